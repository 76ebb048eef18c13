"""Hiding tokens for masked language modelling: what is predicted, and what stands in its place."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from peftlib import PeftlibError
from peftlib.train.losses import IGNORE


def mask_tokens(
    ids: Tensor,
    *,
    mask_id: int,
    vocabulary: int,
    keep: Tensor | None = None,
    special: Collection[int] = (),
    share: float = 0.15,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose positions, each with probability ``share``; of these 80% become the mask, 10% a random token, 10% stay.

    Each row with anything to choose from has at least one chosen position, so that no batch is without targets.

    Args:
        ids: (B, T) integers; unchanged.
        mask_id: the mask's token.
        vocabulary: random tokens are below it, and never special.
        keep: (B, T), True at padding, which is never chosen.
        special: tokens that are never chosen.
        share: of the positions.
        generator: on the device of ``ids``; by default torch's own.

    Returns:
        The changed ids, and labels: the original where a position was chosen, else -100.

    Raises:
        PeftlibError: ``share`` outside (0, 1], or nothing to choose from.

    Example:
        >>> ids = torch.arange(10, 20).expand(50, 10)
        >>> inputs, labels = mask_tokens(ids, mask_id=3, vocabulary=100)
        >>> bool((labels[labels != -100] == ids[labels != -100]).all()), 30 < (inputs == 3).sum() < 90
        (True, tensor(True))

    Source: Devlin et al. 2019, arXiv:1810.04805, appendix A.1.
    """
    if not 0 < share <= 1:
        raise PeftlibError(f"share={share}: give a part of the positions, above 0 and at most 1.")
    closed = torch.tensor([*special, mask_id], device=ids.device)
    free = ~torch.isin(ids, closed) if keep is None else ~torch.isin(ids, closed) & ~keep
    if not free.any():
        raise PeftlibError("mask_tokens has nothing to choose from: every position is padding or special.")
    open_ids = torch.arange(vocabulary, device=ids.device)
    open_ids = open_ids[~torch.isin(open_ids, closed)]
    if not len(open_ids):
        raise PeftlibError(f"vocabulary={vocabulary} has only special tokens: no random token can be drawn.")
    draw = torch.rand(ids.shape, generator=generator, device=ids.device).masked_fill(~free, 2.0)
    # the smallest draw of a row is chosen in any case
    chosen = free & ((draw < share) | (draw == draw.min(-1, keepdim=True).values))
    what = torch.rand(ids.shape, generator=generator, device=ids.device)
    others = open_ids[torch.randint(len(open_ids), ids.shape, generator=generator, device=ids.device)]
    inputs = torch.where(chosen & (what < 0.8), mask_id, ids)
    inputs = torch.where(chosen & (what >= 0.8) & (what < 0.9), others, inputs)
    return inputs, torch.where(chosen, ids, IGNORE)
