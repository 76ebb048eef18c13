"""What happens once: importing, injecting, merging."""

from __future__ import annotations

import functools
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import peftlib
from benchmarks.contest import Contest, Disagreement, agree, tolerance
from benchmarks.models import linears, stack
from benchmarks.peers import BASE, HF, OURS, LoRASettings, invite

PACKAGES = {"peftlib": OURS, "peft": HF}


def importing(*, packages: Sequence[str]) -> Contest:
    """Processor time of a fresh interpreter that imports one package; the first is the floor."""

    def load(package: str) -> None:
        code = f"import sys, {package}; sys.exit('torch' not in sys.modules)"
        if subprocess.run([sys.executable, "-c", code], check=False).returncode:
            raise Disagreement(f"import {package} fails, or does not import torch")

    have = [package for package in packages if importlib.util.find_spec(package)]
    return Contest(
        runs={PACKAGES.get(package, package): functools.partial(load, package) for package in have},
        check=lambda: "each imports torch",
        missing={PACKAGES.get(p, p): "not installed" for p in packages if p not in have},
    )


def injection(*, width: int, layers: int) -> Contest:
    """LoRA on 7 linears a block of a model on the meta device."""
    lora = LoRASettings(rank=8)
    here: dict[str, nn.Module] = {}

    def fresh(name: str) -> None:
        with torch.device("meta"):
            here[name] = stack("seven", width, layers)

    def ours() -> None:
        names = linears(here[OURS])
        peftlib.attach(here[OURS], peftlib.LoRA(rank=lora.rank, alpha=lora.alpha), targets=names)

    def theirs() -> None:
        import peft

        names = linears(here[HF])
        config = peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=names)
        peft.get_peft_model(here[HF], config)

    runs: dict[str, Callable[[], None]] = {OURS: ours}
    missing = {}
    if importlib.util.find_spec("peft"):
        runs[HF] = theirs
    else:
        missing[HF] = "not installed"

    def checked() -> str:
        expected = 7 * layers * 2 * width * lora.rank
        for name, run in runs.items():
            fresh(name)
            run()
            found = sum(p.numel() for p in here[name].parameters() if p.requires_grad)
            if found != expected:
                raise Disagreement(f"{name} trains {found} numbers, not {expected}")
        return f"each trains the {expected:,} numbers of {7 * layers} LoRAs"

    before = {name: functools.partial(fresh, name) for name in runs}
    return Contest(runs=runs, check=checked, missing=missing, before=before, count=7 * layers, piece="linear")


def merging(*, width: int, layers: int, dtype: str) -> Contest:
    """Merging, and keeping what unmerging needs, against `addmm` of the factors into new weights."""
    base = stack("linear", width, layers, dtype)
    made = invite(base, LoRASettings(rank=8), peers=(HF,))
    tuning = peftlib.tunings(made.models[OURS])["t0"]
    factors = iter(tuning.state_dict().values())
    weights = _weights(made.models.pop(BASE))
    products = [(weight, b, a) for weight, a, b in zip(weights, factors, factors, strict=True)]
    new: list[Tensor] = []
    there = HF in made.models
    theirs: list[Any] = list(made.models[HF].children()) if there else []

    def addmm() -> None:
        with torch.no_grad():
            new[:] = [torch.addmm(weight, b, a, alpha=2) for weight, b, a in products]

    runs: dict[str, Callable[[], Any]] = {"addmm": addmm, OURS: tuning.merge}
    before: dict[str, Callable[[], Any]] = {
        "addmm": new.clear,
        OURS: lambda: tuning.unmerge() if tuning.merged else None,
    }
    if there:
        runs[HF] = lambda: [layer.merge() for layer in theirs]
        before[HF] = lambda: [layer.unmerge() for layer in theirs if layer.merged]

    def checked() -> str:
        for name, run in runs.items():
            before[name]()
            run()
        merged = {OURS: _weights(made.models[OURS]), HF: [layer.base_layer.weight for layer in theirs]}
        if not there:
            del merged[HF]
        for name, values in merged.items():
            for value, expected, weight in zip(values, new, weights, strict=True):
                agree({name: value}, expected, weight, tolerance(value))
        tuning.unmerge()
        if not all(map(torch.equal, _weights(made.models[OURS]), weights)):
            raise Disagreement(f"{OURS} does not unmerge exactly")
        return "merged weights agree; unmerged they are the base's, bit for bit (HF peft: not asked)"

    return Contest(
        runs=runs, check=checked, missing=made.missing, before=before, count=layers, piece="linear"
    )


def _weights(model: nn.Module) -> list[Tensor]:
    return [layer.get_parameter("weight") for layer in model.children()]
