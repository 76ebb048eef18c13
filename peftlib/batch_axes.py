"""Along which axis the rows of a batch lie, at every site: two fake forwards, one of them a row longer, tell.

What a batch's rows are at the root, its inputs say; inside a model they may lie along another axis (time first), be
folded into one with something else (B·T, or windows of images), or be nowhere (positions that all rows share). What
grows between the two forwards is the axis. Sizes do not tell which of two folded axes runs faster: where rows are
folded, the model itself runs twice, the second time with its rows rolled by one.

Shape legend: B rows, K places that a row has on a folded axis.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from peftlib.errors import ProbeError, TargetError
from peftlib.methods.base import first_tensor
from peftlib.methods.rowwise import AXES, Axes, Axis
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
    folded = {name: axes for name, axes in found.items() if axes.folded}
    if folded:
        _find_order(model, {name: hosts[name] for name in folded}, folded, call, batch_dim, size)
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

    def resize(tensor: Tensor) -> Tensor:
        index = torch.arange(wanted, device=tensor.device).clamp(max=size - 1)
        return tensor.detach().index_select(batch_dim, index)

    return Call(*pytree.tree_map(_each_row(batch_dim, size, resize), tuple(call)))


def _each_row(batch_dim: int, size: int, change: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
    """A change of those leaves of a call that have the batch's rows."""

    def changed(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not _has(leaf, batch_dim) or leaf.shape[batch_dim] != size:
            return leaf
        return change(leaf)

    return changed


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
                        f"{name or 'the root'!r} has its rows now on axis {known[len(short)].at}, now on axis "
                        f"{axis.at}, so they cannot be told apart. Keep the tunings off it to route them."
                    )
    return axes


def _grown(name: str, short: tuple[int, ...], long: tuple[int, ...]) -> Axis:
    """The axis that grew; raises where it is not one axis, or not by as much for each row."""
    growth = [m - n for n, m in zip(short, long, strict=True)] if len(short) == len(long) else []
    changed = [i for i, g in enumerate(growth) if g]
    if len(changed) == 1:
        by = growth[changed[0]]
        if by == 1:
            return Axis(changed[0])
        if by > 1 and short[changed[0]] % by == 0:
            return Axis(changed[0], folded=True)
    raise TargetError(
        f"{name or 'the root'!r} works on a tensor of shape {short}, and of {long} for a row more: "
        f"{'all rows share it' if growth and not changed else 'it has no axis of rows'}, so rows cannot take different "
        "tunings there. Keep the tunings off it to route them (targets=[..., '!name'])."
    )


def _find_order(
    model: nn.Module,
    hosts: Mapping[str, nn.Module],
    folded: Mapping[str, Axes],
    call: Call,
    batch_dim: int,
    size: int,
) -> None:
    """Tell rows of K places each, (B K), from K places of all rows, (K B)."""
    if size < 2 or any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        raise ProbeError(
            f"{next(iter(hosts))!r} has its rows folded into one axis with something else, and which of the two runs "
            "faster only values tell: pass example= of two rows or more that differ, to a model with values."
        )
    rolled = Call(*pytree.tree_map(_each_row(batch_dim, size, lambda t: t.roll(1, batch_dim)), tuple(call)))
    with _settled(model):
        before, after = (_seen(model, hosts, c) for c in (call, rolled))
    for name, axes in folded.items():
        for side, a, b in zip((axes.input, axes.output), before[name], after[name], strict=True):
            for x, y in zip(a, b, strict=True):
                known = side[x.dim()]
                if known.folded:
                    side[x.dim()] = _ordered(name, known, x, y, size)


def _ordered(name: str, axis: Axis, x: Tensor, y: Tensor, size: int) -> Axis:
    """The order for which the second tensor is the first with its rows rolled by one."""
    fits = []
    for order in (True, False):
        tried = Axis(axis.at, folded=True, rows_first=order)
        difference = tried.split(x, size).roll(1, 0) - tried.split(y, size)
        fits.append((float(difference.double().abs().max()), tried))
    errors = sorted(error for error, _ in fits)
    if errors[0] >= 1e-2 * errors[1] or (
        axis.rows_first is not None and axis != min(fits, key=lambda f: f[0])[1]
    ):
        raise TargetError(
            f"{name or 'the root'!r} has its rows folded into axis {axis.at} of {tuple(x.shape)} in an order that the "
            "example does not show (its rows must differ). Keep the tunings off it to route them, or keep the batch "
            "an axis of its own there."
        )
    return min(fits, key=lambda f: f[0])[1]


def _seen(
    model: nn.Module, hosts: Mapping[str, nn.Module], call: Call
) -> dict[str, tuple[list[Tensor], list[Tensor]]]:
    """The first tensor of every input and output of the hosts, in one forward."""
    seen: dict[str, tuple[list[Tensor], list[Tensor]]] = {name: ([], []) for name in hosts}
    handles = []
    for name, host in hosts.items():

        def note(_: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
            for into, given in zip(seen[name], ([*args, *kwargs.values()], output), strict=True):
                tensor = first_tensor(given)
                if tensor is not None and tensor.dim():
                    into.append(tensor.detach().clone())

        handles.append(host.register_forward_hook(note, with_kwargs=True))
    try:
        model(*call.args, **call.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


@contextlib.contextmanager
def _settled(model: nn.Module) -> Iterator[None]:
    """In evaluation, without gradients, and with the random numbers given back."""
    modes = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        with torch.random.fork_rng(), torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _first_in_attention(less: Attention | None, more: Attention | None) -> bool:
    """Whether the rows lie on the first axis of a module's queries (B, H, T, E), for which a row's prefix is made."""
    if less is None or more is None or len(less.queries) != len(more.queries):
        return False
    pairs = zip(less.queries, more.queries, strict=True)
    return all(short[1:] == long[1:] and short[0] + 1 == long[0] for short, long in pairs)
