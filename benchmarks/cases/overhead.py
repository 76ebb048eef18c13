"""What each wrapped linear costs by itself: a chain of linears too small for their arithmetic to count."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.cases.steps import step
from benchmarks.contest import Contest
from benchmarks.models import stack
from benchmarks.peers import LoRASettings, check, invite, trained


def per_linear(*, width: int, rows: int, layers: int, calls: int, grad: bool) -> Contest:
    """A chain called several times in a run, with a backward or (in eval mode) without gradients."""
    base = stack("linear", width, layers)
    made = invite(base, LoRASettings(rank=8))
    x, dy = torch.randn(2, rows, width)

    def forwards(model: nn.Module) -> None:
        with torch.no_grad():
            for _ in range(calls):
                model(x)

    def steps(model: nn.Module, parameters: list[nn.Parameter]) -> None:
        for _ in range(calls):
            step(model, parameters, x, dy)

    runs: dict[str, Callable[[], None]] = {}
    for name, model in made.models.items():
        model.train(grad)
        run: Callable[[], None] = functools.partial(forwards, model)
        runs[name] = functools.partial(steps, model, trained(model)) if grad else run

    return Contest(
        runs=runs,
        check=lambda: check(made, x, dy),
        missing=made.missing,
        count=layers * calls,
        piece="linear",
    )
