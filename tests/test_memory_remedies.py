"""The search against a budget, and remedies against every combination there is, estimated one by one."""

import functools
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import peftlib
from peftlib import LoRA
from peftlib.errors import ProbeError
from peftlib.memory import MemoryReport, ShardedOver, estimate_memory, plan_memory
from peftlib.memory.remedies import Search, largest_batch, remedies
from peftlib.memory.ways import Way
from tests.zoo import Decoder

BATCH = 8
METHODS = {"full": None, "some": LoRA(rank=4), "few": LoRA(rank=1)}
TWICE = (None, True)
RANKS = (2, 4)
ADAM = functools.partial(torch.optim.Adam, lr=0.1)
X = torch.zeros(BATCH, 4, 32)


def tower():
    def block():
        return nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32))

    return nn.Sequential(nn.Linear(32, 32), nn.Sequential(*(block() for _ in range(4))))


def flat(peak):
    return lambda way: MemoryReport(peak_bytes=peak(way), peak_at="forward", trained_bytes=len(way.method))


# --- the search ----------------------------------------------------------------------------------------------------


@given(
    fixed=st.integers(0, 10**6),
    slopes=st.lists(st.tuples(st.integers(0, 10**5), st.integers(0, 500)), min_size=1, max_size=4),
    budget=st.integers(1, 10**7),
    start=st.integers(1, 3000),
    least=st.integers(1, 2),
    divisor=st.integers(1, 9),
)
def test_the_search_on_any_sum_of_lines(fixed, slopes, budget, start, least, divisor):
    # a peak is the largest of several places, each a line in the batch
    def peak(way):
        tried.append(way.batch)
        if way.batch < least or way.batch % divisor:
            raise ProbeError("no")
        return fixed + max(a + b * way.batch for a, b in slopes)

    tried = []
    start = -(-max(start, least) // divisor) * divisor
    most = largest_batch(Search(flat(peak), budget), Way("m", start))
    smallest = next(size for size in range(divisor, 10**4, divisor) if size >= least)
    after = most + divisor if most else smallest
    assert most == 0 or peak(Way("m", most)) <= budget
    assert after >= 2**20 or peak(Way("m", after)) > budget
    assert tried[0] == start
    assert len(tried) < 42
    assert len(set(tried[:-2])) >= len(tried) - 2


def test_a_search_takes_few_probes():
    def peak(way):
        tried.append(way.batch)
        return 1000 + max(7 * way.batch, 5000 + way.batch)

    for start in (1, 8, 1000):
        tried = []
        assert largest_batch(Search(flat(peak), 13_000), Way("m", start)) == 1714
        assert len(tried) <= 8


# --- remedies by hand ----------------------------------------------------------------------------------------------


def test_what_remedies_are_called():
    def told(peak, way, **choices):
        return [remedy.text for remedy in remedies(Search(flat(peak), 10, **choices), way)]

    everything = {"methods": ("a", "bb", "ccc"), "checkpointing": (None, "x.*"), "ranks": (2, 8)}
    assert told(lambda way: 11 - (way.method != "a"), Way("a", 4), **everything) == ["another method, ccc"]
    assert told(lambda way: 11 - (way.ranks == 8), Way("a", 4), **everything) == [
        "sharding over 8 ranks of 4 each"
    ]
    assert told(lambda way: 11 - (way.checkpointing == "x.*"), Way("a", 4), **everything) == [
        "checkpointing x.*"
    ]
    assert told(lambda way: 8 + way.batch, Way("a", 4), **everything) == ["micro-batches of 2, 2 accumulated"]
    # who accumulates already can do so in smaller ones
    assert told(lambda way: 8 + way.batch, Way("a", 4, accumulate=3)) == [
        "micro-batches of 2, 2 times as many"
    ]

    def all_of_it(way):
        return 8 + way.batch + (way.method == "a") + (way.ranks == 1) + (way.checkpointing is None)

    assert told(all_of_it, Way("a", 4), **everything) == [
        "another method, ccc and checkpointing x.* and micro-batches of 1, 4 accumulated",
        "sharding over 2 ranks of 4 each and checkpointing x.* and micro-batches of 1, 4 accumulated",
        "another method, ccc and sharding over 2 ranks of 4 each and micro-batches of 1, 4 accumulated",
        "another method, ccc and sharding over 2 ranks of 4 each and checkpointing x.* and "
        "micro-batches of 2, 2 accumulated",
    ]


def test_what_a_model_computes_twice_already_is_not_advised_again():
    x = torch.zeros(8, 5, dtype=torch.long)

    def of(decoder):
        def estimate(way):
            return estimate_memory(
                decoder, x[: way.batch], checkpointing=way.checkpointing, accumulate=min(way.accumulate, 2)
            )

        return estimate

    plain, twice = of(Decoder()), of(Decoder(checkpointed=True))
    budget = twice(Way("m", 8)).peak_bytes - 1
    assert not any("checkpointing" in r.text for r in remedies(Search(twice, budget, (), TWICE), Way("m", 8)))
    assert any("checkpointing" in r.text for r in remedies(Search(plain, budget + 1, (), TWICE), Way("m", 8)))


def test_sizes_that_are_refused_are_passed_over():
    def found(*refused):
        def peak(way):
            if way.batch in refused:
                raise ProbeError("no")
            return 8 + way.batch

        return [
            (remedy.way.batch, remedy.way.accumulate)
            for remedy in remedies(Search(flat(peak), 14), Way("m", 12))
        ]

    assert found(6) == [(4, 3)]
    assert found(6, 4) == [(3, 4)]
    assert found(1, 3) == [(6, 2)]
    assert found(1, 6, 3) == [(4, 3)]
    assert found(6, 4, 3, 2) == [(1, 12)]
    assert found(6, 4, 3, 2, 1) == []


# --- every combination ---------------------------------------------------------------------------------------------


@functools.cache
def model(method):
    made = tower()
    if METHODS[method] is not None:
        peftlib.attach(made, METHODS[method], targets="1.*")
    return made


@functools.cache
def whole(method, size, twice):
    """A report of one rank, by a direct estimate."""
    times = 1 if size == BATCH else BATCH // size
    return estimate_memory(
        model(method), X[:size].clone(), accumulate=times, checkpointing=twice, optimizer=ADAM
    )


def report(method, size, twice, ranks):
    one = whole(method, size, twice)
    return one if ranks == 1 else ShardedOver(ranks)(model(method), one, optimizer=ADAM)


@functools.cache
def peaks():
    """Every combination's bytes."""
    sizes = [size for size in range(1, BATCH + 1) if BATCH % size == 0]
    everything = itertools.product(METHODS, sizes, TWICE, (1, *RANKS))
    return {each: report(*each).peak_bytes for each in everything}


def expected(asked, budget):
    """Remedies by their definition: the best of each kind, without those that a simpler one equals."""
    trained = {name: whole(name, BATCH, asked.checkpointing).trained_bytes for name in METHODS}
    order = sorted(METHODS, key=lambda name: (name != asked.method, -trained[name]))
    kinds = {}
    for (method, size, twice, ranks), peak in peaks().items():
        if peak > budget or (asked.checkpointing and not twice):
            continue
        kind = (ranks > 1, method != asked.method, twice != asked.checkpointing)
        place = (size < BATCH, order.index(method), ranks, BATCH // size)
        kinds.setdefault(kind, []).append((place, (method, size, twice, ranks), peak))
    best = {kind: min(found) for kind, found in kinds.items()}
    times = {kind: found[0][-1] for kind, found in best.items()}
    return [
        best[kind][1:]
        for kind in sorted(best)
        if all(
            times[kind] < times[other]
            for other in best
            if other != kind and all(a <= b for a, b in zip(other, kind, strict=True))
        )
    ]


@pytest.mark.parametrize("asked", [Way("full", BATCH), Way("some", BATCH), Way("some", BATCH, None, True)])
def test_remedies_are_the_best_of_every_combination(asked):
    def estimate(way):
        assert way.batch * way.accumulate == BATCH
        return report(way.method, way.batch, way.checkpointing, way.ranks)

    own = whole(asked.method, BATCH, asked.checkpointing).peak_bytes
    seen = set()
    # at each of the bytes there are the answer changes
    for budget in sorted({peak for peak in peaks().values() if peak < own} | {min(peaks().values()) - 1}):
        search = Search(estimate, budget, tuple(METHODS), TWICE, RANKS)
        found = [
            ((r.way.method, r.way.batch, r.way.checkpointing, r.way.ranks), r.peak_bytes)
            for r in remedies(search, asked)
        ]
        assert found == expected(asked, budget)
        seen |= {(way[0] != asked.method, way[1] < BATCH, way[2], way[3] > 1) for way, _ in found}
    assert len(seen) > 5


@pytest.mark.parametrize("share", [0.35, 0.7])
def test_a_plan_names_them(share):
    """The same by the front door, where models are made and estimated anew."""
    budget = int(share * whole("full", BATCH, None).peak_bytes)
    methods = {name: None if method is None else {"1.*": method} for name, method in METHODS.items()}
    plan = plan_memory(
        tower, X, methods, budget, device="cpu", optimizer=ADAM, ranks=RANKS, checkpointing=(None, True)
    )
    for choice in plan.choices:
        if not choice.fits:
            found = [
                ((r.way.method, r.way.batch, r.way.checkpointing, r.way.ranks), r.peak_bytes)
                for r in choice.remedies
            ]
            assert found == expected(choice.way, budget)
    assert not all(choice.fits for choice in plan.choices)
