"""One real step under the tracker."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from peftlib.errors import PeftlibError
from peftlib.memory.live import LiveBytes
from peftlib.memory.report import MemoryReport


def measure_memory(step: Callable[[], Any], *, model: nn.Module | None = None) -> MemoryReport:
    """Run one real training step and report its peak of live bytes.

    Run the step once before, if the first step is not the one that counts: an optimizer makes its state there.

    Args:
        step: does forward, backward and optimizer step; called once, without arguments.
        model: names the modules, and counts parameters and buffers that the step never touches.

    Raises:
        PeftlibError: ``step`` cannot be called, or ``model`` is no module.
        Exception: whatever ``step`` raises; every hook is gone then.

    Example:
        >>> from torch import nn
        >>> model, x = nn.Linear(8, 8), torch.ones(4, 8)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> def step():
        ...     model(x).square().mean().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> measure_memory(step, model=model).optimizer_bytes  # two moments of 72 floats, two step counts
        584
    """
    if not callable(step):
        raise PeftlibError(
            f"measure_memory got {type(step).__name__}: give a function that runs one training step, "
            "as in measure_memory(lambda: train_step(batch))"
        )
    cuda = torch.cuda.is_available()
    for index in range(torch.cuda.device_count() if cuda and torch.cuda.is_initialized() else 0):
        torch.cuda.reset_peak_memory_stats(index)
    with LiveBytes(model) as live:
        step()
    report = live.report()
    if report.asked:
        where = ", ".join(repr(name) if name else "the root" for name in report.asked)
        note = f"{where} asked a tensor for its value; an estimate may go another way: its compare() says by how much"
        report = dataclasses.replace(report, notes=[*report.notes, note])
    if cuda and report.device.startswith("cuda"):
        report = dataclasses.replace(report, cuda_peak_bytes=torch.cuda.max_memory_allocated(report.device))
    return report
