"""What an action was worth: generalized advantages, group advantages, whitening; and estimates of a KL.

Letters: B completions, T positions. A mask is true at the tokens that the policy chose, up to and with the stop id.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from peftlib import PeftlibError
from peftlib.train.parallel import ALONE, Ranks


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """``sum of x over the mask / its size``; numbers outside it, NaN too, have no part in it.

    Example:
        >>> masked_mean(torch.tensor([1.0, 3.0, torch.nan]), torch.tensor([True, True, False]))
        tensor(2.)
    """
    return torch.where(mask, x, 0).sum() / mask.sum()


def whiten(x: Tensor, mask: Tensor, ranks: Ranks = ALONE) -> Tensor:
    """``(x - mean) / std`` within the mask (n - 1 in the variance), 0 outside; equal numbers are exactly 0.

    With ``ranks``, mean and std are those of all processes' numbers. No gradient goes through either.

    Example:
        >>> whiten(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([True, True, False]))
        tensor([-0.7071,  0.7071,  0.0000])
    """
    # counted from one of them: the mean of equal numbers is not that number, and Adam makes whole steps of the rounding
    (start,) = ranks.total(x[mask][0] if ranks.first else 0.0)
    gap = x - start
    inside = gap[mask]
    count, total = ranks.total(inside.numel(), inside.sum())
    mean = total / count
    (squares,) = ranks.total((inside - mean).square().sum())
    return torch.where(mask, (gap - mean) / math.sqrt(squares / max(count - 1, 1) + 1e-8), 0)


@torch.no_grad()
def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """``A_t = d_t + gamma lam A_(t+1)``, ``d_t = r_t + gamma V_(t+1) - V_t``; returns are ``A + V``.

    Args:
        rewards: (B, T), of each token.
        values: (B, T), of what was there before each token was chosen.
        mask: (B, T) booleans. What lies outside has no part: the value after the last token is 0, and t + 1 is the next
            token inside.
        gamma: discount per token, 0 to 1.
        lam: 1 takes the whole sum of rewards for truth, 0 believes the next value.

    Returns:
        Advantages and returns, (B, T), 0 outside of the mask; no gradient goes through them.

    Raises:
        PeftlibError: shapes that differ, a mask that is no boolean, or factors out of their range.

    Example:
        >>> rewards, values = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.5]])
        >>> gae(rewards, values, torch.ones(1, 2, dtype=torch.bool), lam=1.0)
        (tensor([[0.5000, 0.5000]]), tensor([[1., 1.]]))

    Source: Schulman et al. 2016, arXiv:1506.02438, equation 16.
    """
    check_tokens("gae", mask, rewards=rewards, values=values)
    for name, factor in (("gamma", gamma), ("lam", lam)):
        if not 0 <= factor <= 1:
            raise PeftlibError(f"{name}={factor}: give a factor from 0 to 1.")
    advantages = torch.zeros_like(values)
    next_advantage_B = next_value_B = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        inside_B = mask[:, t]
        advantage_B = rewards[:, t] + gamma * next_value_B - values[:, t] + gamma * lam * next_advantage_B
        next_advantage_B = torch.where(inside_B, advantage_B, next_advantage_B)
        next_value_B = torch.where(inside_B, values[:, t], next_value_B)
        advantages[:, t] = torch.where(inside_B, advantage_B, 0)
    return advantages, torch.where(mask, advantages + values, 0)


def grpo_advantages(rewards: Tensor, group_size: int, *, scale: bool = True) -> Tensor:
    """``(r - mean) / (std + 1e-4)`` among the completions of each prompt (n - 1 in the variance).

    Args:
        rewards: (B,), the completions of a prompt next to one another.
        group_size: completions of a prompt, from 2; divides B.
        scale: False leaves out the division, which weighs prompts that are nearly always or never solved most
            (Dr. GRPO).

    Returns:
        (B,). A group whose rewards are all equal has advantages of exactly 0: nothing is learned from it.

    Raises:
        PeftlibError: rewards that are not (B,) or not finite, or a size that does not divide them.

    Example:
        >>> grpo_advantages(torch.tensor([0.0, 1.0, 5.0, 5.0]), 2)
        tensor([-0.7070,  0.7070,  0.0000,  0.0000])

    Source: Shao et al. 2024, arXiv:2402.03300, section 4.1; Liu et al. 2025, arXiv:2503.20783 (without the division).
    """
    if rewards.dim() != 1 or group_size < 2 or not len(rewards) or len(rewards) % group_size:
        raise PeftlibError(
            f"grpo_advantages takes rewards of shape (prompts x group_size,) with a group_size from 2; got "
            f"{tuple(rewards.shape)} and group_size={group_size}."
        )
    if not rewards.isfinite().all():
        where = int((~rewards.isfinite()).nonzero()[0])
        raise PeftlibError(
            f"The reward of completion {where} is {rewards[where].item()}, which is no number."
        )
    groups = rewards.reshape(-1, group_size)
    # counted from one of them, so that equal ones give 0 and not a rounding, of which Adam makes whole steps
    groups = groups - groups[:, :1]
    gap = groups - groups.mean(1, keepdim=True)
    return (gap / (groups.std(1, keepdim=True) + 1e-4) if scale else gap).reshape(-1)


def kl_estimate(logps: Tensor, reference_logps: Tensor, kind: str = "k3") -> Tensor:
    """KL(policy || reference) from the log-probabilities of what the policy drew, one estimate per token.

    With ``d = log p - log p_ref``: ``k1 = d``, unbiased and of either sign; ``k2 = d^2 / 2``, biased, though its
    gradient is not; ``k3 = exp(-d) - 1 + d``, unbiased, never negative, of less variance where the two are close.

    Example:
        >>> kl_estimate(torch.tensor([0.0, -1.0]), torch.tensor([-1.0, 0.0]), "k1")
        tensor([ 1., -1.])

    Source: Schulman 2020, "Approximating KL Divergence".
    """
    d = logps - reference_logps
    if kind == "k1":
        return d
    if kind == "k2":
        return d.square() / 2
    if kind == "k3":
        return torch.expm1(-d) + d
    raise PeftlibError(f"kind={kind!r} is unknown; there are 'k1', 'k2' and 'k3'.")


def check_tokens(name: str, mask: Tensor, **tensors: Tensor) -> None:
    """Raise unless all are (B, T), with a boolean mask that holds a token."""
    shapes = {key: tuple(t.shape) for key, t in {**tensors, "mask": mask}.items()}
    if len(set(shapes.values())) > 1 or mask.dim() != 2:
        raise PeftlibError(f"{name} takes tensors of one shape (completions, positions); got {shapes}.")
    if mask.dtype != torch.bool:
        raise PeftlibError(f"{name} takes a mask of booleans; got {mask.dtype}. Write mask > 0.")
    if not mask.any():
        raise PeftlibError(f"{name}: no token is inside the mask, so there is nothing to average.")
