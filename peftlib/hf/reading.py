"""Reading a directory: which method it is of, and putting it on the model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from peftlib.attach import Plan, check_name
from peftlib.hf.directory import Config, read
from peftlib.hf.lora_in import lora_plan
from peftlib.hf.virtual_in import virtual_plan
from peftlib.restore import explained, restore
from peftlib.targets import Tree
from peftlib.tuning import Tuning


def load(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    name: str | None = None,
    trainable: bool = True,
    example: Any = None,
) -> Tuning:
    """Attach the tuning that HF peft saved in a directory.

    LoRA (linear, embedding and convolution layers, transformers' Conv1D, rank and alpha patterns, rsLoRA, DoRA, biases,
    saved modules, token rows), prompt tuning, p-tuning (the rows that its encoder made) and prefix tuning (with a
    :class:`PositionOffset`). The model computes what HF's computes; prompts are taken off the outputs again, where HF
    leaves them on.

    Args:
        model: the base, as HF's had it: same module names and shapes, without peft's wrapper.
        directory: holds ``adapter_config.json`` and ``adapter_model.safetensors``.
        name: the tuning's name on this model; ``None`` is ``"default"``.
        trainable: whether its parameters require gradients.
        example: for prompts and prefixes, as in :func:`peftlib.attach`; ``None`` takes the model's ``dummy_inputs``.

    Raises:
        CheckpointError: a file is missing, damaged or pickled, does not fit the model, or says what cannot be expressed
            here; the field or key is named. The model is then unchanged.

    Example:
        >>> import tempfile, torch, peftlib.hf
        >>> def make():
        ...     return torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> folder = tempfile.mkdtemp()
        >>> peftlib.hf.save(peftlib.attach(make(), peftlib.LoRA(rank=2), targets="0"), folder)
        >>> peftlib.hf.load(make(), folder)
        Tuning('default', 1 sites, 16 parameters, enabled)
    """
    config, tensors = read(directory)
    name = "default" if name is None else name
    check_name(model, name)
    tree = Tree(model)
    with explained(repr(str(config.path))):
        plan, state = _plan(config, tensors, tree, example)
    what = f"what {str(config.path)!r} says of this model"
    return restore(
        tree, plan, state, name=name, trainable=trainable, source=repr(str(config.path)), what=what
    )


def _plan(
    config: Config, tensors: Mapping[str, Tensor], tree: Tree, example: Any
) -> tuple[Plan, dict[str, Tensor]]:
    kind = config.get("peft_type", (str,), "")
    if kind == "LORA":
        return lora_plan(config, tensors, tree)
    if kind in ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"):
        return virtual_plan(config, tensors, tree, kind, example)
    raise config.error(
        "peft_type",
        "peftlib reads LORA, PROMPT_TUNING, P_TUNING and PREFIX_TUNING. Train and save one of those.",
    )
