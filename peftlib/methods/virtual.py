"""The virtual tokens' way through a model: room at the module that takes the sequence, rows at the embedding.

The module that takes the sequence (the root, or a named part) is made to see P more positions: its ids, masks,
positions, types and labels grow, its outputs shrink again. The embedding writes the trained rows over the
placeholders. A module of hidden states gets the rows directly. So no length changes inside the model, and
absolute positions, rotary, masks and losses stay consistent in models nobody here wrote.

Shape legend: P prompt length, D embedding width.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from peftlib.errors import PeftlibError
from peftlib.methods.arguments import Layout
from peftlib.methods.base import Delta, first_argument
from peftlib.methods.calls import argument_names, back, by_name
from peftlib.methods.outputs import shorten
from peftlib.methods.rowwise import Axis, Rows
from peftlib.methods.sequence import Longer, lengthen

_LAST = 1 << 30
"""Added to a delta's place in its host's order to make it the last."""


class Table(nn.Module):
    """The trained rows themselves, (P, D)."""

    def __init__(self, length: int, width: int, **where: Any):
        super().__init__()
        self.rows = nn.Parameter(torch.empty(length, width, **where))

    def forward(self) -> Tensor:
        return self.rows


@dataclass
class Entry:
    """Where sequences come in: a module's argument names, what they are, and the lookups that follow.

    Attributes:
        layout: what the arguments are.
        names: the forward's positional parameters.
        calls: which of the embedding's lookups during one forward are of the sequence.
        at: the axis of positions in their ids, from the last.
    """

    layout: Layout
    names: list[str]
    calls: list[int]
    at: int

    @classmethod
    def of(cls, host: nn.Module, facts: Mapping[str, Any]) -> Entry:
        names = argument_names(type(host).forward)
        return cls(Layout(**facts["layout"]), names, list(facts.get("calls", ())), facts.get("at", -1))


@dataclass
class Room:
    """The room that the forward which is running made for the prompt.

    Attributes:
        entry: where.
        lengths: P + T of the ids that the embedding will see; empty if it need not write.
        shift: positions that prompts further in have put before this one.
        seen: lookups so far.
        written: lookups that got the rows.
    """

    entry: Entry
    lengths: Sequence[int]
    shift: int = 0
    seen: int = 0
    written: int = 0


class RowPrompts(nn.Module):
    """(B, P, D): the rows of a prompt for each row of a batch."""

    def __init__(self, rows: Rows):
        super().__init__()
        self.rows = rows

    def forward(self) -> Tensor:
        rows = self.rows
        make = lambda: rows.by_row(rows.together(lambda d: d.prompt()))  # noqa: E731
        return rows.kept("prompt", make, lambda d: list(d.prompt.parameters()))


class Prepend(Delta):
    """At the module that takes the sequence: P more positions in front, taken off the outputs again."""

    everywhere: ClassVar[bool] = True

    def __init__(
        self,
        prompt: nn.Module,
        length: int,
        host: nn.Module,
        table: nn.Module | None,
        facts: Mapping[str, Any],
    ):
        super().__init__()
        self.prompt, self.length = prompt, length
        self.entry, self.placeholder = Entry.of(host, facts), facts.get("placeholder", 0)
        self.room: Room | None = None
        # In a tuple, for the embedding is no part of the delta.
        self._table = () if table is None else (table,)

    def extra_repr(self) -> str:
        return f"length={self.length}, at {self.entry.layout.main!r}"

    def alike(self) -> Hashable:
        return type(self), self.length, repr(self.entry)

    def for_rows(self, rows: Rows) -> Prepend:
        twin = copy.copy(self)
        twin.__dict__["_modules"] = {"prompt": RowPrompts(rows)}
        rows.shared[id(self)] = twin
        return twin

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output, longer = self.run(self.entry, base, args, kwargs)
        if not longer.shape:
            return output
        return shorten(self.entry.layout, output, self.length, longer.shape, longer.cached)

    def run(
        self, entry: Entry, base: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Any, Longer]:
        """The output of the longer call as it is, and what was done to the call."""
        layout = entry.layout
        call = by_name(entry.names, args, kwargs)
        others = [anchor for anchor in self._others() if anchor.room is None]
        longer = lengthen(
            layout,
            call,
            self.length,
            placeholder=self.placeholder,
            rows=self._rows,
            others=sum(anchor.length for anchor in others),
        )
        args, kwargs = back(entry.names, args, kwargs, longer.changed)
        looked_up = layout.kind == "ids" and layout.main in longer.changed
        enclosing = [anchor.room for anchor in self._others() if anchor.room is not None and longer.shape]
        outer, room = self.room, Room(entry, longer.lengths if looked_up else ())
        self.room = room
        for other in enclosing:
            other.shift += self.length
        try:
            output = base(*args, **kwargs)
        finally:
            self.room = outer
            for other in enclosing:
                other.shift -= self.length
        if room.lengths and not room.written:
            raise PeftlibError(
                "The model ran without looking up its ids in the embedding that holds the prompt, so the prompt would "
                "silently be lost. Attach with an example that shows this way of calling it."
            )
        return output, longer

    def _others(self) -> Iterator[Prepend]:
        """The enabled prompts of other tunings at the same embedding; those whose forward runs are around this one."""
        for table in self._table:
            for delta in table.__dict__["_peft_active"]:
                if isinstance(delta, Overwrite) and delta.anchor is not self:
                    yield delta.anchor

    def _rows(self, embeds: Tensor) -> Tensor:
        axis = self.entry.layout.axis
        return _spread(self.prompt(), embeds, axis if axis >= 0 else axis - 1)

    def merged(self) -> Any:
        raise _unmergeable()

    def fold(self) -> bool:
        return _fold(self)


class Relay(Delta):
    """At a module that gets its ids from the one with the prompt, for when it is called by itself.

    So generation with an encoder-decoder runs the encoder once. Its output stays P positions longer, and the model,
    given that output in place of ids, lengthens the masks over it.
    """

    everywhere: ClassVar[bool] = True

    def __init__(self, anchor: Prepend, host: nn.Module, facts: Mapping[str, Any]):
        super().__init__()
        self._anchor = (anchor,)
        self.entry = Entry.of(host, facts)

    def alike(self) -> Hashable:
        return type(self), repr(self.entry)

    def for_rows(self, rows: Rows) -> Relay:
        twin = copy.copy(self)
        twin._anchor = (rows.shared[id(self._anchor[0])],)
        return twin

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        anchor = self._anchor[0]
        if anchor.room is not None:
            return base(*args, **kwargs)
        return anchor.run(self.entry, base, args, kwargs)[0]

    def merged(self) -> Any:
        raise _unmergeable()


class AtEmbedding(Delta):
    """Runs after whatever else is at the embedding, so that the rows come out as trained."""

    @property
    def order(self) -> int:
        return _LAST + self.__dict__["_order"]

    @order.setter
    def order(self, value: int) -> None:
        self.__dict__["_order"] = value


class Overwrite(AtEmbedding):
    """At the embedding: the trained rows in the placeholder positions of the lengthened ids."""

    everywhere: ClassVar[bool] = True

    def __init__(self, anchor: Prepend):
        super().__init__()
        self._anchor = (anchor,)

    @property
    def anchor(self) -> Prepend:
        return self._anchor[0]

    def alike(self) -> Hashable:
        return type(self), self.anchor.alike()

    def for_rows(self, rows: Rows) -> Overwrite:
        return Overwrite(rows.shared[id(self.anchor)])

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        room, length = self.anchor.room, self.anchor.length
        ids = first_argument(args, kwargs)
        out = base(*args, **kwargs)
        if room is None:
            raise PeftlibError(
                "The embedding ran while the module that holds the prompt was not running (a part called directly, or "
                "recomputed in a checkpoint), so the prompt would silently be lost. Call the model that the prompt is "
                "attached to, or put the prompt on the part that is called: "
                "attach(model, {'encoder': PromptTuning(...)}). For the embedding's own values, disable the tuning."
            )
        index, room.seen = room.seen, room.seen + 1
        at = room.entry.at
        if index not in room.entry.calls or ids.dim() < -at or ids.shape[at] - room.shift not in room.lengths:
            return out
        room.written += 1
        axis, end = at - 1, room.shift + length
        rows = _spread(self.anchor.prompt(), out, axis)
        rest = out.narrow(axis, end, out.shape[axis] - end)
        return torch.cat([out.narrow(axis, 0, room.shift), rows, rest], axis)

    def merged(self) -> Any:
        raise _unmergeable()


def prompts_within(part: nn.Module, table: nn.Module) -> int:
    """How many positions the enabled prompts at and in a part put before the ids that an embedding sees."""
    inside = set(part.modules())
    active = table.__dict__.get("_peft_active", ())
    return sum(d.anchor.length for d in active if isinstance(d, Overwrite) and d.anchor in inside)


@contextlib.contextmanager
def resting(part: nn.Module) -> Iterator[None]:
    """Let a part run by itself for a trial, without the prompts of modules around it."""
    inside = set(part.modules())
    found = (delta for module in inside for delta in module.__dict__.get("_peft_active", ()))
    around = {d.anchor for d in found if isinstance(d, Overwrite)} - inside
    idle = [anchor for anchor in around if anchor.room is None]
    for anchor in idle:
        anchor.room = Room(anchor.entry, ())
    try:
        yield
    finally:
        for anchor in idle:
            anchor.room = None


def _spread(rows: Tensor, like: Tensor, axis: int) -> Tensor:
    """A prompt's rows, (P, D) or (B, P, D), along one axis of vectors shaped like others."""
    axis %= like.dim()
    sizes = [rows.shape[-2] if i == axis else n for i, n in enumerate(like.shape)]
    if rows.dim() == 3:
        if like.dim() != 3 or like.shape[1 - axis] != len(rows):
            raise PeftlibError(
                f"{len(rows)} rows of a batch have a prompt of their own, and the vectors it goes before have the "
                f"shape {tuple(like.shape)}; expected (B, T, D) or (T, B, D) with B = {len(rows)}."
            )
        return rows.to(like.dtype).movedim(0, 1 - axis)
    view = [n if i in (axis, like.dim() - 1) else 1 for i, n in enumerate(sizes)]
    return rows.to(like.dtype).reshape(view).expand(sizes)


class Placeholder(AtEmbedding):
    """At the embedding: the k-th occurrence of the placeholder id in a sequence takes the k-th trained row."""

    def __init__(self, prompt: nn.Module, length: int, placeholder_id: int):
        super().__init__()
        self.prompt, self.length, self.placeholder_id = prompt, length, placeholder_id

    def extra_repr(self) -> str:
        return f"length={self.length}, placeholder_id={self.placeholder_id}"

    def alike(self) -> Hashable:
        return type(self), self.length, self.placeholder_id

    @classmethod
    def routed(cls, rows: Rows, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        first: Any = rows.deltas[0]
        ids = first_argument(args, kwargs)
        if ids.dim() != 2 or rows.axis(ids) != Axis(0):
            raise PeftlibError(
                f"The embedding sees ids of shape {tuple(ids.shape)}, and each row of the batch has a prompt of its "
                "own; expected (B, T)."
            )
        present_B = rows.present(ids.device) if rows.partial else None
        return first._run(RowPrompts(rows)(), present_B, base, args, kwargs)

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self._run(self.prompt(), None, base, args, kwargs)

    def _run(
        self,
        rows: Tensor,
        present_B: Tensor | None,
        base: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        ids = first_argument(args, kwargs)
        there = ids == self.placeholder_id
        if present_B is not None:
            there = there & present_B[:, None]
        if not (torch.compiler.is_compiling() or ids.is_meta or isinstance(ids, FakeTensor)):
            counts = there.sum(-1)
            wrong = (counts != 0) & (counts != self.length)
            if wrong.any():
                raise PeftlibError(
                    f"A sequence holds the placeholder id {self.placeholder_id} {int(counts[wrong][0])} times; the "
                    f"prompt has {self.length} rows. Write it exactly {self.length} times into each template (or not "
                    "at all)."
                )
        # The placeholder may be an id that the table does not have.
        safe = ids.masked_fill(there, 0)
        args = tuple(safe if a is ids else a for a in args)
        kwargs = {k: safe if v is ids else v for k, v in kwargs.items()}
        out = base(*args, **kwargs)
        which = (there.cumsum(-1) - 1).clamp(0, self.length - 1)
        if rows.dim() == 3:
            vectors = rows[torch.arange(len(rows), device=rows.device)[:, None], which]
        else:
            vectors = rows[which]
        return torch.where(there.unsqueeze(-1), vectors.to(out.dtype), out)

    def merged(self) -> Any:
        raise _unmergeable()

    def fold(self) -> bool:
        return _fold(self)


def _unmergeable() -> PeftlibError:
    return PeftlibError(
        "A prompt cannot be merged: it adds positions, not a change of a weight. Keep the tuning attached."
    )


def _fold(delta: Any) -> bool:
    if isinstance(delta.prompt, Table):
        return False
    with torch.no_grad():
        rows = delta.prompt().detach().clone()
    trains = next(delta.prompt.parameters()).requires_grad
    delta.prompt = Table(*rows.shape, dtype=rows.dtype, device=rows.device)
    delta.prompt.rows = nn.Parameter(rows, requires_grad=trains)
    return True
