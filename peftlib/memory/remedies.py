"""Searching: the largest batch that fits, and what helps where nothing does."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from peftlib.errors import ProbeError, TargetError
from peftlib.memory.lives import RECOMPUTATION
from peftlib.memory.report import MemoryReport
from peftlib.memory.ways import Way

MOST = 2**20
"""The search stops here: a batch that costs nothing would grow for ever."""
GUESSES = 16
"""So many guesses follow lines; then halving the interval is certain to come to an end."""


@dataclass(frozen=True)
class Remedy:
    """What to do instead, and what the peak is then."""

    text: str
    peak_bytes: int
    way: Way = field(repr=False)


@dataclass(frozen=True)
class Search:
    """Ways to train against a budget.

    Attributes:
        estimate: the report of a way.
        budget: bytes.
        methods, checkpointing, ranks: what a remedy may choose from.
    """

    estimate: Callable[[Way], MemoryReport]
    budget: int
    methods: Sequence[str] = ()
    checkpointing: Sequence[object] = (None,)
    ranks: Sequence[int] = ()

    def peak(self, way: Way) -> int | None:
        """Bytes, or None where the model refuses this size or has nothing to compute twice."""
        try:
            return self.estimate(way).peak_bytes
        except (ProbeError, TargetError):
            return None

    def fits(self, way: Way) -> bool:
        peak = self.peak(way)
        return peak is not None and peak <= self.budget


def largest_batch(search: Search, way: Way) -> int:
    """The largest batch that fits, 0 if none does: it was estimated, and the next larger one was as well.

    Bytes grow with the batch on lines that bend upwards, so the next guess is where a line through two known points
    meets the budget. The search begins with the way's own batch, which the model takes; where it refuses
    another size, the sizes that remain are multiples of the smallest divisor of this batch that explains it.
    """
    divisors = _divisors(way.batch)
    peaks: dict[int, int] = {}
    refused: list[int] = []
    fits, low, high, grid = 0, 0, MOST, 1
    guess = way.batch
    while low < guess < high:
        peak = search.peak(dataclasses.replace(way, batch=guess))
        if peak is not None:
            peaks[guess] = peak
            if peak <= search.budget:
                fits = low = guess
            else:
                high = guess
        elif guess == 1:
            low = 1  # as statistics over the batch do
        else:
            grids = [n for n in divisors if all(size % n for size in (*refused, guess))]
            if grids:
                refused.append(guess)
                grid = grids[0]
            else:
                high = guess
        first, last = (low // grid + 1) * grid, (high - 1) // grid * grid
        if first > last:
            break
        guess = min(max(_next(peaks, search.budget, low, high) // grid * grid, first), last)
    return fits


def _next(peaks: Mapping[int, int], budget: int, low: int, high: int) -> int:
    """Where a line meets the budget: across the gap on one turn (too low), on from what fits on the next (too high)."""
    fit = [batch for batch in sorted(peaks) if batch <= low][-2:]
    over = [batch for batch in sorted(peaks) if batch >= high][:2]
    across = fit[-1:] + over[:1]
    lines = [pair for pair in (across, fit, over) if len(pair) == 2]
    if lines and len(peaks) < GUESSES:
        a, b = lines[len(peaks) % len(lines[:2])]
        if slope := (peaks[b] - peaks[a]) / (b - a):
            return math.floor(a + (budget - peaks[a]) / slope)
    return max(low, 1) * 2 if high == MOST else (low + high) // 2


def remedies(search: Search, way: Way) -> list[Remedy]:
    """What makes a way that does not fit fit, cheapest first.

    What can be changed, from cheap to dear: micro-batches (equal ones, whose mean is the batch's), checkpointing (a
    second forward), another method, sharding over ranks. Every combination that fits is a remedy, but one that
    another with some of its changes equals: it has to need fewer micro-batches. Where there is a choice of methods
    or ranks, it falls on those that hold the batch whole, then on the method that trains most and the fewest ranks.
    """
    phases = getattr(search.estimate(way).timeline, "phases", ())
    again = [other for other in search.checkpointing if other]
    if way.checkpointing or any(name == RECOMPUTATION for _, name in phases):
        again = []  # it is computed twice already
    others = [dataclasses.replace(way, method=name) for name in search.methods if name != way.method]
    others = [other for other in others if search.peak(other) is not None]
    others.sort(key=lambda other: -search.estimate(other).trained_bytes)
    found: dict[tuple[bool, ...], Way] = {}
    for changed in itertools.product((False, True), repeat=3):
        sharded, exchanged, checkpointed = changed
        ways = [
            dataclasses.replace(other, ranks=ranks, checkpointing=twice)
            for other in (others if exchanged else [way])
            for twice in (again if checkpointed else [way.checkpointing])
            for ranks in (search.ranks if sharded else [way.ranks])
        ]
        # combinations with fewer changes were looked at before
        less = [
            w.accumulate for c, w in found.items() if all(a <= b for a, b in zip(c, changed, strict=True))
        ]
        least = min(less, default=math.inf)
        if least == way.accumulate:
            continue  # one of them holds the batch whole
        best = next(filter(search.fits, ways), None)
        best = best or next(filter(None, (_in_micro_batches(search, other) for other in ways)), None)
        if best and best.accumulate < least:
            found[changed] = best
    return [Remedy(_text(best, way), search.peak(best) or 0, best) for best in found.values()]


def _in_micro_batches(search: Search, way: Way) -> Way | None:
    """The batch in the fewest equal micro-batches that fit with the gradients they leave."""
    best = None
    sizes = _divisors(way.batch)[:-1]
    while sizes:
        middle = len(sizes) // 2
        size = sizes[middle]
        small = dataclasses.replace(way, batch=size, accumulate=way.accumulate * (way.batch // size))
        if search.peak(small) is None:
            del sizes[middle]  # the model refuses this size, others it may not
        elif search.fits(small):
            best, sizes = small, sizes[middle + 1 :]
        else:
            sizes = sizes[:middle]
    return best


def _text(way: Way, asked: Way) -> str:
    changes = []
    if way.method != asked.method:
        changes.append(f"another method, {way.method}")
    if way.ranks != asked.ranks:
        changes.append(f"sharding over {way.ranks} ranks of {asked.batch} each")
    if way.checkpointing != asked.checkpointing:
        changes.append("checkpointing" if way.checkpointing is True else f"checkpointing {way.again}")
    if way.batch != asked.batch:
        times = way.accumulate // asked.accumulate
        more = f"{times} accumulated" if asked.accumulate == 1 else f"{times} times as many"
        changes.append(f"micro-batches of {way.batch}, {more}")
    return " and ".join(changes)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
