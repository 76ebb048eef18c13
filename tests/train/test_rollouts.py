"""What a rollout and an update may not do unnoticed: another policy, another distribution, gradients elsewhere."""

from __future__ import annotations

import importlib
import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import peftlib
from peftlib import LoRA, NewHead, PeftlibError, train
from peftlib.train import Batches, Rollout, grpo_advantages, init_head, kl_estimate, roll_out, whiten
from peftlib.train.parallel import ALONE
from peftlib.train.tally import Tally
from tests.ranks import launch
from tests.train.rl import Chain, policy_and_value
from tests.train.test_online import arm, run_grpo, run_ppo


def moved(parts, before):
    return max((parts[1].state_dict()[k] - v).abs().max().item() for k, v in before.items())


def values(tuning):
    return {k: v.clone() for k, v in tuning.state_dict().items()}


# -- nothing is learned from equal rewards -----------------------------------------------------------------------------


@pytest.mark.parametrize("reward", [0.1, -1.3, 1000.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_have_no_advantage_at_all(reward, dtype):
    for size in range(2, 20):
        assert not grpo_advantages(torch.full((size,), reward, dtype=dtype), size).any()
        equal = torch.full((size, 3), reward, dtype=dtype)
        assert not whiten(equal, torch.ones(size, 3, dtype=torch.bool)).any()


@pytest.mark.parametrize("reward", [0.1, -1.3, 1000.1])
def test_adam_does_not_move_on_equal_rewards(reward):
    parts = policy_and_value()
    before = values(parts[1])
    history = run_grpo(parts, lambda p, c: [reward] * len(c), beta=0.0, steps=5, group_size=8)
    assert history.last("equal_groups") == 1
    assert moved(parts, before) == 0


# -- the policy that drew is the one that is trained -------------------------------------------------------------------


class TwoWays(nn.Module):
    """Sees what comes after a position, or does not."""

    def __init__(self, causal):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head, self.causal = nn.Embedding(8, 16), nn.Linear(16, 8), causal

    def forward(self, ids):
        x = self.embed(ids)
        steps = torch.arange(1, ids.shape[1] + 1)[:, None]
        mean = x.cumsum(1) / steps if self.causal else x.mean(1, keepdim=True)
        return self.head(x + 3 * mean)


@pytest.mark.parametrize("causal", [True, False])
def test_a_model_that_is_not_causal_is_noticed(causal):
    model = TwoWays(causal)
    policy = peftlib.attach(model, LoRA(rank=2), targets=["head"], name="policy")

    def reward(prompts, completions):
        return [float(ids[0] == 2) for ids in completions]

    run = {
        "reward": reward,
        "prompts": [[[1, 2], [3, 4, 5, 6]]],
        "sampling": {"max_new_tokens": 5, "pad_id": 7},
    }
    if causal:
        assert run_grpo((model, policy, None), **run).last("val/first_ratio_gap") < 1e-5
    else:
        with pytest.raises(
            PeftlibError, match=r"differ from those they were drawn with.*TwoWays is not causal"
        ):
            run_grpo((model, policy, None), **run)


@pytest.mark.parametrize("size", [0.01, 0.1, 3.0])
def test_a_random_forward_is_noticed(size):
    class Moody(Chain):
        def forward(self, ids):
            x = super().forward(ids)
            return x + size * torch.randn_like(x)

    model = Moody()
    policy = peftlib.attach(model, {"1": LoRA(rank=2)}, name="policy")
    with pytest.raises(PeftlibError, match=r"forward is random|changes between two forwards"):
        run_grpo((model, policy, None), sampling={"max_new_tokens": 4})


def done(logps):
    zero = torch.zeros(1, 4)
    return Rollout(
        ids=zero.long(), prompt_lengths=torch.tensor([1]), completions=zero.long(), mask=zero == 0, logps=logps,
        reference_logps=zero, entropy=zero, raw_scores=torch.zeros(1), scores=torch.zeros(1),
        stopped=torch.ones(1, dtype=torch.bool),
    )  # fmt: skip


def test_what_is_clipped_is_counted_by_both_bounds():
    tally, zero = Tally(0.2, 0.28, 1e-3), torch.zeros(1, 4)
    tally.add(1.0, zero, done(zero), {})
    tally.add(1.0, torch.tensor([[1.25, 1.3, 0.9, 0.7]]).log(), done(zero), {})
    assert [row["policy/clipfrac"] for _, row in tally.rows] == [0, 0.5]
    # deviations that cancel in the mean are seen in the largest
    tally = Tally(0.2, 0.2, 1e-2)
    tally.add(1.0, torch.tensor([[1.005, 0.995, 1.005, 0.995]]).log(), done(zero), {})
    found = tally.means(ALONE)
    assert found["val/first_ratio"] == pytest.approx(1, abs=1e-6)
    assert found["val/first_ratio_gap"] == pytest.approx(0.005, rel=1e-3)


def test_gradients_go_to_what_is_trained_alone():
    model = Chain()
    sft = peftlib.attach(model, {"1": LoRA(rank=2)}, name="sft")
    nn.init.normal_(sft.state_dict()["1.lora.b"])
    policy = peftlib.attach(model, {"1": LoRA(rank=2)}, name="policy")
    value = init_head(peftlib.attach(model, {"1": NewHead(1)}, name="value"))
    peftlib.use(model, "sft", "policy")
    before = values(policy)
    run_ppo((model, policy, value), reference=("sft",), steps=2)
    run_grpo((model, policy, value), reference=("sft",), steps=2)
    assert moved((model, policy), before) > 0
    assert all(p.requires_grad and p.grad is None for p in sft.parameters())


# -- the log -----------------------------------------------------------------------------------------------------------


def test_scores_are_logged_with_and_without_the_penalty():
    model, _, _ = policy_and_value()
    made = roll_out(
        model, [[0]] * 50, lambda p, c: [2.0] * len(c), sampling={"max_new_tokens": 1, "stop_ids": [1]},
        missing_stop_penalty=1.0,
    )  # fmt: skip
    numbers = made.numbers()
    assert numbers["objective/raw_scores"] == 2
    assert 0 < numbers["stopped"] < 1
    assert numbers["objective/scores"] == pytest.approx(1 + numbers["stopped"])


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_the_rlhf_reward_is_the_score_less_the_penalty_that_was_paid(kind, monkeypatch):
    import sys

    seen = []
    monkeypatch.setattr(
        sys.modules["peftlib.train.ppo"],
        "roll_out",
        lambda *a, **k: seen.append(roll_out(*a, **k)) or seen[-1],
    )
    parts = policy_and_value()
    nn.init.normal_(parts[1].state_dict()["1.lora.b"])
    history = run_ppo(parts, kl=0.5, kl_kind=kind, steps=1, sampling={"max_new_tokens": 3})
    paid = 0.5 * kl_estimate(seen[0].logps, seen[0].reference_logps, kind).sum(1).mean()
    expected = (seen[0].scores.mean() - paid).item()
    assert history.last("objective/rlhf_reward") == pytest.approx(expected, abs=1e-5)


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "run, settings, says",
    [
        (run_grpo, {"clip_norm": -1.0}, "clip_norm=-1.0: give a number above 0 or None"),
        (run_grpo, {"clip_norm": 0.0}, "clip_norm=0.0"),
        (run_grpo, {"beta": -1.0}, "beta=-1.0: give a number from 0"),
        (run_grpo, {"aggregate": "mean"}, "aggregate='mean': give one of 'token', 'sequence', 'fixed'"),
        (run_grpo, {"clip_high": 0.0}, "clip_high=0.0"),
        (run_ppo, {"kl": -0.5}, "kl=-0.5"),
        (run_ppo, {"kl": math.nan}, "kl=nan"),
        (run_ppo, {"gamma": 1.5}, "gamma=1.5"),
        (run_ppo, {"clip": 0}, "clip=0"),
        (run_ppo, {"value_clip": -1}, "value_clip=-1"),
        (run_ppo, {"missing_stop_penalty": -3}, "missing_stop_penalty=-3"),
        (run_ppo, {"missing_stop_penalty": 1}, "no stop_ids= in sampling"),
        (run_ppo, {"sampling": {"max_new_tokens": 1, "top_k": 1}}, "top_k=1 draws from another distribution"),
        (run_ppo, {"sampling": {"max_new_tokens": 1, "top_p": 0.9}}, "top_p=0.9 draws from another"),
        (run_ppo, {"sampling": {"max_new_tokens": 1, "temperature": None}}, "temperature=None"),
        (run_ppo, {"sampling": {"max_new_tokens": 1, "stop_ids": 3}}, "stop_ids=3: give a collection"),
        (
            run_grpo,
            {"sampling": {"max_new_tokens": 1, "generator": torch.Generator()}},
            "no checkpoint keeps",
        ),
    ],
)
def test_settings_are_refused_before_the_first_rollout(run, settings, says):
    def reward(prompts, completions):
        raise AssertionError("drawn already")

    with pytest.raises(PeftlibError, match=says):
        run(policy_and_value(), reward, **settings)


def test_a_frozen_policy_is_refused(tmp_path):
    model = Chain()
    saved = peftlib.attach(model, {"1": LoRA(rank=2)}, name="policy")
    saved.save(tmp_path / "policy.safetensors")
    saved.detach()
    frozen = peftlib.load(model, tmp_path / "policy.safetensors", trainable=False)
    with pytest.raises(PeftlibError, match=r"'policy' is frozen .* trainable=True"):
        run_grpo((model, frozen, None))


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 1},
        {"kl": 5.0},
        {"gamma": 0.5},
        {"clip": 0.01},
        {"missing_stop_penalty": 3.0},
        {"sampling": 2},
    ],
)
def test_a_training_goes_on_with_the_settings_it_had(change, tmp_path):
    def run(steps, **changed):
        settings = {"sampling": {"max_new_tokens": 3, "stop_ids": {3}}, "steps": steps, **changed}
        return run_ppo(
            policy_and_value(), arm, prompts=Batches([[0], [1]], 2), checkpoint_dir=tmp_path, **settings
        )

    run(1)
    if "sampling" in change:
        change = {"sampling": {"max_new_tokens": 2, "stop_ids": {3}}}
    with pytest.raises(PeftlibError, match=f"was trained with {next(iter(change))}="):
        run(2, resume=True, **change)
    assert len(run(2, resume=True).rows) == 2


def test_a_training_goes_on_with_the_base_it_had(tmp_path):
    settings = {"sampling": {"max_new_tokens": 1}, "checkpoint_dir": tmp_path}
    run_ppo(policy_and_value(), steps=1, **settings)
    with pytest.raises(PeftlibError, match="was trained with base="):
        run_ppo(policy_and_value(seed=9), steps=2, resume=True, **settings)
    run_ppo(policy_and_value(), steps=2, resume=True, **settings)


def test_a_value_may_stand_on_another_tuning():
    model = Chain()
    sft = peftlib.attach(model, {"0": LoRA(rank=2)}, name="sft")
    nn.init.normal_(sft.state_dict()["0.lora.b"])
    policy = peftlib.attach(model, {"1": LoRA(rank=2)}, name="policy")
    value = init_head(peftlib.attach(model, {"1": NewHead(1)}, name="value"))
    peftlib.use(model, "sft", "policy")
    seen = set()
    value.state_dict()
    model[1].register_forward_pre_hook(
        lambda *_: seen.add(tuple(n for n, t in peftlib.tunings(model).items() if t.enabled))
    )
    run_ppo((model, policy, value), reference=("sft",), value_under=("sft",), steps=1)
    assert seen == {("sft", "policy"), ("sft",), ("sft", "value")}
    assert all(p.grad is None for p in sft.parameters())


def test_code_named_beside_equations_is_there():
    page = (Path(__file__).parents[2] / "docs" / "rlhf.md").read_text(encoding="utf-8")
    named = re.findall(r"`train\.(\w+)`", page)
    assert {"gae", "kto_loss", "grpo_advantages", "kl_estimate"} <= set(named)
    assert [name for name in named if not hasattr(train, name)] == []
    for name, file in re.findall(r"`(\w+)` in `peftlib/train/(\w+)\.py`", page):
        assert hasattr(importlib.import_module(f"peftlib.train.{file}"), name)


# -- several processes -------------------------------------------------------------------------------------------------

SHARED = """
import sys, torch, torch.distributed as dist
from peftlib.train import Batches, Generated, completion_logps, grpo, ppo
from tests.train.rl import policy_and_value

rank, world, place = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if world > 1:
    dist.init_process_group("gloo", init_method=f"file://{place}/meet", rank=rank, world_size=world)

def drawn(model, prompts, **settings):
    made, seen = [], {}
    for prompt in prompts:  # completions of a prompt and its turn alone, of 1 to 4 tokens
        turn = seen[tuple(prompt)] = seen.get(tuple(prompt), 0) + 1
        generator = torch.Generator().manual_seed(prompt[0] + 4 * prompt[1] + 16 * turn)
        made.append(torch.randint(0, 4, (1 + (prompt[0] + turn) % 4,), generator=generator))
    pad = lambda rows: torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in made])
    completions, steps = pad(made), torch.arange(int(lengths.max()))
    found = Generated(
        ids=pad([torch.cat((torch.tensor(p), row)) for p, row in zip(prompts, made)]), mask=steps < lengths[:, None],
        prompt_lengths=torch.tensor([len(p) for p in prompts]), completions=completions, cached=False,
        logps=torch.zeros(completions.shape), stopped=lengths < 3,
    )
    found.logps.copy_(completion_logps(model, found)[0].detach())
    return found

sys.modules["peftlib.train.rollouts"].generate = drawn
prompts = [[i, j] for i in range(4) for j in range(2)]
reward = lambda p, c: [float(sum(ids)) * (1 + prompt[0]) for prompt, ids in zip(p, c)]
for algorithm in ("ppo", "token", "sequence", "fixed"):
    model, policy, value = policy_and_value()
    model.double()
    sgd = lambda tuning: torch.optim.SGD(tuning.parameters(), lr=0.1)
    common = dict(
        policy=policy, optimizer=sgd(policy), steps=2, sampling={"max_new_tokens": 5, "stop_ids": [3]},
        parallel="ddp" if world > 1 else None, clip_norm=None, missing_stop_penalty=0.5,
    )
    batches = Batches(prompts, 8, shuffle=False)
    if algorithm == "ppo":
        found = ppo(model, batches, reward, value=value, value_optimizer=sgd(value), epochs=2, **common)
    else:
        found = grpo(model, batches, reward, group_size=3, aggregate=algorithm, epochs=2, **common)
    numbers = [x for row in found.rows for _, x in sorted(row.items())]
    print([f"{x:.5f}" for x in numbers])
    print([f"{x:.6f}" for tuning in (policy, value) for p in tuning.parameters() for x in p.flatten().tolist()])
"""


def test_two_processes_are_one(tmp_path):
    """With completions that the prompt decides: the same values and the same log, whoever has which rows."""
    (alone,), (first, second) = launch(SHARED, 1, tmp_path), launch(SHARED, 2, tmp_path)
    assert first == second == alone


FAILS = """
import sys, torch, torch.distributed as dist
from peftlib.train import Batches, grpo
from tests.train.rl import policy_and_value

rank, world, place = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{place}/meet", rank=rank, world_size=world)
model, policy, _ = policy_and_value()
try:
    grpo(
        model, Batches([[0]] * 8, 4), lambda p, c: [float("nan") if rank else 0.0] * len(c), policy=policy,
        optimizer=torch.optim.SGD(policy.parameters(), lr=0.1), steps=3, sampling={"max_new_tokens": 1}, parallel="ddp",
    )
except Exception as error:
    print(error)
"""


def test_a_reward_that_fails_on_one_process_ends_all(tmp_path):
    first, second = launch(FAILS, 2, tmp_path)
    assert "1 of 2 processes failed in a rollout" in first
    assert "gave nan for completion 0" in second
