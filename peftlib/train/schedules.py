"""Learning rates as plain functions of the step: ``schedule(step, total) -> factor`` of each group's own rate.

A function has no state, so a resumed run needs nothing of it. Give options with ``functools.partial``, or write one.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from peftlib import PeftlibError

Schedule = Callable[[int, int], float]
"""(step from 0, number of steps) -> what each group's initial rate is multiplied by."""


@contextlib.contextmanager
def scheduled(
    optimizers: Sequence[torch.optim.Optimizer], scheduler: Schedule, total: int
) -> Iterator[Callable[[int], float]]:
    """A function that sets all rates for a step and returns the first; afterwards each group has its own again."""

    def groups() -> list[dict[str, Any]]:
        # asked for each time: loading a state makes new ones
        return [group for optimizer in optimizers for group in optimizer.param_groups]

    own = [group["lr"] for group in groups()]

    def at(step: int) -> float:
        factor = scheduler(step, total)
        for group, rate in zip(groups(), own, strict=True):
            group["lr"] = rate * factor
        return float(groups()[0]["lr"])

    try:
        yield at
    finally:
        for group, rate in zip(groups(), own, strict=True):
            group["lr"] = rate


def constant(step: int, total: int, *, warmup: int = 0) -> float:
    """Rise linearly over ``warmup`` steps, then stay: ``min(1, (step + 1) / (warmup + 1))``.

    Raises:
        PeftlibError: a warm-up below 0.

    Example:
        >>> [constant(i, 4, warmup=1) for i in range(4)]
        [0.5, 1.0, 1.0, 1.0]
    """
    _check(warmup)
    return min(1.0, (step + 1) / (warmup + 1))


def linear(step: int, total: int, *, warmup: int = 0, floor: float = 0.0) -> float:
    """Rise over ``warmup`` steps, then fall in a line that reaches ``floor`` one step after the last.

    Example:
        >>> [linear(i, 4) for i in range(4)]
        [1.0, 0.75, 0.5, 0.25]
    """
    if step < warmup:
        return constant(step, total, warmup=warmup)
    return floor + (1 - floor) * (1 - _progress(step, total, warmup))


def cosine(step: int, total: int, *, warmup: int = 0, floor: float = 0.0) -> float:
    """Rise over ``warmup`` steps, then ``floor + (1 - floor) (1 + cos(pi p)) / 2`` for p from 0 to 1.

    Example:
        >>> [round(cosine(i, 5, warmup=1), 3) for i in range(5)]
        [0.5, 1.0, 0.854, 0.5, 0.146]

    Source: Loshchilov and Hutter 2017, arXiv:1608.03983, eq. 5, without restarts.
    """
    if step < warmup:
        return constant(step, total, warmup=warmup)
    return floor + (1 - floor) * (1 + math.cos(math.pi * _progress(step, total, warmup))) / 2


def _check(warmup: int) -> None:
    if warmup < 0:
        raise PeftlibError(f"warmup={warmup}: give a number of steps from 0.")


def _progress(step: int, total: int, warmup: int) -> float:
    _check(warmup)
    # a run that goes on past its last step stays at the floor
    return min(1.0, (step - warmup) / max(1, total - warmup))
