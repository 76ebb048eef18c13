"""What ``fit`` is asked for, checked before anything happens."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from peftlib import PeftlibError


def check(
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    clip: float | None,
    autocast: Any,
    evaluate: Any,
    early_stopping: Any,
    nonfinite: str,
    callbacks: Any,
) -> None:
    """Raise where a value is none that ``fit`` knows, or goes ill with another."""
    if nonfinite not in ("stop", "skip"):
        raise PeftlibError(f"nonfinite={nonfinite!r} is unknown: use 'stop' or 'skip'.")
    if clip is not None and not clip > 0:
        raise PeftlibError(f"clip={clip}: give the largest norm of the gradients, above 0, or None.")
    if early_stopping is not None and evaluate is None:
        raise PeftlibError(
            "early_stopping= needs evaluate=, or there is nothing to stop by: give some batches."
        )
    if not callable(scheduler):
        what = scheduler if isinstance(scheduler, str) else type(scheduler).__name__
        raise PeftlibError(
            f"scheduler={what!r}: give a function of (step, steps in all) that says what the rates are multiplied by, "
            "as train.cosine or functools.partial(train.cosine, warmup=100). torch's schedulers are none."
        )
    if not isinstance(callbacks, Sequence) or not all(map(callable, callbacks)):
        raise PeftlibError(f"callbacks={callbacks!r}: give a list of functions of a row, as [print].")
    if autocast not in (None, torch.bfloat16, torch.float16):
        raise PeftlibError(f"autocast={autocast!r}: give torch.bfloat16, torch.float16 or None.")
    trained = (p for group in optimizer.param_groups for p in group["params"])
    if autocast is torch.float16 and any(p.dtype is torch.float16 for p in trained):
        raise PeftlibError(
            "autocast=torch.float16 scales the gradients of float32 weights, and those to train are in float16, too "
            "coarse for small steps. Keep them in float32 (model.float(), before attaching), or use bfloat16."
        )


def steps_in_all(
    batches: Iterable[Any], steps: int | None, epochs: int | None, accumulate: int
) -> tuple[int | None, int]:
    """Steps per epoch, where batches have a length, and in all."""
    for name, number in (("steps", steps), ("epochs", epochs), ("accumulate", accumulate)):
        _check_whole(name, number)
    if accumulate < 1:
        raise PeftlibError(f"accumulate={accumulate}: a step needs at least one batch.")
    length = length_of(batches)
    per_epoch = None if length is None else -(-length // accumulate)
    if (steps is None) == (epochs is None):
        raise PeftlibError(f"Give steps= or epochs=, one of them; got steps={steps}, epochs={epochs}.")
    if steps is not None:
        total = steps
    elif per_epoch is None:
        raise PeftlibError("epochs= needs batches with a length; these have none. Give steps=.")
    else:
        total = (epochs or 0) * per_epoch
    if total < 1:
        raise PeftlibError(
            f"There is nothing to do: steps={steps}, epochs={epochs}, {per_epoch} step(s) each."
        )
    return per_epoch, total


def length_of(batches: Iterable[Any]) -> int | None:
    """Batches of an epoch, where that is known."""
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:
        return None


def interval(name: str, every: int | None, per_epoch: int | None, *, needed: bool) -> int:
    """Steps between two of something: what was asked for, or an epoch's."""
    _check_whole(f"{name}_every", every)
    if every is None and per_epoch is None and needed:
        raise PeftlibError(f"The batches have no length, so an epoch's end is unknown: give {name}_every=.")
    if every is not None and every < 1:
        raise PeftlibError(f"{name}_every={every}: give a number of steps from 1.")
    return every or per_epoch or 1


def _check_whole(name: str, number: Any) -> None:
    try:
        operator.index(0 if number is None else number)
    except TypeError:
        raise PeftlibError(f"{name}={number!r}: give a whole number.") from None
