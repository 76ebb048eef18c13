"""Searching: the largest batch that fits, and what helps where nothing does."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from peftlib.errors import TargetError
from peftlib.memory.report import MemoryReport

MOST = 2**20
"""The search stops here: a batch that costs nothing would grow for ever."""


@dataclass(frozen=True)
class Way:
    """One way to train: a method, the size of a (micro-)batch, what is computed twice, how many are accumulated."""

    method: str
    batch: int
    length: int | None = None
    checkpointing: Any = None
    accumulate: int = 1

    def __str__(self) -> str:
        length = "" if self.length is None else f" x {self.length}"
        return f"{self.method}, {self.batch}{length}{', checkpointing' if self.checkpointing else ''}"


@dataclass(frozen=True)
class Remedy:
    """What to do, and what the peak is then."""

    text: str
    peak_bytes: int | None


@dataclass(frozen=True)
class Cost:
    """What ways to train cost: looked up, or estimated once."""

    of: Callable[[Way], MemoryReport]
    sharded: Callable[[Way, int], MemoryReport]
    budget: int
    methods: Sequence[str] = ()
    checkpointing: Sequence[Any] = (None,)
    ranks: Sequence[int] = ()

    def fits(self, way: Way) -> bool:
        return self.of(way).peak_bytes <= self.budget

    def exists(self, way: Way) -> bool:
        """Whether the model has what is to be computed twice."""
        try:
            self.of(way)
        except TargetError:
            return False
        return True


def largest_batch(cost: Cost, way: Way) -> int:
    """The largest batch that fits, 0 if none does: it fits, and one more does not.

    Bytes grow with the batch, nearly on a line, so the next guess is where the line through the last two points meets
    the budget; where that goes astray, halving the interval finds it.
    """

    def peak(batch: int) -> int:
        return cost.of(dataclasses.replace(way, batch=batch)).peak_bytes

    low, high = 0, MOST
    points = sorted({1, way.batch if way.batch > 1 else 2})
    guess = points[0]
    seen: dict[int, int] = {}
    for turn in range(64):
        seen[guess] = peak(guess)
        if seen[guess] <= cost.budget:
            low = max(low, guess)
        else:
            high = min(high, guess)
        if low == 0 and high == 1:
            return 0
        if high - low <= 1:
            return low
        if turn + 1 < len(points) and low < points[turn + 1] < high:
            guess = points[turn + 1]
            continue
        a, b = sorted(seen, key=lambda batch: abs(seen[batch] - cost.budget))[:2] if len(seen) > 1 else (1, 2)
        slope = (seen[a] - seen[b]) / (a - b) if len(seen) > 1 else 0
        if slope > 0 and turn < 12:
            # of the two batches around the meeting point, the one that is not known yet
            meets = math.floor(a + (cost.budget - seen[a]) / slope)
            guess = meets if meets not in seen else meets + 1
        else:
            guess = low * 2 if high == MOST else (low + high) // 2
        guess = min(max(guess, low + 1), high - 1)
    return low


def remedies(cost: Cost, way: Way) -> list[Remedy]:
    """What makes a way that does not fit fit, cheapest first."""
    found: list[Remedy] = []
    twice = [dataclasses.replace(way, checkpointing=again) for again in cost.checkpointing if again]
    more = [] if way.checkpointing else [other for other in twice if cost.exists(other)]
    if small := _micro_batches(cost, way):
        found.append(small)
    # time is what this costs
    for other in more:
        if cost.fits(other):
            found.append(Remedy("checkpointing: the blocks are computed twice", cost.of(other).peak_bytes))
            break
        if small := _micro_batches(cost, other):
            found.append(Remedy(f"checkpointing and {small.text}", small.peak_bytes))
            break
    others = [dataclasses.replace(way, method=name) for name in cost.methods if name != way.method]
    fitting = [other for other in others if cost.exists(other) and cost.fits(other)]
    if fitting:
        # the one that trains most: closest to what was asked for
        best = max(fitting, key=lambda other: cost.of(other).trained_bytes)
        found.append(Remedy(f"another method: {best.method}", cost.of(best).peak_bytes))
    for other in (way, *more):
        ranks = next((n for n in cost.ranks if cost.sharded(other, n).peak_bytes <= cost.budget), None)
        if ranks:
            added = "" if other == way else " and checkpointing"
            peak = cost.sharded(other, ranks).peak_bytes
            found.append(Remedy(f"sharding over {ranks} ranks{added}, per rank", peak))
            break
    return found


def _micro_batches(cost: Cost, way: Way) -> Remedy | None:
    """The batch in the fewest micro-batches that fit with the gradients they leave."""
    # kept gradients leave no more room than there is without
    small = min(largest_batch(cost, way), way.batch - 1)
    if small:
        small = min(largest_batch(cost, dataclasses.replace(way, batch=small, accumulate=2)), small)
    if not small:
        return None
    times = -(-way.batch // small)
    # no larger than so many need; and from the second on, each needs what the second does
    each = dataclasses.replace(way, batch=-(-way.batch // times), accumulate=2)
    return Remedy(f"micro-batches of {each.batch}, {times} accumulated", cost.of(each).peak_bytes)
