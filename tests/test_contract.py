"""Every invariant of the contract on every host with every method."""

from __future__ import annotations

import pytest

from tests.contract import COSTLY, INVARIANTS
from tests.zoo import PAIRS, SAMPLE

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # Torch says so of the nested tensors that its own encoder makes of a padded batch.
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning"),
]


def named(check):
    return check.__name__


def every_pair_and_invariant():
    """All of them; daily, each pair meets a sixth of the invariants.

    Neighbours in the lists take turns, so that every invariant meets every method and every host every day.
    """
    for i, pair in enumerate(PAIRS):
        for j, check in enumerate(INVARIANTS):
            daily = (i + j) % 6 == 0
            yield pytest.param(
                check, pair, marks=() if daily else pytest.mark.slow, id=f"{named(check)}-{pair}"
            )


@pytest.mark.parametrize(("check", "pair"), list(every_pair_and_invariant()))
def test_contract(check, pair):
    check(pair)


@pytest.mark.parametrize(
    "pair",
    [
        pytest.param(p, marks=() if p.host.name in SAMPLE and i % 3 == 0 else pytest.mark.slow)
        for i, p in enumerate(PAIRS)
        if p.host.compiles
    ],
    ids=str,
)
@pytest.mark.parametrize("check", COSTLY, ids=named)
def test_costly_contract(check, pair):
    check(pair)
