"""Our losses against the code of TRL's trainers, run on the same log-probabilities; values and gradients.

Not ``gae``, ``ppo_policy_loss`` and ``ppo_value_loss``: TRL 1 has no stable PPO trainer to compare with. Their formulas
are held by twins written out token by token, in ``test_policy``.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from peftlib.train import dpo_loss, grpo_advantages, grpo_loss, kto_loss, reward_loss

pytest.importorskip("trl")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what its dependencies deprecate is not ours
    from trl.trainer.dpo_trainer import DPOTrainer
    from trl.trainer.grpo_trainer import GRPOTrainer
    from trl.trainer.kto_trainer import KTOTrainer
    from trl.trainer.reward_trainer import RewardTrainer

B, T = 3, 5


def trainer(**settings):
    """A stand-in for a trainer: these attributes, one process; whatever else it is asked for is for its logs."""
    same = MagicMock(num_processes=1, device="cpu")
    for name in ("gather", "gather_for_metrics", "reduce"):
        getattr(same, name).side_effect = lambda x, **_: x
    one = MagicMock(accelerator=same, _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0)
    one.model.training = False
    for name, value in settings.items():
        setattr(one, name, value)
    return one


def numbers(*shape, seed=0):
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made.requires_grad_()


def a_mask(rows):
    lengths = torch.arange(rows) % (T - 1) + 2
    return torch.arange(T) < lengths[:, None]


def outputs(logps):
    """What TRL's models give; only the log-probabilities count for the loss."""
    one = torch.ones_like(logps)
    return SimpleNamespace(log_probs=logps, entropy=one, mean_logits=one, is_top1=one > 0)


def agree(ours, theirs, *leaves):
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    for mine, other in zip(
        torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["sigmoid", "hinge", "ipo"])
def test_dpo(kind):
    mask = a_mask(2 * B)
    logps, there = numbers(2 * B, T), numbers(2 * B, T, seed=1).detach()
    inputs = {
        "completion_mask": torch.cat((torch.zeros(2 * B, 1, dtype=torch.long), mask.long()), 1),
        "input_ids": torch.ones(2 * B, T + 1, dtype=torch.long),
        "attention_mask": torch.ones(2 * B, T + 1, dtype=torch.long),
        "ref_chosen_logps": (there * mask).sum(1)[:B],
        "ref_rejected_logps": (there * mask).sum(1)[B:],
    }
    one = trainer(
        aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl", beta=0.3,
        loss_types=[kind], loss_weights=[1.0], label_smoothing=0.0, use_weighting=False,
    )  # fmt: skip
    theirs = DPOTrainer._compute_loss(one, lambda **_: outputs(logps * mask), inputs, False)
    size = mask.sum(1) if kind == "ipo" else 1
    here, far = (logps * mask).sum(1) / size, (there * mask).sum(1) / size
    agree(dpo_loss(*here.chunk(2), *far.chunk(2), beta=0.3, kind=kind), theirs, logps)


@pytest.mark.parametrize("kl", [0.0, 1.5])
def test_kto(kl):
    mask = a_mask(B)
    logps, there = numbers(B, T), numbers(B, T, seed=1).detach()
    desirable = torch.tensor([True, False, True])
    inputs = {
        "label": desirable,
        "completion_mask": torch.cat((torch.zeros(B, 1, dtype=torch.long), mask.long()), 1),
        "input_ids": torch.ones(B, T + 1, dtype=torch.long),
        "attention_mask": torch.ones(B, T + 1, dtype=torch.long),
        "ref_logps": (there * mask).sum(1),
        "ref_KL_logps": torch.zeros(B, dtype=torch.float64),
    }
    one = trainer(
        aux_loss_enabled=False, precompute_ref_logps=True, calculate_KL=True, beta=0.3, loss_type="kto",
        desirable_weight=1.5, undesirable_weight=0.5, _compute_kl_logps=lambda *_: torch.full((B,), kl).double(),
    )  # fmt: skip
    theirs = KTOTrainer._compute_loss(one, lambda **_: outputs(logps * mask), inputs, False)
    ours = kto_loss((logps * mask).sum(1), (there * mask).sum(1), desirable, kl, 0.3, 1.5, 0.5)
    agree(ours, theirs, logps)


@pytest.mark.parametrize("margin", [False, True])
def test_reward(margin):
    scores, gap = numbers(2 * B), torch.tensor([0.5, 0.0, 1.0], dtype=torch.float64)
    inputs = {"attention_mask": torch.ones(2 * B, T), **({"margin": gap} if margin else {})}
    one = trainer(args=SimpleNamespace(center_rewards_coefficient=0.01), aux_loss_enabled=False)
    theirs = RewardTrainer.compute_loss(one, lambda **_: SimpleNamespace(logits=scores[:, None]), inputs)
    agree(reward_loss(*scores.chunk(2), margin=gap if margin else None, centering=0.01), theirs, scores)


@pytest.mark.parametrize(
    "loss_type, aggregate", [("grpo", "sequence"), ("bnpo", "token"), ("dr_grpo", "fixed")]
)
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_grpo(loss_type, aggregate, beta):
    mask = a_mask(4)
    logps, old, there = numbers(4, T), numbers(4, T, seed=1).detach(), numbers(4, T, seed=2).detach()
    advantages = grpo_advantages(torch.tensor([1.0, 0.0, 3.0, -2.0], dtype=torch.float64), 2)
    inputs = {
        "prompt_ids": torch.ones(4, 2), "prompt_mask": torch.ones(4, 2), "completion_ids": torch.ones(4, T),
        "completion_mask": mask.long(), "advantages": advantages, "old_per_token_logps": old,
        "ref_per_token_logps": there,
    }  # fmt: skip
    one = trainer(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, torch.ones_like(logps), None),
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, importance_sampling_level="token", beta=beta,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None), loss_type=loss_type, epsilon_low=0.2,
        epsilon_high=0.28, use_vllm=False, _entropy_bonus_enabled=False, max_completion_length=7,
        aux_loss_enabled=False, router_aux_loss_coef=0.0,
    )  # fmt: skip
    theirs = GRPOTrainer._compute_loss(one, None, inputs)
    ours = grpo_loss(
        logps, old, advantages, mask, reference_logps=there, beta=beta, clip_high=0.28, aggregate=aggregate, length=7
    )  # fmt: skip
    agree(ours, theirs, logps)
