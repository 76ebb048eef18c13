"""HF peft's rules for names: which modules a configuration means, and what it cannot mean."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from peftlib.errors import CheckpointError
from peftlib.hf.directory import CONFIG, Config
from peftlib.methods.base import (
    Method,
    Site,
    plain_class,
)
from peftlib.methods.linear import CONVOLUTIONS, is_transposed, linear_shape
from peftlib.open_attention import Projection
from peftlib.part import Part
from peftlib.targets import Tree

HEADS = ("classifier", "score")
"""Endings of the task heads that HF trains and saves with any tuning of a classification task."""

FUSED = (
    "HF adapts the fused projection of nn.MultiheadAttention with one matrix, peftlib q, k and v separately"
)


def is_meant(config: Config, targets: list[str] | str, name: str) -> bool:
    """HF's rule: a string is a regular expression of the whole name, a list holds names or their trailing parts."""
    excluded = config.get("exclude_modules", (list, str), [])
    if isinstance(excluded, str):
        if config.search("exclude_modules", excluded, name, full=True):
            return False
    elif ends_with_any(name, excluded):
        return False
    for saved in config.names("modules_to_save"):
        if config.search("modules_to_save", rf"(^|.*\.){saved}($|\..*)", name):
            return False
    if isinstance(targets, str):
        return config.search("target_modules", targets, name, full=True)
    if name in targets:
        return True
    layers = config.get("layers_to_transform", (list, int))
    if not ends_with_any(name, targets) or layers is None or layers == []:
        return ends_with_any(name, targets)
    patterns = config.get("layers_pattern", (list, str), [])
    patterns = [patterns] if isinstance(patterns, str) and patterns else patterns
    for pattern in [rf"(?:^|.*?\.){p}\.(?P<idx>\d+)\." for p in patterns] or [r".*?\.[^.]*\.(?P<idx>\d+)\."]:
        if config.search("layers_pattern", pattern, name):
            index = int(re.match(pattern, name)["idx"])  # type: ignore[index]
            return index in (layers if isinstance(layers, list) else [layers])
    return False


def ends_with_any(name: str, ends: Iterable[str]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)


def is_within(name: str, roots: Iterable[str]) -> bool:
    return any(name == r or name.startswith(f"{r}.") for r in roots)


def all_linear(config: Config, tree: Tree) -> list[str]:
    """Every linear layer but the output layer, or, without one, but the head of a sequence classifier."""
    model: Any = tree.model
    declared = getattr(model, "get_output_embeddings", None)
    head = declared() if callable(declared) else None
    if head is None and callable(declared) and config.values.get("task_type") == "SEQ_CLS":
        head = next((h for h in (getattr(model, n, None) for n in reversed(HEADS)) if h is not None), None)
    return [
        n
        for n, m in tree.modules.items()
        if n and m is not head and (isinstance(m, nn.Linear) or (is_transposed(m) and linear_shape(m)))
    ]


def saved_roots(tree: Tree, ends: Sequence[str]) -> list[str]:
    """HF's rule for modules_to_save: every module whose name ends so; only the outermost."""
    hits = [
        n
        for n in tree.modules
        if n and n.endswith(tuple(ends)) and not isinstance(tree.modules[n], Projection)
    ]
    roots = [n for n in hits if not any(n.startswith(f"{o}.") for o in hits)]
    # Those with a tied weight first: their copies leave it to the others.
    return sorted(roots, key=lambda n: isinstance(tree.modules[n], nn.Embedding))


def is_shared(tree: Tree, root: str, copied: Container[str]) -> bool:
    """Whether a module shares a parameter with one outside that has no copy of its own."""
    own = {id(p) for p in tree.modules[root].parameters()}
    return any(
        id(p) in own
        for n, m in tree.modules.items()
        if n != root and not n.startswith(f"{root}.") and n not in copied
        for p in m._parameters.values()
    )


def check_endings(tree: Tree, names: Sequence[str], field: str) -> None:
    """HF finds these modules by the ends of names, so an end must mean no other module."""
    if not names:
        return
    others = [n for n in tree.aliases if n and n.endswith(tuple(names)) and tree.aliases[n] not in names]
    others = [n for n in others if not any(n.startswith(f"{m}.") for m in names)]
    if others:
        raise CheckpointError(
            f"HF's {field} names modules by the ends of their names, and {others[0]!r} ends like one of "
            f"{', '.join(map(repr, names))}, so that HF would take it too."
        )


def target_names(tree: Tree, names: Sequence[str], modules: Sequence[str]) -> list[str] | str:
    """Last parts of the names if these mean no other module, else the names, else an expression for exactly them."""
    config = Config({"modules_to_save": list(modules)}, Path(CONFIG))
    every = [n for n, m in tree.modules.items() if n and not isinstance(m, Projection)]
    for targets in (sorted({n.rpartition(".")[2] for n in names}), sorted(names)):
        if {n for n in every if is_meant(config, targets, n)} == set(names):
            return targets
    return "|".join(re.escape(n) for n in sorted(names))


def state_key(site: str, method: Method, tensor: str) -> str:
    return f"{site}.{method.label}.{tensor}" if site else f"{method.label}.{tensor}"


def without_prefix(key: str, prefix: str) -> str:
    if not key.startswith(prefix):
        raise CheckpointError(
            f"The weights hold {key!r}; every key of such a directory begins with {prefix!r}."
        )
    return key.removeprefix(prefix)


def conv_refusal(site: Site) -> str | None:
    """What HF's LoRA of a convolution leaves out."""
    host: Any = site.module
    if not isinstance(host, CONVOLUTIONS):
        return None
    if set(host.dilation) != {1}:
        return "HF's LoRA of a convolution has no dilation, and this one has"
    if host.padding_mode != "zeros":
        return f"HF's LoRA of a convolution pads with zeros, and this one with {host.padding_mode!r}"
    return None


def scaled_refusal(site: Site) -> str | None:
    for name in ("embed_scale", "scalar_embed_scale"):
        if isinstance(site.module, nn.Embedding) and getattr(site.module, name, None) is not None:
            return f"the embedding multiplies by its {name}, and HF its LoRA as well"
    return None


def task_of(model: nn.Module) -> str | None:
    """HF's task of a model, by the name that its class has there."""
    name = plain_class(model).__name__
    encoder_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    ends = {
        "ForSequenceClassification": "SEQ_CLS",
        "ForTokenClassification": "TOKEN_CLS",
        "ForQuestionAnswering": "QUESTION_ANS",
        "ForCausalLM": "CAUSAL_LM",
        "LMHeadModel": "CAUSAL_LM",
    }
    if encoder_decoder and name.endswith("ForConditionalGeneration"):
        return "SEQ_2_SEQ_LM"
    return next((task for end, task in ends.items() if name.endswith(end)), None)


def refusal(part: Part, why: str) -> CheckpointError:
    return CheckpointError(
        f"{part.name or 'the root'!r} ({type(part.method).__name__}) has no place in HF's format: {why}. Use "
        "tuning.save(path) for this library's own."
    )
