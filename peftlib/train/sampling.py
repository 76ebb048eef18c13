"""Which examples an epoch draws: functions of seed and epoch, so that a resumed run draws what it would have drawn.

A sampler is given to :class:`Batches`. The one that depends on more, the losses, is in ``mining``.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from peftlib import PeftlibError
from peftlib.train.batches import seeded_by


class Balanced:
    """Draws example i with probability ``p_i = chance_i / sum of chances``, each draw for itself, with replacement.

    Args:
        chances: of each example, 0 or more; ``inverse_frequency(classes)`` draws all classes alike.
        draws: in an epoch; by default as many as examples.
        seed: with the epoch, all that the draws depend on.

    Raises:
        PeftlibError: chances below 0, or all 0.

    Example:
        >>> from peftlib.train import inverse_frequency
        >>> sampler = Balanced(inverse_frequency([0] * 90 + [1] * 10), draws=1000)
        >>> 400 < int((sampler(epoch=0) >= 90).sum()) < 600
        True
    """

    def __init__(self, chances: Tensor | Sequence[float], *, draws: int | None = None, seed: int = 0):
        given = torch.as_tensor(chances, dtype=torch.float64)
        if (
            given.dim() != 1
            or not len(given)
            or not bool((given >= 0).all())
            or not 0 < given.sum() < torch.inf
        ):
            raise PeftlibError(
                "Chances are one number of 0 or more per example, and not all 0; got shape "
                f"{tuple(given.shape)}. inverse_frequency(classes) gives such."
            )
        self._until = given.cumsum(0) / given.sum()
        # where nothing more can be drawn no rounding may draw
        self._last = int(given.nonzero()[-1])
        self.draws, self.seed = len(given) if draws is None else draws, seed

    def __len__(self) -> int:
        return self.draws

    def __call__(self, epoch: int) -> Tensor:
        """The numbers drawn in an epoch."""
        drawn = torch.rand(self.draws, generator=seeded_by(self.seed, epoch), dtype=torch.float64)
        return torch.searchsorted(self._until, drawn, right=True).clamp_max(self._last)


class Replay:
    """New examples with a share of old ones among them: of any w draws in a row, ``w share`` are old, to less than one.

    The examples are the new ones with the old after them, ``Batches([*new, *old], ...)``. Draw k is old if
    ``floor((k + 1) share) > floor(k share)``; both kinds are drawn in an order of their own, all of a kind before any
    comes again. An epoch has as many draws as show each new example about once.

    Args:
        new: how many examples are new.
        old: how many come after them.
        share: of the draws that are old, between 0 and 1.
        seed: of both orders.

    Raises:
        PeftlibError: no example of a kind, or a share of nothing or of everything.

    Example:
        >>> sampler = Replay(new=6, old=100, share=0.25)
        >>> (sampler(epoch=0) >= 6).int().tolist()
        [0, 0, 0, 1, 0, 0, 0, 1]

    Source: Rolnick et al. 2019, arXiv:1811.11682, who mix old and new half and half.
    """

    def __init__(self, new: int, old: int, share: float | Fraction, *, seed: int = 0):
        # as written: 0.1 is a tenth, not the binary number next to it
        self.share = Fraction(str(share)).limit_denominator(10**6)
        if new < 1 or old < 1 or not 0 < self.share < 1:
            raise PeftlibError(
                f"Replay(new={new}, old={old}, share={share}): there has to be an example of each kind, and a share "
                "between 0 and 1. Without old data use plain Batches."
            )
        self.new, self.old, self.seed = new, old, seed

    def __len__(self) -> int:
        return max(1, round(self.new / (1 - self.share)))

    def __call__(self, epoch: int) -> Tensor:
        """The numbers drawn in an epoch, whose first draw follows the last of the one before."""
        k = torch.arange(epoch * len(self), (epoch + 1) * len(self))
        before = k * self.share.numerator // self.share.denominator
        is_old = (k + 1) * self.share.numerator // self.share.denominator > before
        old = self.new + self._in_turn(before, self.old, 1)
        return torch.where(is_old, old, self._in_turn(k - before, self.new, 0))

    def _in_turn(self, number: Tensor, size: int, kind: int) -> Tensor:
        """Draw ``number`` of one kind: permutation after permutation."""
        turns = number // size
        first = int(turns[0])
        orders = [
            torch.randperm(size, generator=seeded_by(self.seed, kind, turn))
            for turn in range(first, int(turns[-1]) + 1)
        ]
        return torch.cat(orders)[number - first * size]
