"""What the savings run compares, as data: each method with its learning rate.

The rates are the best of a few (1, 3, 10, ...) on the bundled GPT with seed 1; for another model, `--rate METHOD=VALUE`
replaces one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftlib import (
    Adapter,
    BitFit,
    FullFineTuning,
    LoRA,
    PartialFineTuning,
    PrefixTuning,
    PromptTuning,
    PTuningV1,
    PTuningV2,
)


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One row of the table.

    Attributes:
        build: the method for a model and an example of its input; most look at neither.
        rate: AdamW's learning rate, constant over the run.
    """

    build: Callable[[nn.Module, Tensor], Any]
    rate: float


# The base values are not kept: the run compares with fine-tuning as everybody does it, in place.
CONTESTANTS: Mapping[str, Contestant] = {
    "full": Contestant(build=lambda *_: FullFineTuning(keep_base=False), rate=5e-4),
    "partial": Contestant(
        build=lambda model, example: PartialFineTuning(
            targets=last_block_and_head(model, example), keep_base=False
        ),
        rate=2e-3,
    ),
    "bitfit": Contestant(build=lambda *_: BitFit(keep_base=False), rate=1e-2),
    "lora": Contestant(build=lambda *_: LoRA(rank=8, alpha=16), rate=3e-3),
    "adapter": Contestant(build=lambda *_: Adapter(dim=32), rate=5e-3),
    "prefix": Contestant(build=lambda *_: PrefixTuning(length=16, hidden=128), rate=3e-3),
    "ptuning-v2": Contestant(build=lambda *_: PTuningV2(length=16), rate=1e-1),
    "prompt": Contestant(build=lambda *_: PromptTuning(length=16), rate=3e-2),
    "ptuning-v1": Contestant(build=lambda *_: PTuningV1(length=16, encoder="mlp", hidden=128), rate=1e-2),
}


def last_block_and_head(model: nn.Module, example: Tensor) -> list[str]:
    """Names of the last block of the largest stack, and of the layer with parameters that is executed last.

    >>> model = nn.Sequential(
    ...     nn.Embedding(8, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 8)
    ... )
    >>> last_block_and_head(model, torch.tensor([[1]]))
    ['1.1', '2']
    """
    blocks = [
        (sum(parameter.numel() for parameter in stack.parameters()), f"{name}.{len(stack) - 1}")
        for name, stack in model.named_modules()
        if name and isinstance(stack, nn.ModuleList | nn.Sequential) and len(stack) > 1
    ]
    block = [max(blocks)[1]] if blocks else []
    executed: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: executed.append(name))
        for name, module in model.named_modules()
        if name and not list(module.children()) and list(module.parameters())
    ]
    try:
        with torch.no_grad():
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    return block + [name for name in executed[-1:] if not any(name.startswith(f"{b}.") for b in block)]
