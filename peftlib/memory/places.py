"""Which part of a step some code belongs to, read off its frames."""

from __future__ import annotations

from collections.abc import Iterable
from types import FrameType

import torch
from torch import nn

from peftlib.memory.step import backward, loss_of

PARTS_OF_A_STEP = {loss_of.__code__: "the loss", backward.__code__: "the backward"}


def place(frames: Iterable[FrameType], model: nn.Module) -> str:
    """The innermost module of the model that runs in these frames, or the part of the step around it.

    Args:
        frames: outermost first.
        model: whose modules to name.
    """
    names = {id(module): name for name, module in model.named_modules()}
    where = "code outside the model"
    for frame in frames:
        owner = frame.f_locals.get("self")
        if id(owner) in names:
            name = names[id(owner)]
            where = repr(name) if name else "the root"
        elif isinstance(owner, torch.optim.Optimizer):
            where = "the optimizer's step"
        else:
            where = PARTS_OF_A_STEP.get(frame.f_code, where)
    return where
