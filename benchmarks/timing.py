"""How every benchmark takes time: contestants in turns, one process, no garbage collection, spread beside the middle.

A shared machine changes its speed by tens of percent within seconds. So each round runs every contestant once, and what
is compared are the samples of one round; a ratio is the median over rounds of such pairs.
"""

from __future__ import annotations

import gc
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


CLOCKS: Mapping[str, Callable[[], float]] = {
    "processor": time.process_time,  # one thread: what others do on the machine does not count
    "wall": time.perf_counter,
    "children": _children,
}


def clock_for(threads: int, device: str) -> str:
    """The clock that is fair there.

    >>> clock_for(1, "cpu"), clock_for(2, "cpu"), clock_for(1, "cuda")
    ('processor', 'wall', 'cuda')
    """
    if device.startswith("cuda"):
        return "cuda"
    return "processor" if threads == 1 else "wall"


def sample(run: Callable[[], Any], clock: str) -> float:
    """Seconds of one call; with the clock "value", the number that the call returns (bytes, say)."""
    if clock == "value":
        return float(run())
    if clock == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000
    now = CLOCKS[clock]
    started = now()
    run()
    return now() - started


def in_turns(
    runs: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    clock: str,
    warm_up: int = 2,
    before: Mapping[str, Callable[[], Any]] | None = None,
) -> dict[str, list[float]]:
    """Samples of each run, one a round; ``before[name]`` is called first each time and does not count.

    The first ``warm_up`` rounds are thrown away.
    """
    prepare = before or {}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    enabled = gc.isenabled()
    gc.collect()
    # what is there stays: collecting between the rounds looks at new objects alone
    gc.freeze()
    gc.disable()
    try:
        for turn in range(-warm_up, rounds):
            for name, run in runs.items():
                prepare.get(name, lambda: None)()
                spent = sample(run, clock)
                if turn >= 0:
                    samples[name].append(spent)
            # what is freed by counting is freed at once; cycles (autograd's, compilers') wait for here
            gc.collect()
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()
    return samples


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles.

    >>> spread([3.0, 1.0, 2.0, 10.0, 4.0])
    {'median': 3.0, 'low': 2.0, 'high': 4.0}
    """
    if len(values) == 1:
        return dict.fromkeys(("median", "low", "high"), values[0])
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high}
