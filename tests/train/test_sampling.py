"""Samplers, mining and weights: what is stated of them, on any numbers."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import peftlib
from peftlib import FullFineTuning, PeftlibError
from peftlib.train import (
    Balanced,
    Batches,
    Mining,
    Replay,
    causal_lm,
    fit,
    inverse_frequency,
    l2_sp,
    regression,
    with_penalty,
    with_weights,
)

each = partial(regression, each=True)


def rows(count, seed=3):
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, dtype=torch.float64, generator=generator)
    return [{"inputs": draw(5), "labels": draw(3)} for _ in range(count)]


def stacked(some):
    return {key: torch.stack([row[key] for row in some]) for key in some[0]}


def line():
    torch.manual_seed(1)
    return nn.Linear(5, 3).double()


def trained(batches, loss, steps=3, **options):
    model = line()
    fit(model, batches, loss, optimizer=torch.optim.SGD(model.parameters(), lr=0.05), steps=steps, **options)
    return model.weight.detach()


# -- weights -----------------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(times=st.lists(st.integers(1, 3), min_size=1, max_size=6), size=st.integers(1, 4))
def test_a_weight_of_two_is_the_example_twice_and_a_common_factor_is_nothing(times, size):
    examples = rows(len(times))
    again = [row for row, n in zip(examples, times, strict=True) for _ in range(n)]
    expected = trained([stacked(again)], regression)
    for factor in (1.0, 0.25):
        weights = [factor * n for n in times]
        batches = Batches(examples, size, stacked, seed=2, index=True)
        found = trained(batches, with_weights(each, weights), accumulate=len(batches))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_weighted_samples_with_a_penalty_and_mining_are_the_loop_one_would_write():
    examples, weights = rows(7), torch.tensor([1.0, 2.0, 0.5, 3.0, 1.0, 0.25, 4.0])
    model, naive = line(), line()
    tuning = peftlib.attach(model, FullFineTuning())
    mining = Mining(7)
    loss = with_penalty(with_weights(mining.watch(each), weights), l2_sp(tuning, 0.5))
    batches = Batches(examples, 3, stacked, sampler=mining, index=True)
    fit(model, batches, loss, optimizer=torch.optim.SGD(tuning.parameters(), lr=0.05), steps=1, accumulate=3)
    order, x, y = mining(1), *stacked(examples).values()
    del order
    losses = (naive(x) - y).square().sum(1)
    v = weights.double()
    total = (v * losses).sum() / (3 * v).sum()
    for p in naive.parameters():
        p.grad = torch.autograd.grad(total, p, retain_graph=True)[0]
    torch.optim.SGD(naive.parameters(), lr=0.05).step()
    torch.testing.assert_close(model.weight, naive.weight, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(mining.losses, losses / 3, rtol=1e-12, atol=0)


def test_what_cannot_be_weighed_is_refused():
    for weights in ([1.0, 0.0], [1.0, math.nan], [[1.0]], [math.inf, 1.0]):
        with pytest.raises(PeftlibError, match="one finite number above 0 per example"):
            with_weights(each, weights)
    model, batch = line(), stacked(rows(2))
    with pytest.raises(PeftlibError, match=r"which is not there\. Use Batches\(\.\.\., index=True\)"):
        with_weights(each, [1.0, 1.0])(model, batch)
    batch["index"] = torch.tensor([0, 1])
    with pytest.raises(PeftlibError, match=r"Use partial\(loss, each=True\)"):
        with_weights(regression, [1.0, 1.0])(model, batch)
    with torch.no_grad():  # evaluation is on other examples
        assert with_weights(regression, [1.0])(model, stacked(rows(2)))[1] == 6


def test_a_loss_may_give_one_sum_and_count_per_sample():
    examples = [stacked(rows(4))]
    torch.testing.assert_close(trained(examples, each), trained(examples, regression), rtol=1e-12, atol=0)
    with pytest.raises(PeftlibError, match="both of the batch or both one per sample"):
        trained(examples, lambda model, batch: (each(model, batch)[0], 4))


# -- class balance -----------------------------------------------------------------------------------------------------


@given(classes=st.lists(st.integers(-2, 3), min_size=1, max_size=30))
def test_each_class_has_the_same_sum(classes):
    found = inverse_frequency(classes)
    assert float(found.sum()) == pytest.approx(len(classes), rel=1e-5)
    sums = {c: sum(float(w) for w, own in zip(found, classes, strict=True) if own == c) for c in classes}
    assert max(sums.values()) == pytest.approx(min(sums.values()), rel=1e-5)


def test_draws_are_as_likely_as_stated():
    sampler = Balanced([0.0, 1.0, 3.0, 0.0], draws=40_000, seed=5)
    shares = torch.bincount(sampler(epoch=2), minlength=4) / len(sampler)
    torch.testing.assert_close(shares, torch.tensor([0.0, 0.25, 0.75, 0.0]), rtol=0, atol=0.01)
    assert torch.equal(sampler(2), Balanced([0.0, 1.0, 3.0, 0.0], draws=40_000, seed=5)(2))
    assert not torch.equal(sampler(2), sampler(3))
    labels = [0] * 95 + [1] * 5
    drawn = Balanced(inverse_frequency(labels), draws=10_000)(0)
    assert float((drawn >= 95).double().mean()) == pytest.approx(0.5, abs=0.03)
    assert len(Batches(labels, 8, sampler=Balanced(inverse_frequency(labels)))) == 13


def test_chances_of_nothing_are_refused():
    for chances in ([], [0.0, 0.0], [-1.0, 2.0], [math.nan, 1.0], [[1.0]]):
        with pytest.raises(PeftlibError, match="Chances are one number of 0 or more per example"):
            Balanced(chances)
    for classes in ([], [0.5, 1.0], [[1, 2]]):
        with pytest.raises(PeftlibError, match="one integer class per example"):
            inverse_frequency(classes)


# -- replay ------------------------------------------------------------------------------------------------------------


@given(
    new=st.integers(1, 20), old=st.integers(1, 9), epochs=st.integers(1, 4),
    share=st.fractions(Fraction(1, 50), Fraction(49, 50), max_denominator=60), seed=st.integers(0, 5),
)  # fmt: skip
def test_any_window_of_draws_has_its_share_of_old_to_less_than_one(new, old, epochs, share, seed):
    sampler = Replay(new, old, share, seed=seed)
    drawn = torch.cat([sampler(epoch) for epoch in range(epochs)]).tolist()
    assert len(drawn) == epochs * len(sampler)
    olds = [0]
    for number in drawn:
        assert 0 <= number < new + old
        olds.append(olds[-1] + (number >= new))
    # what any two places differ in by more or less than their share
    ahead = [count - k * share for k, count in enumerate(olds)]
    assert max(ahead) - min(ahead) < 1
    # every example of a kind before any comes again
    for kind, size in (([n for n in drawn if n < new], new), ([n - new for n in drawn if n >= new], old)):
        for turn in range(0, len(kind), size):
            part = kind[turn : turn + size]
            assert len(set(part)) == len(part)
    assert torch.equal(sampler(epochs), Replay(new, old, share, seed=seed)(epochs))


def test_a_share_is_taken_as_written_and_steps_have_it_exactly():
    assert Replay(9, 9, 0.1).share == Fraction(1, 10)
    new, old = rows(30), rows(8, seed=4)
    batches = Batches([*new, *old], 8, stacked, sampler=Replay(30, 8, 0.25), index=True)
    assert len(batches) == 5
    for epoch in range(3):
        assert [int((b["index"] >= 30).sum()) for b in batches.epoch(epoch)] == [2] * 5


def test_nothing_to_mix_is_refused():
    for new, old, share in ((0, 1, 0.5), (1, 0, 0.5), (1, 1, 0), (1, 1, 1.0)):
        with pytest.raises(PeftlibError, match="an example of each kind, and a share between 0 and 1"):
            Replay(new, old, share)


# -- mining ------------------------------------------------------------------------------------------------------------


def naive_expected(losses, cap, power):
    """Raise c until the draws are as many as examples."""
    scores = [loss**power for loss in losses]
    low, high = 0.0, 1e12
    for _ in range(300):
        c = (low + high) / 2
        low, high = (c, high) if sum(min(cap, c * s) for s in scores) < len(scores) else (low, c)
    return [min(cap, low * s) for s in scores]


@given(
    losses=st.lists(st.floats(0.01, 50), min_size=1, max_size=12),
    cap=st.integers(1, 4), power=st.sampled_from([0.0, 0.5, 1.0, 2.0]), seed=st.integers(0, 9),
)  # fmt: skip
def test_draws_follow_the_losses_up_to_the_cap(losses, cap, power, seed):
    mining = Mining(len(losses), cap=cap, power=power, seed=seed)
    assert sorted(mining(0).tolist()) == list(range(len(losses)))
    mining.losses[:] = torch.tensor(losses)
    expected = mining.expected()
    torch.testing.assert_close(
        expected, torch.tensor(naive_expected(losses, cap, power), dtype=torch.float64), rtol=1e-6, atol=1e-9
    )
    for epoch in (1, 2):
        drawn = mining(epoch)
        assert len(drawn) == len(losses)
        times = torch.bincount(drawn, minlength=len(losses))
        assert (times <= cap).all()
        assert (times - expected).abs().max() < 1 + 1e-6


def test_over_many_epochs_the_draws_are_their_expectation():
    mining = Mining(4, cap=2)
    mining(0)
    mining.losses[:] = torch.tensor([1.0, 2.0, 0.5, 10.0])
    times = sum(torch.bincount(mining(epoch), minlength=4) for epoch in range(1, 2001)) / 2000
    torch.testing.assert_close(times.double(), mining.expected(), rtol=0, atol=0.03)
    assert mining.expected()[3] == 2


def test_what_is_unknown_or_no_number_counts_as_the_mean():
    mining = Mining(4, cap=4)
    loss = mining.watch(lambda model, batch: (batch["value"], batch["count"]))
    batch = {
        "index": torch.tensor([0, 1, 2]),
        "value": torch.tensor([2.0, math.nan, 0.0]),
        "count": torch.tensor([1, 1, 0]),
    }
    loss(None, batch)
    torch.testing.assert_close(
        mining.losses, torch.tensor([2.0, math.nan, math.nan, math.nan]).double(), equal_nan=True
    )
    assert mining.expected().tolist() == [1.0] * 4
    with torch.no_grad():
        loss(None, {**batch, "value": torch.full((3,), 9.0)})
    assert mining.losses[0] == 2
    mining.losses[:] = 0
    assert mining.expected().tolist() == [1.0] * 4
    mining(1)
    mining(0)  # a training that begins anew
    assert mining.losses.isnan().all()


def test_mining_learns_the_hard_examples_sooner():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 5, generator=generator).double()
    y = x[:, :3] * torch.where(torch.arange(64) < 56, 0.0, 3.0)[:, None]
    examples = [{"inputs": a, "labels": b} for a, b in zip(x, y, strict=True)]
    found = {}
    for cap in (1, 4):
        mining, model = Mining(64, cap=cap), line()
        batches = Batches(examples, 8, stacked, sampler=mining, index=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        fit(model, batches, mining.watch(each), optimizer=optimizer, epochs=6)
        found[cap] = (model(x[56:]) - y[56:]).square().mean().item()
    assert found[4] < 0.8 * found[1]


def test_a_look_at_the_batches_during_training_changes_nothing_of_what_is_mined():
    def run(**more):
        mining, model, drawn = Mining(7), line(), []
        batches = Batches(rows(7), 2, stacked, sampler=mining, index=True)

        def loss(model, batch):
            drawn.append(batch["index"].tolist()) if torch.is_grad_enabled() else None
            return each(model, batch)

        options = {key: make(batches) for key, make in more.items()}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        fit(model, batches, mining.watch(loss), optimizer=optimizer, steps=12, **options)
        return drawn, mining.losses, batches

    drawn, losses, batches = run()
    epochs = [sorted(itertools.chain(*drawn[i : i + 4])) for i in (0, 4, 8)]
    assert epochs[0] == list(range(7)) != epochs[1]  # it does draw by losses
    for more in (
        {"callbacks": lambda batches: [lambda row: list(batches) and None]},
        {"evaluate": lambda batches: batches},
    ):
        again, found, _ = run(**more)
        assert again == drawn
        assert torch.equal(found, losses)
    assert sorted(itertools.chain(*(batch["index"].tolist() for batch in batches))) == list(range(7))
    assert torch.equal(batches.sampler.losses, losses)


def test_what_mining_cannot_do_is_refused():
    for numbers in ({"examples": 0}, {"examples": 1, "cap": 0}, {"examples": 1, "power": -1.0}):
        with pytest.raises(PeftlibError, match="Mining takes examples >= 1"):
            Mining(**numbers)
    batches = Batches(rows(3), 2, stacked, sampler=Mining(3))
    with pytest.raises(PeftlibError, match=r"batch\['index'\], which is not there"):
        trained(batches, batches.sampler.watch(each))
    with pytest.raises(PeftlibError, match="The mining was of 3 examples, and is now of 4"):
        Mining(4).load_state_dict(Mining(3).state_dict())


def test_rows_of_tokens_are_mined_per_target():
    ids = torch.tensor([[1, 2, 0, 1], [1, 1, 1, 1]])
    labels = torch.tensor([[1, 2, -100, -100], [1, 1, 1, 1]])
    mining, model = Mining(2), nn.Embedding(3, 3)
    loss = mining.watch(partial(causal_lm, each=True))
    loss(model, {"inputs": ids, "labels": labels, "index": torch.tensor([1, 0])})
    logs = model.weight.log_softmax(-1)
    assert mining.losses[1].item() == pytest.approx(-logs[1, 2].item(), rel=1e-5)
    assert mining.losses[0].item() == pytest.approx(-logs[1, 1].item(), rel=1e-5)
