"""Bytes of one PPO update: the four roles as tunings of one base, and as four models.

The same update, measured by `peftlib.measure_memory`: log-probabilities of the reference, scores of the reward, then a
step of the value and one of the policy.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

import peftlib
from benchmarks.gpt import GPT
from peftlib import LoRA, NewHead
from peftlib.train import Generated, completion_logps, gae, generate, ppo_policy_loss, ppo_value_loss
from peftlib.train.reward import one_number
from peftlib.train.rollouts import at_completions

Role = Callable[[str], AbstractContextManager[nn.Module]]
"""The name of a role -> the model that plays it, while the context lasts."""

TRAINED = ("policy", "value")
JUDGES = ("value", "reward")


def update(role: Role, done: Generated, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """One PPO step of policy and value on completions."""

    def numbers(model: nn.Module) -> torch.Tensor:
        return one_number(at_completions(model(done.ids), done), done.mask)

    with torch.no_grad():
        with role("reference") as model:
            there, _ = completion_logps(model, done)
        with role("reward") as model:
            scores = numbers(model)
    with role("value") as model:
        values = numbers(model)
        with torch.no_grad():
            rewards = torch.where(done.mask, scores, 0) - 0.05 * (done.logps - there)
            advantages, returns = gae(rewards, values, done.mask)
        ppo_value_loss(values, values.detach(), returns, done.mask).backward()
    with role("policy") as model:
        logps, _ = completion_logps(model, done)
        ppo_policy_loss(logps, logps.detach(), advantages, done.mask).backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def measured(
    role: Role, everything: nn.Module, trained: Mapping[str, Any], done: Generated
) -> dict[str, int]:
    """Bytes at the peak of the second update; in the first one the optimizers make their state."""
    optimizers = [torch.optim.AdamW(trained[name].parameters(), lr=1e-4) for name in TRAINED]
    update(role, done, optimizers)
    report = peftlib.measure_memory(lambda: update(role, done, optimizers), model=everything)
    return {
        "weights": report.frozen_bytes + report.trained_bytes,
        "gradients": report.gradient_bytes,
        "optimizer": report.optimizer_bytes,
        "activations": report.activation_bytes + report.temporary_bytes,
        "peak": report.peak_bytes,
    }


def lora(name: str) -> LoRA:
    return LoRA(rank=8, alpha=16, head={"head": NewHead(1)} if name in JUDGES else None)


def memory(base: GPT, prompts: Sequence[Sequence[int]], sampling: Mapping[str, Any]) -> dict[str, Any]:
    """Each way's bytes, by kind; `base` is copied and stays as it is."""
    base = copy.deepcopy(base)
    for tuning in peftlib.tunings(base).values():
        tuning.detach()
    torch.manual_seed(0)
    done = generate(base, prompts, **sampling)
    found = {}

    copies = nn.ModuleDict({name: copy.deepcopy(base) for name in ("policy", "value", "reward", "reference")})
    for name in JUDGES:
        copies[name].head = nn.Linear(base.head.in_features, 1)
    found["four models, policy and value trained in full"] = measured(
        lambda name: contextlib.nullcontext(copies[name]), copies, dict(copies.items()), done
    )
    copies = nn.ModuleDict({name: copy.deepcopy(base) for name in copies})
    tunings = {name: peftlib.attach(copies[name], lora(name)) for name in (*TRAINED, "reward")}
    found["four models, each with a LoRA"] = measured(
        lambda name: contextlib.nullcontext(copies[name]), copies, tunings, done
    )
    tunings = {name: peftlib.attach(base, lora(name), name=name) for name in (*TRAINED, "reward")}

    @contextlib.contextmanager
    def as_(name: str) -> Any:
        with peftlib.use(base, *(() if name == "reference" else (name,))):
            yield base

    found["one base and three LoRAs"] = measured(as_, base, tunings, done)
    return found
