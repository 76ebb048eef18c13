"""Taking the P positions in front off a module's outputs again, wherever they carry them; caches keep them.

Shape legend: B batch, P prompt length, T tokens, H heads, E head width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from peftlib.errors import TargetError
from peftlib.methods.arguments import Layout, Shape
from peftlib.methods.calls import named_tensors


def learn_outputs(layout: Layout, before: Any, after: Any, short: Shape, long: Shape) -> None:
    """Note in the layout which axes of the outputs grew between two calls with positions of the given shapes.

    Raises:
        TargetError: an output grew by something else, or there are no tensors that could be told apart.
    """
    extra, extra_flat = long[layout.axis] - short[layout.axis], math.prod(long) - math.prod(short)
    old, new = dict(named_tensors(before)), dict(named_tensors(after))
    if not new:
        raise TargetError(
            f"A prompt has to be taken off the outputs again, and {type(after).__name__} shows no tensors: return a "
            "tensor, or a tuple, mapping or dataclass of tensors."
        )
    for path, tensor in new.items():
        if path in layout.outputs or path not in old or old[path].dim() != tensor.dim():
            continue
        sizes = list(old[path].shape)
        growth = [b - a for a, b in zip(sizes, tensor.shape, strict=True)]
        if any(g not in (0, extra, extra_flat) for g in growth) and not _is_cached(layout, path, tensor, []):
            raise TargetError(
                f"For {extra} more positions the output {path or 'tensor'!r} goes from {tuple(sizes)} to "
                f"{tuple(tensor.shape)}, so the prompt's share of it cannot be taken off. Target a module that keeps "
                "one output for each position."
            )
        layout.outputs[path] = [i for i, g in enumerate(growth) if g]
        layout.sizes[path] = sizes


def shorten(layout: Layout, output: Any, extra: int, shape: Shape, cached: bool = False) -> Any:
    """The output without its first ``extra`` positions.

    Args:
        layout: what the example showed of the outputs.
        output: tensors in any containers.
        extra: P.
        shape: of the longer call's positions.
        cached: whether the call had a cache, which the output may hand on.
    """
    length, flat = shape[layout.axis], math.prod(shape)
    first: list[str] = []

    def cut(path: str, tensor: Tensor) -> Tensor:
        first.append(path)
        axes = _axes(layout, path, tensor, shape)
        if _is_cached(layout, path, tensor, axes, path == first[0], cached):
            return tensor
        for axis in axes:
            size = tensor.shape[axis]
            if extra < size <= length:
                # Less than all of them where the longest sequence is shorter than the padding (pad_packed_sequence).
                tensor = tensor.narrow(axis, extra, size - extra)
            elif size == flat:
                at = axis + layout.axis % len(shape)
                tensor = tensor.unflatten(axis, shape).narrow(at, extra, length - extra)
                tensor = tensor.flatten(axis, axis + len(shape) - 1)
        return tensor

    return _map_tensors(output, cut)


def _is_cached(
    layout: Layout, path: str, tensor: Tensor, axes: list[int], first: bool = False, cached: bool = False
) -> bool:
    """Keys and values, or another cache: by name, or (B, H, T, E) or (B, T, H, E) beside the output proper."""
    low = path.lower()
    named = layout.given.get(path.partition(".")[0]) == "cache" or any(
        w in low for w in ("past", "cache", "present")
    )
    if named or tensor.dim() != 4 or first:
        return named
    # As many positions as features a head look like a map of attention, where the example did not show the output.
    square = cached and axes == [2, 3] and path not in layout.outputs and "att" not in low
    return axes in ([1], [2]) or square


def _axes(layout: Layout, path: str, tensor: Tensor, shape: Shape) -> list[int]:
    """The axes of an output that carry positions."""
    guess = _likely_axes(layout, path, tensor, shape)
    if path in layout.outputs and len(layout.sizes[path]) == tensor.dim():
        # An axis that did not grow in the example but has another size now: other arguments, another output.
        return layout.outputs[path] or [i for i in guess if tensor.shape[i] != layout.sizes[path][i]]
    # What the example had under another name or place, channels before positions for instance.
    alike = {
        tuple(axes) for p, axes in layout.outputs.items() if axes and len(layout.sizes[p]) == tensor.dim()
    }
    if len(alike) == 1 and not guess and not layout.paired:
        return list(alike.pop())
    return guess


def _likely_axes(layout: Layout, path: str, tensor: Tensor, shape: Shape) -> list[int]:
    """What shapes and names say of an output that the example did not have."""
    length, low = shape[layout.axis], path.lower()
    if layout.paired and "cross" in low:
        return [tensor.dim() - 1]
    if layout.paired and not low.startswith("encoder"):
        # The decoder's, as long as the encoder's by chance.
        return []
    if tensor.dim() == 4 and tensor.shape[2] == tensor.shape[3] == length:
        return [2, 3]
    return [layout.axis % len(shape)] if tensor.dim() >= 2 and tensor.shape[: len(shape)] == shape else []


def _map_tensors(output: Any, change: Callable[[str, Tensor], Tensor], path: str = "") -> Any:
    """The output with its tensors changed; containers keep their types, and stay the same object if nothing changed."""
    if isinstance(output, Tensor):
        return change(path, output)
    step = (lambda key: f"{path}.{key}") if path else str
    if isinstance(output, Mapping):
        new = {k: _map_tensors(v, change, step(k)) for k, v in output.items()}
        if all(new[k] is v for k, v in output.items()):
            return output
        return new if type(output) is dict else type(output)(**new)
    if isinstance(output, (tuple, list)):
        items = [_map_tensors(v, change, step(i)) for i, v in enumerate(output)]
        if all(a is b for a, b in zip(items, output, strict=True)):
            return output
        return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        old = {f.name: getattr(output, f.name) for f in dataclasses.fields(output)}
        changed = {k: _map_tensors(v, change, step(k)) for k, v in old.items()}
        changed = {k: v for k, v in changed.items() if v is not old[k]}
        return dataclasses.replace(output, **changed) if changed else output
    return output
