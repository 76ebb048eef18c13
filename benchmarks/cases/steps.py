"""Training steps of LoRA against the frozen base, which does the same forward and dX: time, kept bytes, peak bytes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.contest import Contest
from benchmarks.models import stack
from benchmarks.peers import BASE, HF, LORALIB, OURS, SHARED, Entrants, LoRASettings, check, invite, trained
from peftlib.memory import measure_memory


def entrants(
    *,
    block: str,
    width: int,
    dtype: str,
    layers: int,
    batch: int,
    tokens: int,
    rank: int = 8,
    dropout: float = 0.0,
    tunings: int = 1,
    peers: bool = True,
) -> tuple[Entrants, Tensor, Tensor]:
    """Models with a LoRA on every linear, an input and the gradient of the output."""
    base = stack(block, width, layers, dtype)
    x, dy = torch.randn(2, batch, tokens, width).to(getattr(torch, dtype))
    shared = None if block == "linear" else x
    lora = LoRASettings(rank=rank, dropout=dropout, tunings=tunings)
    # loralib has one LoRA a layer
    named = (HF, LORALIB) if tunings == 1 else (HF,)
    made = invite(base, lora, shared, named if peers else ())
    return made, x, dy


def step(call: Callable[[Tensor], Tensor], parameters: list[nn.Parameter], x: Tensor, dy: Tensor) -> None:
    """Forward, backward, gradients dropped: what a training step does but for the optimizer."""
    x = x.detach().requires_grad_()
    call(x).backward(dy)
    for parameter in parameters:
        parameter.grad = None


def time_of_step(*, compiled: str = "", **kind: Any) -> Contest:
    """Time of a step; `compiled` names a backend of torch.compile."""
    made, x, dy = entrants(**kind)
    calls: dict[str, Callable[[Tensor], Tensor]] = dict(made.models)
    if compiled:
        # anything that cannot be in the graph is an error, not a slow number
        calls = {
            name: torch.compile(model, backend=compiled, fullgraph=name in (BASE, OURS))
            for name, model in made.models.items()
            if name != SHARED
        }
        made.models.pop(SHARED, None)
    runs = {name: functools.partial(step, calls[name], trained(made.models[name]), x, dy) for name in calls}
    return Contest(runs=runs, check=lambda: check(made, x, dy, calls), missing=made.missing)


def kept_bytes(model: Callable[[Tensor], Tensor], there: set[int], x: Tensor) -> int:
    """Bytes that the graph of a forward keeps, besides parameters."""
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x.detach().requires_grad_())
    del y
    return sum(found.values())


def saved_bytes(**kind: Any) -> Contest:
    """What the backward keeps."""
    made, x, dy = entrants(**kind)
    runs = {
        name: functools.partial(
            kept_bytes, model, {p.untyped_storage().data_ptr() for p in model.parameters()}, x
        )
        for name, model in made.models.items()
    }
    return Contest(runs=runs, check=lambda: check(made, x, dy), missing=made.missing)


def peak_bytes(**kind: Any) -> Contest:
    """Largest number of live bytes within a step, besides parameters."""
    made, x, dy = entrants(**kind)

    def peak(model: nn.Module) -> int:
        report = measure_memory(lambda: step(model, trained(model), x, dy), model=model)
        return report.peak_bytes - report.frozen_bytes - report.trained_bytes

    runs = {name: functools.partial(peak, model) for name, model in made.models.items()}
    return Contest(runs=runs, check=lambda: check(made, x, dy), missing=made.missing)
