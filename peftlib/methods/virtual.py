"""The virtual tokens' way through a model: room at the module that takes the sequence, rows at the embedding.

The module that takes the sequence (the root, or a named part) is made to see P more positions: its ids, masks,
positions, types and labels grow, its outputs shrink again. The embedding writes the trained rows over the
placeholders. A module of hidden states gets the rows directly. So no length changes inside the model, and
absolute positions, rotary, masks and losses stay consistent in models nobody here wrote.

Shape legend: P prompt length, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftlib.errors import PeftlibError
from peftlib.methods.base import Delta, first_argument
from peftlib.methods.sequence import Layout, argument_names, back, by_name, lengthen, shorten


class Table(nn.Module):
    """The trained rows themselves, (P, D)."""

    def __init__(self, length: int, width: int, **where: Any):
        super().__init__()
        self.rows = nn.Parameter(torch.empty(length, width, **where))

    def forward(self) -> Tensor:
        return self.rows


class Prepend(Delta):
    """At the module that takes the sequence: P more positions in front, taken off the outputs again."""

    def __init__(self, prompt: nn.Module, length: int, host: nn.Module, facts: Mapping[str, Any]):
        super().__init__()
        self.prompt, self.length = prompt, length
        self.layout = Layout(**facts["layout"])
        self.names = argument_names(type(host).forward)
        self.placeholder, self.calls = facts.get("placeholder", 0), tuple(facts.get("calls", ()))
        self.pending: int | None = None
        """Length of the lengthened ids that the embedding will see; 0: none this time; ``None``: not in a forward."""
        self.seen = self.written = 0

    def extra_repr(self) -> str:
        return f"length={self.length}, at {self.layout.main!r}"

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = by_name(self.names, args, kwargs)
        changed, length, batch = lengthen(
            self.layout, call, self.length, placeholder=self.placeholder, rows=self._rows
        )
        args, kwargs = back(self.names, args, kwargs, changed)
        self.pending = length if self.layout.kind == "ids" and self.layout.main in changed else 0
        self.seen = self.written = 0
        try:
            output = base(*args, **kwargs)
            missed = self.pending and not self.written
        finally:
            self.pending = None
        if missed:
            raise PeftlibError(
                "The model ran without looking up its ids in the embedding that holds the prompt, so the prompt would "
                "silently be lost. Attach with an example that shows this way of calling it."
            )
        return shorten(self.layout, output, self.length, length, batch) if length else output

    def _rows(self, embeds: Tensor) -> Tensor:
        rows_PD = self.prompt().to(embeds.dtype)
        if self.layout.kind == "embeds" and self.layout.axis == 0:
            return rows_PD.unsqueeze(1).expand(-1, embeds.shape[1], -1)
        return rows_PD.expand(*embeds.shape[:-2], -1, -1)

    def merged(self) -> Any:
        raise PeftlibError(
            "A prompt cannot be merged: it adds positions, not a change of a weight. Keep the tuning attached."
        )

    def fold(self) -> bool:
        return _fold(self)


class Overwrite(Delta):
    """At the embedding: the trained rows in the placeholder positions of the lengthened ids."""

    def __init__(self, anchor: Prepend):
        super().__init__()
        self._anchor = (anchor,)

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        anchor = self._anchor[0]
        ids = first_argument(args, kwargs)
        out = base(*args, **kwargs)
        if anchor.pending is None:
            raise PeftlibError(
                "The embedding ran while the module that holds the prompt was not running (an encoder called directly, or "
                "recomputed in a checkpoint), so the prompt would silently be lost. Call the model that the prompt is "
                "attached to, or put the prompt on the part that is called: attach(model, {'encoder': PromptTuning(...)})."
            )
        index, anchor.seen = anchor.seen, anchor.seen + 1
        if not anchor.pending or index not in anchor.calls or ids.shape[-1] != anchor.pending:
            return out
        anchor.written += 1
        rows_PD = anchor.prompt().to(out.dtype)
        return torch.cat([rows_PD.expand(*out.shape[:-2], -1, -1), out[..., anchor.length :, :]], -2)

    def merged(self) -> Any:
        return []  # the prompt itself refuses


class Placeholder(Delta):
    """At the embedding: the k-th occurrence of the placeholder id in a sequence takes the k-th trained row."""

    def __init__(self, prompt: nn.Module, length: int, placeholder_id: int):
        super().__init__()
        self.prompt, self.length, self.placeholder_id = prompt, length, placeholder_id

    def extra_repr(self) -> str:
        return f"length={self.length}, placeholder_id={self.placeholder_id}"

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        ids = first_argument(args, kwargs)
        there = ids == self.placeholder_id
        if not torch.compiler.is_compiling() and not ids.is_meta:
            counts = there.sum(-1)
            wrong = (counts != 0) & (counts != self.length)
            if wrong.any():
                raise PeftlibError(
                    f"A sequence holds the placeholder id {self.placeholder_id} {int(counts[wrong][0])} times; the prompt has "
                    f"{self.length} rows. Write it exactly {self.length} times into each template (or not at all)."
                )
        # The placeholder may be an id that the table does not have.
        safe = ids.masked_fill(there, 0)
        args = tuple(safe if a is ids else a for a in args)
        kwargs = {k: safe if v is ids else v for k, v in kwargs.items()}
        out = base(*args, **kwargs)
        rows_PD = self.prompt().to(out.dtype)
        which = (there.cumsum(-1) - 1).clamp(0, self.length - 1)
        return torch.where(there.unsqueeze(-1), rows_PD[which], out)

    def merged(self) -> Any:
        raise PeftlibError(
            "A prompt cannot be merged: it adds positions, not a change of a weight. Keep the tuning attached."
        )

    def fold(self) -> bool:
        return _fold(self)


def _fold(delta: Any) -> bool:
    if isinstance(delta.prompt, Table):
        return False
    with torch.no_grad():
        rows = delta.prompt().detach().clone()
    trains = next(delta.prompt.parameters()).requires_grad
    delta.prompt = Table(*rows.shape, dtype=rows.dtype, device=rows.device)
    delta.prompt.rows = nn.Parameter(rows, requires_grad=trains)
    return True
