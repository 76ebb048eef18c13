"""PPO and GRPO where the best policy is known; what they leave alone; stopping and going on; best of n."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import peftlib
from peftlib import LoRA, NewHead, PeftlibError
from peftlib.train import (
    AdaptiveKL,
    Balanced,
    Batches,
    NonFiniteError,
    RewardModel,
    best_of,
    causal_lm,
    fit,
    grpo,
    init_head,
    pad,
    ppo,
    roll_out,
)
from peftlib.train.online import check_shares
from peftlib.train.ppo import token_rewards
from tests.ranks import launch
from tests.train.rl import Chain, policy_and_value

ARMS = torch.tensor([0.0, 0.5, 1.0, 0.2])


def arm(prompts, completions):
    return [ARMS[ids[0]].item() for ids in completions]


def run_ppo(parts, reward=arm, *, rate=0.03, width=64, prompts=None, **settings):
    model, policy, value = parts
    settings = {"steps": 4, "sampling": {"max_new_tokens": 1}, "kl": 0.5, "minibatch": 32, **settings}
    return ppo(
        model,
        prompts or [[[0]] * width],
        reward,
        policy=policy,
        value=value,
        optimizer=torch.optim.Adam(policy.parameters(), lr=rate),
        value_optimizer=torch.optim.Adam(value.parameters(), lr=0.05),
        **settings,
    )


def run_grpo(parts, reward=arm, *, rate=0.03, prompts=None, **settings):
    model, policy, _ = parts
    settings = {"steps": 4, "sampling": {"max_new_tokens": 1}, **settings}
    return grpo(
        model,
        prompts or [[[0]] * 16],
        reward,
        policy=policy,
        optimizer=torch.optim.Adam(policy.parameters(), lr=rate),
        **settings,
    )


def test_ppo_finds_the_bandits_best_policy_under_a_kl():
    """The maximum of ``E[r] - b KL(p || q)`` is ``p ~ q exp(r / b)``."""
    parts = policy_and_value()
    model, policy, _ = parts
    with policy.disabled():
        reference = model.probabilities()
    history = run_ppo(parts, steps=60, width=128, epochs=2, minibatch=64)
    for group in (0.01, 0.003):
        history = run_ppo(parts, steps=30, width=256, rate=group, epochs=2, minibatch=128)
    best = (reference.log() + ARMS / 0.5).softmax(-1)
    assert (model.probabilities() - best).abs().max() < 0.04
    kl = (best * (best.log() - reference.log())).sum().item()
    assert history.last("objective/kl") == pytest.approx(kl, abs=0.1)


def test_grpo_finds_the_best_arm():
    parts = policy_and_value()
    history = run_grpo(parts, steps=40, beta=0.0)
    assert parts[0].probabilities()[2] > 0.95
    assert history.last("equal_groups") > 0.5  # all right: nothing more to learn, and it is said
    assert history.rows[0]["equal_groups"] == 0


def test_dr_grpo_under_a_kl_ends_where_its_gradient_is_zero():
    """Its k3 term, as a loss, pulls along the gradient of ``KL(q || p)``: compared with that optimum, found densely."""
    parts = policy_and_value()
    model, policy, _ = parts
    with policy.disabled():
        q = model.probabilities()
    for rate, steps in ((0.03, 40), (0.01, 30), (0.003, 30)):
        run_grpo(
            parts, steps=steps, beta=0.5, scale=False, aggregate="fixed", group_size=32, rate=rate,
        )  # fmt: skip
    logits = torch.zeros(4, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=200)

    def closure():
        optimizer.zero_grad()
        p = logits.softmax(-1)
        # among 32 the own reward is part of the mean, which shrinks the advantage by 31 / 32
        loss = -(p * ARMS).sum() * 31 / 32 + 0.5 * (q * (q.log() - p.log())).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert (model.probabilities() - logits.detach().softmax(-1)).abs().max() < 0.04


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_a_reward_at_the_end_of_a_chain_of_tokens_is_found(algorithm):
    """A token MDP: of 64 sequences one earns 1; what comes before is only right because of what follows."""
    parts = policy_and_value()
    way = {"steps": 60, "sampling": {"max_new_tokens": 3}}

    def reward(prompts, completions):
        right = [[a == b for a, b in zip(ids, (1, 2, 3), strict=True)] for ids in completions]
        return [0.25 * sum(row) + all(row) for row in right]

    run = (
        run_ppo(parts, reward, kl=0.0, **way)
        if algorithm == "ppo"
        else run_grpo(parts, reward, beta=0.0, **way)
    )
    assert run.last("objective/scores") > 1.6
    assert run.rows[0]["objective/scores"] < 0.7


@pytest.mark.parametrize("run", [run_ppo, run_grpo])
def test_the_first_ratio_is_one_and_the_base_is_untouched(run):
    parts = policy_and_value()
    model, policy, value = parts
    base = {k: v.clone() for k, v in model.state_dict().items() if "_peft" not in k}
    history = run(parts, sampling={"max_new_tokens": 3, "temperature": 0.7, "stop_ids": [3]})
    assert all(row["val/first_ratio"] == pytest.approx(1, abs=1e-6) for row in history.rows)
    assert history.rows[0]["objective/kl"] == pytest.approx(0, abs=1e-6)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in base.items())
    assert (policy.enabled, value.enabled) == (True, False)
    assert all(math.isfinite(x) for row in history.rows for x in row.values())
    names = {
        "objective/kl",
        "objective/entropy",
        "objective/scores",
        "policy/approxkl",
        "policy/clipfrac",
        "loss/policy",
        "val/ratio",
    }
    assert names | ({"loss/value"} if run is run_ppo else {"equal_groups"}) <= set(history.rows[0])


@pytest.mark.parametrize("run", [run_ppo, run_grpo])
def test_dropout_is_off_in_rollouts_and_updates(run):
    ends = []
    for dropout in (0.0, 0.9):
        model = Chain()
        torch.manual_seed(1)
        policy = peftlib.attach(model, {"1": LoRA(rank=4, dropout=dropout)}, name="policy")
        value = init_head(peftlib.attach(model, {"1": NewHead(1)}, name="value"))
        peftlib.use(model, "policy")
        model.train()
        history = run((model, policy, value), sampling={"max_new_tokens": 3})
        assert history.rows[0]["val/first_ratio"] == pytest.approx(1, abs=1e-6)
        assert model.training
        ends.append((policy.state_dict(), history))
    assert ends[0][0]["1.lora.b"].any()
    assert all(torch.equal(ends[1][0][k], v) for k, v in ends[0][0].items())
    assert ends[0][1] == ends[1][1]


def test_nothing_is_learned_from_groups_whose_rewards_are_equal_and_it_is_said():
    parts = policy_and_value()
    before = {k: v.clone() for k, v in parts[1].state_dict().items()}
    history = run_grpo(parts, lambda p, c: [0.7] * len(c), beta=0.0)
    assert [row["equal_groups"] for row in history.rows] == [1.0] * 4
    assert all(torch.equal(parts[1].state_dict()[k], v) for k, v in before.items())


@pytest.mark.parametrize("run", [run_ppo, run_grpo])
def test_rows_per_forward_change_nothing(run):
    ends = []
    for rows in (None, 5):
        parts = policy_and_value()
        for tuning in parts[1:]:
            for p in tuning.parameters():
                p.data = p.data.double()
        parts[0].double()
        run(parts, sampling={"max_new_tokens": 3, "stop_ids": [3]}, rows=rows, seed=5)
        ends.append(parts[1].state_dict())
    for key, value in ends[0].items():
        torch.testing.assert_close(ends[1][key], value, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_rewards_are_kl_per_token_and_the_score_at_the_last(kind):
    model, policy, _ = policy_and_value()
    nn.init.normal_(policy.state_dict()["1.lora.b"])
    done = roll_out(
        model,
        [[0], [1, 2]],
        lambda p, c: [2.0, 3.0],
        sampling={"max_new_tokens": 3, "stop_ids": [2]},
        missing_stop_penalty=1.5,
    )
    assert done.scores.tolist() == [2.0 - 1.5 * (not done.stopped[0]), 3.0 - 1.5 * (not done.stopped[1])]
    rewards = token_rewards(done, 0.1, kind)
    for row in range(2):
        n = int(done.mask[row].sum())
        kl = done.logps[row] - done.reference_logps[row]
        if kind == "k3":
            kl = (-kl).exp() - 1 + kl
        assert kl[:n].abs().max() > 0.01
        expected = [-0.1 * kl[t].item() + (done.scores[row].item() if t == n - 1 else 0) for t in range(n)]
        assert rewards[row, :n].tolist() == pytest.approx(expected, abs=1e-6)
        assert not rewards[row, n:].any()


def test_the_rate_follows_its_schedule():
    history = run_grpo(policy_and_value(), scheduler=lambda step, steps: 1 - step / steps, rate=0.04)
    assert [row["rate"] for row in history.rows] == pytest.approx([0.04, 0.03, 0.02, 0.01])


def test_the_kls_weight_follows_its_target():
    parts = policy_and_value()
    history = run_ppo(parts, kl=AdaptiveKL(start=0.1, target=0.01, horizon=64), rate=0.1, steps=6)
    weights = [w for _, w in history.column("objective/kl_weight")]
    assert weights[0] == 0.1
    for row, after in zip(history.rows, weights[1:], strict=False):
        error = min(max(row["objective/kl"] / 0.01 - 1, -0.2), 0.2)
        assert after == pytest.approx(row["objective/kl_weight"] * (1 + error))
    # however many completions an iteration has
    assert AdaptiveKL(start=0.1, target=6.0, horizon=100).after(
        0.1, kl=0.0, completions=512
    ) == pytest.approx(0.08)


# -- stopping and going on ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", [run_ppo, run_grpo])
def test_killed_and_resumed_equals_never_stopped(run, tmp_path):
    settings = {
        "sampling": {"max_new_tokens": 3, "stop_ids": [3]},
        "checkpoint_every": 2,
        "seed": 3,
    }
    if run is run_ppo:
        settings["kl"] = AdaptiveKL(start=0.1, target=0.01, horizon=64)

    def prompts():
        return Batches([[0], [1], [2], [1, 2], [0, 0]], 2, seed=1)

    whole = policy_and_value()
    expected = run(whole, prompts=prompts(), steps=7, checkpoint_dir=tmp_path / "whole", **settings)

    def dies(row):
        if row["step"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(
            policy_and_value(),
            prompts=prompts(),
            steps=7,
            checkpoint_dir=tmp_path / "cut",
            callbacks=[dies],
            **settings,
        )
    # other values, until those of the checkpoint are read
    again = policy_and_value(seed=0)
    nn.init.normal_(again[1].state_dict()["1.lora.b"])
    found = run(again, prompts=prompts(), steps=7, checkpoint_dir=tmp_path / "cut", resume=True, **settings)
    assert found == expected
    for one, other in zip(whole[1:], again[1:], strict=True):
        if run is run_ppo or one.name == "policy":
            assert all(torch.equal(other.state_dict()[k], v) for k, v in one.state_dict().items())
    assert len((tmp_path / "cut" / "log.jsonl").read_text().splitlines()) == 7


def test_ppo_does_not_go_on_with_what_grpo_began(tmp_path):
    run_grpo(policy_and_value(), steps=1, checkpoint_dir=tmp_path)
    with pytest.raises(PeftlibError, match="algorithm='grpo', not 'ppo'"):
        run_ppo(policy_and_value(), steps=2, checkpoint_dir=tmp_path, resume=True)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reward, says",
    [
        (lambda p, c: [math.nan] * len(c), "gave nan for completion 0"),
        (lambda p, c: [0.0], r"shape \(1,\) for 64 completions"),
        (lambda p, c: torch.zeros(len(c), 1), r"shape \(64, 1\)"),
        (lambda p, c: 1.0, r"shape \(\)"),
        (lambda p, c: ["good"] * len(c), "no list of numbers"),
        (lambda p, c: None, "NoneType"),
    ],
)
def test_rewards_that_are_no_numbers(reward, says):
    parts = policy_and_value()
    before = {k: v.clone() for k, v in parts[1].state_dict().items()}
    with pytest.raises(PeftlibError, match=says):
        run_ppo(parts, reward)
    assert all(torch.equal(parts[1].state_dict()[k], v) for k, v in before.items())
    assert parts[1].enabled


@pytest.mark.parametrize(
    "run, settings, says",
    [
        (run_ppo, {"steps": 0}, "steps=0"),
        (run_ppo, {"epochs": 0}, "epochs=0"),
        (run_ppo, {"minibatch": 0}, "minibatch=0"),
        (run_ppo, {"kl_kind": "k2"}, "kl_kind='k2'"),
        (run_ppo, {"reference": ("policy",)}, "policy and its reference are the same"),
        (run_ppo, {"reference": "policy"}, "sequence of names"),
        (run_ppo, {"sampling": {"max_new_tokens": 1, "temperature": 0.0}}, "a policy is explored by drawing"),
        (run_grpo, {"group_size": 1}, "group_size=1"),
        (run_grpo, {"parallel": "fsdp"}, "gather every weight for every token"),
        (run_grpo, {"resume": True}, "needs the checkpoint_dir="),
    ],
)
def test_settings_that_make_no_sense(run, settings, says):
    with pytest.raises(PeftlibError, match=says):
        run(policy_and_value(), **settings)


def test_tunings_and_optimizers_that_do_not_go_together():
    model, policy, value = policy_and_value()
    good = {"steps": 1, "sampling": {"max_new_tokens": 1}}
    adam = torch.optim.Adam
    with pytest.raises(PeftlibError, match="optimizer of the policy holds 2 parameter"):
        ppo(
            model, [[[0]]], arm, policy=policy, value=value, optimizer=adam(value.parameters()),
            value_optimizer=adam(value.parameters()), **good,
        )  # fmt: skip
    peftlib.use(model, "policy", "value")
    with pytest.raises(PeftlibError, match=r"not \['value'\]. Call peftlib.use"):
        run_ppo((model, policy, value))
    peftlib.use(model)
    with pytest.raises(PeftlibError, match="needs 'policy' among them"):
        run_grpo((model, policy, value))
    with pytest.raises(PeftlibError, match="not a tuning of this Chain"):
        run_grpo((Chain(), policy, value))
    plain = peftlib.attach(model, LoRA(rank=1), targets=["1"], name="no-head")
    peftlib.use(model, "policy")
    with pytest.raises(PeftlibError, match="NewHead\\(1\\)"):
        run_ppo((model, policy, plain))


def test_a_gradient_that_is_no_number_stops_and_changes_nothing():
    parts = policy_and_value()
    before = {k: v.clone() for k, v in parts[1].state_dict().items()}
    for p in parts[1].parameters():
        p.register_hook(lambda g: g * math.nan)
    with pytest.raises(NonFiniteError, match="gradient of the policy is not finite") as caught:
        run_ppo(parts)
    assert len(caught.value.batches[0].scores) == 64
    assert all(torch.equal(parts[1].state_dict()[k], v) for k, v in before.items())
    assert caught.value.step == 0


def test_the_error_names_the_iteration_in_which_a_gradient_was_no_number():
    parts, seen = policy_and_value(), []

    def third(gradient):
        seen.append(gradient)
        return gradient * (math.nan if len(seen) == 3 else 1)

    next(iter(parts[1].parameters())).register_hook(third)
    with pytest.raises(NonFiniteError) as caught:
        run_grpo(parts)
    assert caught.value.step == 2


# -- a learned reward, best of n ---------------------------------------------------------------------------------------


def test_four_models_are_one_base_and_three_tunings():
    model, policy, value = policy_and_value()
    reward = init_head(peftlib.attach(model, {"1": NewHead(1)}, name="reward"))
    with torch.no_grad():
        reward.state_dict()["1.newhead.weight"].copy_(ARMS @ torch.eye(4, 8)[None])
    peftlib.use(model, "policy")
    history = run_ppo((model, policy, value), RewardModel(reward), steps=25, kl=0.0)
    assert history.last("objective/scores") > 0.9
    assert model.probabilities()[2] > 0.8


def test_the_best_of_n_and_fine_tuning_on_it():
    model, policy, _ = policy_and_value()
    torch.manual_seed(0)
    found = best_of(model, [[0], [0, 0]], arm, 16, max_new_tokens=1)
    assert [best.reward for best in found] == [1.0, 1.0]
    assert all(best.mean < 1 for best in found)
    assert found[1].example.ids == [0, 0, 2]
    assert found[1].example.labels == [-100, -100, 2]
    batch = pad([best.example for best in found], 0)
    fit(model, [batch], causal_lm, optimizer=torch.optim.Adam(policy.parameters(), lr=0.1), steps=20)
    assert model.probabilities()[2] > 0.8
    with pytest.raises(PeftlibError, match="n=0"):
        best_of(model, [[0]], arm, 0, max_new_tokens=1)
    with pytest.raises(PeftlibError, match="rows=0"):
        best_of(model, [[0]], arm, 2, rows=0, max_new_tokens=1)
    with pytest.raises(PeftlibError, match="n=3 completions at temperature=0 are one and the same"):
        best_of(model, [[0]], arm, 3, max_new_tokens=1, temperature=0)
    assert len(best_of(model, [[0]], arm, 1, max_new_tokens=1, temperature=0)) == 1
    # where all earn the same, choosing told nothing
    found = best_of(model, [[0]], lambda p, c: [0.1] * len(c), 6, max_new_tokens=1)
    assert found[0].reward == found[0].mean


def test_the_best_of_n_drawn_in_parts():
    seen = []

    def reward(prompts, completions):
        return [float(ids[0]) for ids in completions]

    class Watched(Chain):
        def forward(self, ids):
            seen.append(len(ids))
            return super().forward(ids)

    found = best_of(Watched(), [[0], [1, 2]], reward, 6, rows=5, max_new_tokens=1)
    assert seen == [5, 5, 2]
    assert [best.example.ids[:-1] for best in found] == [[0], [1, 2]]


# -- several processes -------------------------------------------------------------------------------------------------

TOGETHER = """
import os, sys, torch, torch.distributed as dist
from peftlib.train import Batches, dpo, fit, grpo, pad_pairs, ppo
from tests.train.rl import policy_and_value
from tests.train.test_online import arm
from tests.train.test_preference import pairs

rank, world, place = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{place}/meet", rank=rank, world_size=world)
for algorithm in ("ppo", "grpo"):
    model, policy, value = policy_and_value(seed=rank)  # the first one's values count
    adam, prompts = torch.optim.Adam(policy.parameters(), lr=0.03), Batches([[0]] * 64, 64)
    settings = dict(steps=12, sampling={"max_new_tokens": 1}, parallel="ddp", checkpoint_dir=f"{place}/{algorithm}")
    if algorithm == "ppo":
        found = ppo(
            model, prompts, arm, policy=policy, value=value, optimizer=adam, kl=0.0, minibatch=16,
            value_optimizer=torch.optim.Adam(value.parameters(), lr=0.05), **settings,
        )
    else:
        found = grpo(model, prompts, arm, policy=policy, optimizer=adam, beta=0.0, group_size=2, **settings)
    row = found.rows[0]
    print(row["completions"], row["targets"], found.rows[0]["objective/scores"], found.last("objective/scores"))
    print([round(x, 6) for p in policy.parameters() for x in p.flatten().tolist()])
"""


def test_two_processes_improve_one_policy(tmp_path):
    first, second = launch(TOGETHER, 2, tmp_path)
    assert first == second  # the same numbers and the same values, though each drew its own completions
    numbers = [[float(x) for x in line.split()] for line in first.splitlines()[::2]]
    for (completions, _, before, after), expected in zip(numbers, (64, 128), strict=True):
        assert completions == expected
        assert after > before + 0.15


def test_prompts_that_processes_cannot_share_are_refused():
    check_shares(Batches([[0]] * 8, 4), 2)
    with pytest.raises(PeftlibError, match="Batches of 3 from 9 prompts an epoch leave some of 2 processes"):
        check_shares(Batches([[0]] * 9, 3), 2)
    # what counts is how many an epoch draws
    with pytest.raises(PeftlibError, match="Batches of 4 from 5 prompts an epoch"):
        check_shares(Batches([[0]] * 8, 4, sampler=Balanced([1.0] * 8, draws=5)), 2)
    with pytest.raises(PeftlibError, match="got list"):
        check_shares([[[0]]], 2)
