"""Writing what stands beside an adapter: whole modules, biases, token rows."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from peftlib.errors import CheckpointError
from peftlib.hf.names import check_endings, is_shared, refusal, scaled_refusal
from peftlib.methods.base import (
    CHILD,
    Site,
)
from peftlib.methods.bitfit import BitFit
from peftlib.methods.full import FullFineTuning
from peftlib.methods.lora import LoRA
from peftlib.methods.new_head import NewHead
from peftlib.methods.partial import PartialFineTuning
from peftlib.methods.position_offset import PositionOffset
from peftlib.methods.prefix import DeepPrefix
from peftlib.methods.soft_prompt import SoftPrompt
from peftlib.methods.token_rows import TokenRows
from peftlib.targets import Tree
from peftlib.tuning import Tuning


def write_modules(
    tuning: Tuning, tree: Tree, prefix: str, also: Sequence[str]
) -> tuple[list[str], dict[str, Tensor]]:
    """Whole modules: full or partial fine-tuning, new heads of the old shape, and those that HF wants anyway."""
    tensors: dict[str, Tensor] = {}
    owners = set(also)
    heads: set[str] = set()
    for part in tuning.parts:
        method = part.method
        if isinstance(method, (FullFineTuning, PartialFineTuning)):
            owners.add(part.name)
        elif isinstance(method, NewHead):
            old, new = part.host._parameters, dict(part.delta.tensors())
            if {n: t.shape for n, t in new.items()} != {n: t.shape for n, t in old.items() if t is not None}:
                raise refusal(
                    part, "its shape is not that of the layer it replaces, and HF loads it into that layer"
                )
            owners.add(part.name)
            heads.add(part.name)
        elif not isinstance(method, (LoRA, BitFit, TokenRows, SoftPrompt, DeepPrefix, PositionOffset)):
            raise refusal(part, "peft has no such method, or none that computes the same")
    if "" in owners:
        raise CheckpointError(
            "The whole model is trained; that is a checkpoint of the model, not an adapter for HF peft."
        )
    roots = [n for n in tree.modules if n in owners and not any(n.startswith(f"{o}.") for o in owners)]
    for root in roots:
        if root not in heads and is_shared(tree, root, heads):
            raise CheckpointError(
                f"{root!r} is trained whole and shares a weight with another module; HF would train a copy and leave "
                "the other as it was. Untie them first."
            )
        # What is not trained is written as it is.
        whole = {
            k: t
            for k, t in tree.modules[root].state_dict(keep_vars=True).items()
            if f".{CHILD}." not in f".{k}"
        }
        tensors |= {f"{prefix}{root}.{k}": t for k, t in whole.items()}
    current = tuning.state_dict()
    for part in tuning.parts:
        if part.name in owners and isinstance(part.method, (FullFineTuning, PartialFineTuning, NewHead)):
            for own, _ in part.delta.tensors():
                tensors[f"{prefix}{part.name}.{own}"] = current[f"{part.prefix}.{own}"]
    check_endings(tree, roots, "modules_to_save")
    return roots, tensors


def write_biases(tuning: Tuning, tree: Tree, adapted: Sequence[str]) -> tuple[str, dict[str, Tensor]]:
    trained: dict[str, Tensor] = {}
    for part in tuning.parts:
        if isinstance(part.method, BitFit):
            for name, value in part.delta.tensors():
                if name != "bias":
                    raise refusal(part, f"HF saves biases that are called 'bias', not {name!r}")
                trained[part.name] = value
    if not trained:
        return "none", {}
    every = {
        n: m._parameters["bias"] for n, m in tree.modules.items() if m._parameters.get("bias") is not None
    }
    only = set(trained) == {n for n in adapted if n in every}
    written = {n: trained.get(n, every[n]) for n in every if not only or n in trained}
    taken = {id(every[n]): v for n, v in trained.items()}
    return ("lora_only" if only else "all"), {
        f"base_model.model.{n}{'.base_layer' if n in adapted else ''}.bias": taken.get(id(every[n]), v)
        for n, v in written.items()
        if v is not None
    }


def write_tokens(tuning: Tuning, tree: Tree) -> tuple[dict[str, list[int]], dict[str, Tensor]]:
    ids: dict[str, list[int]] = {}
    tensors: dict[str, Tensor] = {}
    for part in tuning.parts:
        if isinstance(part.method, TokenRows) and part.built:
            why = scaled_refusal(Site(part.name, part.host))
            if why is not None:
                raise refusal(part, why)
            ids[part.name] = list(part.method.ids)
            tensors |= {
                f"base_model.model.{part.name}.token_adapter.trainable_tokens_delta": t
                for _, t in part.delta.tensors()
            }
    check_endings(tree, list(ids), "trainable_token_indices")
    return ids, tensors
