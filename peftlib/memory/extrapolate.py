"""From shrunken copies to the real size: bytes are polynomials in batch, length and depth."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from peftlib.errors import PeftlibError
from peftlib.memory.report import PARTS, MemoryReport


def extrapolate(
    report: Callable[..., MemoryReport], small: Mapping[str, Sequence[int]], at: Mapping[str, int]
) -> MemoryReport:
    """Continue the reports of small sizes to a large one, where a real step is too large and a fake one impossible.

    Each part of the peak is a polynomial in each size: batch and depth are straight lines (two points each), the
    length is one too with fused attention, else a parabola (three points). n points determine a polynomial of degree
    n - 1, which is then evaluated exactly. It holds as long as the peak stays at its place: the report says where it
    was at the largest of the small sizes, and has a note if it was elsewhere at another.

    Args:
        report: the report of one size, called with the names of ``small`` as keywords.
        small: name of a size -> the values to measure at.
        at: name -> the value to continue to.

    Raises:
        PeftlibError: the names differ, or a size has fewer than two different values.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from peftlib.memory import measure_memory
        >>> def step(batch, depth):
        ...     model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(depth)))
        ...     return measure_memory(lambda: model(torch.ones(batch, 8)).sum().backward(), model=model)
        >>> small = {"batch": (64, 128), "depth": (2, 3)}
        >>> extrapolate(step, small, {"batch": 512, "depth": 8}).peak_bytes == step(512, 8).peak_bytes
        True
    """
    if set(small) != set(at):
        raise PeftlibError(f"small= has the sizes {sorted(small)}, at= has {sorted(at)}: give both the same")
    for name, values in small.items():
        if len(set(values)) < 2:
            raise PeftlibError(f"small[{name!r}] = {tuple(values)}: give two or more different values")
    reports = {
        point: report(**dict(zip(small, point, strict=True))) for point in itertools.product(*small.values())
    }
    weights = {
        point: math.prod(
            _lagrange(values, value, at[name])
            for (name, values), value in zip(small.items(), point, strict=True)
        )
        for point in reports
    }

    def there(name: str) -> int:
        return round(sum(weight * getattr(reports[point], name) for point, weight in weights.items()))

    last = reports[max(reports)]
    parts: dict[str, Any] = {name: there(name) for name in PARTS}
    places = {one.peak_at.partition(" ")[0] for one in reports.values()}
    sizes = ", ".join(f"{name} {at[name]} from {tuple(values)}" for name, values in small.items())
    notes = [*last.notes, f"continued to {sizes}"]
    if len(places) > 1:
        notes.append(
            f"the small peaks were in different places ({', '.join(sorted(places))}): measure larger ones"
        )
    return MemoryReport(
        peak_bytes=sum(parts.values()),
        peak_at=last.peak_at,
        device=last.device,
        tuning_bytes=there("tuning_bytes"),
        notes=notes,
        **parts,
    )


def _lagrange(values: Sequence[int], value: int, at: int) -> Fraction:
    return math.prod(
        (Fraction(at - other, value - other) for other in set(values) if other != value), start=Fraction(1)
    )
