"""Partial fine-tuning: the named part of the model is trained, the rest stays frozen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peftlib.errors import PeftlibError
from peftlib.methods.base import Method, Site
from peftlib.methods.trained import BaseTraining

if TYPE_CHECKING:
    from peftlib.probe import Probe
    from peftlib.targets import Tree


@dataclass(frozen=True, kw_only=True)
class PartialFineTuning(BaseTraining):
    """Train all parameters under the targets, for instance the last blocks and the output head.

    Args:
        targets: as in :func:`peftlib.attach`; modules are taken with all they hold, parameters alone.
        keep_base: keep the base values of what is trained, so that ``disable`` and ``detach`` are exact.

    Example:
        >>> import torch, peftlib
        >>> model = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(3)])
        >>> peftlib.attach(model, peftlib.PartialFineTuning(targets=["2"])).num_parameters
        20
    """

    targets: Any = None

    def __post_init__(self) -> None:
        if self.targets is not None and not self.targets and self.targets != "":
            raise PeftlibError(f"PartialFineTuning(targets={self.targets!r}) names nothing to train.")

    @property
    def own_targets(self) -> Sequence[Any] | None:
        return self.targets

    def default_sites(self, tree: Tree, probe: Probe | None) -> list[Site]:
        return Method.default_sites(self, tree, probe)

    def config(self) -> dict[str, Any]:
        # Where it goes is kept by the sites, not by the method.
        return {k: v for k, v in super().config().items() if k != "targets"}
