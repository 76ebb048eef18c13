"""Losses on preferences, of log-probabilities and scores alone: DPO and its kin, KTO, the reward model's.

Each is a mean over its rows, computed in the dtype that is given. Models come in ``dpo`` and ``reward``.

Letters: B pairs or rows. A log-ratio is ``log pi(y|x) - log pi_ref(y|x)``, and beta times it the implicit reward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peftlib import PeftlibError

KINDS = ("sigmoid", "ipo", "hinge")


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    kind: str = "sigmoid",
) -> Tensor:
    """The mean over pairs of a decreasing function of ``h = log-ratio(chosen) - log-ratio(rejected)``.

    ``sigmoid``: ``-(1 - e) log s(beta h) - e log s(-beta h)`` with e the share of labels that are wrong;
    ``ipo``: ``(h - 1 / (2 beta))^2``; ``hinge``: ``max(0, 1 - beta h)``.

    Args:
        policy_chosen_logps: (B,), summed over the completion's tokens; for ``ipo`` their mean,
            as its authors computed it.
        policy_rejected_logps: (B,), of the worse completion.
        reference_chosen_logps: (B,), the same of the reference.
        reference_rejected_logps: (B,).
        beta: how dear it is to leave the reference.
        label_smoothing: e, from 0 to below a half; of ``sigmoid`` alone.
        kind: ``"sigmoid"``, ``"ipo"`` or ``"hinge"``.

    Raises:
        PeftlibError: shapes that differ, no pairs, or settings out of their range.

    Example:
        >>> zero = torch.zeros(3)
        >>> dpo_loss(zero, zero, zero, zero)  # ln 2: nothing learned yet
        tensor(0.6931)

    Source: Rafailov et al. 2023, arXiv:2305.18290, equation 7; Mitchell 2023 (conservative DPO); Azar et al. 2023,
    arXiv:2310.12036, equation 17; Zhao et al. 2023, arXiv:2305.10425 (hinge).
    """
    logps = (policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    _same("dpo_loss", *logps)
    _positive("beta", beta)
    if kind not in KINDS:
        raise PeftlibError(f"kind={kind!r} is unknown; there are {', '.join(map(repr, KINDS))}.")
    if not 0 <= label_smoothing < 0.5:
        raise PeftlibError(
            f"label_smoothing={label_smoothing} is the share of wrong labels: from 0 to below 0.5."
        )
    if label_smoothing and kind != "sigmoid":
        raise PeftlibError(f"label_smoothing= goes with kind='sigmoid'; kind={kind!r} has none.")
    h_B = (policy_chosen_logps - reference_chosen_logps) - (policy_rejected_logps - reference_rejected_logps)
    if kind == "ipo":
        return (h_B - 1 / (2 * beta)).square().mean()
    if kind == "hinge":
        return (1 - beta * h_B).relu().mean()
    wrong = label_smoothing
    return -((1 - wrong) * F.logsigmoid(beta * h_B) + wrong * F.logsigmoid(-beta * h_B)).mean()


def kto_loss(
    policy_logps: Tensor,
    reference_logps: Tensor,
    desirable: Tensor,
    kl: Tensor | float,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Kahneman and Tversky's value of each answer, good or bad by itself: the mean of ``w (1 - s(+-beta (r - z)))``.

    r is the log-ratio, z = max(0, kl) the point that gains and losses are counted from, + for desirable answers.

    Args:
        policy_logps: (B,), summed over the completion's tokens.
        reference_logps: (B,), the same of the reference.
        desirable: (B,) booleans.
        kl: an estimate of KL(policy || reference), a number; or the log-ratios of prompts with answers that belong to
            others, whose mean it is. No gradient goes through it.
        beta: how soon gains and losses saturate.
        desirable_weight: w of good answers; keep n_good w_good / (n_bad w_bad) between 1 and 4/3.
        undesirable_weight: w of bad ones.

    Raises:
        PeftlibError: shapes that differ, labels that are no booleans, no rows, or settings out of their range.

    Example:
        >>> kto_loss(torch.zeros(2), torch.zeros(2), torch.tensor([True, False]), 0.0)
        tensor(0.5000)

    Source: Ethayarajh et al. 2024, arXiv:2402.01306, equations 7 and 8.
    """
    _same("kto_loss", policy_logps, reference_logps, desirable)
    if desirable.dtype != torch.bool:
        raise PeftlibError(
            f"kto_loss takes desirable= as booleans; got {desirable.dtype}. Write desirable > 0."
        )
    _positive("beta", beta)
    z = torch.as_tensor(kl, dtype=policy_logps.dtype, device=policy_logps.device).detach().mean().clamp(min=0)
    gain_B = beta * (policy_logps - reference_logps - z)
    weight_B = torch.where(desirable, desirable_weight, undesirable_weight).to(gain_B)
    return (weight_B * (1 - torch.sigmoid(torch.where(desirable, gain_B, -gain_B)))).mean()


def reward_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor | float | None = None, centering: float = 0.0
) -> Tensor:
    """Bradley and Terry's: the mean of ``-log s(chosen - rejected - margin) + centering (chosen + rejected)^2``.

    Only differences of scores are learned from pairs; a little centering (0.01) keeps their mean at 0.

    Args:
        chosen: (B,) scores of the better answers.
        rejected: (B,) scores of the worse ones.
        margin: by how much the better one is better, a number or (B,).
        centering: weight of the squared sum of a pair's scores, from 0.

    Raises:
        PeftlibError: shapes that differ, no pairs, or a negative centering.

    Example:
        >>> reward_loss(torch.tensor([2.0]), torch.tensor([1.0]))  # log(1 + e^-1)
        tensor(0.3133)

    Source: Ouyang et al. 2022, arXiv:2203.02155, equation 1; Touvron et al. 2023, arXiv:2307.09288, equation 2;
    Eisenstein et al. 2023, arXiv:2312.09244, section 3 (centering).
    """
    _same(
        "reward_loss", chosen, rejected, *((margin,) if isinstance(margin, Tensor) and margin.dim() else ())
    )
    if centering < 0:
        raise PeftlibError(f"centering={centering} is a weight: give 0 or more.")
    gap_B = chosen - rejected if margin is None else chosen - rejected - margin
    loss = -F.logsigmoid(gap_B).mean()
    return loss + centering * (chosen + rejected).square().mean() if centering else loss


def _same(name: str, *tensors: Tensor) -> None:
    """One number per row, and as many in each; broadcasting would answer another question."""
    shapes = [tuple(t.shape) for t in tensors]
    if len(set(shapes)) > 1 or len(shapes[0]) != 1 or not shapes[0][0]:
        raise PeftlibError(
            f"{name} takes tensors of one shape (rows,), with at least one row; got {', '.join(map(str, shapes))}. Sum "
            "log-probabilities over each completion first."
        )


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise PeftlibError(f"{name}={value}: give a number above 0.")
