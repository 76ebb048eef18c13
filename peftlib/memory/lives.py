"""What a storage was for, settled from its whole life; the peak of many lives, and their course."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from peftlib.memory.report import PARTS, Timeline

FORWARD, RECOMPUTATION, BACKWARD, STEP = "forward", "recomputation", "backward", "optimizer step"
# what a storage is known to be wins in this order: a flat buffer with one trained parameter is trained
KNOWN = ("trained_bytes", "frozen_bytes", "gradient_bytes", "optimizer_bytes")
INSTANTS = 1000


@dataclass(eq=False, slots=True)
class Life:
    """What one storage was: its size over time, and where it was made."""

    device: str
    phase: str
    module: str | None
    sizes: list[tuple[int, int]] = field(default_factory=list)
    """(time, bytes) at birth (0: before the step) and at every change; 0 bytes once freed."""
    part: str | None = None
    tuning: bool = False

    @property
    def born(self) -> int:
        return self.sizes[0][0]

    @property
    def freed(self) -> float:
        time, size = self.sizes[-1]
        return math.inf if size else time

    def size_at(self, time: int) -> int:
        index = bisect.bisect_right(self.sizes, time, key=lambda change: change[0])
        return self.sizes[index - 1][1] if index else 0

    def mark(self, part: str) -> None:
        """Say what it is; what is known for more certain stays."""
        if self.part is None or KNOWN.index(part) < KNOWN.index(self.part):
            self.part = part

    def settled(self, backward_times: Sequence[int]) -> str:
        """The part it counts under, given when backward formulas ran."""
        if self.part is not None:
            return self.part
        if self.born == 0:
            return "input_bytes"
        if self.phase in (FORWARD, RECOMPUTATION):
            later = bisect.bisect_left(backward_times, self.born)
            if later < len(backward_times) and backward_times[later] < self.freed:
                return "activation_bytes"
        return "temporary_bytes"


def changes(lives: Iterable[Life]) -> list[tuple[int, int, Life]]:
    """(time, bytes more, whose) in order of time."""
    found = []
    for life in lives:
        before = 0
        for time, size in life.sizes:
            found.append((time, size - before, life))
            before = size
    return sorted(found, key=lambda change: change[0])


def peak(lives: Iterable[Life]) -> tuple[int, int]:
    """The largest sum of sizes, and the first time it was reached."""
    total = most = at = 0
    # all that was there before the step was there at once
    for time, group in itertools.groupby(changes(lives), key=lambda change: change[0]):
        total += sum(more for _, more, _ in group)
        if total > most:
            most, at = total, time
    return most, at


def timeline(
    lives: Iterable[Life], backward_times: Sequence[int], phases: Sequence[tuple[int, str]]
) -> Timeline:
    """The bytes of each part at the fullest instant of each stretch of time."""
    found = changes(lives)
    last = found[-1][0] if found else 0
    stretch = max(1, math.ceil((last + 1) / INSTANTS))
    now = dict.fromkeys(PARTS, 0)
    parts: dict[str, list[int]] = {name: [] for name in PARTS}
    for instant, group in itertools.groupby(found, key=lambda change: change[0] // stretch):
        for name, size in now.items():
            # nothing changed meanwhile
            parts[name] += [size] * (instant - len(parts[name]))
        fullest, most = now, -1
        for _, same in itertools.groupby(group, key=lambda change: change[0]):
            for _, more, life in same:
                now[life.settled(backward_times)] += more
            if (total := sum(now.values())) > most:
                fullest, most = dict(now), total
        for name, size in fullest.items():
            parts[name].append(size)
    starts: list[tuple[int, str]] = []
    for time, phase in phases:
        instant = time // stretch
        if starts and starts[-1][0] == instant:
            starts.pop()
        if not starts or starts[-1][1] != phase:
            starts.append((instant, phase))
    return Timeline(parts=parts, phases=starts)
