"""Making a call P positions longer at the front.

Left out on purpose: what an argument is (``arguments``), what stands in the new positions (``virtual``), and how the
outputs become shorter again (``outputs``).

Shape legend: B batch, P prompt length, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftlib.errors import PeftlibError
from peftlib.methods.arguments import DECODER, MEMORY, Layout, Shape, axis_of, mask_kind
from peftlib.methods.base import first_tensor
from peftlib.methods.calls import is_filled
from peftlib.methods.masks import lengthen_mask


@dataclass
class Longer:
    """A call made longer.

    Attributes:
        changed: the arguments that changed, by name.
        shape: the longer positions' shape, (B, P + T) for instance; empty where nothing came in front, because the
            cache holds the prompt already or the sequence is not among the arguments.
        lengths: of the longer ids, of each argument of them.
        cached: whether there is a cache among the arguments, filled or not.
    """

    changed: dict[str, Any]
    shape: Shape = ()
    lengths: tuple[int, ...] = ()
    cached: bool = False


def lengthen(
    layout: Layout,
    call: Mapping[str, Any],
    extra: int,
    *,
    placeholder: int = 0,
    rows: Callable[[Tensor], Tensor] | None = None,
    others: int = 0,
) -> Longer:
    """The arguments that change when ``extra`` positions come in front.

    Args:
        layout: what the arguments are.
        call: all arguments by name.
        extra: P.
        placeholder: the id that stands in the new positions of ids.
        rows: ``rows(embeds)`` gives the values for the new positions of embeddings; ``None`` is zeros.
        others: positions that prompts further in will put in front as well.
    """
    main = layout.main if isinstance(call.get(layout.main), Tensor) else _embeds(layout, call)
    if main is None:
        if not any(value is not None for name, value in call.items() if name.startswith(MEMORY)):
            raise PeftlibError(
                f"This call gives the prompt nothing to stand before: the example's sequence came as {layout.main!r}, "
                f"and this call has {', '.join(map(repr, call)) or 'no arguments'}, so the prompt would "
                "silently be lost. Call the model as in the example, or attach with an example of this call."
            )
        return Longer(_masks_of_memory(layout, call, extra, others))
    embedded = main != layout.main or layout.kind == "embeds"
    shape = tuple(call[main].shape[:-1] if embedded else call[main].shape)
    past, offsets = _past(layout, call)
    front = _Front(layout, shape, extra, placeholder, rows)
    changed: dict[str, Any] = {name: call[name] + extra for name in offsets if past}
    lengths: list[int] = []
    for name, value in call.items():
        kind = "embeds" if name == main and embedded else layout.kind_of(name, value, shape, past)
        if kind == "lengths":
            changed[name] = _plus(value, extra)
        elif not isinstance(value, Tensor) or name in offsets or kind in ("skip", "cache", "offset"):
            continue
        elif kind in ("mask", "padding_mask"):
            changed[name] = front.mask(name, value, kind, past)
        elif past:
            if kind == "positions":
                changed[name] = value + extra
        else:
            changed[name] = front.before(name, value, kind)
            if kind == "ids":
                lengths.append(changed[name].shape[front.axis_of(value)])
    if past:
        return Longer(changed)
    cached = any(layout.is_cache(name, value) for name, value in call.items())
    return Longer(
        changed, tuple(_sized(shape, layout.axis, shape[layout.axis] + extra)), tuple(lengths), cached
    )


@dataclass
class _Front:
    """New positions before the arguments of one call whose own positions have the given shape."""

    layout: Layout
    shape: Shape
    extra: int
    placeholder: int
    rows: Callable[[Tensor], Tensor] | None

    def axis_of(self, value: Tensor) -> int:
        axis = axis_of(value, self.shape, self.layout.axis)
        return value.dim() - 1 if axis is None else axis

    def mask(self, name: str, mask: Tensor, kind: str, past: bool) -> Tensor:
        square = not past and self.layout.is_square(name, mask, kind, self.shape)
        last = square or past or mask.shape[-1] == self.shape[self.layout.axis]
        hides = kind == "padding_mask" or (
            # Only a named kind overrules what nn.MultiheadAttention means by True.
            self.layout.hides and square and mask.dtype == torch.bool and name not in self.layout.given
        )
        axis = -1 if last else self.axis_of(mask)
        return lengthen_mask(mask, self.extra, hides=hides, square=square, axis=axis)

    def before(self, name: str, value: Tensor, kind: str) -> Tensor:
        axis = self.axis_of(value)
        if kind == "positions":
            order = torch.arange(self.extra, dtype=value.dtype, device=value.device)
            order = order.view([-1 if i == axis else 1 for i in range(value.dim())])
            new, value = order.expand(_sized(value.shape, axis, self.extra)), value + self.extra
        elif kind == "embeds" and self.rows is not None:
            new = self.rows(value)
        elif kind == "labels" and value.is_floating_point():
            raise PeftlibError(
                f"The labels {name!r} are {value.dtype}: no floating-point label is left out of a loss, so the "
                "prompt's positions would be learned from. Compute the loss outside of the model."
            )
        else:
            fill = {"ids": self.placeholder, "labels": self.layout.ignored}.get(kind, 0)
            new = value.new_full(_sized(value.shape, axis, self.extra), fill)
        return torch.cat([new, value], axis)


def _plus(lengths: Any, extra: int) -> Any:
    if isinstance(lengths, (Tensor, int)):
        return lengths + extra
    return type(lengths)([n + extra for n in lengths])


def _embeds(layout: Layout, call: Mapping[str, Any]) -> str | None:
    """The argument of embeddings that stands in for the ids."""
    for name, value in call.items():
        low = name.lower()
        if isinstance(value, Tensor) and "embed" in low and value.dim() == 3 and value.is_floating_point():
            if low.startswith(DECODER) == layout.main.startswith(DECODER):
                return name
    return None


def _past(layout: Layout, call: Mapping[str, Any]) -> tuple[bool, list[str]]:
    """Whether a cache holds the prompt already, and the arguments that count what it holds."""
    caches = [value for name, value in call.items() if layout.is_cache(name, value)]
    offsets = [name for name, value in call.items() if layout.is_offset(name, value, bool(caches))]
    for name in offsets:
        if call[name] > 0:
            return True, offsets
    # A count of nothing is believed before the size of a cache, which may be allocated in full.
    return not offsets and is_filled(caches), offsets


def _masks_of_memory(layout: Layout, call: Mapping[str, Any], extra: int, others: int) -> dict[str, Any]:
    """The masks over an encoder's output that is longer by the prompt and given in place of ids."""
    changed: dict[str, Any] = {}
    for source, outputs in call.items():
        memory = first_tensor(outputs) if source.startswith(MEMORY) and "mask" not in source else None
        if memory is None or memory.dim() != 3:
            continue
        for name, mask in call.items():
            kind = layout.given.get(name, mask_kind(name) if "mask" in name else "skip")
            if isinstance(mask, Tensor) and kind in ("mask", "padding_mask") and not name.startswith(DECODER):
                if mask.shape[-1] == memory.shape[1] - extra - others:
                    changed[name] = lengthen_mask(mask, extra, hides=kind == "padding_mask")
    return changed


def _sized(shape: Sequence[int], axis: int, size: int) -> list[int]:
    sizes = list(shape)
    sizes[axis] = size
    return sizes
