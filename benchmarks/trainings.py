"""The trainings of the quality run: one of them, how long a step takes, and the short ones that choose a rate."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import cycle, islice
from typing import Any

import torch
from torch import nn

from benchmarks.entries import adamw, start
from benchmarks.tasks import Score, Task
from benchmarks.timing import clock_for, in_turns
from peftlib.train import History, NonFiniteError, constant, fit, train_step

WARMUP = 5
SEARCH_SEED = 100
"""Rates are chosen with a seed that the results don't use."""
ROUNDS = 5
"""How often the methods take turns to be timed."""


def train(
    name: str, task: Task, rate: float, seed: int, steps: int, evaluate: Any = None
) -> tuple[History, int]:
    """The history, and how many parameters were trained."""
    model, tuning = start(name, task, seed)
    optimizer = adamw(name, task, model, tuning, rate)
    history = fit(
        model,
        task.batches(seed),
        task.loss,
        optimizer=optimizer,
        steps=steps,
        scheduler=partial(constant, warmup=WARMUP),
        autocast=task.autocast,
        evaluate=evaluate,
        evaluate_every=1,
        progress=False,
        seed=seed,
    )
    return history, tuning.num_parameters


def scored(task: Task, score: Score, model: nn.Module) -> dict[str, float]:
    """A score, in the precision of the training."""
    with torch.autocast("cpu", task.autocast, enabled=task.autocast is not None):
        return score(model)


class At:
    """A test that `fit` asks for after every step, and that is only made after the steps which are marked."""

    def __init__(self, score: Score, marks: Sequence[int]) -> None:
        self.score, self.marks, self.step = score, set(marks), 0

    def __call__(self, model: nn.Module) -> dict[str, float]:
        self.step += 1
        return self.score(model) if self.step in self.marks else {}


def pace(task: Task, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Median seconds of each method's step, and how many times a step of full fine-tuning that is.

    They take turns on the same batches, and the ratio is the median of each turn's.
    """
    few = list(islice(task.batches(SEARCH_SEED), ROUNDS))
    runs = {}
    for name in {"full": 0, **dict.fromkeys(names)}:
        model, tuning = start(name, task, SEARCH_SEED)
        optimizer = adamw(name, task, model, tuning, 1e-5)
        runs[name] = partial(step, model.train(), cycle(few), task, optimizer)
    seconds = in_turns(runs, rounds=ROUNDS, clock=clock_for(torch.get_num_threads(), "cpu"))
    return {
        name: {
            "seconds": statistics.median(seconds[name]),
            "relative": statistics.median(a / b for a, b in zip(seconds[name], seconds["full"], strict=True)),
        }
        for name in names
    }


def step(model: nn.Module, batches: Iterator[Any], task: Task, optimizer: torch.optim.Optimizer) -> None:
    """One step as `fit` makes it."""
    train_step(model, [next(batches)], task.loss, optimizer, autocast=task.autocast)


def search_steps(task: Task) -> int:
    """A third of the steps, but not the warm-up alone."""
    return min(task.size.steps, max(task.size.steps // 3, 2 * WARMUP))


def search(name: str, task: Task, rate: float) -> float:
    """The validation loss of a short training."""
    steps = search_steps(task)
    try:
        history = train(
            name, task, rate, SEARCH_SEED, steps, At(partial(scored, task, task.validation), [steps])
        )[0]
    except NonFiniteError:
        return math.inf
    return history.last("eval_loss")


def marks(steps: int, end: int) -> list[int]:
    """The steps after which a model is tested: thirds of ``steps`` while it goes on, and the end.

    >>> marks(75, 75), marks(75, 60), marks(75, 160)
    ([25, 50, 75], [25, 50, 60], [25, 50, 75, 150, 160])
    """
    thirds = {max(1, steps * i // 3) for i in (1, 2, 3)}
    return sorted({mark for mark in thirds if mark < end} | {end} | set(range(2 * steps, end, steps)))
