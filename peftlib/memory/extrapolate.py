"""From shrunken copies to the real size: bytes are polynomials in batch, length and depth."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from peftlib.errors import PeftlibError
from peftlib.memory.lives import FORWARD
from peftlib.memory.report import PARTS, MemoryReport


def extrapolate(
    report: Callable[..., MemoryReport], small: Mapping[str, Sequence[int]], at: Mapping[str, int]
) -> MemoryReport:
    """Continue the reports of small sizes to a large one, where a real step is too large and a fake one impossible.

    Each part of the peak is a polynomial in each size: batch and depth are straight lines (two points each), the
    length is one too with fused attention, else a parabola (three points). n points determine a polynomial of degree
    n - 1, which is then evaluated exactly. The peak may move: the optimizer's step is the fullest moment of a small
    batch, the end of the forward that of a large one. So each instant of the timelines is continued, and the fullest
    is the peak. Over a size that changes how many operators run (depth) it is the peak of each phase instead, which is
    exact while that stays at its place; the report has a note where the peak changed its phase.

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
    largest = max(reports)
    weights = {
        point: math.prod(
            _lagrange(values, value, at[name])
            for (name, values), value in zip(small.items(), point, strict=True)
        )
        for point in reports
    }

    def there(values: Mapping[Point, int]) -> int:
        return round(sum(weight * values[point] for point, weight in weights.items()))

    timed = all(one.timeline is not None for one in reports.values())
    courses: dict[Point, Course] = {
        point: _instants(one) if timed else {PEAK: one.parts()} for point, one in reports.items()
    }
    aligned = len({tuple(course) for course in courses.values()}) == 1
    if not aligned:
        courses = {point: _phases(one, courses[point]) for point, one in reports.items()}
    moments = [key for key in courses[largest] if all(key in course for course in courses.values())]
    continued = {
        key: {name: there({point: course[key][name] for point, course in courses.items()}) for name in PARTS}
        for key in moments
    }
    fullest = max(continued, key=lambda key: sum(continued[key].values()))
    last, phase = reports[largest], fullest[0]
    sizes = ", ".join(f"{name} {at[name]} from {tuple(values)}" for name, values in small.items())
    notes = [*last.notes, f"continued to {sizes}"]
    places = {_phase(one) for one in reports.values()} | ({phase} if timed else set())
    if len(places) > 1 and not aligned:
        notes.append(
            f"the peaks were in different places ({', '.join(sorted(places))}) and the steps differ in length, so that "
            "the peak of each phase was continued, not each moment: measure larger sizes"
        )
    return MemoryReport(
        peak_bytes=sum(continued[fullest].values()),
        peak_at=last.peak_at if fullest == PEAK or phase == _phase(last) else phase,
        device=last.device,
        tuning_bytes=there({point: one.tuning_bytes for point, one in reports.items()}),
        notes=notes,
        **dict[str, Any](continued[fullest]),
    )


Point = tuple[int, ...]
Course = dict[tuple[str, int], Mapping[str, int]]
"""(phase, number) -> bytes by part."""
PEAK = ("peak", 0)
"""Where a report has no timeline."""


def _instants(report: MemoryReport) -> Course:
    """Each instant of the timeline."""
    course: Course = {}
    assert report.timeline is not None
    starts, phase = dict(report.timeline.phases), FORWARD
    for instant, sizes in enumerate(zip(*report.timeline.parts.values(), strict=True)):
        phase = starts.get(instant, phase)
        course[phase, instant] = dict(zip(report.timeline.parts, sizes, strict=True))
    return course


def _phases(report: MemoryReport, instants: Course) -> Course:
    """The fullest instant of each phase."""
    course: Course = {}
    for (phase, _), parts in instants.items():
        if sum(parts.values()) > sum(course.get((phase, 0), {}).values()):
            course[phase, 0] = parts
    # an instant of the timeline may hold two phases, the report knows whose the peak is
    return course | {(_phase(report), 0): report.parts()}


def _phase(report: MemoryReport) -> str:
    return report.peak_at.partition(" of ")[0].partition(" outside")[0]


def _lagrange(values: Sequence[int], value: int, at: int) -> Fraction:
    return math.prod(
        (Fraction(at - other, value - other) for other in set(values) if other != value), start=Fraction(1)
    )
