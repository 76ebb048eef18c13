"""Batches whose rows go through different tunings, without gradients."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import torch
from torch import Tensor

import peftlib
from benchmarks.contest import Contest, agree, tolerance
from benchmarks.models import stack
from benchmarks.peers import BASE, HF, OURS, LoRASettings, factors, fill, frozen, hf_wrapped, ours

ONE = "peftlib, one tuning"


def forward(*, width: int, layers: int, rows: int, tokens: int, tunings: int, against: str) -> Contest:
    """A batch of so many rows through so many tunings in turns; `against` the base, or one tuning for all rows."""
    base = stack("seven", width, layers).eval()
    lora = LoRASettings(rank=8, tunings=tunings)
    x = torch.randn(rows, tokens, width)
    names = [f"t{i % tunings}" for i in range(rows)]
    routed = ours(base, lora)
    for i in range(tunings):
        fill(factors(routed, f"t{i}"), seed=i)
    one, plain = copy.deepcopy(routed), frozen(base)
    calls: dict[str, Callable[[Tensor], Tensor]] = {
        against: {BASE: plain, ONE: one}[against],
        (ONE if against == BASE else BASE): one if against == BASE else plain,
        OURS: routed,
    }
    missing = {}
    try:
        theirs = hf_wrapped(base, lora).eval()
        for i in range(tunings):
            fill(factors(theirs, f"t{i}"), seed=i)
        calls[HF] = functools.partial(theirs, adapter_names=names)
    except ImportError:
        missing[HF] = "not installed"

    expected = torch.empty(rows, tokens, width)
    with torch.no_grad():
        for i in range(tunings):
            with peftlib.use(routed, f"t{i}"):
                expected[i::tunings] = routed(x[i::tunings])
    # stays open as long as the model lives
    peftlib.route(routed, names, example=x).__enter__()

    def run(call: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.no_grad():
            return call(x)

    def checked() -> str:
        found = {name: run(calls[name]) for name in (OURS, HF) if name in calls}
        agree(found, expected, run(plain), tolerance(x))
        return "each row equals what its tuning gives by itself"

    return Contest(
        runs={name: functools.partial(run, call) for name, call in calls.items()},
        check=checked,
        missing=missing,
    )
