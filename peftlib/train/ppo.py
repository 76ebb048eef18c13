"""PPO for language: a policy and its value as two tunings of one base, which is also the reference.

One iteration, from top to bottom: draw completions; reward each token with ``-kl`` and the last one with the score too;
advantages from the values; a few epochs of clipped steps on minibatches.

To read it all: ``generate`` (and ``decoding``) draws, ``rollouts`` judges, ``advantages`` says what each token was
worth, ``policy`` has the losses, and ``online`` the loop around the iteration that is written down here.

Source: Ouyang et al. 2022, arXiv:2203.02155; the details are those of Huang et al. 2024, arXiv:2403.17031.

Letters: B completions, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftlib import PeftlibError, Tuning, use
from peftlib.train.advantages import gae, kl_estimate, whiten
from peftlib.train.batches import Batches
from peftlib.train.decoding import rounding, running
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
from peftlib.train.outputs import first_tensor
from peftlib.train.parallel import Ranks
from peftlib.train.policy import ppo_policy_loss, ppo_value_loss
from peftlib.train.reference import Reference
from peftlib.train.reward import one_number
from peftlib.train.rollouts import (
    Reward,
    Rollout,
    at_completions,
    in_parts,
    roll_out,
    rows_of,
    token_logps,
)
from peftlib.train.tally import Tally


@dataclass(frozen=True)
class AdaptiveKL:
    """The weight of a KL penalty that keeps the KL near a target.

    After n completions it is ``b (1 + clip(kl / target - 1, +-0.2) min(n / horizon, 1))``.

    Args:
        start: weight of the first iteration.
        target: KL to the reference, in nats per completion.
        horizon: completions after which the weight may have changed by a factor of about 1.2; an iteration of more
            changes it by no more than that.

    Example:
        >>> AdaptiveKL(start=0.1, target=1.0, horizon=10).after(0.1, kl=3.0, completions=5)
        0.11000000000000001

    Source: Ziegler et al. 2019, arXiv:1909.08593, section 2.2.
    """

    start: float = 0.1
    target: float = 6.0
    horizon: int = 10_000

    def __post_init__(self) -> None:
        if not (self.start > 0 and self.target > 0 and self.horizon > 0):
            raise PeftlibError(f"{self}: start, target and horizon are numbers above 0.")

    def after(self, weight: float, kl: float, completions: int) -> float:
        """The weight for the next iteration."""
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        return weight * (1 + error * min(completions / self.horizon, 1))


def ppo(
    model: nn.Module,
    prompts: Batches | Sequence[Sequence[Sequence[int]]],
    reward: Reward,
    *,
    policy: Tuning,
    value: Tuning,
    optimizer: torch.optim.Optimizer,
    value_optimizer: torch.optim.Optimizer,
    steps: int,
    sampling: Mapping[str, Any],
    reference: Reference = (),
    value_under: Sequence[str] = (),
    missing_stop_penalty: float = 0.0,
    kl: float | AdaptiveKL = 0.05,
    kl_kind: str = "k1",
    gamma: float = 1.0,
    lam: float = 0.95,
    epochs: int = 4,
    minibatch: int | None = None,
    rows: int | None = None,
    clip: float = 0.2,
    value_clip: float = 0.2,
    clip_norm: float | None = 1.0,
    **training: Any,
) -> History:
    """Maximize ``E[score - kl_weight KL(policy || reference)]`` by clipped steps on the model's own completions.

    Args:
        model: causal, ids -> logits, with the tunings on it; those that are enabled now make the policy.
        prompts: batches of rows of ids, again and again: ``Batches(prompts, 16)``.
        reward: (prompts, completions), lists of ids -> one number each; see :class:`peftlib.train.RewardModel`.
        policy: what is trained.
        value: a second tuning with ``NewHead(1)`` for an output.
        optimizer: of the policy's parameters.
        value_optimizer: of the value's.
        steps: iterations.
        sampling: settings of :func:`peftlib.train.generate`: ``{"max_new_tokens": 32, "stop_ids": [2]}``. Its
            temperature holds for the reference and the update too.
        reference: names of the tunings that make it; none is the base.
        value_under: names of the tunings that the value stands on, ``("sft",)``; none is the base alone.
        missing_stop_penalty: taken from the score of a completion that no stop id ended.
        kl: weight of the penalty per token, or how it is to change.
        kl_kind: ``"k1"`` or ``"k3"``, see :func:`peftlib.train.kl_estimate`.
        gamma: discount per token.
        lam: see :func:`peftlib.train.gae`.
        epochs: passes over the completions of an iteration.
        minibatch: completions per optimizer step, of each process; None is all.
        rows: completions in one forward, if memory is short; changes no result but by rounding.
        clip: of the ratio, see :func:`peftlib.train.ppo_policy_loss`.
        value_clip: of the value, see :func:`peftlib.train.ppo_value_loss`.
        clip_norm: largest norm of the gradients of each.
        **training: ``scheduler``, ``checkpoint_dir``, ``checkpoint_every``, ``resume``, ``callbacks``, ``progress``,
            ``seed`` and ``parallel="ddp"``, as in :func:`peftlib.train.fit`.

    Returns:
        A row per iteration: ``objective/kl`` (nats per completion), ``/entropy``, ``/scores``, ``/rlhf_reward``,
        ``/kl_weight``; ``policy/approxkl``, ``/clipfrac``; ``loss/policy``, ``loss/value``; ``val/ratio`` (mean
        over all minibatches), ``val/first_ratio`` (of the first one: 1).

    Raises:
        PeftlibError: tunings, optimizers or settings that do not go together, a reward that is no number, a first
            minibatch whose ratio is not 1.
        NonFiniteError: a gradient is no number.

    Example:
        >>> import peftlib
        >>> model = torch.nn.Sequential(torch.nn.Embedding(5, 8), torch.nn.Linear(8, 5))
        >>> value = peftlib.attach(model, {"1": peftlib.NewHead(1)}, name="value").disable()
        >>> policy = peftlib.attach(model, peftlib.LoRA(rank=2), targets=["1"])
        >>> def reward(prompts, completions):  # the more often a 3, the better
        ...     return [float(ids.count(3)) for ids in completions]
        >>> history = ppo(
        ...     model,
        ...     [[[1], [2]] * 8],
        ...     reward,
        ...     policy=policy,
        ...     value=peftlib.train.init_head(value),
        ...     optimizer=torch.optim.Adam(policy.parameters(), lr=0.05),
        ...     value_optimizer=torch.optim.Adam(value.parameters(), lr=0.05),
        ...     steps=20,
        ...     sampling={"max_new_tokens": 4},
        ... )
        >>> scores = [number for _, number in history.column("objective/scores")]
        >>> sum(scores[-5:]) > sum(scores[:5])
        True
    """
    names = names_with(model, policy, [value])
    value_names = (*value_under, value.name)
    check_policy(policy, optimizer, "the policy")
    check_policy(value, value_optimizer, "the value")
    settings: dict[str, Any] = {
        "epochs": epochs,
        "minibatch": minibatch,
        "clip": clip,
        "value_clip": value_clip,
        "clip_norm": clip_norm,
        "gamma": gamma,
        "lam": lam,
        "kl_kind": kl_kind,
        "missing_stop_penalty": missing_stop_penalty,
    }
    check_settings(**settings, rows=rows, kl=kl.start if isinstance(kl, AdaptiveKL) else kl)

    def iteration(batch: list[Any], before: Mapping[str, Any] | None, ranks: Ranks) -> dict[str, Any]:
        weight = _weight(kl, before)
        with use(model, *names):
            done = together(
                ranks,
                lambda: roll_out(
                    model,
                    batch,
                    reward,
                    reference=reference,
                    sampling=sampling,
                    missing_stop_penalty=missing_stop_penalty,
                    rows=rows,
                ),
            )
        with use(model, *value_names), torch.no_grad():
            (values_BT,) = in_parts(lambda part: (values_of(model, part),), done, rows)
        rewards_BT = token_rewards(done, weight, kl_kind)
        advantages_BT, returns_BT = gae(rewards_BT, values_BT, done.mask, gamma, lam)
        advantages_BT = whiten(advantages_BT, done.mask, ranks)

        tally = Tally(clip, clip, rounding(model))
        for _ in range(epochs):
            for places in minibatches(len(batch), minibatch or len(batch), done.ids.device):
                (tokens,) = ranks.total(done.mask[places].sum())
                for micro in places.split(rows or len(places)):
                    part = rows_of(done, micro)
                    share = part.mask.sum().item() / tokens
                    with use(model, *names):
                        logps_BT = token_logps(model, part, sampling.get("temperature", 1.0))
                        loss = ppo_policy_loss(logps_BT, part.logps, advantages_BT[micro], part.mask, clip)
                        (share * loss).backward(inputs=parameters_of(optimizer))
                    with use(model, *value_names):
                        now_BT = values_of(model, part)
                        value_loss = ppo_value_loss(
                            now_BT, values_BT[micro], returns_BT[micro], part.mask, value_clip
                        )
                        (share * value_loss).backward(inputs=parameters_of(value_optimizer))
                    losses = {"loss/policy": loss, "loss/value": value_loss}
                    tally.add(share, logps_BT, part, losses)
                stepped(optimizer, clip_norm, "the policy", done, ranks)
                stepped(value_optimizer, clip_norm, "the value", done, ranks)
        row = {**done.numbers(ranks), **tally.means(ranks)}
        return {
            "loss": row["loss/policy"],
            **row,
            **ranks.mean({"objective/rlhf_reward": rewards_BT.sum().item() / len(batch)}),
            "objective/kl_weight": weight,
        }

    return improve(
        model,
        prompts,
        iteration,
        {"policy": (policy, optimizer), "value": (value, value_optimizer)},
        steps=steps,
        settings={
            "algorithm": "ppo",
            "policy": list(names),
            "value": list(value_names),
            "kl": asdict(kl) if isinstance(kl, AdaptiveKL) else kl,
            **kept(sampling, reference),
            **settings,
        },
        **training,
    )


def values_of(model: nn.Module, done: Rollout) -> Tensor:
    """What the value says before each token was chosen, (B, T)."""
    with running(model, done.ids):
        output = model(done.ids)
    return one_number(at_completions(first_tensor(output, model), done), done.mask)


def token_rewards(done: Rollout, weight: float, kind: str = "k1") -> Tensor:
    """``-weight kl_t`` at each token, and the score at the last one; (B, T)."""
    rewards_BT = -weight * kl_estimate(done.logps, done.reference_logps, kind)
    last_B = done.mask.sum(1) - 1
    return rewards_BT.scatter_add(1, last_B[:, None], done.scores[:, None])


def _weight(kl: float | AdaptiveKL, before: Mapping[str, Any] | None) -> float:
    """From the row before, so that nothing else has to be kept for going on."""
    if not isinstance(kl, AdaptiveKL):
        return kl
    if before is None:
        return kl.start
    return kl.after(before["objective/kl_weight"], before["objective/kl"], before["completions"])
