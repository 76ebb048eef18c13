"""One safetensors file per tuning: tensors, the resolved plan as JSON metadata, a fingerprint of the base.

Saving is atomic (temporary file, fsync, rename). Loading is strict, and everything is checked before the model is
touched. Nothing in a file can import or run code: methods are looked up among those already defined.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftlib import methods
from peftlib.attach import Plan, build_parts, check_name, install
from peftlib.container import read, write
from peftlib.errors import CheckpointError
from peftlib.methods.base import METHODS, Method, Site, placement, without_values
from peftlib.targets import Tree
from peftlib.tuning import Part, Tuning, check_state


def save(tuning: Tuning, path: str | os.PathLike[str]) -> None:
    """Write a tuning to ``path``; see :meth:`peftlib.Tuning.save`."""
    state = tuning.state_dict()
    empty = [k for k, t in state.items() if t.is_meta]
    if empty:
        raise CheckpointError(
            f"The tuning {tuning.name!r} has no values yet: {empty[0]!r} is on the meta device."
        )
    about = {
        "name": tuning.name,
        "plan": [
            {
                "method": type(method).__name__,
                "config": _encode(method),
                "sites": {p.name: p.facts for p in parts},
            }
            for method, parts in _grouped(tuning.parts)
        ],
        "base": fingerprint(tuning.model),
        "torch": torch.__version__,
    }
    whole, sharded = _gather(state)
    try:
        # Every process holds the whole tensors now; one of them writes.
        if not sharded or torch.distributed.get_rank() == 0:
            write(path, whole, about)
    finally:
        if sharded:
            torch.distributed.barrier()


def load(
    model: nn.Module, path: str | os.PathLike[str], *, name: str | None = None, trainable: bool = True
) -> Tuning:
    """Attach the tuning in a file to a model of the same base.

    Args:
        model: the base, as it was when the tuning was made (same parameter names and shapes).
        path: a file written by :meth:`peftlib.Tuning.save`.
        name: the tuning's name on this model; ``None`` takes the one in the file.
        trainable: whether its parameters require gradients.

    Returns:
        The tuning, attached and enabled.

    Raises:
        CheckpointError: the file is missing, damaged, of another format or version, names an unknown method, was made
            for another base, or its tensors do not fit. The model is then unchanged.

    Example:
        >>> import tempfile, os, torch, peftlib
        >>> path = os.path.join(tempfile.mkdtemp(), "chat.safetensors")
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> peftlib.attach(model, peftlib.LoRA(rank=2), targets=["0"], name="chat").save(path)
        >>> fresh = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> peftlib.load(fresh, path)
        Tuning('chat', 1 sites, 16 parameters, enabled)
    """
    about, state = read(path)
    _check_description(about, path)
    name = about["name"] if name is None else name
    check_name(model, name)
    tree = Tree(model)
    here = fingerprint(model)
    if here["shapes"] != about["base"].get("shapes"):
        there = {k: about["base"].get(k) for k in ("class", "parameters")}
        raise CheckpointError(
            f"{os.fspath(path)!r} was made for another base: {there['class']} with {there['parameters']} parameters; "
            f"this is {here['class']} with {here['parameters']}. Load it into a model with the same parameter names "
            "and shapes."
        )
    try:
        plan = [(_decode(p["method"], p["config"]), list(_sites(tree, p["sites"]))) for p in about["plan"]]
        _check(plan)
        with without_values():
            parts = build_parts(tree, plan, name)
    except CheckpointError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"The plan in {os.fspath(path)!r} does not fit this model: {error}") from error
    own = {f"{part.prefix}.{key}": t for part in parts for key, t in part.delta.tensors()}
    check_state(own, state, f"the model it is loaded into ({os.fspath(path)!r})")
    given = [_give_values(part, tree.model, state) for part in parts]
    tuning = install(model, tree, parts, name=name, freeze=True)
    for part, keys in zip(tuning.parts, given, strict=True):
        _copy_values(part, keys, state)
    if not trainable:
        for parameter in tuning.parameters():
            parameter.requires_grad_(False)
    return tuning


def _gather(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
    """The whole tensors of a sharded tuning (a collective call), and whether there were shards at all."""
    module = sys.modules.get("torch.distributed.tensor")
    if module is None:
        return dict(state), False
    sharded = any(isinstance(t, module.DTensor) for t in state.values())
    return {k: t.full_tensor() if isinstance(t, module.DTensor) else t for k, t in state.items()}, sharded


@torch.no_grad()
def _give_values(part: Part, model: nn.Module, state: Mapping[str, Tensor]) -> set[str]:
    """Turn the empty tensors of a delta into the file's, where the host is; no copy if they are there already."""
    empty = {key: t for key, t in part.delta.tensors() if t.is_meta}
    if not empty:
        return set()
    where = placement(Site(part.name, part.host, part.parameter, model))["device"]
    # A base on meta has no values yet; a tuning's are kept on the CPU until it does.
    where = torch.device("cpu") if where.type == "meta" else where
    values = {key: state[f"{part.prefix}.{key}"].to(where, t.dtype) for key, t in empty.items()}
    part.delta.load_state_dict(values, assign=True, strict=False)
    part.delta.derive()
    return set(values)


@torch.no_grad()
def _copy_values(part: Part, given: set[str], state: Mapping[str, Tensor]) -> None:
    """The rest: the base's own tensors, and those of a method that builds its own with values."""
    for key, tensor in part.delta.tensors():
        if key not in given:
            tensor.copy_(state[f"{part.prefix}.{key}"])


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """What tells one base from another: class, size, and a hash over parameter names and shapes."""
    entries = [(name, list(p.shape)) for name, _, _, p in Tree(model).parameters()]
    return {
        "class": getattr(type(model), "__name__", "?"),
        "parameters": sum(p.numel() for _, _, _, p in Tree(model).parameters()),
        "shapes": hashlib.sha256(json.dumps(sorted(entries)).encode()).hexdigest(),
    }


def _grouped(parts: list[Part]) -> Iterator[tuple[Method, list[Part]]]:
    groups: dict[int, tuple[Method, list[Part]]] = {}
    for part in parts:
        if part.built:
            groups.setdefault(id(part.method), (part.method, []))[1].append(part)
    yield from groups.values()


def _encode(method: Method) -> dict[str, Any]:
    return {k: str(v) if isinstance(v, torch.dtype) else v for k, v in method.config().items() if k != "head"}


def _decode(kind: str, config: Mapping[str, Any]) -> Method:
    if kind in methods.HOME:
        getattr(methods, kind)  # imports its file
    if kind not in METHODS:
        raise CheckpointError(
            f"The file names the method {kind!r}, which this program does not have. It has: "
            f"{', '.join(sorted({*methods.HOME, *METHODS}))}. A method of your own must be imported before loading."
        )
    known = {f.name for f in dataclasses.fields(METHODS[kind])}
    unknown = set(config) - known
    if unknown:
        raise CheckpointError(f"The file gives {kind} the unknown setting(s) {', '.join(sorted(unknown))}.")
    values = dict(config)
    if isinstance(values.get("dtype"), str):
        dtype = getattr(torch, values["dtype"].removeprefix("torch."), None)
        if not isinstance(dtype, torch.dtype):
            raise CheckpointError(f"The file names the dtype {values['dtype']!r}, which torch does not have.")
        values["dtype"] = dtype
    return METHODS[kind](**values)


def _sites(tree: Tree, sites: Mapping[str, Mapping[str, Any]]) -> Iterator[Site]:
    for name, facts in sites.items():
        yield dataclasses.replace(tree.site(name), facts=dict(facts))


def _check_description(about: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    kinds = {"name": str, "plan": list, "base": dict}
    wrong = [key for key, kind in kinds.items() if not isinstance(about.get(key), kind)]
    if wrong:
        raise CheckpointError(
            f"{os.fspath(path)!r} does not describe a tuning: its {', '.join(wrong)} is missing or of another kind."
        )


def _check(plan: Plan) -> None:
    for method, sites in plan:
        for site in sites:
            why = method.refuses(site) or method.fits(site)
            if why is not None:
                raise CheckpointError(
                    f"{site.name or 'the root'!r} cannot carry {type(method).__name__}: {why}."
                )
