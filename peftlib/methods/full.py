"""Full fine-tuning: every parameter of the model, or of the named modules, is trained."""

from __future__ import annotations

from dataclasses import dataclass

from peftlib.methods.trained import BaseTraining


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
