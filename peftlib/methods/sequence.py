"""Making a call P positions longer at the front, and its outputs P positions shorter again.

A model's arguments are told apart by name and shape: ids, masks, positions, token types, labels, embeddings. What is
sequence-shaped and unknown is refused. Which axes of the outputs grow is learned from two fake forwards.

Left out on purpose: what stands in the new positions. That is the prompt's business (``prompt``).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftlib.errors import PeftlibError

KINDS = ("ids", "embeds", "mask", "padding_mask", "positions", "types", "labels", "cache", "skip")
"""What an argument can be: ``mask`` marks what is seen (or adds to scores), ``padding_mask`` what is ignored."""

IGNORED_LABEL = -100


@dataclass
class Layout:
    """How one module takes sequences; JSON-able through ``vars``.

    Attributes:
        main: name of the argument that carries the sequence.
        kind: ``"ids"`` or ``"embeds"``.
        axis: its sequence axis.
        labels: whether labels are aligned with the sequence (not so in an encoder-decoder).
        given: kinds that the user named, by argument.
        outputs: path of an output tensor -> its axes that grow with the sequence.
        ranks: path of an output tensor -> its number of axes.
    """

    main: str
    kind: str
    axis: int
    labels: bool = True
    given: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, list[int]] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)

    def kind_of(self, name: str, value: Any, batch: int, length: int) -> str:
        """The kind of one argument of a call whose main argument is (batch, length)."""
        if name in self.given:
            return self.given[name]
        if name == self.main:
            return self.kind
        low = name.lower()
        if "past" in low or "cache" in low:
            return "positions" if isinstance(value, Tensor) and "position" in low else "cache"
        if not isinstance(value, Tensor) or low.startswith(("decoder_", "tgt", "memory", "encoder_")):
            return "skip"
        square = value.dim() >= 2 and value.shape[-2:] == (length, length)
        aligned = value.dim() >= 1 and value.shape[-1] == length
        if "mask" in low:
            if "head" in low or not (aligned or value.dim() >= 1):
                return "skip"
            return "padding_mask" if "padding" in low or "pad_mask" in low else "mask"
        if "pos" in low and not value.is_floating_point() and (aligned or value.numel() == 1):
            return "positions"
        if ("type" in low or "segment" in low) and aligned:
            return "types"
        leading = value.dim() >= 2 and value.shape[:2] == (batch, length)
        if ("label" in low or "target" in low) and not value.is_floating_point():
            return "labels" if leading and self.labels else "skip"
        if "embed" in low and leading and value.dim() == 3:
            return "embeds"
        if leading or (square and length > 1):
            raise PeftlibError(
                f"The argument {name!r} of shape {tuple(value.shape)} looks aligned with the sequence of length {length}, "
                "and what a prompt means for it is not known. Name its kind: "
                f"sequence_args={{{name!r}: kind}} with one of {', '.join(map(repr, KINDS))}."
            )
        return "skip"


def argument_names(forward: Callable[..., Any]) -> list[str]:
    """Names of the positional parameters of a bound or unbound forward, ``self`` left out."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [n for n, p in inspect.signature(forward).parameters.items() if p.kind in kinds]
    return names[1:] if names[:1] == ["self"] else names


def by_name(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name; what the signature does not name is ``"#i"``."""
    found = {names[i] if i < len(names) else f"#{i}": value for i, value in enumerate(args)}
    return {**found, **kwargs}


def back(
    names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any], changed: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call with changed arguments, each where it stood."""
    new_args = tuple(
        changed.get(names[i] if i < len(names) else f"#{i}", value) for i, value in enumerate(args)
    )
    return new_args, {key: changed.get(key, value) for key, value in kwargs.items()}


def cached_length(value: Any) -> int:
    """How many positions a key/value cache holds; 0 for none or an empty one."""
    if value is None or isinstance(value, bool):
        return 0
    if isinstance(value, Tensor):
        return value.shape[-2] if value.dim() >= 2 and value.numel() else 0
    for name in ("get_seq_length", "seq_length", "seen_tokens", "length"):
        found = getattr(value, name, None)
        if found is not None:
            return int(found() if callable(found) else found)
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return _longest(value)
    held = vars(value).values() if hasattr(value, "__dict__") else ()
    return _longest([v for v in held if isinstance(v, (Tensor, list, tuple, dict))])


def _longest(caches: Sequence[Any]) -> int:
    # A loop, not max(..., default=0), which the compiler does not follow.
    longest = 0
    for cache in caches:
        longest = max(longest, cached_length(cache))
    return longest


def lengthen(
    layout: Layout,
    call: Mapping[str, Any],
    extra: int,
    *,
    placeholder: int = 0,
    rows: Callable[[Tensor], Tensor] | None = None,
) -> tuple[dict[str, Any], int, int]:
    """The arguments that change when ``extra`` positions come in front.

    Args:
        layout: what the arguments are.
        call: all arguments by name.
        extra: P.
        placeholder: the id that stands in the new positions of ids.
        rows: ``rows(embeds)`` gives the (..., P, D) values for the new positions of embeddings; ``None`` is zeros.

    Returns:
        The changed arguments, the new length and the batch size; the length is 0 where nothing is prepended because
        the cache already holds the prompt or the sequence is not among the arguments.
    """
    main = call.get(layout.main)
    embeds = None
    if main is None:
        for name, value in call.items():
            if embeds is None and isinstance(value, Tensor) and "embed" in name.lower() and value.dim() == 3:
                embeds = name
        main = call.get(embeds) if embeds is not None else None
    if not isinstance(main, Tensor):
        return {}, 0, 0
    axis = layout.axis if embeds is None else 1
    length = main.shape[axis]
    batch = main.shape[1 - axis] if main.dim() > 1 else 1
    kinds = {n: "embeds" if n == embeds else layout.kind_of(n, v, batch, length) for n, v in call.items()}
    past = _longest([call[n] for n, kind in kinds.items() if kind == "cache"])
    offset = call.get("start_pos")
    if isinstance(offset, int) and offset > 0:
        past = past or offset
    changed: dict[str, Any] = {}
    for name, kind in kinds.items():
        value = call[name]
        if not isinstance(value, Tensor) or kind in ("skip", "cache"):
            continue
        if kind in ("mask", "padding_mask"):
            changed[name] = lengthen_mask(
                value, extra, length, prepend=not past, padding=kind == "padding_mask"
            )
        elif kind == "positions":
            shifted = value + extra
            if not past and value.shape[-1] == length:
                first = torch.arange(extra, dtype=value.dtype, device=value.device)
                shifted = torch.cat([first.expand(*value.shape[:-1], extra), shifted], -1)
            changed[name] = shifted
        elif past:
            continue
        elif kind == "embeds":
            at = layout.axis if name == layout.main else 1
            new = value.new_zeros(_sized(value, at, extra)) if rows is None else rows(value)
            changed[name] = torch.cat([new, value], at)
        else:
            fill = {"ids": placeholder, "types": 0, "labels": IGNORED_LABEL}[kind]
            at = layout.axis if kind == "ids" else -1
            changed[name] = torch.cat([value.new_full(_sized(value, at, extra), fill), value], at)
    if isinstance(offset, int) and past:
        changed["start_pos"] = offset + extra
    return changed, 0 if past else length + extra, batch


def lengthen_mask(mask: Tensor, extra: int, length: int, *, prepend: bool, padding: bool) -> Tensor:
    """A mask with ``extra`` visible positions in front.

    A (..., T) mask gets columns. A (..., T, T) mask gets columns and rows: prompt rows see the prompt (in order, if
    the first row does not see the last column: a causal mask), and the real positions as far as the first and the last
    of them may be seen by the first row.
    """
    boolean = mask.dtype == torch.bool
    # An additive mask is floating point with more than one axis of positions; a floating (B, T) mask marks with 1.
    square = (
        mask.dim() >= 2
        and mask.shape[-1] == mask.shape[-2] == length
        and (mask.dim() != 2 or mask.shape[0] == length)
    )
    additive = mask.is_floating_point() and (mask.dim() > 2 or square)
    seen: float = 0 if padding or additive else 1
    wider = F.pad(mask, (extra, 0), value=bool(seen) if boolean else seen)
    if not (square and prepend) or (mask.dim() == 2 and not mask.is_floating_point() and not boolean):
        return wider
    first = mask[..., :1, :]
    last = mask[..., :1, -1:]
    future = torch.ones(extra, extra, dtype=torch.bool, device=mask.device).triu(1)
    if boolean:
        hidden = (last if padding else ~last) & future
        corner = hidden if padding else ~hidden
        rows = first | last if padding else first & last
    else:
        corner = torch.where(future, last, torch.zeros_like(last))
        rows = first + last
    corner = corner.expand(*mask.shape[:-2], extra, extra)
    top = torch.cat([corner, rows.expand(*mask.shape[:-2], extra, mask.shape[-1])], -1)
    return torch.cat([top, wider], -2)


def shorten(layout: Layout, output: Any, extra: int, length: int, batch: int) -> Any:
    """The output without its first ``extra`` positions, wherever it carries them; caches keep them."""

    def cut(path: str, tensor: Tensor) -> Tensor:
        low = path.lower()
        if any(word in low for word in ("past", "cache", "present")):
            return tensor
        axes = layout.outputs.get(path)
        if axes is None or layout.ranks.get(path) != tensor.dim():
            axes = _grown_axes(tensor, length, batch)
        if axes == [2] and tensor.dim() == 4:
            return tensor  # (B, H, T, E): keys or values for a cache
        for axis in axes:
            if tensor.shape[axis] == length:
                tensor = tensor.narrow(axis, extra, length - extra)
        return tensor

    return _map_tensors(output, cut)


def _grown_axes(tensor: Tensor, length: int, batch: int) -> list[int]:
    if tensor.dim() == 4 and tensor.shape[2] == tensor.shape[3] == length:
        return [2, 3]
    return [1] if tensor.dim() >= 2 and tuple(tensor.shape[:2]) == (batch, length) else []


def _map_tensors(output: Any, change: Callable[[str, Tensor], Tensor], path: str = "") -> Any:
    if isinstance(output, Tensor):
        return change(path, output)
    step = (lambda key: f"{path}.{key}") if path else str
    if isinstance(output, Mapping):
        new = {k: _map_tensors(v, change, step(k)) for k, v in output.items()}
        if all(new[k] is v for k, v in output.items()):
            return output
        return type(output)(**new) if not type(output) is dict else new
    if isinstance(output, (tuple, list)):
        items = [_map_tensors(v, change, step(i)) for i, v in enumerate(output)]
        if all(a is b for a, b in zip(items, output, strict=True)):
            return output
        return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
    if hasattr(output, "__dataclass_fields__"):
        import dataclasses

        old = {k: getattr(output, k) for k in output.__dataclass_fields__}
        changed = {k: _map_tensors(v, change, step(k)) for k, v in old.items()}
        changed = {k: v for k, v in changed.items() if v is not old[k]}
        return dataclasses.replace(output, **changed) if changed else output
    return output


def _sized(value: Tensor, axis: int, size: int) -> list[int]:
    shape = list(value.shape)
    shape[axis] = size
    return shape


def sequence_axis(module: nn.Module, value: Tensor) -> int:
    """The sequence axis of a module's main argument: the last of ids, the second of (B, T, D) embeddings.

    Attention modules say ``batch_first=False`` where the sequence comes first.
    """
    if not value.is_floating_point():
        return value.dim() - 1
    first = next((m for m in module.modules() if isinstance(m, nn.MultiheadAttention)), None)
    return 0 if first is not None and not first.batch_first else 1
