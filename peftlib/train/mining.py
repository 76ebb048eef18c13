"""Drawing examples by the loss they had: the sampler that has a state, which goes into the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftlib import PeftlibError
from peftlib.train.batches import seeded_by
from peftlib.train.step import Loss
from peftlib.train.weighting import of_samples

_ONE = 2**32
"""Expected draws are whole numbers of this part, so that their sum is exact."""


class Mining:
    """Draws hard examples more often: after a first epoch with each once, ``E[draws_i] = min(cap, c l_i^power)``.

    l_i is the loss per target when example i was last trained on, and c makes an epoch have as many draws as there are
    examples. No example is drawn more than ``cap`` times an epoch, and none more or less often than its expectation
    rounded up or down. What is minimized is then another mean than that of the data: hard examples may be wrong ones.

    Args:
        examples: how many there are.
        cap: most draws of one example in an epoch; 1 draws each once.
        power: 0 ignores losses, larger ones look at little else.
        seed: of everything drawn.

    Raises:
        PeftlibError: numbers out of range; in training, a loss of whole batches, or batches without ``index``. ``fit``
            refuses it in several processes, each of which would know other losses.

    Example:
        >>> from functools import partial
        >>> from peftlib.train import Batches, regression
        >>> rows = [{"inputs": float(x), "labels": 0.0} for x in (1, 1, 1, 3)]
        >>> def collate(rows):
        ...     return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}
        >>> mining = Mining(len(rows), cap=2)
        >>> batches = Batches(rows, 2, collate, sampler=mining, index=True)
        >>> loss = mining.watch(partial(regression, each=True))
        >>> for epoch in range(2):
        ...     drawn = [loss(nn.Identity(), batch) and batch["index"] for batch in batches.epoch(epoch)]
        >>> int((torch.cat(drawn) == 3).sum())
        2

    Source: sampling by loss, Loshchilov and Hutter 2016, arXiv:1511.06343; hard examples, Shrivastava et al. 2016,
    arXiv:1604.03540.
    """

    def __init__(self, examples: int, *, cap: int = 3, power: float = 1.0, seed: int = 0):
        if examples < 1 or cap < 1 or power < 0:
            raise PeftlibError(
                f"Mining takes examples >= 1, cap >= 1 and power >= 0; got {examples}, {cap}, {power}."
            )
        self.cap, self.power, self.seed = cap, power, seed
        self.losses = torch.full((examples,), torch.nan, dtype=torch.float64)
        """Of each example, per target, when it was last trained on; NaN before."""
        self._order, self._epoch = torch.arange(examples), -1
        self._goes_on = False

    def __len__(self) -> int:
        return len(self.losses)

    def __call__(self, epoch: int) -> Tensor:
        """The numbers drawn in an epoch, by the losses so far; epoch 0 forgets what was before."""
        if not (self._goes_on and epoch == self._epoch):
            if epoch == 0:
                self.losses.fill_(torch.nan)
            self._order, self._epoch = self._draw(epoch), epoch
        self._goes_on = False
        return self._order

    def watch(self, loss: Loss) -> Loss:
        """The loss as it is, of whose samples this keeps the values in training."""

        def watched(model: nn.Module, batch: Any) -> Any:
            result = loss(model, batch)
            if torch.is_grad_enabled():
                sums, counts, index = of_samples(result, batch)
                now = (sums.detach() / counts).double().cpu()
                index, fine = index.cpu(), now.isfinite()  # 0 targets or an overflow say nothing
                self.losses[index[fine]] = now[fine]
            return result

        return watched

    def expected(self) -> Tensor:
        """Expected draws of each example in the next epoch, (N,)."""
        losses = self.losses.clamp_min(0)
        known = losses[~losses.isnan()]
        if not len(known):
            return torch.ones_like(losses)
        score = losses.nan_to_num(nan=float(known.mean()))
        # by the largest, so that no power overflows
        score = (score / score.max().clamp_min(torch.finfo(torch.float64).tiny)) ** self.power
        found, free = torch.zeros_like(score), torch.ones_like(score, dtype=torch.bool)
        while True:
            left, total = len(score) - float(found.sum()), score[free].sum()
            share = score * (left / total) if total > 0 else torch.full_like(score, left / int(free.sum()))
            over = free & (share > self.cap)
            if not over.any():
                return torch.where(free, share, found)
            found[over], free = float(self.cap), free & ~over

    def _draw(self, epoch: int) -> Tensor:
        generator, count = seeded_by(self.seed, epoch), len(self)
        shuffled = torch.randperm(count, generator=generator)
        # systematic sampling: points one apart, and each example an interval as long as its expectation
        lengths = (self.expected()[shuffled] * _ONE).round().long().clamp_max(self.cap * _ONE)
        short = count * _ONE - int(lengths.sum())
        room = (self.cap * _ONE - lengths) if short > 0 else -lengths
        filled = room.cumsum(0)
        # what rounding took from the sum, the first with room give back
        lengths += (filled.clamp(max=short) if short > 0 else filled.clamp(min=short)).diff(
            prepend=torch.zeros(1).long()
        )
        ends = lengths.cumsum(0) + int(torch.randint(_ONE, (1,), generator=generator))
        times = (ends // _ONE).diff(prepend=torch.zeros(1).long())
        drawn = shuffled.repeat_interleave(times)
        return drawn[torch.randperm(count, generator=generator)]

    def state_dict(self) -> dict[str, Tensor]:
        """Losses, and the draws of this epoch."""
        return {"losses": self.losses, "order": self._order, "epoch": torch.tensor(self._epoch)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on within the epoch of the state.

        Raises:
            PeftlibError: it is of another number of examples.
        """
        if len(state["losses"]) != len(self):
            raise PeftlibError(
                f"The mining was of {len(state['losses'])} examples, and is now of {len(self)}. Go on with the same."
            )
        self.losses, self._order = state["losses"].clone(), state["order"].clone()
        self._epoch, self._goes_on = int(state["epoch"]), True
