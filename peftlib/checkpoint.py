"""One safetensors file per tuning: tensors, the resolved plan as JSON metadata, a fingerprint of the base.

Saving is atomic (temporary file, fsync, rename). Loading is strict, and everything is checked before the model is
touched. Nothing in a file can import or run code: methods are looked up among those already defined.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from peftlib import methods, resume
from peftlib.attach import Plan, check_name
from peftlib.container import reading, write
from peftlib.errors import CheckpointError, PeftlibError
from peftlib.fingerprint import check_base, fingerprint
from peftlib.methods.base import METHODS, Method, Site
from peftlib.part import Part
from peftlib.restore import explained, restore
from peftlib.storage import is_sharded, whole
from peftlib.targets import Tree
from peftlib.tuning import Tuning


def save(
    tuning: Tuning,
    path: str | os.PathLike[str],
    optimizer: torch.optim.Optimizer | None = None,
    hash_base: bool = False,
) -> None:
    """Write a tuning to ``path``; see :meth:`peftlib.Tuning.save`."""
    check_path(path)
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
        "base": fingerprint(Tree(tuning.model), values=hash_base),
        "torch": torch.__version__,
    }
    if optimizer is not None:
        taken = [k for k in state if k.startswith(resume.PREFIX)]
        if taken:
            raise CheckpointError(
                f"{taken[0]!r} begins like the optimizer's own tensors in a file. Rename that module, or save "
                "without the optimizer."
            )
        about["optimizer"], tensors = resume.describe(tuning, optimizer)
        state |= tensors
    sharded = any(is_sharded(t) for t in state.values())
    writes = not sharded or torch.distributed.get_rank() == 0
    gathered = {}
    for key, tensor in state.items():
        # All processes gather, one tensor at a time; the one that writes keeps it, off the device that holds shards.
        value = whole(tensor)
        if writes:
            gathered[key] = value.cpu() if is_sharded(tensor) else value
    try:
        if writes:
            write(path, gathered, about)
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
    if not isinstance(model, nn.Module):
        raise PeftlibError(f"load needs an nn.Module; got {type(model).__name__}.")
    check_path(path)
    shown = os.fspath(path)
    with reading(path) as file:
        about = file.about
        _check_description(about, path)
        name = about["name"] if name is None else name
        check_name(model, name)
        tree = Tree(model)
        check_base(tree, about["base"], str(shown))
        beside = resume.PREFIX if "optimizer" in about else None
        state = file.tensors(k for k in file.entries if beside is None or not k.startswith(beside))
    source = f"The plan in {shown!r}"
    with explained(source):
        plan = [(_decode(p["method"], p["config"]), list(_sites(tree, p["sites"]))) for p in about["plan"]]
        _check(plan)
    what = f"the model it is loaded into ({shown!r})"
    return restore(tree, plan, state, name=name, trainable=trainable, source=source, what=what)


def check_path(path: Any) -> None:
    if not isinstance(path, (str, os.PathLike)):
        raise PeftlibError(f"A tuning's file is named by a str or a path; got {type(path).__name__}.")


def _grouped(parts: list[Part]) -> Iterator[tuple[Method, list[Part]]]:
    """What one call of ``build`` made, in order: deltas of one host run in the order in which they are built."""
    for _, group in itertools.groupby((p for p in parts if p.built), key=lambda p: p.entry):
        found = list(group)
        yield found[0].method, found


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
