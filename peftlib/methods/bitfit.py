"""BitFit: only bias vectors are trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from peftlib.methods.base import Site
from peftlib.methods.trained import BaseTraining


@dataclass(frozen=True, kw_only=True)
class BitFit(BaseTraining):
    """Train every bias b in ``y = W x + b`` and in the normalizations, nothing else.

    A bias is a one-axis parameter named ``bias``, ending in ``_bias`` (``in_proj_bias``) or beginning with ``bias_``
    (``bias_ih_l0``).

    Args:
        keep_base: keep the base values (small), so that ``disable`` and ``detach`` are exact.

    Default sites: the whole model.

    Example:
        >>> import torch, peftlib
        >>> model = torch.nn.Linear(4, 2)
        >>> peftlib.attach(model, peftlib.BitFit()).num_parameters
        2

    Source: Ben Zaken et al. 2021, arXiv:2106.10199, section 3.
    """

    moves_statistics: ClassVar[bool] = False

    def wanted(self, site: Site) -> list[str]:
        return [
            n
            for n in super().wanted(site)
            if (n == "bias" or n.endswith("_bias") or n.startswith("bias_"))
            and site.module._parameters[n].dim() == 1  # type: ignore[union-attr]
        ]
