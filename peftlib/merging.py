"""Updates as weights: written into the base and taken out again, or beside it as a state dict.

A delta says which weights it changes and how (``Delta.merged``). Here these steps are put into the order in which the
model takes them, checked against whoever else uses the weight, and done once per weight: in float32 or wider, rounded
once. Nothing here depends on how many tunings there are, only on those that are enabled.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftlib.errors import PeftlibError, StateError
from peftlib.methods.base import Delta
from peftlib.methods.trained import TRAINED
from peftlib.site import base_alone, check_no_route, is_open
from peftlib.storage import is_sharded
from peftlib.targets import Tree

MERGED = "_peft_merged"
"""Attribute of a module with merged weights: parameter's own name -> name of the tuning that is in it."""

Step = tuple["slice | None", Callable[[Tensor], Tensor]]
Place = tuple[nn.Module, str]


@dataclass
class Change:
    """All that the deltas do to one parameter.

    Attributes:
        site: name of a site that changes it, for messages.
        places: every (owner, own name) that has the parameter, the changing one first.
        hosts: the modules whose deltas change it.
        steps: (rows or all, old -> new) in the order in which the model takes them.
    """

    site: str
    places: list[Place]
    hosts: list[nn.Module]
    steps: list[Step]

    @property
    def parameter(self) -> nn.Parameter:
        owner, name = self.places[0]
        return owner._parameters[name]  # type: ignore[return-value]

    def value(self) -> Tensor:
        """What the parameter becomes: same dtype, device and strides, storage of its own.

        Raises:
            PeftlibError: it is not finite.
        """
        old = self.parameter.detach()
        new = self._by_rows(old)
        if new is None:
            # Between several steps nothing is rounded.
            new = old if len(self.steps) == 1 else old.to(_wide(old), copy=True)
            for rows, step in self.steps:
                if rows is None:
                    new = step(new)
                else:
                    new[rows] = step(new[rows])
        same = new.is_meta or new.untyped_storage().data_ptr() == old.untyped_storage().data_ptr()
        if same or new.dtype != old.dtype or new.stride() != old.stride():
            new = torch.empty_like(old).copy_(new)
        if not new.is_meta and not _is_finite(new):
            raise PeftlibError(
                f"Merging into {_shown(self.site)} gives values that are not finite. The model is unchanged; look for "
                "NaN in the tuning, or scale it down."
            )
        return new

    def _by_rows(self, old: Tensor) -> Tensor | None:
        """The new value where every step has rows of its own (projections fused into one weight), each written once."""
        spans = sorted(
            (rows.start, rows.stop, i) for i, (rows, _) in enumerate(self.steps) if rows is not None
        )
        apart = all(stop <= start for (_, stop, _), (start, *_) in itertools.pairwise(spans))
        if len(spans) < len(self.steps) or not apart:
            return None
        new, at = torch.empty_like(old), 0
        for start, stop, i in spans:
            new[at:start] = old[at:start]
            new[start:stop] = self.steps[i][1](old[start:stop])
            at = stop
        new[at:] = old[at:]
        return new


@dataclass
class Kept:
    """A merged weight's original, every place that has the weight, and the state that the merge left it in."""

    places: list[Place]
    original: Tensor
    state: tuple[int, int] = (0, 0)


def merge(
    model: nn.Module, name: str, deltas: Sequence[Delta], keep: str | torch.device | None
) -> list[Kept]:
    """Write the updates of one tuning's enabled deltas into the weights; what was there comes back.

    One weight after the other, so that with ``keep`` on another device only one weight is held twice. If anything
    fails, those done are put back.
    """
    where = _device(keep)
    tree = Tree(model)
    mine = {id(delta) for delta in deltas}
    kept: list[Kept] = []
    with plainly(tree):
        changes = collect(tree, mine)
        for change in changes:
            _check_alone(name, change, mine)
        try:
            for change in changes:
                value, parameter = change.value(), change.parameter
                original = parameter.data
                kept.append(Kept(change.places, original if where is None else original.to(where)))
                parameter.data = value
                kept[-1].state = _state(parameter)
                for owner, own in change.places:
                    owner.__dict__.setdefault(MERGED, {})[own] = name
        except BaseException:
            put_back(kept)
            raise
    return kept


def check_unchanged(kept: Sequence[Kept], tuning: str) -> None:
    """Raise if a merged weight got other values since (a state dict was loaded): undoing would lose them."""
    for one in kept:
        owner, name = one.places[0]
        who, version = _state(owner._parameters[name])
        # A copy of the model has parameters of its own, which start anew.
        if who == one.state[0] and version != one.state[1]:
            raise StateError(
                f"The weight {name!r} of a {type(owner).__name__} was changed while {tuning!r} was merged into it (a "
                "state dict was loaded, or it was trained), and unmerge() would put the old values over the new. Call "
                "unmerge(overwrite=True) to do that; to keep the new ones, take state_dict() first."
            )


def _state(parameter: Tensor | None) -> tuple[int, int]:
    return id(parameter), 0 if parameter is None or parameter.is_inference() else parameter._version


def put_back(kept: Sequence[Kept]) -> None:
    """Undo :func:`merge`."""
    for one in kept:
        owner, name = one.places[0]
        parameter = owner._parameters[name]
        # A model that was moved or cast meanwhile has its base moved and cast.
        parameter.data = one.original.to(parameter.device, parameter.dtype)  # type: ignore[union-attr]
        for owner, name in one.places:
            merged = owner.__dict__.get(MERGED, {})
            merged.pop(name, None)
            if not merged:
                owner.__dict__.pop(MERGED, None)


def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a plain model that computes what this one computes with its enabled tunings.

    ``W + dW`` under the base's own keys, for every tuning that is enabled now (:func:`peftlib.use` chooses); full,
    partial and bias tunings are in it with their values. The model is not touched. Loads with ``strict=True`` into a
    fresh model of the same class.

    Args:
        model: any module, tunings on it or not; a part of a tuned model counts as well.

    Returns:
        As ``model.state_dict()``: same keys, order, shapes, dtypes and devices. Changed weights are new tensors
        (computed in float32 or wider, rounded once), the others share memory with the model.

    Raises:
        PeftlibError: an enabled tuning is no change of weights (a prompt, a prefix, an adapter, a new head), a weight
            is shared with a module that the tuning does not change, or a result is not finite.

    Example:
        >>> import torch, peftlib
        >>> model, x = torch.nn.Linear(4, 4), torch.randn(2, 4)
        >>> tuning = peftlib.attach(model, peftlib.LoRA(rank=2))
        >>> _ = torch.nn.init.ones_(tuning.state_dict()["lora.b"])
        >>> plain = torch.nn.Linear(4, 4)
        >>> plain.load_state_dict(peftlib.merged_state_dict(model))
        <All keys matched successfully>
        >>> torch.allclose(plain(x), model(x))
        True
    """
    if not isinstance(model, nn.Module):
        raise PeftlibError(f"merged_state_dict needs an nn.Module; got {type(model).__name__}.")
    with base_alone():
        state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    held = {id(tensor) for tensor in state.values()}
    tree = Tree(model)
    with plainly(tree):
        changes = collect(tree)
        for change in changes:
            if id(change.parameter) not in held:
                raise PeftlibError(
                    f"The weight of {_shown(change.site)} is not in the model's state_dict(), so its update has no "
                    "key. Export the module that holds the weight, or merge() the tuning and read the weights."
                )
        values = {id(change.parameter): change.value() for change in changes}
    for key, tensor in state.items():
        if isinstance(tensor, Tensor):
            state[key] = values.get(id(tensor), tensor.detach())
    return state


def collect(tree: Tree, chosen: set[int] | None = None) -> list[Change]:
    """The changes of every parameter by the enabled deltas, or by those chosen by their ids.

    Raises:
        PeftlibError: a delta is no change of a weight, or a weight is used by another module in another way.
    """
    found: dict[tuple[int, str], Change] = {}
    for site, host in tree.modules.items():
        for delta in _running(host):
            if chosen is not None and id(delta) not in chosen:
                continue
            for owner, name, rows, step in _updates(site, delta):
                change = found.setdefault((id(owner), name), Change(site, [(owner, name)], [], []))
                change.hosts.append(host)
                change.steps.append((rows, step))
    for change in found.values():
        if is_sharded(change.parameter.data):
            raise PeftlibError(
                f"The weight of {_shown(change.site)} is sharded, and so is no whole that an update could be written "
                "into. Save the tuning, load it into a model that is not sharded, and merge there."
            )
    users: dict[int, list[tuple[str, nn.Module, str]]] = {id(c.parameter): [] for c in found.values()}
    for site, module in tree.modules.items():
        for name, parameter in module._parameters.items():
            if id(parameter) in users:
                users[id(parameter)].append((site, module, name))
    unique: dict[int, Change] = {}
    for change in found.values():
        for site, module, name in users[id(change.parameter)]:
            twin = found.get((id(module), name))
            if twin is None or twin.steps != change.steps:
                raise PeftlibError(
                    f"The weight of {_shown(change.site)} is shared with {_shown(site)}, so merging would change that "
                    "as well. Untie them first, or keep the tuning attached."
                )
            if twin is not change:
                change.places.append((module, name))
                change.hosts += twin.hosts
        unique.setdefault(id(change.parameter), change)
    return list(unique.values())


@contextlib.contextmanager
def plainly(tree: Tree) -> Iterator[None]:
    """Compute as written whatever is around: no gradients, no inference tensors, no autocast."""
    kinds = {parameter.device.type for _, _, _, parameter in tree.parameters()}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for kind in kinds:
            if torch.amp.is_autocast_available(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _running(host: nn.Module) -> Iterator[Delta]:
    """Enabled deltas in the order in which they act: what a weight reads as comes before what is done with it."""
    check_no_route(host)
    if is_open(host):
        for chain in host.__dict__["_peft_weights"].values():
            yield from chain
        yield from host.__dict__["_peft_active"]


def _updates(
    site: str, delta: Delta
) -> Sequence[tuple[nn.Module, str, slice | None, Callable[[Tensor], Tensor]]]:
    try:
        return delta.merged()
    except PeftlibError as error:
        raise type(error)(f"{_shown(site)} stands in the way. {error}") from error


def _check_alone(tuning: str, change: Change, mine: set[int]) -> None:
    """Raise if somebody else is at the weight, for whom a merge would change more than was asked for."""
    for owner, name in change.places:
        chains = [host.__dict__["_peft_active"] for host in change.hosts]
        if is_open(owner):
            chains.append(owner.__dict__["_peft_weights"].get(name, ()))
        if any(id(delta) not in mine for chain in chains for delta in chain):
            raise StateError(
                f"{_shown(change.site)} carries another enabled delta, which a merge of {tuning!r} would reorder. "
                "Disable the other tunings first."
            )
        merged = owner.__dict__.get(MERGED, {})
        if name in merged:
            raise StateError(
                f"{_shown(change.site)} has {merged[name]!r} merged into it already; unmerge() that one first."
            )
        trained = owner.__dict__.get(TRAINED, {}).get(name)
        if trained is not None and id(trained) not in mine:
            raise StateError(
                f"The weight of {_shown(change.site)} is trained by another enabled tuning, which would lose its base "
                f"if {tuning!r} were merged into it. Disable that one first."
            )


def _device(keep: str | torch.device | None) -> torch.device | None:
    try:
        where = None if keep is None else torch.device(keep)
    except (RuntimeError, TypeError) as error:
        raise PeftlibError(f"merge(keep={keep!r}): keep must be a device, such as 'cpu': {error}") from error
    if where is not None and where.type == "meta":
        raise PeftlibError(
            "merge(keep='meta') would lose the base; keep it on a device with memory, such as 'cpu'."
        )
    return where


def _is_finite(tensor: Tensor) -> bool:
    # A sum is finite only if all of its terms are, and quick. It may overflow where none of them is infinite.
    return math.isfinite(tensor.sum().item()) or all(math.isfinite(t.item()) for t in torch.aminmax(tensor))


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _shown(site: str) -> str:
    return repr(site) if site else "The root"
