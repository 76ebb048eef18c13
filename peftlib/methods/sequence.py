"""Making a call P positions longer at the front, and its outputs P positions shorter again.

A model's arguments are told apart by name and shape: ids, masks, positions, token types, labels, embeddings. What is
sequence-shaped and unknown is refused. Which axes of the outputs grow is learned from two fake forwards (``layout``).

Left out on purpose: what stands in the new positions. That is the prompt's business (``virtual``).

Shape legend: B batch, P prompt length, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from peftlib.errors import PeftlibError
from peftlib.methods.base import first_tensor
from peftlib.methods.calls import holds_floats, is_filled
from peftlib.methods.masks import lengthen_mask

KINDS = (
    "ids",
    "embeds",
    "mask",
    "padding_mask",
    "loss_mask",
    "positions",
    "lengths",
    "offset",
    "types",
    "labels",
    "cache",
    "skip",
)
"""What an argument can be: ``mask`` marks what is seen (or adds to scores), ``padding_mask`` what is ignored,
``loss_mask`` what is learned from; ``lengths`` count the positions of each sequence, ``offset`` those that the cache
holds; ``types`` are 0 at the prompt."""

DECODER = ("decoder_", "tgt")
"""How names of a decoder's arguments begin."""
_MEMORY = ("encoder_", "memory")
_OFFSETS = ("start_pos", "input_pos", "pos", "position", "offset", "past_length", "past_key_values_length")

_STATES = ("state", "hidden", "hidden_state", "hx", "h0", "mem", "kv")
"""Names, but for a plural, of tensors that carry what came before."""

Shape = tuple[int, ...]


@dataclass
class Layout:
    """How one module takes sequences; JSON-able through ``vars``.

    Attributes:
        main: name of the argument that carries the sequence.
        kind: ``"ids"`` or ``"embeds"``.
        axis: the axis of positions in the ids' shape, or in that of embeddings less D: -1 is the last, 0 the first.
        paired: the sequence is the encoder's in an encoder-decoder, so labels are of another one.
        hides: a boolean (T, T) mask marks what is hidden, as nn.MultiheadAttention has it.
        ignored: the label that the loss leaves out.
        given: kinds that the user named, by argument.
        square: by argument, whether a mask is (T, T), as far as the example told.
        outputs: path of an output tensor -> its axes that grow with the sequence.
        sizes: path of an output tensor -> its shape in the example.
    """

    main: str
    kind: str
    axis: int = -1
    paired: bool = False
    hides: bool = False
    ignored: int = -100
    given: dict[str, str] = field(default_factory=dict)
    square: dict[str, bool] = field(default_factory=dict)
    outputs: dict[str, list[int]] = field(default_factory=dict)
    sizes: dict[str, list[int]] = field(default_factory=dict)

    def kind_of(self, name: str, value: Any, shape: Shape, past: bool = False) -> str:
        """The kind of one argument of a call whose positions have the given shape, (B, T) for instance."""
        if name in self.given:
            return self.given[name]
        if name == self.main:
            return self.kind
        low = name.lower()
        if self.is_cache(name, value):
            return "cache"
        if _counts(low, value, shape):
            return "skip" if low.startswith(self._other_side()) else "lengths"
        if low.rstrip("s") in _STATES or not isinstance(value, Tensor):
            self._check_state(name, value)
        if not isinstance(value, Tensor) or not value.dim():
            return "skip"
        length = shape[self.axis]
        leading = _axis_of(value, shape, self.axis) is not None
        last = value.shape[-1] == length
        if low.startswith(self._other_side()):
            # An encoder-decoder masks the encoder's output by the same sequence.
            of_memory = self.paired and low.startswith(_MEMORY) and "mask" in low and last
            return _mask_kind(low) if of_memory else "skip"
        if "head_mask" in low:
            return "skip"
        if "mask" in low:
            if any(word in low for word in ("loss", "label", "target")):
                return "loss_mask" if leading else "skip"
            return _mask_kind(low) if leading or last or (past and value.shape[-1] > length) else "skip"
        if "pad" in low and value.dtype == torch.bool and (leading or last):
            return "padding_mask"
        whole = not value.is_floating_point()
        if "pos" in low and whole:
            return "positions" if leading or last else "skip"
        if ("type" in low or "segment" in low) and (leading or last):
            return "types"
        if ("label" in low or "target" in low) and whole:
            return "labels" if leading and not self.paired else "skip"
        if "embed" in low and leading and value.dim() == len(shape) + 1:
            return "embeds"
        if leading or (length > 1 and value.shape[-2:] == (length, length)):
            raise PeftlibError(
                f"The argument {name!r} of shape {tuple(value.shape)} looks aligned with the sequence of length "
                f"{length}, and what a prompt means for it is not known. Name its kind: "
                f"sequence_args={{{name!r}: kind}} with one of {', '.join(map(repr, KINDS))}."
            )
        return "skip"

    def _check_state(self, name: str, value: Any) -> None:
        """Refuse what may carry earlier positions, the prompt's among them, under a name that does not say so."""
        if not name.lower().startswith(self._other_side()) and holds_floats(value):
            raise PeftlibError(
                f"The argument {name!r} ({type(value).__name__}) holds tensors. If they are of earlier positions, the "
                "prompt is in them and must not come again. Name its kind: "
                f"sequence_args={{{name!r}: 'cache'}}, or 'skip' for what is no cache and no state."
            )

    def is_cache(self, name: str, value: Any) -> bool:
        """Whether an argument holds keys and values of earlier positions."""
        if name in self.given:
            return self.given[name] == "cache"
        low = name.lower()
        if (
            value is None
            or isinstance(value, (bool, int, float, str))
            or not ("past" in low or "cache" in low)
        ):
            return False
        return not (isinstance(value, Tensor) and ("pos" in low or "mask" in low))

    def is_offset(self, name: str, value: Any, cached: bool) -> bool:
        """Whether an argument counts the positions that a cache holds, be it an argument or inside the model."""
        number = type(value) is int or (isinstance(value, Tensor) and value.numel() == 1)
        if name in self.given or not number:
            return number and self.given[name] == "offset"
        low = name.lower()
        return low == "start_pos" or (
            cached and low in _OFFSETS and not (isinstance(value, Tensor) and value.dim())
        )

    def is_square(self, name: str, value: Tensor, kind: str, shape: Shape) -> bool:
        """Whether a mask's last two axes are rows and columns of the sequence."""
        length = shape[self.axis]
        if value.dim() < 2 or value.shape[-2:] != (length, length) or name.startswith(_MEMORY):
            return False
        if name in self.square:
            return self.square[name]
        if value.dim() > 2 or value.shape != shape:
            return True
        # As many sequences as tokens, and no example to tell (B, T) from (T, T): what names and dtypes mean mostly.
        whole = not value.is_floating_point() and value.dtype != torch.bool
        return not (whole or kind == "padding_mask" or "attention_mask" in name)

    def _other_side(self) -> tuple[str, ...]:
        return (*_MEMORY, "src") if self.main.startswith(DECODER) else (*DECODER, *_MEMORY)


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
        if not any(value is not None for name, value in call.items() if name.startswith(_MEMORY)):
            raise PeftlibError(
                f"This call gives the prompt nothing to stand before: the example's sequence came as {layout.main!r}, "
                f"and this call has {', '.join(map(repr, call)) or 'no arguments'}, so the prompt would "
                "silently be lost. Call the model as in the example, or attach with an example of this call."
            )
        return Longer(_masks_of_memory(layout, call, extra, others))
    embedded = main != layout.main or layout.kind == "embeds"
    shape = tuple(call[main].shape[:-1] if embedded else call[main].shape)
    length = shape[layout.axis]
    past, offsets = _past(layout, call)
    changed: dict[str, Any] = {name: call[name] + extra for name in offsets if past}
    lengths: list[int] = []
    for name, value in call.items():
        kind = "embeds" if name == main and embedded else layout.kind_of(name, value, shape, past)
        if kind == "lengths":
            changed[name] = (
                value + extra if isinstance(value, (Tensor, int)) else type(value)([n + extra for n in value])
            )
            continue
        if not isinstance(value, Tensor) or name in offsets or kind in ("skip", "cache", "offset"):
            continue
        if kind in ("mask", "padding_mask"):
            square = layout.is_square(name, value, kind, shape) and not past
            at = -1 if square or past or value.shape[-1] == length else _axis_of(value, shape, layout.axis)
            hides = kind == "padding_mask" or (
                layout.hides and square and value.dtype == torch.bool and name not in layout.given
            )
            changed[name] = lengthen_mask(
                value, extra, hides=hides, square=square, axis=-1 if at is None else at
            )
            continue
        at = _axis_of(value, shape, layout.axis)
        at = value.dim() - 1 if at is None else at
        if kind == "positions":
            new = torch.arange(extra, dtype=value.dtype, device=value.device)
            new = new.view([-1 if i == at else 1 for i in range(value.dim())]).expand(
                _sized(value.shape, at, extra)
            )
            changed[name] = value + extra if past else torch.cat([new, value + extra], at)
        elif not past:
            if kind == "labels" and value.is_floating_point():
                raise PeftlibError(
                    f"The labels {name!r} are {value.dtype}: no floating-point label is left out of a loss, so the "
                    "prompt's positions would be learned from. Compute the loss outside of the model."
                )
            if kind == "embeds" and rows is not None:
                new = rows(value)
            else:
                fill = {"ids": placeholder, "labels": layout.ignored}.get(kind, 0)
                new = value.new_full(_sized(value.shape, at, extra), fill)
            changed[name] = torch.cat([new, value], at)
            if kind == "ids":
                lengths.append(value.shape[at] + extra)
    if past:
        return Longer(changed)
    cached = any(layout.is_cache(name, value) for name, value in call.items())
    return Longer(changed, tuple(_sized(shape, layout.axis, length + extra)), tuple(lengths), cached)


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
        memory = first_tensor(outputs) if source.startswith(_MEMORY) and "mask" not in source else None
        if memory is None or memory.dim() != 3:
            continue
        for name, mask in call.items():
            kind = layout.given.get(name, _mask_kind(name) if "mask" in name else "skip")
            if isinstance(mask, Tensor) and kind in ("mask", "padding_mask") and not name.startswith(DECODER):
                if mask.shape[-1] == memory.shape[1] - extra - others:
                    changed[name] = lengthen_mask(mask, extra, hides=kind == "padding_mask")
    return changed


def _mask_kind(name: str) -> str:
    low = name.lower()
    return "padding_mask" if "padding" in low or "pad_mask" in low else "mask"


def _counts(name: str, value: Any, shape: Shape) -> bool:
    """Whether an argument counts the positions of each sequence of a batch."""
    if "len" not in name or "label" in name or "target" in name or len(shape) != 2:
        return False
    if isinstance(value, Tensor):
        return value.dim() == 1 and len(value) in shape and not value.is_floating_point()
    return isinstance(value, (list, tuple)) and len(value) in shape and all(type(n) is int for n in value)


def _axis_of(value: Tensor, shape: Shape, axis: int) -> int | None:
    """The sequence's axis in a tensor that begins with the positions' shape, or with (B, T) where that is (T, B)."""
    n = len(shape)
    axis %= n
    if _begins(value, shape, axis):
        return axis
    return 1 - axis if n == 2 and _begins(value, shape[::-1], 1 - axis) else None


def _begins(value: Tensor, shape: Shape, axis: int) -> bool:
    """Whether a tensor's first axes are these, or 1 where they are not the sequence's."""
    if value.dim() < len(shape):
        return False
    return all(value.shape[i] == size or (i != axis and value.shape[i] == 1) for i, size in enumerate(shape))


def _sized(shape: Sequence[int], axis: int, size: int) -> list[int]:
    sizes = list(shape)
    sizes[axis] = size
    return sizes
