"""What the quality run compares, as data: each method with the rates to choose from, for encoders and language models.

The sizes are those of the savings run; LoRA is there twice, on every linear and, as in its paper, on q and v alone.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.contestants import CONTESTANTS
from benchmarks.tasks import Task
from peftlib import BitFit, LoRA, PartialFineTuning, PeftlibError, Tuning, attach
from peftlib.methods.base import Method

# A method's part of the model, beside the new head: (method, targets).
Part = tuple[Method, Any]


def savings(name: str) -> Callable[[Task], Part]:
    """The method as the savings run has it."""
    return lambda task: (CONTESTANTS[name].build(task.base, torch.empty(0)), None)


def last_block(task: Task) -> Part:
    """The last of the model's stacked blocks."""
    name, stack = max(
        ((name, module) for name, module in task.base.named_modules() if isinstance(module, nn.ModuleList)),
        key=lambda pair: sum(parameter.numel() for parameter in pair[1].parameters()),
    )
    return PartialFineTuning(keep_base=False), [f"{name}.{len(stack) - 1}"]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One row of the table: a method, and the rates to choose from.

    Attributes:
        part: what is trained beside a new head; None is the head alone.
        encoder: AdamW's rates for an encoder with a new head.
        language_model: those for a language model.
    """

    part: Callable[[Task], Part] | None
    encoder: tuple[float, ...]
    language_model: tuple[float, ...]

    def rates(self, task: Task) -> tuple[float, ...]:
        """The grid for a task: with a new head, or without one."""
        return self.language_model if task.head is None else self.encoder


HEAD_RATE = 1e-2
"""A new head's own rate beside any method: at the rates that suit pretrained weights it would hardly learn."""

METHODS: Mapping[str, Entry] = {
    "head": Entry(part=None, encoder=(1e-2, 3e-2), language_model=()),
    "full": Entry(part=savings("full"), encoder=(3e-5, 1e-4), language_model=(3e-5, 1e-4)),
    "partial": Entry(part=last_block, encoder=(1e-4, 5e-4), language_model=(3e-4, 1e-3)),
    "bitfit": Entry(
        part=lambda task: (BitFit(keep_base=False), task.body),
        encoder=(1e-3, 3e-3),
        language_model=(1e-3, 3e-3),
    ),
    "lora-qv": Entry(
        part=lambda task: (LoRA(rank=8, alpha=16), task.query_value),
        encoder=(1e-3, 3e-3),
        language_model=(1e-3, 3e-3),
    ),
    "lora": Entry(part=savings("lora"), encoder=(3e-4, 1e-3), language_model=(3e-4, 1e-3)),
    "adapter": Entry(part=savings("adapter"), encoder=(1e-3, 3e-3), language_model=(1e-3, 3e-3)),
    "prefix": Entry(part=savings("prefix"), encoder=(1e-3, 3e-3), language_model=(3e-4, 1e-3)),
    "ptuning-v2": Entry(part=savings("ptuning-v2"), encoder=(1e-2, 3e-2), language_model=(1e-2, 3e-2)),
    "prompt": Entry(part=savings("prompt"), encoder=(1e-2, 3e-2), language_model=(3e-2, 1e-1)),
    "ptuning-v1": Entry(part=savings("ptuning-v1"), encoder=(1e-3, 3e-3), language_model=(1e-3, 3e-3)),
}


def start(name: str, task: Task, seed: int) -> tuple[nn.Module, Tuning]:
    """A copy of the base with the method on it; what is new in it depends on the seed alone.

    Raises:
        PeftlibError: the method cannot act on this model.
    """
    model = copy.deepcopy(task.base)
    torch.manual_seed(seed)
    task.renew(model)
    part = METHODS[name].part
    head = PartialFineTuning(keep_base=False)
    if part is None:
        if task.head is None:
            raise PeftlibError("there is no new layer to train alone")
        return model, attach(model, head, targets=[task.head])
    method, targets = part(task)
    if task.head is not None and name != "full":
        method = dataclasses.replace(method, head={task.head: head})
    return model, attach(model, method, targets=targets, example=task.example)


def adamw(name: str, task: Task, model: nn.Module, tuning: Tuning, rate: float) -> torch.optim.AdamW:
    """The optimizer of a training: the method's rate, and the new head's own."""
    of_head: set[int] = set()
    if task.head is not None and name != "head":
        of_head = {id(parameter) for parameter in model.get_submodule(task.head).parameters()}
    parts = {
        value: [p for p in tuning.parameters() if (id(p) in of_head) == value] for value in (False, True)
    }
    groups = [{"params": parts[False], "lr": rate}, {"params": parts[True], "lr": HEAD_RATE}]
    return torch.optim.AdamW([group for group in groups if group["params"]])
