"""Losses of a policy and of its values, from log-probabilities alone: PPO's and GRPO's.

Letters: B completions, T positions. The ratio of a token is ``exp(log p - log p_old)``, 1 in the first minibatch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftlib import PeftlibError
from peftlib.train.advantages import check_tokens, kl_estimate, masked_mean

AGGREGATES = ("token", "sequence", "fixed")


def ppo_policy_loss(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, clip: float = 0.2
) -> Tensor:
    """The mean over tokens of ``max(-A ratio, -A clip(ratio, 1 - clip, 1 + clip))``.

    Args:
        logps: (B, T) of the tokens that were chosen, under the policy as it is now.
        old_logps: (B, T) the same when they were chosen.
        advantages: (B, T), see :func:`peftlib.train.gae`.
        mask: (B, T) booleans; numbers outside, NaN too, have no part in it.
        clip: beyond which a ratio gains nothing any more.

    Raises:
        PeftlibError: shapes that differ, a mask that is no boolean or is empty, a clip that is not positive.

    Example:
        >>> one = torch.ones(1, 2)
        >>> ppo_policy_loss(one, one, one, one > 0)
        tensor(-1.)

    Source: Schulman et al. 2017, arXiv:1707.06347, equation 7.
    """
    check_tokens("ppo_policy_loss", mask, logps=logps, old_logps=old_logps, advantages=advantages)
    return masked_mean(_clipped(logps, old_logps, advantages, mask, clip, clip), mask)


def ppo_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float = 0.2
) -> Tensor:
    """Half the mean over tokens of ``max((V - R)^2, (V_clipped - R)^2)``, V clipped to ``V_old +- clip``.

    Args:
        values: (B, T) as they are now.
        old_values: (B, T) those that the advantages came from.
        returns: (B, T), see :func:`peftlib.train.gae`.
        mask: (B, T) booleans.
        clip: how far a value may go for its own good.

    Raises:
        PeftlibError: as :func:`ppo_policy_loss`.

    Example:
        >>> zero, one = torch.zeros(1, 2), torch.ones(1, 2)
        >>> ppo_value_loss(zero, zero, one, one > 0)
        tensor(0.5000)

    Source: Schulman et al. 2017; Huang et al. 2024, arXiv:2403.17031, detail 14 (clipping as in its code).
    """
    check_tokens("ppo_value_loss", mask, values=values, old_values=old_values, returns=returns)
    _positive(clip=clip)
    values, old_values, returns = (torch.where(mask, t, 0) for t in (values, old_values, returns))
    near = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * masked_mean(torch.maximum((values - returns).square(), (near - returns).square()), mask)


def grpo_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    reference_logps: Tensor | None = None,
    beta: float = 0.0,
    clip: float = 0.2,
    clip_high: float | None = None,
    aggregate: str = "token",
    length: int | None = None,
) -> Tensor:
    """PPO's objective with one advantage per completion, and ``beta k3`` to the reference per token.

    Args:
        logps: (B, T) of the tokens that were chosen, under the policy as it is now.
        old_logps: (B, T) the same when they were chosen.
        advantages: (B,), see :func:`peftlib.train.grpo_advantages`.
        mask: (B, T) booleans.
        reference_logps: (B, T), needed where ``beta`` is not 0.
        beta: weight of the KL to the reference.
        clip: how far a ratio may fall, ``1 - clip``.
        clip_high: how far it may rise, ``1 + clip_high``; None is ``clip`` (0.28 gives rare tokens more room).
        aggregate: ``"token"``: the mean over all tokens; ``"sequence"``: the mean of each completion's mean;
            ``"fixed"``: the sum over ``B x length``, which does not favour short right answers (Dr. GRPO).
        length: most tokens a completion may have, for ``"fixed"``.

    Raises:
        PeftlibError: as :func:`ppo_policy_loss`; a reference or a length that is missing.

    Example:
        >>> logps, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
        >>> grpo_loss(logps, logps, torch.tensor([1.0, -1.0]), mask)
        tensor(0.)

    Source: Shao et al. 2024, arXiv:2402.03300, equation 3; Yu et al. 2025, arXiv:2503.14476 (clip_high, token);
    Liu et al. 2025, arXiv:2503.20783 (fixed).
    """
    if advantages.shape != logps.shape[:1]:
        raise PeftlibError(
            f"grpo_loss takes one advantage per completion, ({logps.shape[0]},); got {tuple(advantages.shape)}."
        )
    spread = advantages[:, None].expand_as(logps)
    check_tokens("grpo_loss", mask, logps=logps, old_logps=old_logps)
    losses = _clipped(logps, old_logps, spread, mask, clip, clip if clip_high is None else clip_high)
    if beta:
        if reference_logps is None:
            raise PeftlibError(f"beta={beta} weighs the KL to a reference: give reference_logps=.")
        check_tokens("grpo_loss", mask, logps=logps, reference_logps=reference_logps)
        inside, reference_inside = (torch.where(mask, t, 0) for t in (logps, reference_logps))
        losses = losses + beta * kl_estimate(inside, reference_inside, "k3")
    if aggregate == "token":
        return masked_mean(losses, mask)
    inside = torch.where(mask, losses, 0)
    if aggregate == "sequence":
        # a completion of no token counts as one of loss 0
        return (inside.sum(1) / mask.sum(1).clamp(min=1)).mean()
    if aggregate == "fixed":
        if length is None or length < mask.sum(1).max():
            raise PeftlibError(
                f"aggregate='fixed' divides by the most tokens a completion may have: give length=, from "
                f"{int(mask.sum(1).max())}; got {length}."
            )
        return inside.sum() / (len(mask) * length)
    raise PeftlibError(f"aggregate={aggregate!r} is unknown; there are {', '.join(map(repr, AGGREGATES))}.")


def _clipped(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, low: float, high: float
) -> Tensor:
    _positive(clip=low, clip_high=high)
    # outside the mask before exp: an infinity there would make the gradient inside NaN
    ratio = torch.where(mask, logps - old_logps, 0).exp()
    advantages = torch.where(mask, advantages, 0)
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high))


def _positive(**settings: float) -> None:
    for name, value in settings.items():
        if not value > 0:
            raise PeftlibError(f"{name}={value}: give a number above 0.")
