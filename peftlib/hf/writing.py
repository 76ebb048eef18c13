"""Writing a directory."""

from __future__ import annotations

import json
import os
from pathlib import Path

from peftlib.errors import CheckpointError
from peftlib.hf.directory import write
from peftlib.hf.lora_out import write_lora
from peftlib.hf.virtual_out import write_virtual
from peftlib.methods.lora import LoRA
from peftlib.methods.prefix import DeepPrefix
from peftlib.methods.soft_prompt import SoftPrompt
from peftlib.storage import METADATA, encoded, laid_out
from peftlib.targets import Tree
from peftlib.tuning import Tuning


def save(tuning: Tuning, directory: str | os.PathLike[str]) -> None:
    """Write a tuning as HF peft reads it: ``PeftModel.from_pretrained(base, directory)`` computes the same.

    LoRA with whatever stands beside it (biases, whole modules, new heads of the old size, token rows), or one prompt
    or prefix, with a task head if there is one. A prompt encoder or a prefix MLP is written as the values it makes.
    HF puts the tokens after a prefix at positions P, P + 1, ...; so it takes one with a :class:`PositionOffset`.

    Args:
        tuning: attached, in a model whose module names HF will find again.
        directory: made if it is missing; files of the same names are replaced, each at once.

    Raises:
        CheckpointError: the tuning holds what the format cannot say; the reason is named, and nothing is written.
    """
    tuning._check()
    parts = tuning.parts
    kinds = {type(p.method) for p in parts}
    tree = Tree(tuning.model)
    if LoRA in kinds:
        values, tensors = write_lora(tuning, tree)
    elif any(issubclass(k, (SoftPrompt, DeepPrefix)) for k in kinds):
        values, tensors = write_virtual(tuning, tree)
    else:
        raise CheckpointError(
            f"The tuning {tuning.name!r} holds {', '.join(sorted(k.__name__ for k in kinds))}, and HF's format needs "
            "LoRA, a prompt or a prefix in it. Use tuning.save(path) for this library's own."
        )
    empty = [k for k, t in tensors.items() if t.is_meta]
    if empty:
        raise CheckpointError(
            f"The tuning {tuning.name!r} has no values yet: {empty[0]!r} is on the meta device."
        )
    values |= {
        "base_model_name_or_path": getattr(tuning.model, "name_or_path", None) or None,
        "inference_mode": True,
        "revision": None,
    }
    config = json.dumps(values, indent=2, sort_keys=True).encode()
    entries, data = laid_out(tensors)
    write(Path(directory), config, encoded({METADATA: {"format": "pt"}, **entries}), *data.values())
