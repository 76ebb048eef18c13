"""What a model keeps that is no parameter: running means, codebooks, counters, wherever in it they are.

A step that is not made leaves them as they were, a checkpoint has those that training changed, and so have the best
values. Left out on purpose: large tables of whole numbers (packed weights, masks), which no training moves.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

LARGE = 2**16
"""Elements from which on whole numbers and 8-bit floats are taken for a table."""


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that training may move, by name."""
    return {
        name: buffer.detach()
        for name, buffer in model.named_buffers()
        if buffer.numel() < LARGE or (buffer.dtype.is_floating_point and buffer.itemsize > 1)
    }


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors, by name."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


@torch.no_grad()
def put(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give buffers values, those that the model makes or resizes as it runs among them."""
    for name, value in values.items():
        parent, _, own = name.rpartition(".")
        module = model.get_submodule(parent)
        there = module._buffers.get(own)
        if there is not None and there.shape == value.shape:
            there.copy_(value)
        else:
            device = next((t.device for t in (*model.parameters(), *model.buffers())), None)
            module.register_buffer(own, value.to(device), own not in module._non_persistent_buffers_set)


class Buffers:
    """A model's buffers, and what they were when a training began."""

    def __init__(self, model: nn.Module):
        # torch.compile's module has the user's model inside, whose names stay
        self.model: nn.Module = getattr(model, "_orig_mod", model)
        self.start = copied(buffers_of(self.model))

    def changed(self) -> dict[str, Tensor]:
        """Those that are no longer as at the start."""
        now = buffers_of(self.model).items()
        return {name: b for name, b in now if name not in self.start or not _same(b, self.start[name])}

    def put(self, changed: Mapping[str, Tensor]) -> None:
        """All as at the start but these."""
        put(self.model, {**self.start, **changed})


def _same(one: Tensor, other: Tensor) -> bool:
    like = one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
    return like and torch.equal(one, other)
