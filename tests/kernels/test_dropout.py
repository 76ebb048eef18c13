"""Dropped positions: their distribution, their bound, and that a seed says all."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from peftlib.kernels import reference
from peftlib.kernels.dropout import draw_seed, dropped, how_many, zeroed

CPU = torch.device("cpu")


def mask(seed: int, n: int, p: float) -> torch.Tensor:
    """True where an element is dropped."""
    return reference.drop(torch.ones(n), dropped(seed, n, p, CPU), p) == 0


@given(n=st.integers(0, 400), p=st.floats(0.001, 0.999), seed=st.integers(0, 2**62))
def test_positions_ascend_and_those_too_many_lie_past_the_end(n: int, p: float, seed: int) -> None:
    positions = dropped(seed, n, p, CPU)
    assert positions.dtype == torch.int64
    assert positions.shape == (how_many(n, p),)
    inside = positions[positions < n]
    assert (inside.diff() > 0).all()
    assert (positions[len(inside) :] == n).all()
    assert (inside >= 0).all()
    # Enough were drawn: what is left over, or an element each.
    assert len(inside) < len(positions) or len(positions) == n
    assert torch.equal(positions, dropped(seed, n, p, CPU))


@pytest.mark.parametrize("p", [0.001, 0.05, 0.1, 0.5, 0.9])
def test_each_element_is_dropped_with_that_probability_and_independently(p: float) -> None:
    n, draws = 97, 20_000
    masks = torch.stack([mask(seed, n, p) for seed in range(draws)]).double()
    deviation = math.sqrt(p * (1 - p) / draws)
    assert (
        masks.mean(0) - p
    ).abs().max() < 4.5 * deviation  # once in 1500 runs for a fair draw; the seeds are fixed
    # Neighbours at any distance, and the same element in draws of neighbouring seeds.
    for one, other in [(masks[:, :-k], masks[:, k:]) for k in (1, 2, 7, 40)] + [(masks[:-1], masks[1:])]:
        together = (one * other).mean()
        assert abs(together - p * p) < 4.5 * math.sqrt(p * p * (1 - p * p) / one.numel())
    counts = masks.sum(1)
    assert abs(counts.var() / (n * p * (1 - p)) - 1) < 0.1


def test_long_draws_have_the_right_rate() -> None:
    n, p = 4_000_000, 0.05
    count = int((dropped(0, n, p, CPU) < n).sum())
    assert abs(count - n * p) < 4.5 * math.sqrt(n * p * (1 - p))
    last = int(dropped(0, n, p, CPU)[count - 1])
    assert n - last < 400, "the draw ends before its elements do"


@given(n=st.integers(1, 10_000), p=st.floats(0.001, 0.999))
def test_enough_positions_are_drawn_for_any_count_that_could_occur(n: int, p: float) -> None:
    k = how_many(n, p)
    assert k <= n
    if k < n:  # the exact tail, summed in logarithms
        terms = torch.arange(k + 1, n + 1, dtype=torch.float64)
        log = (
            math.lgamma(n + 1)
            - torch.lgamma(terms + 1)
            - torch.lgamma(n - terms + 1)
            + terms * math.log(p)
            + (n - terms) * math.log1p(-p)
        )
        assert torch.logsumexp(log, 0) < -35


def test_the_seed_follows_torch() -> None:
    torch.manual_seed(5)
    first = [draw_seed() for _ in range(3)]
    torch.manual_seed(5)
    assert [draw_seed() for _ in range(3)] == first
    assert len(set(first)) == 3
    with FakeTensorMode():
        assert draw_seed() == 0
        assert dropped(0, 100, 0.1, CPU).shape == (how_many(100, 0.1),)
    assert dropped(0, 100, 0.1, torch.device("meta")).shape == (how_many(100, 0.1),)


@pytest.mark.usefixtures("poisoned_memory")
def test_zeroed_copies() -> None:
    x = torch.randn(6, 5).t()
    before = x.clone()
    positions = torch.tensor([0, 7, 29, 30, 30])
    out = zeroed(x, positions)
    expected = before.reshape(-1)
    expected[[0, 7, 29]] = 0
    assert torch.equal(out, expected.view(5, 6))
    assert torch.equal(x, before)
    assert zeroed(torch.empty(0, 3), torch.tensor([0])).shape == (0, 3)
