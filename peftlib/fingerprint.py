"""What tells one base from another: class, size, names and shapes; on request the values themselves."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from peftlib.errors import CheckpointError, StateError
from peftlib.merging import MERGED
from peftlib.methods.trained import TRAINED
from peftlib.storage import as_bytes, whole
from peftlib.targets import Tree


def fingerprint(tree: Tree, values: bool = False) -> dict[str, Any]:
    """Of a base with or without tunings on it: the same either way.

    Dtypes are told but not compared, since a tuning takes those of the base it comes to.

    Args:
        tree: of the model.
        values: add a hash of each parameter, 16 bytes of SHA-256 over its numbers as they lie in memory.
    """
    parameters = list(tree.parameters())
    entries = sorted((name, list(p.shape)) for name, _, _, p in parameters)
    found = {
        "class": getattr(type(tree.model), "__name__", "?"),
        "parameters": sum(p.numel() for *_, p in parameters),
        "dtypes": dict(sorted(Counter(str(p.dtype).removeprefix("torch.") for *_, p in parameters).items())),
        "shapes": hashlib.sha256(json.dumps(entries).encode()).hexdigest(),
    }
    if values:
        found["values"] = {
            name: hashlib.sha256(as_bytes(whole(value))).hexdigest()[:32]
            for name, value in _base_values(tree).items()
        }
    return found


def check_base(tree: Tree, wanted: Mapping[str, Any], path: str) -> None:
    """Raise if the model is not the base that a file's fingerprint is of."""
    here = fingerprint(tree)
    if here["shapes"] != wanted.get("shapes"):
        raise CheckpointError(
            f"{path!r} was made for another base: {_words(wanted)}; this is {_words(here)}. Load it into a model with "
            "the same parameter names and shapes."
        )
    hashes = wanted.get("values")
    if hashes is None:
        return
    mine = fingerprint(tree, values=True)["values"]
    if not isinstance(hashes, dict) or hashes.keys() != mine.keys():
        raise CheckpointError(f"{path!r} does not have one hash for each parameter of its base.")
    differ = [name for name in mine if mine[name] != hashes[name]]
    if differ:
        raise CheckpointError(
            f"{path!r} was made for a base of other values: {differ[0]!r} differs"
            f"{f', and {len(differ) - 1} more of {len(mine)}' if len(differ) > 1 else ''}. Its base was "
            f"{_words(wanted)}; this is {_words(here)}. Load the same weights, in the same dtype."
        )


def _words(base: Mapping[str, Any]) -> str:
    dtypes = base.get("dtypes")
    kinds = f" in {', '.join(map(str, dtypes))}" if isinstance(dtypes, dict) and dtypes else ""
    return f"{base.get('class')} with {base.get('parameters')} parameters{kinds}"


def _base_values(tree: Tree) -> dict[str, Tensor]:
    """Each base parameter's own value, also while a tuning has put another in its place."""
    kept: dict[int, Tensor | None] = {}
    for module in tree.modules.values():
        for name, delta in module.__dict__.get(TRAINED, {}).items():
            if name in module._parameters:  # and not a running statistic
                kept[id(module._parameters[name])] = delta.other._parameters.get(name)
    found = {}
    for name, module, own, parameter in tree.parameters():
        value = kept.get(id(parameter), parameter)
        if own in module.__dict__.get(MERGED, {}):
            raise StateError(
                f"{name!r} has {module.__dict__[MERGED][own]!r} merged into it, so the base cannot be hashed. "
                "unmerge() it first."
            )
        if value is None:
            raise StateError(
                f"{name!r} is trained with keep_base=False, so the base's value is gone and cannot be hashed. Leave "
                "hash_base out."
            )
        if value.is_meta:
            raise CheckpointError(
                f"{name!r} is on the meta device and has no value that a hash could be of. Give the model its values."
            )
        found[name] = value
    return found
