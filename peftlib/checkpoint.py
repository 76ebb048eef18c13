"""One safetensors file per tuning: tensors, the resolved plan as JSON metadata, a fingerprint of the base.

Saving is atomic (temporary file, fsync, rename). Loading is strict, and everything is checked before the model is
touched. Nothing in a file can import or run code: methods are looked up among those already defined.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from peftlib.attach import Plan, build_parts, check_name, install
from peftlib.errors import CheckpointError, PeftlibError
from peftlib.methods.base import METHODS, Method, Site
from peftlib.targets import Tree
from peftlib.tuning import Part, Tuning, check_state

FORMAT = "peftlib"
VERSION = 1


def save(tuning: Tuning, path: str | os.PathLike[str]) -> None:
    """Write a tuning to ``path``; see :meth:`peftlib.Tuning.save`."""
    state = {k: t.contiguous() for k, t in tuning.state_dict().items()}
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
    metadata = {"format": FORMAT, "version": str(VERSION), "tuning": json.dumps(about)}
    write_atomically(Path(path), safetensors.torch.save({k: t.clone() for k, t in state.items()}, metadata))


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
    name = about["name"] if name is None else name
    check_name(model, name)
    tree = Tree(model)
    here = fingerprint(model)
    if here["shapes"] != about["base"].get("shapes"):
        raise CheckpointError(
            f"{os.fspath(path)!r} was made for another base: {about['base'].get('class')} with "
            f"{about['base'].get('parameters', 0):,} parameters; this is {here['class']} with {here['parameters']:,}. "
            "Load it into a model with the same parameter names and shapes."
        )
    try:
        plan = [(_decode(p["method"], p["config"]), list(_sites(tree, p["sites"]))) for p in about["plan"]]
        _check(plan)
        parts = build_parts(tree, plan, name)
    except CheckpointError:
        raise
    except (PeftlibError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"The plan in {os.fspath(path)!r} does not fit this model: {error}") from error
    own = {f"{part.prefix}.{key}": t for part in parts for key, t in part.delta.tensors()}
    check_state(own, state, f"the model it is loaded into ({os.fspath(path)!r})")
    if any(t.is_meta for t in own.values()):
        raise CheckpointError(
            "The model is on the meta device, where values cannot be loaded. Materialise it first."
        )
    tuning = install(model, tree, parts, name=name, freeze=True)
    tuning.load_state_dict(state)
    if not trainable:
        for parameter in tuning.parameters():
            parameter.requires_grad_(False)
    return tuning


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The metadata and tensors of a tuning file, on the CPU."""
    shown = repr(os.fspath(path))
    try:
        with safetensors.safe_open(os.fspath(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise CheckpointError(f"{shown} is a safetensors file, but not of a peftlib tuning.")
            if metadata.get("version") != str(VERSION):
                raise CheckpointError(
                    f"{shown} has format version {metadata.get('version')}; this peftlib reads version {VERSION}. "
                    "Update peftlib."
                )
            about = json.loads(metadata["tuning"])
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except FileNotFoundError as error:
        raise CheckpointError(f"There is no file {shown}.") from error
    except (
        OSError,
        safetensors.SafetensorError,
        json.JSONDecodeError,
        KeyError,
        UnicodeDecodeError,
    ) as error:
        raise CheckpointError(f"{shown} is not a readable tuning file: {error}") from error
    if not isinstance(about, dict) or not all(k in about for k in ("name", "plan", "base")):
        raise CheckpointError(f"{shown} lacks the description of its tuning.")
    return about, state


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """What tells one base from another: class, size, and a hash over parameter names and shapes."""
    entries = [(name, list(p.shape)) for name, _, _, p in Tree(model).parameters()]
    return {
        "class": getattr(type(model), "__name__", "?"),
        "parameters": sum(p.numel() for _, _, _, p in Tree(model).parameters()),
        "shapes": hashlib.sha256(json.dumps(sorted(entries)).encode()).hexdigest(),
    }


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that at every moment either the old or the new content is whole on disk."""
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except OSError as error:
        raise CheckpointError(f"Cannot write to {str(path.parent)!r}: {error}") from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o666 & ~_umask())
        Path(temporary).replace(path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise CheckpointError(
                f"Cannot write {str(path)!r}: {error}. The old file, if any, is untouched."
            ) from error
        raise
    if hasattr(os, "O_DIRECTORY"):
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _grouped(parts: list[Part]) -> Iterator[tuple[Method, list[Part]]]:
    groups: dict[int, tuple[Method, list[Part]]] = {}
    for part in parts:
        if part.built:
            groups.setdefault(id(part.method), (part.method, []))[1].append(part)
    yield from groups.values()


def _encode(method: Method) -> dict[str, Any]:
    return {k: str(v) if isinstance(v, torch.dtype) else v for k, v in method.config().items() if k != "head"}


def _decode(kind: str, config: Mapping[str, Any]) -> Method:
    if kind not in METHODS:
        raise CheckpointError(
            f"The file names the method {kind!r}, which this program does not have. It has: "
            f"{', '.join(sorted(METHODS))}. A method of your own must be imported before loading."
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


def _check(plan: Plan) -> None:
    for method, sites in plan:
        for site in sites:
            why = method.refuses(site) or method.fits(site)
            if why is not None:
                raise CheckpointError(
                    f"{site.name or 'the root'!r} cannot carry {type(method).__name__}: {why}."
                )
