"""Advantages, KL estimates, PPO's and GRPO's losses: naive twins in float64, hand-computed values, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peftlib import PeftlibError
from peftlib.train import (
    gae,
    grpo_advantages,
    grpo_loss,
    kl_estimate,
    ppo_policy_loss,
    ppo_value_loss,
    whiten,
)


@st.composite
def tokens(draw, how_many=3):
    rows, steps = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    lengths = draw(st.lists(st.integers(0, steps), min_size=rows, max_size=rows))
    lengths[0] = max(1, lengths[0])
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    mask = torch.arange(steps) < torch.tensor(lengths)[:, None]
    made = [torch.randn(rows, steps, generator=generator, dtype=torch.float64) for _ in range(how_many)]
    return mask, [torch.where(mask, x, torch.nan) for x in made]


@given(tokens(2), st.sampled_from([0.0, 0.9, 1.0]), st.sampled_from([0.0, 0.95, 1.0]))
def test_gae_is_the_sum_it_stands_for(case, gamma, lam):
    mask, (rewards, values) = case
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for row in range(len(mask)):
        n = int(mask[row].sum())
        r, v = rewards[row, :n].tolist(), [*values[row, :n].tolist(), 0.0]
        for t in range(n):
            expected = sum((gamma * lam) ** (k - t) * (r[k] + gamma * v[k + 1] - v[k]) for k in range(t, n))
            assert advantages[row, t].item() == pytest.approx(expected, abs=1e-12)
            assert returns[row, t].item() == pytest.approx(expected + v[t], abs=1e-12)
    assert not advantages[~mask].any()
    assert not returns[~mask].any()


def test_gae_of_a_row_padded_on_the_left_or_with_a_gap_is_that_of_its_tokens():
    rewards, values = torch.randn(1, 3), torch.randn(1, 3)
    plain, _ = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), 0.9, 0.8)
    mask = torch.tensor([[False, True, True, False, True]])
    spread = [torch.zeros(1, 5).masked_scatter(mask, x) for x in (rewards, values)]
    torch.testing.assert_close(gae(*spread, mask, 0.9, 0.8)[0][mask], plain[0])


@given(tokens(3), st.sampled_from([0.1, 0.2]))
def test_ppo_losses_one_token_at_a_time(case, clip):
    mask, (new, old, advantages) = case
    new.requires_grad_()
    loss = ppo_policy_loss(new, old, advantages, mask, clip)
    naive, value = [], []
    for row, t in mask.nonzero().tolist():
        ratio, a = (new[row, t] - old[row, t]).exp(), advantages[row, t]
        naive.append(torch.maximum(-a * ratio, -a * ratio.clamp(1 - clip, 1 + clip)))
        near = old[row, t] + (new[row, t] - old[row, t]).clamp(-clip, clip)
        value.append(torch.maximum((new[row, t] - a) ** 2, (near - a) ** 2) / 2)
    torch.testing.assert_close(loss, torch.stack(naive).mean())
    torch.testing.assert_close(ppo_value_loss(new, old, advantages, mask, clip), torch.stack(value).mean())
    for mine, other in ((loss, naive), (ppo_value_loss(new, old, advantages, mask, clip), value)):
        (got,) = torch.autograd.grad(mine, new, retain_graph=True)
        (expected,) = torch.autograd.grad(torch.stack(other).mean(), new, retain_graph=True)
        torch.testing.assert_close(got[mask], expected[mask])
        assert not got[~mask].any()  # what lies outside, NaN here, does not leak into the gradient


@given(tokens(3), st.sampled_from(["token", "sequence", "fixed"]), st.sampled_from([0.0, 0.1]))
def test_grpo_one_token_at_a_time(case, aggregate, beta):
    mask, (new, old, there) = case
    new.requires_grad_()
    advantages = torch.arange(len(mask), dtype=torch.float64) - 1
    length = mask.shape[1] + 1
    loss = grpo_loss(
        new, old, advantages, mask, reference_logps=there, beta=beta, clip=0.1, clip_high=0.3, aggregate=aggregate,
        length=length,
    )  # fmt: skip
    rows = []
    for row in range(len(mask)):
        terms = [new.new_zeros(())]
        for t in range(int(mask[row].sum())):
            ratio, a = (new[row, t] - old[row, t]).exp(), advantages[row]
            d = there[row, t] - new[row, t]
            terms.append(-torch.minimum(a * ratio, a * ratio.clamp(0.9, 1.3)) + beta * (d.exp() - d - 1))
        rows.append(torch.stack(terms).sum())
    sums, sizes = torch.stack(rows), mask.sum(1)
    expected = {
        "token": sums.sum() / sizes.sum(),
        "sequence": (sums / sizes.clamp(min=1)).mean(),
        "fixed": sums.sum() / (len(mask) * length),
    }[aggregate]
    torch.testing.assert_close(loss, expected)
    (got,), (want,) = torch.autograd.grad(loss, new, retain_graph=True), torch.autograd.grad(expected, new)
    torch.testing.assert_close(got[mask], want[mask])
    assert not got[~mask].any()


def test_group_advantages_by_hand():
    found = grpo_advantages(torch.tensor([1.0, 2.0, 3.0, 7.0, 7.0, 7.0], dtype=torch.float64), 3)
    assert found.tolist() == pytest.approx(
        [-1 / 1.0001, 0, 1 / 1.0001, 0, 0, 0]
    )  # std of 1, 2, 3 with n - 1 is 1
    assert not grpo_advantages(torch.full((8,), 0.7), 8).any()  # though their mean in float32 is not 0.7
    raw = grpo_advantages(torch.tensor([1.0, 2.0, 3.0]), 3, scale=False)
    assert raw.tolist() == [-1, 0, 1]


def test_whitening():
    x, mask = torch.tensor([[1.0, 2.0, 4.0, torch.nan]]), torch.tensor([[True, True, True, False]])
    white = whiten(x, mask)
    assert white[mask].mean().item() == pytest.approx(0, abs=1e-6)
    assert white[mask].std().item() == pytest.approx(1)
    assert white[0, 3] == 0
    alone = whiten(x, torch.tensor([[True, False, False, False]]))
    assert alone.tolist() == [[0, 0, 0, 0]]


def test_kl_estimates_are_unbiased():
    """Summed over the whole distribution, k1 and k3 are the KL itself; k3 varies less where both are close."""
    torch.manual_seed(0)
    policy = torch.randn(7, dtype=torch.float64).log_softmax(0)
    near = (policy + 0.1 * torch.randn(7, dtype=torch.float64)).log_softmax(0)
    kl = (policy.exp() * (policy - near)).sum().item()
    means, spread = {}, {}
    for kind in ("k1", "k2", "k3"):
        each = kl_estimate(policy, near, kind)
        means[kind] = (policy.exp() * each).sum().item()
        spread[kind] = (policy.exp() * (each - means[kind]) ** 2).sum().item()
    assert means["k1"] == pytest.approx(kl)
    assert means["k3"] == pytest.approx(kl)
    assert means["k2"] == pytest.approx(kl, rel=0.2)
    assert means["k2"] != pytest.approx(kl, rel=1e-6)
    assert spread["k3"] < 0.01 * spread["k1"]
    assert (kl_estimate(policy, near, "k3") >= 0).all()
    drawn = torch.multinomial(policy.exp(), 200_000, replacement=True)
    for kind in ("k1", "k3"):
        error = 4 * math.sqrt(spread[kind] / len(drawn))
        assert abs(kl_estimate(policy, near, kind)[drawn].mean().item() - kl) < error


one, yes = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: gae(one, one, yes.float()), "mask of booleans; got torch.float32"),
        (lambda: gae(one, one[:1], yes), "one shape"),
        (lambda: gae(one, one, yes, gamma=1.5), "gamma=1.5"),
        (lambda: gae(one, one, ~yes), "no token is inside"),
        (lambda: ppo_policy_loss(one, one, one[0], yes), "one shape"),
        (lambda: ppo_policy_loss(one, one, one, yes, clip=0.0), "clip=0.0"),
        (lambda: ppo_value_loss(one, one, one, yes, clip=-1.0), "clip=-1.0"),
        (lambda: grpo_loss(one, one, one, yes), r"one advantage per completion, \(2,\)"),
        (lambda: grpo_loss(one, one, one[:, 0], yes, beta=0.1), "give reference_logps"),
        (lambda: grpo_loss(one, one, one[:, 0], yes, aggregate="mean"), "'mean' is unknown"),
        (lambda: grpo_loss(one, one, one[:, 0], yes, aggregate="fixed"), "give length=, from 3; got None"),
        (lambda: grpo_loss(one, one, one[:, 0], yes, aggregate="fixed", length=2), "from 3; got 2"),
        (lambda: grpo_advantages(torch.zeros(4), 1), "group_size from 2"),
        (lambda: grpo_advantages(torch.zeros(4), 3), "group_size=3"),
        (lambda: grpo_advantages(torch.tensor([0.0, math.nan]), 2), "completion 1 is nan"),
        (lambda: kl_estimate(one, one, "k4"), "'k4' is unknown"),
    ],
)
def test_what_they_refuse(call, says):
    with pytest.raises(PeftlibError, match=says):
        call()
