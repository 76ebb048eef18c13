"""Along which axis the rows of a batch lie, at every site: two fake forwards, one of them a row longer, tell.

What a batch's rows are at the root, its inputs say; inside a model they may lie along another axis (time first, heads
folded in), or nowhere (positions that all rows share). What grew by one between the two forwards is the axis.

Left out on purpose: rows folded into one axis with time, (B·T, D). Sizes do not tell which of the two runs faster.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from peftlib.errors import ProbeError, TargetError
from peftlib.methods.rowwise import AXES, Axes
from peftlib.probe import Attention, Call, Probe, Record, as_call


def learn_axes(model: nn.Module, hosts: Mapping[str, nn.Module], example: Any, batch_dim: int) -> None:
    """Note at each host where the rows of a batch lie.

    Args:
        model: the root.
        hosts: open modules by name.
        example: a call of the root.
        batch_dim: the batch axis of its tensors.

    Raises:
        ProbeError: the example has no such axis, or the model does not take a row more.
        TargetError: a site where the rows have no axis of their own; it is named.
    """
    call = as_call(example)
    size = _batch_size(call, batch_dim)
    # One row broadcasts, so that nothing would show.
    rows = max(2, size)
    probe = Probe(model, _resized(call, batch_dim, size, rows))
    try:
        more = probe.run(*_resized(call, batch_dim, size, rows + 1))
    except Exception as error:
        lines = str(error).splitlines()
        raise ProbeError(
            f"{type(model).__name__} does not run with {rows + 1} rows where the example has {size} (on axis "
            f"{batch_dim} of every tensor of that size there): {lines[0] if lines else type(error).__name__}. Pass "
            "example= with a batch whose size no other axis has, and without a filled cache."
        ) from error
    found = {name: _axes(name, probe.record, more) for name in hosts}
    for name, host in hosts.items():
        host.__dict__.setdefault(AXES, {})[batch_dim] = found[name]


def _batch_size(call: Call, batch_dim: int) -> int:
    for leaf in pytree.tree_leaves(call):
        if isinstance(leaf, Tensor) and _has(leaf, batch_dim):
            return leaf.shape[batch_dim]
    raise ProbeError(
        f"The model's call has no tensor with an axis {batch_dim}, so there are no rows to route. Pass batch_dim=, the "
        "axis of the inputs along which the batch lies."
    )


def _has(tensor: Tensor, axis: int) -> bool:
    return -tensor.dim() <= axis < tensor.dim()


def _resized(call: Call, batch_dim: int, size: int, wanted: int) -> Call:
    """The call with another number of rows, the last of them repeated."""

    def resize(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not _has(leaf, batch_dim) or leaf.shape[batch_dim] != size:
            return leaf
        index = torch.arange(wanted, device=leaf.device).clamp(max=size - 1)
        return leaf.detach().index_select(batch_dim, index)

    return Call(*pytree.tree_map(resize, tuple(call)))


def _axes(name: str, less: Record, more: Record) -> Axes:
    axes = Axes(keys=_first_in_attention(less.attention.get(name), more.attention.get(name)))
    if name not in less.traces or name not in more.traces:
        return axes  # it did not run, and is refused if it ever does
    a, b = less.traces[name], more.traces[name]
    for known, before, after in ((axes.input, a.inputs, b.inputs), (axes.output, a.outputs, b.outputs)):
        if len(before) != len(after):
            raise TargetError(
                f"{name or 'the root'!r} runs {len(before)} times for one batch and {len(after)} times for a row more, "
                "so its rows cannot be told apart. Keep the tunings off it to route them."
            )
        for short, long in zip(before, after, strict=True):
            if short is not None and long is not None and short:
                axis = _grown(name, short, long)
                if known.setdefault(len(short), axis) != axis:
                    raise TargetError(
                        f"{name or 'the root'!r} has its rows now on axis {known[len(short)]}, now on axis {axis}, so "
                        "they cannot be told apart. Keep the tunings off it to route them."
                    )
    return axes


def _grown(name: str, short: tuple[int, ...], long: tuple[int, ...]) -> int:
    """The axis that grew by one; raises where it is not one axis, or not by one."""
    growth = [m - n for n, m in zip(short, long, strict=True)] if len(short) == len(long) else []
    changed = [i for i, g in enumerate(growth) if g]
    if len(changed) == 1 and growth[changed[0]] == 1:
        return changed[0]
    why = (
        "all rows share it"
        if growth and not changed
        else "its rows are folded into one axis with something else"
        if len(changed) == 1
        else "it has no axis of rows"
    )
    raise TargetError(
        f"{name or 'the root'!r} works on a tensor of shape {short}, and of {long} for a row more: {why}, so rows "
        "cannot take different tunings there. Keep the tunings off it to route them (targets=[..., '!name']), or keep "
        "the batch an axis of its own there."
    )


def _first_in_attention(less: Attention | None, more: Attention | None) -> bool:
    """Whether the rows lie on the first axis of a module's queries (B, H, T, E), for which a row's prefix is made."""
    if less is None or more is None or len(less.queries) != len(more.queries):
        return False
    pairs = zip(less.queries, more.queries, strict=True)
    return all(short[1:] == long[1:] and short[0] + 1 == long[0] for short, long in pairs)
