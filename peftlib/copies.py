"""Copies to try things on: a model whose tensors are others, a call whose containers are not the caller's.

A forward may cache tensors in its module, write to its own weights or fill the lists that it is given; on these
copies that harms nobody.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from peftlib.errors import ProbeError
from peftlib.methods.base import CHILD
from peftlib.site import TUNINGS, Deltas, deltas, is_open

_PLAIN = (
    bool,
    int,
    float,
    str,
    bytes,
    type(None),
    type,
    torch.dtype,
    torch.device,
    torch.Size,
    Tensor,
    nn.Module,
)


def structural_copy(model: nn.Module, tensor: Callable[[Tensor], Tensor], *, idle: bool = False) -> nn.Module:
    """A deep copy whose parameters and buffers are replaced by ``tensor(original)``.

    Without ``idle`` the tunings that are off are left out, so that it costs the same however many there are.
    """
    memo: dict[int, Any] = {}
    keep = []  # the originals' ids must not be reused while the memo lives
    modules = list(model.modules() if idle else _awake(model, set()))
    emptied: list[tuple[nn.Module, Deltas]] = []
    for module in modules:
        if is_open(module) and not idle:
            emptied.append((module, Deltas()))
            memo[id(deltas(module))] = emptied[-1][1]
        if TUNINGS in module.__dict__:
            memo[id(module.__dict__[TUNINGS])] = {}
    for module in modules:
        for own in (*module._parameters.values(), *module._buffers.values()):
            if own is None or id(own) in memo:
                continue
            keep.append(own)
            made = tensor(own)
            if isinstance(own, nn.Parameter) and not isinstance(made, nn.Parameter):
                made = nn.Parameter(made.detach(), requires_grad=own.requires_grad)
            memo[id(own)] = made
        for value in module.__dict__.values():
            # Tensors kept as plain attributes (rotary tables, masks).
            for item in pytree.tree_leaves(value) if isinstance(value, (Tensor, list, tuple, dict)) else ():
                if isinstance(item, Tensor) and id(item) not in memo:
                    keep.append(item)
                    memo[id(item)] = tensor(item.detach())
    for module in modules:
        for key, value in module.__dict__.items():
            if key not in ("_modules", "_parameters", "_buffers") and id(value) not in memo:
                if not isinstance(value, _PLAIN):
                    # What cannot be copied (locks, generators, open files) is shared with the original.
                    trial = dict(memo)
                    try:
                        if not _holds_module(value):
                            copy.deepcopy(value, trial)
                    except Exception:  # noqa: BLE001 (whatever its __deepcopy__ raises)
                        keep.append(value)
                        memo[id(value)] = value
    try:
        copied = copy.deepcopy(model, memo)
        for host, stand_in in emptied:
            stand_in._modules.update(
                {key: copy.deepcopy(delta, memo) for key, delta in _running(host).items()}
            )
        return copied
    except Exception as error:
        raise ProbeError(
            f"{type(model).__name__} cannot be copied for the fake forward ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''}). Attach before wrapping the model for "
            "several processes; "
            "else give it a working __deepcopy__, or leave example= out and name the targets."
        ) from error


def _running(host: nn.Module) -> dict[str, nn.Module]:
    """The deltas at an open host that are on, and those that only hold tensors, which others may need."""
    chains = (host.__dict__["_peft_active"], *host.__dict__["_peft_weights"].values())
    on = {id(delta) for chain in chains for delta in chain}
    own: dict[str, Any] = deltas(host)._modules
    return {key: delta for key, delta in own.items() if id(delta) in on or delta.passive}


def _awake(module: nn.Module, seen: set[int]) -> Iterator[nn.Module]:
    """All modules inside but the deltas that are off."""
    seen.add(id(module))
    yield module
    own: dict[str, Any] = module._modules
    if is_open(module):
        own = {key: child for key, child in own.items() if key != CHILD} | _running(module)
    for child in own.values():
        if child is not None and id(child) not in seen:
            yield from _awake(child, seen)


def _holds_module(value: Any) -> bool:
    return isinstance(value, (list, tuple, dict, set)) and any(
        isinstance(v, nn.Module) or _holds_module(v)
        for v in (value.values() if isinstance(value, dict) else value)
    )


def cloned(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def spared(call: Any, seen: dict[int, Any] | None = None) -> Any:
    """A call whose lists, dicts and caches are not the given ones, so that a forward that fills them spares those.

    Tensors stay the same: a deep copy of a fake one has no memory behind it.
    """
    seen = {} if seen is None else seen
    if isinstance(call, _PLAIN) or callable(call) or id(call) in seen:
        return seen.get(id(call), call)
    if isinstance(call, (list, tuple, dict)):
        # Flattened once, for its leaves may be containers of a kind that pytree does not know.
        return pytree.tree_map(lambda leaf: spared(leaf, seen), call, is_leaf=lambda x: not _is_container(x))
    if not hasattr(call, "__dict__"):
        return call
    seen[id(call)] = made = copy.copy(call)
    vars(made).update({key: spared(value, seen) for key, value in vars(call).items()})
    return made


def _is_container(value: Any) -> bool:
    return isinstance(value, (list, tuple, dict))
