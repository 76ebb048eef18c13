"""Writing prompts and prefixes as the rows, keys and values that they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftlib.errors import CheckpointError
from peftlib.hf.beside_out import write_modules
from peftlib.hf.names import HEADS, refusal, saved_roots, task_of
from peftlib.methods.bitfit import BitFit
from peftlib.methods.position_offset import PositionOffset
from peftlib.methods.prefix import DeepPrefix
from peftlib.methods.ptuning_v1 import PTuningV1
from peftlib.methods.soft_prompt import SoftPrompt
from peftlib.methods.token_rows import TokenRows
from peftlib.part import Part
from peftlib.targets import Tree
from peftlib.tuning import Tuning


def write_virtual(tuning: Tuning, tree: Tree) -> tuple[dict[str, Any], dict[str, Tensor]]:
    parts = [p for p in tuning.parts if p.built and isinstance(p.method, (SoftPrompt, DeepPrefix))]
    for part in tuning.parts:
        if isinstance(part.method, (BitFit, TokenRows)):
            raise refusal(part, "beside a prompt or a prefix HF keeps whole modules only")
    if len({id(p.method) for p in parts}) != 1:
        raise CheckpointError("HF's format holds one prompt or one prefix; this tuning has several.")
    task = task_of(tuning.model) or "FEATURE_EXTRACTION"
    # HF looks for the head of a classification task in the directory; an untrained one is written as it is.
    ends = {"SEQ_CLS": HEADS, "TOKEN_CLS": HEADS, "QUESTION_ANS": ("qa_outputs",)}.get(task)
    modules, tensors = write_modules(tuning, tree, "base_model.", saved_roots(tree, ends) if ends else [])
    method = parts[0].method
    with torch.no_grad():
        if isinstance(method, SoftPrompt):
            values, rows = _prompt_out(parts[0], method)
        else:
            assert isinstance(method, DeepPrefix)
            values, rows = _prefix_out(tuning, parts, method, task)
    values |= {
        "task_type": task,
        "num_virtual_tokens": method.length,
        "num_transformer_submodules": 1,
        "modules_to_save": modules or None,
    }
    return values, {"prompt_embeddings": rows, **tensors}


def _prompt_out(part: Part, method: SoftPrompt) -> tuple[dict[str, Any], Tensor]:
    if method.placeholder is not None:
        raise refusal(part, "HF puts virtual tokens in front, not at placeholders in a template")
    if part.name:
        raise refusal(part, "HF puts virtual tokens before the model's input, not that of a part")
    rows: Tensor = part.delta.prompt()  # type: ignore[operator]
    if isinstance(method, PTuningV1):
        kind = {
            "peft_type": "P_TUNING",
            "encoder_reparameterization_type": "MLP",
            "encoder_hidden_size": rows.shape[1],
        }
    else:
        kind = {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "RANDOM"}
    return {**kind, "token_dim": rows.shape[1]}, rows


def _prefix_out(
    tuning: Tuning, parts: Sequence[Part], method: DeepPrefix, task: str
) -> tuple[dict[str, Any], Tensor]:
    if task == "SEQ_2_SEQ_LM":
        raise refusal(parts[0], "HF's prefix of an encoder-decoder is a cache of its decoder alone")
    offsets = [p.method.offset for p in tuning.parts if isinstance(p.method, PositionOffset)]
    if offsets != [method.length]:
        raise refusal(
            parts[0],
            f"HF's prefix puts the first token at position {method.length}, and this one leaves it at "
            f"{offsets[0] if offsets else 0}. Train it with peftlib.hf.PositionOffset({method.length}) at the root",
        )
    layers = _layers(tuning.model)
    if layers is not None and layers != len(parts):
        raise refusal(parts[0], f"HF's prefix stands in all {layers} layers, and this one in {len(parts)}")
    pairs = [p.delta.key_value() for p in parts]  # type: ignore[operator]
    if len({t.shape for pair in pairs for t in pair}) != 1:
        raise refusal(parts[0], "HF's keys and values have one size in all layers")
    heads, size = pairs[0][0].shape[1:]
    values = {
        "peft_type": "PREFIX_TUNING",
        "prefix_projection": False,
        "num_layers": len(parts),
        "num_attention_heads": heads,
        "token_dim": heads * size,
    }
    return values, torch.cat([t.flatten(1) for pair in pairs for t in pair], 1)


def _layers(model: nn.Module) -> int | None:
    config: Any = getattr(model, "config", None)
    if callable(getattr(config, "get_text_config", None)):
        config = config.get_text_config()
    sizes: Iterator[Any] = (getattr(config, n, None) for n in ("num_hidden_layers", "num_layers", "n_layer"))
    return next((s for s in sizes if isinstance(s, int)), None)
