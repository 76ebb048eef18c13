"""What the minibatches of an iteration showed: how far the policy has moved from the one that drew, and the losses."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from peftlib import PeftlibError
from peftlib.train.advantages import masked_mean
from peftlib.train.parallel import Ranks
from peftlib.train.rollouts import Rollout


class Tally:
    """Means over the minibatches of an iteration, and what the first of them showed.

    Args:
        clip: how far a ratio may fall.
        clip_high: how far it may rise.
        rounding: by how much per token log-probabilities of the same policy may differ, see ``decoding``.
    """

    def __init__(self, clip: float, clip_high: float, rounding: float) -> None:
        self.clip, self.clip_high, self.rounding = clip, clip_high, rounding
        self.gap = 0.0
        self.rows: list[tuple[float, dict[str, float]]] = []

    def add(self, share: float, logps: Tensor, done: Rollout, losses: Mapping[str, Tensor]) -> None:
        """Note a part that is this share of its minibatch.

        Raises:
            PeftlibError: nothing was trained yet, and the policy is not the one that drew the tokens.
        """
        moved = torch.where(done.mask, logps.detach() - done.logps, 0)
        ratio = moved.exp()
        if not self.rows:
            off = masked_mean(moved.abs(), done.mask).item()
            if not off <= self.rounding:
                raise PeftlibError(
                    f"Before the first update the policy's log-probabilities differ from the rollout's by {off:.3g} "
                    "per token, though values and tokens are the same. Something in the model changes between two "
                    "forwards: dropout that eval mode does not turn off, or a state that it keeps."
                )
            self.gap = (ratio - 1).abs().max().item()
        clipped = (ratio < 1 - self.clip) | (ratio > 1 + self.clip_high)
        numbers = {
            "policy/approxkl": masked_mean(moved.square() / 2, done.mask),
            "policy/clipfrac": masked_mean(clipped.to(ratio), done.mask),
            "val/ratio": masked_mean(ratio, done.mask),
            **losses,
        }
        self.rows.append((share, {name: n.detach().item() for name, n in numbers.items()}))

    def means(self, ranks: Ranks) -> dict[str, float]:
        """By name, over all processes; of the first part ``val/first_ratio`` and the largest deviation from 1 in it."""
        share, first = self.rows[0]
        sums = {name: sum(share * row[name] for share, row in self.rows) for name in first}
        whole, part, ratio, *totals = ranks.total(
            sum(share for share, _ in self.rows), share, share * first["val/ratio"], *sums.values()
        )
        gaps = ranks.total(*(self.gap if rank == ranks.rank else 0.0 for rank in range(ranks.world)))
        return {
            **{name: total / whole for name, total in zip(sums, totals, strict=True)},
            "val/first_ratio": ratio / part,
            "val/first_ratio_gap": max(gaps),
        }
