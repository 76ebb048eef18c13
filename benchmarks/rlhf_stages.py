"""The stages of the RLHF run, each a function: SFT, pairs, the reward model, DPO, PPO and GRPO, and a look at a policy.

All act on one model, with a tuning for each role.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

import peftlib
from benchmarks.gpt import GPTConfig
from benchmarks.progress import Progress
from benchmarks.python_lines import NEWLINE, Line, truth
from benchmarks.rlhf_report import SAMPLES
from peftlib import LoRA, NewHead, Tuning, use
from peftlib.train import (
    Batches,
    Encoded,
    Pair,
    RewardModel,
    causal_lm,
    completion_logps,
    dpo,
    fit,
    generate,
    grpo,
    init_head,
    linear,
    pad,
    pad_pairs,
    ppo,
    reward_accuracy,
    reward_model,
)
from peftlib.train.losses import IGNORE

SAMPLING: dict[str, Any] = {
    "max_new_tokens": 24,
    "stop_ids": [NEWLINE],
    "pad_id": NEWLINE,
    "drop_ended": True,
}
GROUP = 8
"""Completions of a prompt that GRPO compares."""
Ids = list[int]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a run spends.

    Attributes:
        gpt: the model.
        pretrain_steps, batch, context, pretrain_rate: its pretraining, see :func:`benchmarks.lm.pretrained`.
        sft_steps, sft_batch: lines of code completed.
        drawn: prompts that the SFT model completes for pairs, each `tries` times.
        tries: completions of each.
        reward_steps, dpo_steps: of `pairs` pairs each.
        ppo_steps, grpo_steps: iterations of `completions` completions each.
        held_out: prompts that the policies are judged on.
        seeds: runs after SFT.
    """

    gpt: GPTConfig = GPTConfig(width=128, layers=3, heads=4)  # noqa: RUF009 (frozen)
    pretrain_steps: int = 500
    pretrain_rate: float = 3e-3
    batch: int = 8
    context: int = 96
    sft_steps: int = 400
    sft_batch: int = 32
    drawn: int = 320
    tries: int = 6
    pairs: int = 32
    reward_steps: int = 70
    dpo_steps: int = 60
    ppo_steps: int = 24
    grpo_steps: int = 24
    completions: int = 64
    held_out: int = 384
    seeds: int = 3


def ids(text: str) -> Ids:
    return list(text.encode())


def completed(prompt: Ids, completion: Ids) -> Encoded:
    """Both, of which the completion is trained."""
    return Encoded(prompt + completion, [IGNORE] * len(prompt) + completion)


def tuned(model: nn.Module, name: str, *, head: bool = False) -> Tuning:
    """A fresh LoRA; with a head of one number, if it is to judge."""
    method = LoRA(rank=8, alpha=16, head={"head": NewHead(1)} if head else None)
    tuning = peftlib.attach(model, method, name=name)
    return init_head(tuning) if head else tuning


def adam(tuning: Tuning, rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(tuning.parameters(), lr=rate, weight_decay=0, eps=1e-5)


def follow(progress: Progress, what: str, number: str) -> dict[str, Any]:
    """What every training here has in common."""
    return {
        "scheduler": linear,
        "callbacks": [lambda row: progress.step(f"{what} {row[number]:.3f}")],
        "progress": False,
    }


def sft(model: nn.Module, train: Sequence[Line], budget: Budget, progress: Progress) -> Tuning:
    """A LoRA that completes lines as their authors did."""
    tuning = tuned(model, "sft")
    examples = [completed(ids(line.prompt), ids(line.rest + "\n")) for line in train]
    batches = Batches(examples, budget.sft_batch, partial(pad, pad_id=NEWLINE))
    optimizer = torch.optim.AdamW(tuning.parameters(), lr=3e-3)
    more = follow(progress, "sft", "loss")
    fit(model, batches, causal_lm, optimizer=optimizer, steps=budget.sft_steps, **more)
    return tuning


def preferences(model: nn.Module, prompts: Sequence[Ids], tries: int) -> list[Pair]:
    """Of each prompt as many pairs as there are completions of both kinds: one that parses and one that does not."""
    repeated = [prompt for prompt in prompts for _ in range(tries)]
    done = generate(model, repeated, **SAMPLING).lists()
    scores, pairs = truth(repeated, done), []
    for start in range(0, len(done), tries):
        group = range(start, start + tries)
        good = [done[i] for i in group if scores[i]]
        bad = [done[i] for i in group if not scores[i]]
        for better, worse in zip(good, bad, strict=False):
            pairs.append(Pair(completed(repeated[start], better), completed(repeated[start], worse)))
    return pairs


def learned_reward(
    model: nn.Module, pairs: Sequence[Pair], budget: Budget, seed: int, progress: Progress
) -> tuple[RewardModel, dict[str, float]]:
    """A reward model fitted on seven eighths of the pairs, and how it does on the others."""
    apart = max(1, len(pairs) // 8)
    collate = partial(pad_pairs, pad_id=NEWLINE)
    batches = Batches(pairs[apart:], min(budget.pairs, len(pairs) - apart), collate, seed=seed)
    tuning = tuned(model, "reward", head=True)
    optimizer = torch.optim.AdamW(tuning.parameters(), lr=3e-3)
    with use(model, "reward"):
        fit(
            model, batches, partial(reward_model, centering=0.01), optimizer=optimizer,
            steps=budget.reward_steps, seed=seed, **follow(progress, f"seed {seed}, reward", "loss"),
        )  # fmt: skip
        told = reward_accuracy(model, [collate(pairs[:apart])])
    return RewardModel(tuning, pad_id=NEWLINE), told


def look(
    model: nn.Module, name: str, prompts: Sequence[Ids], judge: RewardModel, seed: int
) -> dict[str, Any]:
    """How a policy completes held-out prompts: scores, and its KL to the SFT model in nats per completion."""
    with use(model, name), torch.no_grad():
        done = generate(model, prompts, **SAMPLING, generator=torch.Generator().manual_seed(seed))
        here, _ = completion_logps(model, done)
    with use(model, "sft"), torch.no_grad():
        there, _ = completion_logps(model, done)
    completions = done.lists()
    return {
        "true": truth(prompts, completions),
        "learned": judge(prompts, completions).mean().item(),
        "kl": (here - there).sum(1).mean().item(),
        "bytes": done.mask.sum(1).float().mean().item(),
        "completions": [bytes(completion).decode("latin-1") for completion in completions[:SAMPLES]],
    }


def train_dpo(
    model: nn.Module, policy: Tuning, pairs: Sequence[Pair], budget: Budget, seed: int, progress: Progress
) -> list[dict[str, float]]:
    """DPO on the pairs; no completions are drawn, so there is nothing to show of them."""
    batches = Batches(pairs, min(budget.pairs, len(pairs)), partial(pad_pairs, pad_id=NEWLINE), seed=seed)
    fit(
        model, batches, partial(dpo, reference=("sft",), beta=1.0), optimizer=adam(policy, 1e-3),
        steps=budget.dpo_steps, seed=seed, **follow(progress, f"seed {seed}, dpo", "loss"),
    )  # fmt: skip
    return []


def train_online(
    algorithm: str, model: nn.Module, policy: Tuning, prompts: Sequence[Ids], judge: RewardModel,
    budget: Budget, seed: int, progress: Progress,
) -> list[dict[str, float]]:  # fmt: skip
    """PPO with the learned reward or GRPO with the scorer; a row per iteration."""
    seen: list[float] = []

    def reward(prompts: Sequence[Ids], completions: Sequence[Ids]) -> Any:
        true = truth(prompts, completions)
        # of PPO this is only watched, and not told
        seen.append(sum(true) / len(true))
        return true if algorithm == "grpo" else judge(prompts, completions)

    common: dict[str, Any] = {
        "policy": policy,
        "reference": ("sft",),
        "sampling": SAMPLING,
        "epochs": 2,
        "minibatch": budget.completions // 2,
        "seed": seed,
        **follow(progress, f"seed {seed}, {algorithm}", "objective/scores"),
    }
    if algorithm == "grpo":
        history = grpo(
            model, Batches(prompts, budget.completions // GROUP, seed=seed), reward, optimizer=adam(policy, 2e-3),
            steps=budget.grpo_steps, group_size=GROUP, beta=0.04, **common,
        )  # fmt: skip
    else:
        value = tuned(model, "value", head=True).disable()
        history = ppo(
            model, Batches(prompts, budget.completions, seed=seed), reward, optimizer=adam(policy, 1e-3), value=value,
            value_optimizer=adam(value, 3e-3), steps=budget.ppo_steps, kl=0.05, missing_stop_penalty=1.0, **common,
        )  # fmt: skip
        value.detach()
    return [
        {"true": true, "scores": row["objective/scores"], "kl": row["objective/kl"], "ratio": row["val/first_ratio"]}
        for true, row in zip(seen, history.rows, strict=True)
    ]  # fmt: skip
