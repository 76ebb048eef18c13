"""Every invariant of the contract on every host with every method."""

from __future__ import annotations

import pytest

from tests.contract import COMPILED, INVARIANTS
from tests.zoo import HOSTS, PAIRS

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # Torch says so of the nested tensors that its own encoder makes of a padded batch.
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning"),
]


def every_pair_and_invariant():
    """All of them; daily, each pair meets a third of the invariants.

    Neighbours in the lists take turns, so that every invariant meets every method and every host every day.
    """
    for i, pair in enumerate(PAIRS):
        for j, check in enumerate(INVARIANTS):
            marks = () if (i + j) % 3 == 0 else pytest.mark.slow
            yield pytest.param(check, pair, marks=marks, id=f"{check.__name__}-{pair}")


@pytest.mark.parametrize("check, pair", list(every_pair_and_invariant()))
def test_contract(check, pair):
    check(pair)


def compiled_pairs():
    """Every pair that is one graph; all but the smallest host, and one method in turn on each other, are slow."""
    for turn, host in enumerate(h for h in HOSTS.values() if h.compiles):
        pairs = [p for p in PAIRS if p.host is host]
        for i, pair in enumerate(pairs):
            yield pair, host.name == "block" or i == turn % len(pairs)


@pytest.mark.parametrize(
    "check, pair",
    [
        pytest.param(
            check,
            pair,
            id=f"{check.__name__}-{pair}",
            marks=() if sampled and (i == 0 or pair.host.name == "block") and i < 3 else pytest.mark.slow,
        )
        for i, check in enumerate(COMPILED)
        for pair, sampled in compiled_pairs()
    ],
)
def test_compiled_contract(check, pair):
    check(pair)
