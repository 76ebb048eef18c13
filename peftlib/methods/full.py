"""Full fine-tuning: every parameter of the model, or of the named modules, is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from peftlib.methods.base import Site
from peftlib.methods.trained import BaseTraining

if TYPE_CHECKING:
    from peftlib.probe import Probe
    from peftlib.targets import Tree


@dataclass(frozen=True, kw_only=True)
class FullFineTuning(BaseTraining):
    """Train all parameters under each site: ``theta <- theta - step``; batch-norm statistics are saved with them.

    Args:
        keep_base: keep the base values (a second copy), so that ``disable`` and ``detach`` are exact.

    Default sites: the whole model. As a part of a mapping it trains a task head: ``{"classifier": FullFineTuning()}``.

    Example:
        >>> import torch, peftlib
        >>> model = torch.nn.Linear(4, 2)
        >>> peftlib.attach(model, peftlib.FullFineTuning()).num_parameters
        10
    """

    def default_sites(self, tree: Tree, probe: Probe | None) -> list[Site]:
        return [tree.site("")]
