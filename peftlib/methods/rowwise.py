"""Several tunings in one batch, at one site: deltas of a kind run together, each for its own rows.

A group of like deltas (same class, same settings) stands in for them in the host's chain. Their tensors are laid out by
row, (B, ...), so that one batched product serves all; there is no loop over tunings. Rows of the base get zeros, or
keep what they had.

Left out on purpose: which tunings and rows there are (``routing``), and along which axis rows lie (``batch_axes``).

Shape legend: B rows, U different deltas, N sizes of one delta's tensor.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.utils.rnn import pad_sequence

from peftlib.errors import PeftlibError
from peftlib.methods.base import Delta, first_argument, map_first
from peftlib.methods.rows import FrozenCache

T = TypeVar("T")


@dataclass(frozen=True)
class Axis:
    """Where a tensor has the rows of a batch.

    Attributes:
        at: the axis.
        folded: whether each row has K places on it.
        rows_first: whether the K places of a row stand together, (B K), or are strewn, (K B).
    """

    at: int
    folded: bool = False
    rows_first: bool | None = None

    def split(self, tensor: Tensor, size: int) -> Tensor:
        """(B, ...): the rows in front, and the axis left with the K (or 1) places of each."""
        if not self.folded:
            return tensor.movedim(self.at, 0).unsqueeze(self.at + 1) if self.at else tensor.unsqueeze(1)
        if self.rows_first is False:
            return tensor.unflatten(self.at, (-1, size)).movedim(self.at + 1, 0)
        return tensor.unflatten(self.at, (size, -1)).movedim(self.at, 0)

    def join(self, tensor: Tensor) -> Tensor:
        """The inverse of :meth:`split`."""
        at = self.at
        if not self.folded:
            return tensor.squeeze(at + 1).movedim(0, at) if at else tensor.squeeze(1)
        if self.rows_first is False:
            return tensor.movedim(0, at + 1).flatten(at, at + 1)
        return tensor.movedim(0, at).flatten(at, at + 1)


@dataclass
class Axes:
    """Where a module has the rows of a batch.

    Attributes:
        input: number of axes of its first input -> where the rows are.
        output: the same of its first output.
        keys: whether its attention has them on the first axis of queries and keys.
    """

    input: dict[int, Axis] = field(default_factory=dict)
    output: dict[int, Axis] = field(default_factory=dict)
    keys: bool = False

    @property
    def folded(self) -> bool:
        return any(axis.folded for side in (self.input, self.output) for axis in side.values())


class Rows:
    """Which of several like deltas each row of a batch takes; it runs in their stead.

    Args:
        name: of the host that they are at.
        deltas: each once.
        which: for each row its delta's index, or ``None``.
        axes: where every host has the rows, by name; filled by the time they run.
        shared: what the groups of one batch have in common, by the deltas they stand for.
    """

    def __init__(
        self,
        name: str,
        deltas: Sequence[Delta],
        which: Sequence[int | None],
        axes: Mapping[str, Axes],
        shared: dict[int, Any],
    ):
        self.name, self.deltas, self.shared = name, tuple(deltas), shared
        self.which = tuple(len(self.deltas) if i is None else i for i in which)
        self.partial = any(i is None for i in which)
        self._axes = axes
        self._kept: dict[str, FrozenCache] = {}
        self._constants: dict[Any, Tensor] = {}
        self._numbers: dict[str, list[Any]] = {}

    def __len__(self) -> int:
        return len(self.which)

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.deltas[0].routed(self, base, *args, **kwargs)

    def known(self) -> Axes:
        """Where this host has its rows; raises if that has not been learned."""
        found = self._axes.get(self.name)
        if found is None:
            raise PeftlibError(
                f"{self.name or 'the root'!r} ran before the batch's way through the model was known: a part of the "
                "model was called by itself, or it was compiled first. Pass route(..., example=) of a call that runs "
                "it."
            )
        return found

    def axis(self, tensor: Tensor, side: str = "input") -> Axis:
        """Where a tensor has its rows; raises where it is not known, or they are not as many as the names."""
        if tensor.is_nested:
            raise PeftlibError(
                f"{self.name!r} got a nested tensor, whose rows have no common size. Make the encoder with "
                "enable_nested_tensor=False."
            )
        axis: Axis | None = getattr(self.known(), side).get(tensor.dim())
        if axis is None:
            raise PeftlibError(
                f"{self.name or 'the root'!r} has an {side} of shape {tuple(tensor.shape)}, and the example had none "
                f"of {tensor.dim()} axes, so its rows are not known. Pass route(..., example=) of such a call."
            )
        size = tensor.shape[axis.at]
        if size % len(self) if axis.folded else size != len(self):
            raise PeftlibError(
                f"route has {len(self)} names, and {self.name or 'the root'!r} has {size} rows on axis {axis.at} of "
                f"its {side} {tuple(tensor.shape)}. Give one name for each row of the batch; if they are as many, pass "
                "route(..., example=) of such a call."
            )
        return axis

    def stacked(self, what: str, read: Callable[[Any], Tensor]) -> Tensor:
        """(B, N): each row's own tensor, zeros where it has none; smaller ones have zeros behind."""
        return self.kept(what, lambda: self.by_row(self.together(read)), own_parameters)

    def kept(self, what: str, make: Callable[[], T], sources: Callable[[Any], Iterable[Tensor]]) -> T:
        """What ``make`` gives; without gradients it is kept for the next call, until a source changes."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            self._kept.clear()
            return make()
        cache = self._kept.setdefault(what, FrozenCache())
        return cache(list(itertools.chain.from_iterable(map(sources, self.deltas))), make)

    def together(self, read: Callable[[Any], Tensor]) -> Tensor:
        """(U, N): a tensor of each delta."""
        tensors_UN = [read(d) for d in self.deltas]
        if len({t.shape for t in tensors_UN}) == 1:
            return torch.stack(tensors_UN)
        # Of different rank or length: zeros behind the shorter ones.
        return pad_sequence(tensors_UN, batch_first=True)

    def by_row(self, tensors_UN: Tensor) -> Tensor:
        """(B, N): of each row's delta, zeros where it has none."""
        if self.partial:
            tensors_UN = torch.cat([tensors_UN, torch.zeros_like(tensors_UN[:1])])
        if self.which == tuple(range(len(tensors_UN))):
            return tensors_UN
        return tensors_UN[self.constant(self.which, tensors_UN.device)]

    def numbers(self, what: str) -> list[Any]:
        """A number that each delta has, for each row; 0 where it has no delta."""
        if what not in self._numbers:
            own = [*(getattr(d, what) for d in self.deltas), 0]
            self._numbers[what] = [own[i] for i in self.which]
        return self._numbers[what]

    def scalars(self, what: str, like: Tensor) -> Any:
        """The same as one number, if it is that for all rows, or as (B, 1, 1) beside a tensor."""
        numbers = self.numbers(what)
        if len(set(numbers)) == 1:
            return numbers[0]
        return self.constant(numbers, like.device, like.dtype).view(-1, 1, 1)

    def by_tuning(self, what: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """(B,) int32: each row's delta or -1; and (U,): a number that each delta has."""
        which = [i if i < len(self.deltas) else -1 for i in self.which]
        numbers = [getattr(d, what) for d in self.deltas]
        return self.constant(which, device, torch.int32), self.constant(numbers, device, torch.float32)

    def present(self, device: torch.device) -> Tensor:
        """(B,) bool: which rows have a delta here at all."""
        return self.constant([i < len(self.deltas) for i in self.which], device)

    def constant(
        self, values: Sequence[Any], device: torch.device, dtype: torch.dtype | None = None
    ) -> Tensor:
        """(B,): a number for each row, on the device once and for all."""
        key = (tuple(values), device, dtype)
        if torch.compiler.is_compiling():
            return torch.tensor(values, device=device, dtype=dtype)
        if key not in self._constants:
            self._constants[key] = torch.tensor(values, device=device, dtype=dtype)
        return self._constants[key]


def rowwise(rows: Rows, base: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Any delta that calls its base once, as it was called, and changes each row by itself.

    The base runs on the whole batch; then the delta's own forward runs under ``vmap`` over its tensors, with that row
    of the output in place of the base.
    """
    like = rows.deltas[0]
    x = first_argument(args, kwargs)
    version = _version(x)
    output = base(*args, **kwargs)
    if _version(x) != version:
        raise PeftlibError(
            f"{rows.name!r} changes its input in place, so that {type(like).__name__} cannot be routed there. Make it "
            "work out of place, or use the tunings one after another."
        )
    names = [n for n, _ in like.tensors()]
    tensors = [rows.stacked(n, functools.partial(_tensor, n)) for n in names]
    at_x = rows.axis(x)

    def change(y: Tensor) -> Tensor:
        at_y = rows.axis(y, "output")
        y_B = at_y.split(y, len(rows))

        def one(own: Sequence[Tensor], x_row: Tensor, y_row: Tensor) -> Any:
            return functional_call(like, dict(zip(names, own, strict=True)), ((lambda *_: y_row), x_row))

        new_B = torch.vmap(one, randomness="different")(tensors, at_x.split(x, len(rows)), y_B)
        if rows.partial:
            present = rows.present(y.device).view([-1, *[1] * y.dim()])
            new_B = torch.where(present, new_B, y_B)
        return at_y.join(new_B)

    return map_first(output, change)


def own_parameters(delta: Delta) -> Iterable[Tensor]:
    """What a delta's tensors by row are made of."""
    # parameters() walks modules at every call, and most deltas have none inside.
    return delta.parameters() if delta._modules else delta._parameters.values()  # type: ignore[return-value]


def _tensor(name: str, delta: Delta) -> Tensor:
    return dict(delta.tensors())[name]


def _version(tensor: Tensor) -> int:
    return 0 if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version
