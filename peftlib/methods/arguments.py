"""What each argument of a forward is to a sequence, told by its name and shape.

Ids, masks, positions, token types, labels, embeddings, caches. What is sequence-shaped and unknown is refused.

Shape legend: B batch, T tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from peftlib.errors import PeftlibError
from peftlib.methods.calls import holds_floats

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
MEMORY = ("encoder_", "memory")
"""How names of an encoder's outputs, and of what belongs to them, begin."""
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
        leading = axis_of(value, shape, self.axis) is not None
        last = value.shape[-1] == length
        if low.startswith(self._other_side()):
            # An encoder-decoder masks the encoder's output by the same sequence.
            of_memory = self.paired and low.startswith(MEMORY) and "mask" in low and last
            return mask_kind(low) if of_memory else "skip"
        if "head_mask" in low:
            return "skip"
        if "mask" in low:
            if any(word in low for word in ("loss", "label", "target")):
                return "loss_mask" if leading else "skip"
            return mask_kind(low) if leading or last or (past and value.shape[-1] > length) else "skip"
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
        if value.dim() < 2 or value.shape[-2:] != (length, length) or name.startswith(MEMORY):
            return False
        if name in self.square:
            return self.square[name]
        if value.dim() > 2 or value.shape != shape:
            return True
        # As many sequences as tokens, and no example to tell (B, T) from (T, T): what names and dtypes mean mostly.
        whole = not value.is_floating_point() and value.dtype != torch.bool
        return not (whole or kind == "padding_mask" or "attention_mask" in name)

    def _other_side(self) -> tuple[str, ...]:
        return (*MEMORY, "src") if self.main.startswith(DECODER) else (*DECODER, *MEMORY)


def mask_kind(name: str) -> str:
    low = name.lower()
    return "padding_mask" if "padding" in low or "pad_mask" in low else "mask"


def _counts(name: str, value: Any, shape: Shape) -> bool:
    """Whether an argument counts the positions of each sequence of a batch."""
    if "len" not in name or "label" in name or "target" in name or len(shape) != 2:
        return False
    if isinstance(value, Tensor):
        return value.dim() == 1 and len(value) in shape and not value.is_floating_point()
    return isinstance(value, (list, tuple)) and len(value) in shape and all(type(n) is int for n in value)


def axis_of(value: Tensor, shape: Shape, axis: int) -> int | None:
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
