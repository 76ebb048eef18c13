"""Batches in an order that is a function of the seed and the epoch, so that any place in it can be found again."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from peftlib import PeftlibError


class Sampler(Protocol):
    """What an epoch draws: a length, and called with an epoch's number, that many numbers of examples.

    One whose draws depend on more than the epoch also has ``state_dict`` and ``load_state_dict``, of tensors.

    Example:
        >>> class ShortFirst:
        ...     def __init__(self, texts):
        ...         self.order = torch.tensor([len(text) for text in texts]).argsort()
        ...
        ...     def __len__(self):
        ...         return len(self.order)
        ...
        ...     def __call__(self, epoch):
        ...         return self.order
        >>> texts = ["four", "a", "six"]
        >>> list(Batches(texts, 2, sampler=ShortFirst(texts)))
        [['a', 'six'], ['four']]
    """

    def __len__(self) -> int: ...

    def __call__(self, epoch: int) -> Tensor: ...


class Batches:
    """Batches of ``size`` examples, in another order each epoch: the permutation of generator(seed + epoch).

    It draws nothing from the global generators, and a run that goes on starts at its batch without making those before.

    Args:
        examples: anything with a length and ``[i]``.
        size: examples in a batch; the last one of an epoch may have fewer.
        collate: a list of examples -> a batch; by default the list itself.
        shuffle: whether the order changes.
        seed: of the order, and of what ``augment`` draws.
        sampler: what is drawn instead of each example once: :class:`Balanced`, :class:`Replay`, :class:`Mining`, or
            one of your own, see :class:`Sampler`.
        augment: (example, generator) -> example, before ``collate``. The generator is seeded by seed, epoch and place
            in it, so that a resumed run sees what it would have seen.
        index: add ``batch["index"]``, the examples' numbers (B,), to batches that are mappings: what weights and mining
            look samples up by.

    Raises:
        PeftlibError: no examples, or none that have a length and ``[i]``; a size below 1, ``index`` of batches that are
            no mappings, or a sampler that draws another number of examples than its length, or one that is not there.

    Example:
        >>> batches = Batches(range(5), 2, seed=1)
        >>> (
        ...     len(batches),
        ...     sorted(sum(batches, [])),
        ...     list(batches.epoch(1, start=2)) == list(batches.epoch(1))[2:],
        ... )
        (3, [0, 1, 2, 3, 4], True)
        >>> noisy = Batches(
        ...     range(5), 2, augment=lambda x, generator: x + torch.rand(1, generator=generator).item()
        ... )
        >>> list(noisy.epoch(0, start=1)) == list(noisy.epoch(0))[1:]
        True
    """

    def __init__(
        self,
        examples: Sequence[Any],
        size: int,
        collate: Callable[[list[Any]], Any] = list,
        *,
        shuffle: bool = True,
        seed: int = 0,
        sampler: Sampler | None = None,
        augment: Callable[[Any, torch.Generator], Any] | None = None,
        index: bool = False,
    ):
        if not (hasattr(examples, "__len__") and hasattr(examples, "__getitem__")):
            raise PeftlibError(
                f"Batches cannot be made of a {type(examples).__name__}: examples need a length and [i]. Give a list."
            )
        if len(examples) == 0 or size < 1:
            raise PeftlibError(
                f"Batches of {size} from {len(examples)} example(s): there has to be at least one of each."
            )
        self.examples, self.size, self.collate = examples, size, collate
        self.shuffle, self.seed = shuffle, seed
        self.sampler, self.augment, self.index = sampler, augment, index

    def __len__(self) -> int:
        return -(-self.draws // self.size)

    @property
    def draws(self) -> int:
        """Examples in an epoch."""
        return len(self.examples) if self.sampler is None else len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        """A look at epoch 0, of which a sampler that has a state learns nothing: a training may be under way."""
        look = copy.copy(self)
        look.sampler = copy.deepcopy(self.sampler) if hasattr(self.sampler, "state_dict") else self.sampler
        return look.epoch(0)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Any]:
        """The batches of an epoch from batch ``start`` on."""
        for places in self.places(epoch, start):
            yield self.made(epoch, places)

    def places(self, epoch: int, start: int = 0) -> Iterator[list[tuple[int, int]]]:
        """What each of these batches is made of: (place in the epoch, number of the example)."""
        order = list(enumerate(self._order(epoch).tolist()))
        for first in range(start * self.size, len(order), self.size):
            yield order[first : first + self.size]

    def made(self, epoch: int, places: Sequence[tuple[int, int]]) -> Any:
        """A batch of these."""
        batch = self.collate([self._example(number, epoch, place) for place, number in places])
        if not self.index:
            return batch
        if not isinstance(batch, Mapping):
            raise PeftlibError(
                f"index=True adds batch['index'], and collate= gives {type(batch).__name__}. Give a dict."
            )
        return {**batch, "index": torch.tensor([number for _, number in places])}

    def _order(self, epoch: int) -> Tensor:
        if self.sampler is None:
            order = torch.arange(len(self.examples))
            if self.shuffle:
                generator = torch.Generator().manual_seed(self.seed + epoch)
                order = torch.randperm(len(self.examples), generator=generator)
            return order
        order = self.sampler(epoch)
        there = len(self.examples)
        if len(order) != len(self.sampler) or bool(((order < 0) | (order >= there)).any()):
            raise PeftlibError(
                f"{type(self.sampler).__name__}, of length {len(self.sampler)}, drew {len(order)} numbers, and not all "
                f"of them are those of {there} examples. Make it for these examples."
            )
        return order

    def _example(self, number: int, epoch: int, place: int) -> Any:
        example = self.examples[number]
        return example if self.augment is None else self.augment(example, seeded_by(self.seed, epoch, place))

    def state_dict(self) -> dict[str, Tensor]:
        """What the next batch depends on besides seed, epoch and place: the sampler's state, if it has any."""
        state: Any = getattr(self.sampler, "state_dict", dict)
        return state()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on with a sampler's state.

        Raises:
            PeftlibError: it is not this sampler's.
        """
        expected, given = self.state_dict().keys(), state.keys()
        if expected != given:
            raise PeftlibError(
                f"The batches were saved with a sampler that keeps {sorted(given) or 'nothing'}; "
                f"{type(self.sampler).__name__} keeps {sorted(expected) or 'nothing'}. Go on with the same sampler."
            )
        if state and self.sampler is not None:
            self.sampler.load_state_dict(state)  # type: ignore[attr-defined]


def seeded_by(*numbers: int) -> torch.Generator:
    """A generator of its own for each tuple of numbers: sums of seeds would meet, (0, 1) and (1, 0)."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))
