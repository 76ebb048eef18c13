"""Along which axis the rows of a batch lie, at every site: two fake forwards, one of them a row longer, tell.

What a batch's rows are at the root, its inputs say; inside a model they may lie along another axis (time first), be
folded into one with something else (B·T, or windows of images), or be nowhere (positions that all rows share). What
grows between the two forwards is the axis. That row i is still row i there (a model may sort its rows by length) and
which of two folded axes runs faster, no size tells: so a copy of the model with the same weights runs twice on the
values, the second time with its rows rolled by one.

Shape legend: B rows, K places that a row has on a folded axis.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from peftlib.copies import structural_copy
from peftlib.errors import ProbeError, TargetError
from peftlib.methods.base import first_tensor
from peftlib.methods.rowwise import Axes, Axis
from peftlib.observe import Attention, Record
from peftlib.probe import Call, Probe, as_call

ROUNDING = 0.05
"""How far rolled rows may be off, as a share of how far rows differ: sums in another order, in bfloat16 too."""


@dataclass
class Learned:
    """What one kind of call showed.

    Attributes:
        axes: where each site has the rows; ``None`` for one that did not run.
        verified: whether the rows were seen in their order, which takes rows that differ.
    """

    axes: dict[str, Axes | None]
    verified: bool


def learn_axes(
    model: nn.Module, names: Iterable[str], example: Any, batch_dim: int, *, sure: bool = False
) -> Learned:
    """Where the named sites have the rows of a batch.

    Args:
        model: the root.
        names: of open modules in it.
        example: a call of the root.
        batch_dim: the batch axis of its tensors.
        sure: every tensor of the batch's size on that axis holds rows; else those that need not are asked about.

    Raises:
        ProbeError: the example has no such axis, the model does not take a row more, or a tensor that the rows may
            share has by chance as many.
        TargetError: a site where the rows have no axis of their own, or another order; it is named.
    """
    call = as_call(example)
    batch = _Batch(call, batch_dim)
    # One row broadcasts, so that nothing would show.
    rows = max(2, batch.size)
    probe = Probe(model, batch.resized(rows))
    try:
        more = probe.run(*batch.resized(rows + 1))
    except Exception as error:
        lines = str(error).splitlines()
        raise ProbeError(
            f"{type(model).__name__} does not run with {rows + 1} rows where the example has {batch.size} (on axis "
            f"{batch_dim} of every tensor of that size there): {lines[0] if lines else type(error).__name__}. Pass "
            "route(..., example=) with a batch whose size no other axis has, and without a filled cache."
        ) from error
    names = list(names)
    found = {name: _axes(name, probe.record, more) for name in names}
    for leaf in batch.leaves[1:] if not sure else ():
        _check_shared(probe, batch, leaf, rows, names, more)
    return Learned(found, _check_order(model, found, batch))


class _Batch:
    """A call, and which of its leaves have the batch's rows."""

    def __init__(self, call: Call, batch_dim: int):
        self.flat, self.spec = pytree.tree_flatten(tuple(call))
        self.dim = batch_dim
        sized = [i for i, leaf in enumerate(self.flat) if isinstance(leaf, Tensor) and _has(leaf, batch_dim)]
        if not sized:
            raise ProbeError(
                f"The model's call has no tensor with an axis {batch_dim}, so there are no rows to route. Pass "
                "batch_dim=, the axis of the inputs along which the batch lies."
            )
        self.size: int = self.flat[sized[0]].shape[batch_dim]
        self.leaves = [i for i in sized if self.flat[i].shape[batch_dim] == self.size]

    def changed(self, change: Callable[[Tensor], Tensor], leaves: Iterable[int]) -> Call:
        chosen = set(leaves)
        flat = [change(leaf) if i in chosen else leaf for i, leaf in enumerate(self.flat)]
        return Call(*pytree.tree_unflatten(flat, self.spec))

    def resized(self, wanted: int, leaves: Iterable[int] | None = None) -> Call:
        """With another number of rows, the last of them repeated."""

        def resize(tensor: Tensor) -> Tensor:
            index = torch.arange(wanted, device=tensor.device).clamp(max=self.size - 1)
            return tensor.detach().index_select(self.dim, index).requires_grad_(tensor.requires_grad)

        return self.changed(resize, self.leaves if leaves is None else leaves)

    def rolled(self) -> Call:
        roll = lambda t: t.detach().roll(1, self.dim).requires_grad_(t.requires_grad)  # noqa: E731
        return self.changed(roll, self.leaves)


def rows_differ(example: Any, batch_dim: int) -> bool:
    """Whether a call's rows differ at all, so that their order can be seen."""
    batch = _Batch(as_call(example), batch_dim)
    tensors = [batch.flat[i] for i in batch.leaves]
    if batch.size < 2 or any(t.is_meta or isinstance(t, FakeTensor) for t in tensors):
        return False
    return any(not torch.equal(t, t.roll(1, batch_dim)) for t in tensors)


def kind_of_call(call: Call) -> Hashable:
    """What of a call may change the way of its rows: which arguments there are, and switches; no sizes, no numbers."""

    def kind(value: Any) -> Hashable:
        if isinstance(value, Tensor):
            return value.dim(), value.is_floating_point()
        if value is None or isinstance(value, (bool, str)):
            return value
        if isinstance(value, (list, tuple)):
            return tuple(kind(v) for v in value)
        if isinstance(value, Mapping):
            return tuple((str(k), kind(v)) for k, v in value.items())
        return type(value).__name__

    return tuple(kind(v) for v in call.args), tuple(sorted((k, kind(v)) for k, v in call.kwargs.items()))


def _has(tensor: Tensor, axis: int) -> bool:
    return -tensor.dim() <= axis < tensor.dim()


def _check_shared(
    probe: Probe, batch: _Batch, leaf: int, rows: int, names: Sequence[str], more: Record
) -> None:
    """Refuse a tensor of the batch's size that the model takes without another row as well, and differently."""
    others = [i for i in batch.leaves if i != leaf]
    try:
        kept = batch.resized(rows)
        grown = batch.resized(rows + 1, others)
        flat, spec = pytree.tree_flatten(tuple(grown))
        flat[leaf] = pytree.tree_flatten(tuple(kept))[0][leaf]
        record = probe.run(*Call(*pytree.tree_unflatten(flat, spec)))
    except Exception:  # noqa: BLE001 (it does need the row)
        return
    for name in names:
        a, b = more.traces.get(name), record.traces.get(name)
        if a is not None and b is not None and (a.inputs, a.outputs) != (b.inputs, b.outputs):
            raise ProbeError(
                f"A tensor of shape {tuple(batch.flat[leaf].shape)} among the inputs may hold one entry for each of "
                f"{batch.size} rows, or be shared by all of them: the model runs either way, and {name!r} sees "
                "another. Pass route(..., example=) with a batch of another size, which no axis of what is shared has."
            )


def _axes(name: str, less: Record, more: Record) -> Axes | None:
    if name not in less.traces or name not in more.traces:
        return None
    axes = Axes(keys=_first_in_attention(less.attention.get(name), more.attention.get(name)))
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


def _check_order(model: nn.Module, found: Mapping[str, Axes | None], batch: _Batch) -> bool:
    """Find the order of folded axes, and refuse rows in another order; whether the values showed it."""
    folded = [name for name, axes in found.items() if axes is not None and axes.folded]
    tensors = (*model.parameters(), *model.buffers(), *(t for t in batch.flat if isinstance(t, Tensor)))
    if batch.size < 2 or any(t.is_meta or isinstance(t, FakeTensor) for t in tensors):
        if folded:
            raise ProbeError(
                f"{folded[0]!r} has its rows folded into one axis with something else, and which of the two runs "
                "faster only values tell: pass example= of two rows or more that differ, to a model with values."
            )
        return False
    calls = Call(*pytree.tree_unflatten(batch.flat, batch.spec)), batch.rolled()
    try:
        before, after = (_seen(_twin(model), found, call) for call in calls)
    except Exception as error:
        if not folded:
            # What only runs with its tunings (ids that a template's prompt stands for) is taken by its sizes.
            return True
        lines = str(error).splitlines()
        raise ProbeError(
            f"{type(model).__name__} does not run on the example by itself, and {folded[0]!r} has its rows folded into "
            f"one axis in an order that only values tell: {lines[0] if lines else type(error).__name__}. Pass "
            "another route(..., example=)."
        ) from error
    for name, axes in found.items():
        if axes is None:
            continue
        for side, a, b in zip((axes.input, axes.output), before[name], after[name], strict=True):
            for x, y in zip(a, b, strict=False):
                known = side.get(x.dim())
                if known is not None and not x.is_nested and x.shape == y.shape:
                    side[x.dim()] = _ordered(name, known, x, y, batch.size)
    return rows_differ(calls[0], batch.dim)


def _twin(model: nn.Module) -> nn.Module:
    """A copy with the same parameters, whose buffers and other state are its own."""
    return structural_copy(model, lambda t: t if isinstance(t, nn.Parameter) else t.detach().clone()).eval()


def _ordered(name: str, axis: Axis, x: Tensor, y: Tensor, size: int) -> Axis:
    """The order for which the second tensor is the first with its rows rolled by one."""
    orders = [Axis(axis.at, True, first) for first in (True, False)] if axis.folded else [axis]
    off = []
    for tried in orders:
        rolled = tried.split(x, size).roll(1, 0)
        off.append(_distance(rolled, tried.split(y, size)))
    best = min(range(len(orders)), key=off.__getitem__)
    # How far rows are apart, or the other order is off: what rounding has to be small beside.
    apart = max(off) if axis.folded else _distance(axis.split(x, size).roll(1, 0), axis.split(x, size))
    if axis.folded and (
        off[best] >= ROUNDING * apart or axis.rows_first not in (None, orders[best].rows_first)
    ):
        raise TargetError(
            f"{name or 'the root'!r} has its rows folded into axis {axis.at} of {tuple(x.shape)} in an order that the "
            "example does not show (its rows must differ). Keep the tunings off it to route them, or keep the batch "
            "an axis of its own there."
        )
    if off[best] > ROUNDING * apart:
        raise TargetError(
            f"{name or 'the root'!r} does not see the rows of the batch in their order: with the inputs' rows rolled "
            "by one, its own are not (a model that sorts its rows, or mixes them). Keep the tunings off it to route "
            "them."
        )
    return orders[best]


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).nan_to_num(0, 0, 0).abs().max()) if a.numel() else 0.0


def _seen(model: nn.Module, names: Iterable[str], call: Call) -> dict[str, tuple[list[Tensor], list[Tensor]]]:
    """The first tensor of every input and output of the sites, in one forward on copies of the inputs."""
    seen: dict[str, tuple[list[Tensor], list[Tensor]]] = {name: ([], []) for name in names}
    handles = []
    for name in seen:

        def note(_: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
            for into, given in zip(seen[name], ([*args, *kwargs.values()], output), strict=True):
                tensor = first_tensor(given)
                if tensor is not None and tensor.dim():
                    into.append(tensor.detach().clone())

        handles.append(model.get_submodule(name).register_forward_hook(note, with_kwargs=True))
    try:
        # What a model has to say of a call without gradients is not about the user's.
        with torch.random.fork_rng(), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Caches and other objects too: a forward may write into them.
            tensors = [t for t in pytree.tree_leaves(tuple(call)) if isinstance(t, Tensor)]
            own = copy.deepcopy(
                call, {id(t): t.detach().clone().requires_grad_(t.requires_grad) for t in tensors}
            )
            model(*own.args, **own.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _first_in_attention(less: Attention | None, more: Attention | None) -> bool:
    """Whether the rows lie on the first axis of a module's queries (B, H, T, E), for which a row's prefix is made."""
    if less is None or more is None or len(less.queries) != len(more.queries):
        return False
    pairs = zip(less.queries, more.queries, strict=True)
    return all(short[1:] == long[1:] and short[0] + 1 == long[0] for short, long in pairs)
