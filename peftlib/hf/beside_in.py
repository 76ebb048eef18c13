"""Reading what HF peft keeps beside an adapter: token rows, whole modules, biases."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from peftlib.attach import Plan
from peftlib.errors import CheckpointError
from peftlib.hf.directory import CONFIG, Config
from peftlib.hf.names import is_shared, saved_roots, scaled_refusal, state_key
from peftlib.methods.base import (
    Method,
    Site,
)
from peftlib.methods.bitfit import BitFit
from peftlib.methods.full import FullFineTuning
from peftlib.methods.linear import is_transposed, linear_shape
from peftlib.methods.new_head import NewHead
from peftlib.methods.token_rows import TokenRows
from peftlib.targets import Tree

_TOKENS_KEY = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta")


def read_tokens(
    config: Config, rest: dict[str, Tensor], tree: Tree, plan: Plan, state: dict[str, Tensor]
) -> None:
    """Single rows of an embedding."""
    given = config.get("trainable_token_indices", (list, dict))
    keys = [k for k in rest if _TOKENS_KEY.fullmatch(k)]
    if given and not keys:
        raise config.error("trainable_token_indices", "there are no weights for them.")
    for key in keys:
        name = _TOKENS_KEY.fullmatch(key)["module"]  # type: ignore[index]
        ids = given
        if isinstance(given, dict):
            ids = next((v for k, v in given.items() if name.endswith(k)), None)
        if not isinstance(ids, list):
            raise config.error("trainable_token_indices", f"names no ids for the weights of {name!r}.")
        method = TokenRows(ids=ids)
        site = tree.site(name)
        why = method.refuses(site) or method.fits(site) or scaled_refusal(site)
        if why is not None:
            raise config.error("trainable_token_indices", f"{name!r}: {why}.")
        plan.append((method, method.survey(method.resolve(site, tree, None), tree, None)))
        state[state_key(site.name, method, "rows")] = rest.pop(key)


def read_modules(
    config: Config, rest: dict[str, Tensor], tree: Tree, plan: Plan, state: dict[str, Tensor]
) -> None:
    """Modules that are trained and saved whole."""
    roots = saved_roots(tree, config.names("modules_to_save"))
    full = FullFineTuning()
    copied: set[str] = set()
    surveyed: list[Site] = []
    for root in roots:
        values = {k[len(root) + 1 :]: k for k in rest if k.startswith(f"{root}.")}
        for own, key in values.items():
            # With bias="all" HF writes these beside the module's own.
            if own.startswith(("original_module.", "modules_to_save.")):
                rest.pop(key)
        values = {k: v for k, v in values.items() if v in rest}
        if not values:
            raise config.error("modules_to_save", f"there are no weights for {root!r}.")
        site = tree.site(root)
        if is_shared(tree, root, copied):
            shape = linear_shape(site.module)
            if shape is None or is_transposed(site.module):
                raise config.error(
                    "modules_to_save",
                    f"{root!r} shares a weight with another module; HF trains a copy of it, which peftlib can do for a "
                    "linear layer only. Untie them first, or save both.",
                )
            # A copy of its own, and the shared weight stays.
            method: Method = NewHead(shape[1], bias=site.module._parameters.get("bias") is not None)
            plan.append((method, [site]))
            copied.add(root)
            for own, key in values.items():
                state[state_key(root, method, own)] = rest.pop(key)
            continue
        inner = full.resolve(site, tree, None)
        surveyed += full.survey(inner, tree, None) if inner else []
        for own, key in values.items():
            owner, _, name = f"{root}.{own}".rpartition(".")
            state[state_key(tree.aliases.get(owner, owner), full, name)] = rest.pop(key)
    if surveyed:
        plan.append((full, surveyed))


def read_biases(
    config: Config, rest: dict[str, Tensor], tree: Tree, plan: Plan, state: dict[str, Tensor]
) -> None:
    bias = config.get("bias", (str,), "none")
    if bias not in ("none", "all", "lora_only"):
        raise config.error("bias", "expected 'none', 'all' or 'lora_only'.")
    if bias == "none":
        return
    method, sites = BitFit(), {}
    taken: dict[int, str] = {}
    for key in [k for k in rest if k.endswith(".bias")]:
        owner = key.removesuffix(".bias").removesuffix(".base_layer")
        parameter = tree.modules[owner]._parameters.get("bias") if owner in tree.modules else None
        if parameter is None:
            continue
        first = taken.setdefault(id(parameter), owner)
        if first == owner:
            sites[owner] = replace(tree.site(owner), facts={"names": ["bias"]})
            state[state_key(owner, method, "bias")] = rest.pop(key)
        elif torch.equal(rest[key], state[state_key(first, method, "bias")]):
            rest.pop(key)
    if sites:
        plan.append((method, list(sites.values())))


def check_rest(config: Config, rest: Mapping[str, Tensor], tree: Tree) -> None:
    """What is left may repeat the base (HF writes adapted embeddings again), not replace it."""
    for key, value in rest.items():
        owner, _, name = key.replace(".base_layer.", ".").rpartition(".")
        module = tree.modules.get(tree.aliases.get(owner, owner))
        own = None if module is None else module._parameters.get(name, module._buffers.get(name))
        if own is None:
            raise CheckpointError(f"{config.weights} has {key!r}, which is no part of what {CONFIG} says.")
        if own.is_meta:
            raise CheckpointError(
                f"{config.weights} repeats the base's {key!r}, which is on the meta device, so that they cannot be "
                "compared. Give the model its values first, then load."
            )
        if own.shape != value.shape or not torch.equal(own.detach().to(value), value):
            raise CheckpointError(
                f"{config.weights} replaces the base's {key!r} of shape {tuple(own.shape)} by other values of shape "
                f"{tuple(value.shape)} (HF does that where a vocabulary was resized). Put them into the base first, "
                "then load."
            )
