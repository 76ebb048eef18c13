"""Batches in an order that is a function of the seed and the epoch, so that any place in it can be found again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from peftlib import PeftlibError


class Batches:
    """Batches of ``size`` examples, in another order each epoch: the permutation of generator(seed + epoch).

    It draws nothing from the global generators, and a run that goes on starts at its batch without making those before.

    Args:
        examples: anything with a length and ``[i]``.
        size: examples in a batch; the last one of an epoch may have fewer.
        collate: a list of examples -> a batch; by default the list itself.
        shuffle: whether the order changes.
        seed: of the order.

    Raises:
        PeftlibError: no examples, or a size below 1.

    Example:
        >>> batches = Batches(range(5), 2, seed=1)
        >>> (
        ...     len(batches),
        ...     sorted(sum(batches, [])),
        ...     list(batches.epoch(1, start=2)) == list(batches.epoch(1))[2:],
        ... )
        (3, [0, 1, 2, 3, 4], True)
    """

    def __init__(
        self,
        examples: Sequence[Any],
        size: int,
        collate: Callable[[list[Any]], Any] = list,
        *,
        shuffle: bool = True,
        seed: int = 0,
    ):
        if len(examples) == 0 or size < 1:
            raise PeftlibError(
                f"Batches of {size} from {len(examples)} example(s): there has to be at least one of each."
            )
        self.examples, self.size, self.collate = examples, size, collate
        self.shuffle, self.seed = shuffle, seed

    def __len__(self) -> int:
        return -(-len(self.examples) // self.size)

    def __iter__(self) -> Iterator[Any]:
        return self.epoch(0)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Any]:
        """The batches of an epoch from batch ``start`` on."""
        order = torch.arange(len(self.examples))
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            order = torch.randperm(len(self.examples), generator=generator)
        for chosen in order.split(self.size)[start:]:
            yield self.collate([self.examples[i] for i in chosen.tolist()])
