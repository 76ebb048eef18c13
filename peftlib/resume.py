"""The state of an optimizer in a tuning's file, so that training goes on as if it had never stopped.

It lies beside the tuning's tensors, so the two can never be of different steps. Everything is named by the parameter
it belongs to: the order of parameters and of groups may change. Tensors are tensors, settings are JSON; what is neither
is refused by its name rather than pickled.

Left out on purpose: schedulers, data order and random state, which have small state dicts of their own.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftlib.container import Reading, reading
from peftlib.errors import CheckpointError, PeftlibError
from peftlib.storage import as_bytes, is_sharded, like, whole
from peftlib.tuning import Tuning

PREFIX = "optimizer/"
"""How the names of an optimizer's tensors begin in a file."""
_SCALARS = (bool, int, float, str, type(None))
_NOT_SETTINGS = ("params", "param_names")


def describe(tuning: Tuning, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An optimizer's state as JSON and tensors.

    Raises:
        CheckpointError: it trains what is not the tuning's, or its state holds what a file without pickles cannot.
    """
    _check_kind(optimizer)
    packed = optimizer.state_dict()
    if more := sorted(map(str, packed.keys() - {"state", "param_groups"})):
        raise CheckpointError(
            f"{_kind(optimizer)}.state_dict() has {more[0]!r} besides state and param_groups. {_YOURSELF}"
        )
    tensors: dict[str, Tensor] = {}
    names = _names(tuning, optimizer, packed["param_groups"])

    def put(place: str, key: Any, value: Any) -> dict[str, Any]:
        if isinstance(key, str) and (type(value) in (Tensor, nn.Parameter) or is_sharded(value)):
            name = f"{PREFIX}{place}/{key}"
            while name in tensors:  # of a key or a module with a slash in it
                name += "'"
            tensors[name] = value
            return {"tensor": name}
        if isinstance(key, str) and _is_plain(value):
            return {"tuple" if isinstance(value, tuple) else "value": value}
        raise CheckpointError(
            f"{_kind(optimizer)} keeps {key!r} of {place!r} as {_what(value)}, which is neither a tensor nor a JSON "
            f"value. {_YOURSELF}"
        )

    unnamed = [i for i in packed["state"] if i not in names]
    if unnamed:
        raise CheckpointError(
            f"{_kind(optimizer)} keeps a state under {unnamed[0]!r}, which is no parameter. {_YOURSELF}"
        )
    return {
        "class": _kind(optimizer),
        "groups": [
            {
                "parameters": [names[i] for i in group["params"]],
                "settings": {k: put(f"group {g}", k, v) for k, v in group.items() if k not in _NOT_SETTINGS},
            }
            for g, group in enumerate(packed["param_groups"])
        ],
        "state": {
            names[i]: {k: put(names[i], k, v) for k, v in state.items()}
            for i, state in packed["state"].items()
        },
    }, tensors


def load_optimizer(tuning: Tuning, optimizer: torch.optim.Optimizer, path: str | os.PathLike[str]) -> None:
    """Give an optimizer the state in a file; see :meth:`peftlib.Tuning.load_optimizer`."""
    _check_kind(optimizer)
    shown = repr(os.fspath(path))
    with reading(path) as file:
        about = file.about.get("optimizer")
        if about is None:
            raise CheckpointError(
                f"{shown} was saved without an optimizer. Save with tuning.save(path, optimizer=optimizer)."
            )
        try:
            if about["class"] != _kind(optimizer):
                raise CheckpointError(
                    f"{shown} holds the state of {about['class']}; this is {_kind(optimizer)}. Make the same one."
                )
            names = _names(tuning, optimizer, optimizer.state_dict()["param_groups"])
            _check_parameters(tuning, list(names.values()), file, shown)
            tensors = file.tensors(n for n in file.entries if n.startswith(PREFIX))
            packed = _packed(about, optimizer, names, tensors, shown)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise CheckpointError(
                f"{shown} does not describe an optimizer as it should: {error!r}."
            ) from error
        kept = {n: file.entries[n].dtype for n in names.values()}
    _give(optimizer, packed, kept, dict(zip(names.values(), _parameters(optimizer), strict=True)), names)


def _packed(
    about: Mapping[str, Any],
    optimizer: torch.optim.Optimizer,
    names: Mapping[int, str],
    tensors: Mapping[str, Tensor],
    shown: str,
) -> dict[str, Any]:
    """What ``optimizer.load_state_dict`` takes, in this optimizer's own order."""

    def get(entry: Mapping[str, Any]) -> Any:
        if "tensor" in entry:
            return tensors[entry["tensor"]]
        # JSON has no tuples.
        return tuple(entry["tuple"]) if "tuple" in entry else entry["value"]

    groups = []
    saved: dict[frozenset[str], Mapping[str, Any]] = {frozenset(g["parameters"]): g for g in about["groups"]}
    for group in optimizer.state_dict()["param_groups"]:
        own = frozenset(names[i] for i in group["params"])
        match = saved.pop(own, None)
        if match is None:
            theirs = next((other for other in saved if own & other), frozenset())
            raise _no_group(about, shown, min(own ^ theirs, default="(none)"))
        settings = {k: get(v) for k, v in match["settings"].items()}
        kept = {k: group[k] for k in _NOT_SETTINGS if k in group}
        groups.append({**settings, **kept})
    if saved:
        raise _no_group(about, shown, min(next(iter(saved)), default="(none)"))
    states = dict(about["state"].items())
    state = {i: {k: get(v) for k, v in states[name].items()} for i, name in names.items() if name in states}
    return {"state": state, "param_groups": groups}


def _no_group(about: Mapping[str, Any], shown: str, odd: str) -> CheckpointError:
    return CheckpointError(
        f"{shown} has {len(about['groups'])} group(s) of parameters, and the optimizer's are not the same ones: they "
        f"part at {odd!r}. Make its groups of the parameters they had."
    )


@torch.no_grad()
def _give(
    optimizer: torch.optim.Optimizer,
    packed: dict[str, Any],
    dtypes: Mapping[str, torch.dtype],
    parameters: Mapping[str, Tensor],
    names: Mapping[int, str],
) -> None:
    for i, state in packed["state"].items():
        parameter = parameters[names[i]]
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[key] = like(value, parameter)
    optimizer.load_state_dict(packed)
    for i, state in packed["state"].items():
        parameter = parameters[names[i]]
        if parameter.dtype != dtypes[names[i]]:
            continue  # another base's dtype: the state has followed it, as torch does
        for key, value in state.items():
            now = optimizer.state[parameter].get(key)
            if isinstance(value, Tensor) and isinstance(now, Tensor) and now.dtype != value.dtype:
                # Torch rounds a state to its parameter's dtype, and this optimizer keeps it wider.
                optimizer.state[parameter][key] = value.to(now.device)


def _names(
    tuning: Tuning, optimizer: torch.optim.Optimizer, groups: Iterable[Mapping[str, Any]]
) -> dict[int, str]:
    """Names of the optimizer's parameters by their numbers in its state dict."""
    own = {id(p): name for name, p in tuning.named_parameters()}
    found: dict[int, str] = {}
    for packed, group in zip(groups, optimizer.param_groups, strict=True):
        for i, parameter in zip(packed["params"], group["params"], strict=True):
            if id(parameter) not in own:
                name = next((n for n, p in tuning.model.named_parameters() if p is parameter), None)
                raise CheckpointError(
                    f"{_kind(optimizer)} trains {repr(name) if name else tuple(parameter.shape)}, which is not the "
                    f"tuning's own. Make it of tuning.parameters() of {tuning.name!r} alone."
                )
            found[i] = own[id(parameter)]
    return found


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """In the order of the numbers in the state dict."""
    return list({id(p): p for group in optimizer.param_groups for p in group["params"]}.values())


def _check_parameters(tuning: Tuning, names: Sequence[str], file: Reading, shown: str) -> None:
    """The state is of these values and no others; somebody may have replaced the file since they were loaded."""
    own = tuning.state_dict()
    for name in names:
        shape, entry = tuple(own[name].shape), file.entries.get(name)
        if entry is None or entry.shape != shape:
            there = "does not have it" if entry is None else f"has it with shape {entry.shape}"
            raise CheckpointError(
                f"The tuning {tuning.name!r} trains {name!r} of shape {shape}, and {shown} {there}. Load the tuning "
                "from that file first."
            )
    for name, value in file.tensors(names).items():
        if as_bytes(value.to(own[name].dtype)) != as_bytes(whole(own[name])):
            raise CheckpointError(
                f"The tuning {tuning.name!r} does not have the values of {shown}: {name!r} differs. Load the tuning "
                "from that file, and give its optimizer the state before training on."
            )


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(isinstance(v, _SCALARS) for v in value)
    return isinstance(value, _SCALARS)


def _what(value: Any) -> str:
    kind = type(value).__name__
    inside = next((type(v).__name__ for v in value), None) if isinstance(value, (list, tuple)) else None
    return f"a {kind} of {inside}" if inside else f"a {kind}"


def _kind(optimizer: torch.optim.Optimizer) -> str:
    return type(optimizer).__name__


def _check_kind(optimizer: Any) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise PeftlibError(
            f"optimizer= takes a torch.optim.Optimizer; got {type(optimizer).__name__}. Pass the optimizer itself."
        )


_YOURSELF = "Keep its state_dict() by your own means, beside tuning.save(path)."
