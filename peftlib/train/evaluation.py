"""Numbers of a model while it trains, and when they say that it is enough."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peftlib import PeftlibError
from peftlib.train.buffers import Buffers, copied
from peftlib.train.parallel import ALONE, Ranks
from peftlib.train.rng import untouched
from peftlib.train.state import State
from peftlib.train.step import Loss, moved, weighted


@dataclass(frozen=True, kw_only=True)
class EarlyStopping:
    """End when a number has not improved for a while; the tuning then has its best values again.

    Args:
        patience: evaluations without improvement before the end.
        metric: which number of the history.
        higher_is_better: True for accuracies.
        by: how much better counts as better.

    Example:
        >>> EarlyStopping(patience=2, metric="eval_accuracy", higher_is_better=True).better(0.8, 0.7)
        True
    """

    patience: int = 3
    metric: str = "eval_loss"
    higher_is_better: bool = False
    by: float = 0.0

    def __post_init__(self) -> None:
        if self.patience < 1 or self.by < 0:
            raise PeftlibError(
                f"EarlyStopping takes patience >= 1 and by >= 0; got {self.patience}, {self.by}."
            )

    def better(self, now: float, best: float | None) -> bool:
        """Whether ``now`` is an improvement; what is no number never is."""
        if not math.isfinite(now) or best is None:
            return math.isfinite(now)
        return now > best + self.by if self.higher_is_better else now < best - self.by


@torch.no_grad()
def run_evaluation(
    model: nn.Module,
    evaluate: Any,
    loss: Loss,
    autocast: torch.dtype | None,
    device: torch.device,
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """The numbers of ``evaluate``, as ``eval_...``; neither the random state nor train mode notices.

    With ``ranks``, batches are dealt out to them, and of a function's numbers those of the first count.
    """
    with untouched(), mode(model, False), ranks.settled(model):
        if callable(evaluate):
            found = evaluate(model)
            named = found if isinstance(found, Mapping) else {"loss": found}
            return ranks.agreed({f"eval_{name}": float(value) for name, value in named.items()})
        total, targets = 0.0, 0.0
        for batch in ranks.deal(evaluate):
            value, count = weighted(loss, model, moved(batch, device), autocast, device)
            total, targets = total + value.item(), targets + count
        total, targets = ranks.total(total, targets)
    if not targets:
        raise PeftlibError("evaluate= has no batches. Pass what can be iterated again and again.")
    return {"eval_loss": total / targets}


def consider(
    stopping: EarlyStopping, row: Mapping[str, Any], state: State, trained: Any, buffers: Buffers
) -> None:
    """Keep the values if they are the best so far, and stop if there were none for a while."""
    if stopping.metric not in row:
        raise PeftlibError(
            f"early_stopping watches {stopping.metric!r}, and evaluate= gives: "
            f"{', '.join(k for k in row if k.startswith('eval_'))}. Name one of these."
        )
    now = row[stopping.metric]
    if stopping.better(now, state.best):
        state.best, state.waited = now, 0
        state.best_values, state.best_buffers = copied(trained.state_dict()), copied(buffers.changed())
    else:
        state.waited += 1
        state.stopped = state.waited >= stopping.patience


@contextlib.contextmanager
def mode(model: nn.Module, train: bool) -> Iterator[None]:
    """Train or eval mode; each module has its own back afterwards."""
    before = [(module, module.training) for module in model.modules()]
    model.train(train)
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
