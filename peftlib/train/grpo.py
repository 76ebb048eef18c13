"""GRPO: several completions of each prompt, each judged against the others; no value is learned.

Letters: G completions of a prompt, B of all prompts together, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from peftlib import Tuning
from peftlib.train.advantages import grpo_advantages
from peftlib.train.batches import Batches
from peftlib.train.decoding import rounding
from peftlib.train.history import History
from peftlib.train.online import (
    check_policy,
    check_settings,
    improve,
    kept,
    minibatches,
    names_with,
    parameters_of,
    stepped,
    together,
)
from peftlib.train.parallel import Ranks
from peftlib.train.policy import grpo_loss
from peftlib.train.reference import Reference
from peftlib.train.rollouts import Reward, roll_out, rows_of, token_logps
from peftlib.train.tally import Tally


def grpo(
    model: nn.Module,
    prompts: Batches | Sequence[Sequence[Sequence[int]]],
    reward: Reward,
    *,
    policy: Tuning,
    optimizer: torch.optim.Optimizer,
    steps: int,
    sampling: Mapping[str, Any],
    group_size: int = 8,
    reference: Reference = (),
    missing_stop_penalty: float = 0.0,
    beta: float = 0.04,
    scale: bool = True,
    aggregate: str = "token",
    epochs: int = 1,
    minibatch: int | None = None,
    rows: int | None = None,
    clip: float = 0.2,
    clip_high: float | None = None,
    clip_norm: float | None = 1.0,
    **training: Any,
) -> History:
    """Raise the probability of completions that earn more than others of the same prompt.

    Dr. GRPO is ``scale=False, aggregate="fixed"``.

    Args:
        model: causal, ids -> logits, with the tunings on it; those that are enabled now make the policy.
        prompts: batches of rows of ids, again and again: ``Batches(prompts, 4)``.
        reward: (prompts, completions), lists of ids -> one number each.
        policy: what is trained.
        optimizer: of its parameters.
        steps: iterations.
        sampling: settings of :func:`peftlib.train.generate`, see :func:`peftlib.train.ppo`.
        group_size: completions of each prompt, from 2.
        reference: names of the tunings that make it; none is the base.
        missing_stop_penalty: taken from the score of a completion that no stop id ended.
        beta: weight of the KL to the reference, per token.
        scale: divide by the group's standard deviation, see :func:`peftlib.train.grpo_advantages`.
        aggregate: ``"token"``, ``"sequence"`` or ``"fixed"``, see :func:`peftlib.train.grpo_loss`.
        epochs: passes over the completions of an iteration.
        minibatch: completions per optimizer step, of each process; None is all.
        rows: completions in one forward, if memory is short; changes no result but by rounding.
        clip: how far a ratio may fall, ``1 - clip``.
        clip_high: how far it may rise; None is ``clip``.
        clip_norm: largest norm of the gradients.
        **training: see :func:`peftlib.train.ppo`.

    Returns:
        A row per iteration, as :func:`peftlib.train.ppo` without what is of the value; ``equal_groups`` is the share of
        prompts whose completions all earned the same, from which nothing is learned.

    Raises:
        PeftlibError, NonFiniteError: as :func:`peftlib.train.ppo`.

    Example:
        >>> import peftlib
        >>> model = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 5))
        >>> policy = peftlib.attach(model, peftlib.LoRA(rank=2), targets=["1"])
        >>> def reward(prompts, completions):  # the more often a 3, the better
        ...     return [float(ids.count(3)) for ids in completions]
        >>> history = grpo(
        ...     model,
        ...     [[[1], [2]]],
        ...     reward,
        ...     policy=policy,
        ...     optimizer=torch.optim.Adam(policy.parameters(), lr=0.05),
        ...     steps=30,
        ...     sampling={"max_new_tokens": 4},
        ... )
        >>> scores = [value for _, value in history.column("objective/scores")]
        >>> sum(scores[-5:]) > sum(scores[:5])
        True

    Source: Shao et al. 2024, arXiv:2402.03300, section 4.1; Dr. GRPO: Liu et al. 2025, arXiv:2503.20783.
    """
    names = names_with(model, policy)
    check_policy(policy, optimizer, "the policy")
    settings: dict[str, Any] = {
        "group_size": group_size,
        "beta": beta,
        "aggregate": aggregate,
        "epochs": epochs,
        "minibatch": minibatch,
        "clip": clip,
        "clip_high": clip_high,
        "clip_norm": clip_norm,
        "missing_stop_penalty": missing_stop_penalty,
    }
    check_settings(**settings, rows=rows)

    def iteration(batch: list[Any], before: Mapping[str, Any] | None, ranks: Ranks) -> dict[str, Any]:
        done = together(
            ranks,
            lambda: roll_out(
                model,
                [prompt for prompt in batch for _ in range(group_size)],
                reward,
                reference=reference,
                sampling=sampling,
                missing_stop_penalty=missing_stop_penalty,
                rows=rows,
            ),
        )
        advantages_B = grpo_advantages(done.scores, group_size, scale=scale)
        tally = Tally(clip, clip if clip_high is None else clip_high, rounding(model))
        size = minibatch or len(done.ids)
        for _ in range(epochs):
            for places in minibatches(len(done.ids), size, done.ids.device):
                (tokens,) = ranks.total(done.mask[places].sum())
                for micro in places.split(rows or len(places)):
                    part = rows_of(done, micro)
                    share = part.mask.sum().item() / tokens
                    if aggregate != "token":
                        share = len(micro) / (len(places) * ranks.world)
                    logps_BT = token_logps(model, part, sampling.get("temperature", 1.0))
                    loss = grpo_loss(
                        logps_BT,
                        part.logps,
                        advantages_B[micro],
                        part.mask,
                        reference_logps=part.reference_logps,
                        beta=beta,
                        clip=clip,
                        clip_high=clip_high,
                        aggregate=aggregate,
                        length=sampling["max_new_tokens"],
                    )
                    (share * loss).backward(inputs=parameters_of(optimizer))
                    tally.add(share, logps_BT, part, {"loss/policy": loss})
                stepped(optimizer, clip_norm, "the policy", done, ranks)
        groups = done.scores.reshape(-1, group_size)
        equal = (groups == groups[:, :1]).all(1).float().mean().item()
        row = {**done.numbers(ranks), **tally.means(ranks), **ranks.mean({"equal_groups": equal})}
        return {"loss": row["loss/policy"], **row}

    return improve(
        model,
        prompts,
        iteration,
        {"policy": (policy, optimizer)},
        steps=steps,
        settings={
            "algorithm": "grpo",
            "policy": list(names),
            "scale": scale,
            **kept(sampling, reference),
            **settings,
        },
        **training,
    )
