"""What stands in for real tensors, and for what fake ones do not know."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from peftlib.memory.onednn import LSTM, WORKSPACE, lstm_workspace
from peftlib.memory.places import place

Value = bool | int | float
Hint = Value | Callable[[Tensor], Value]


class Faked:
    """Gives each tensor a fake CPU twin; twins share storage where the originals do, at the same size in bytes."""

    def __init__(self, mode: FakeTensorMode):
        self._mode = mode
        self._bases: dict[tuple[int, torch.dtype], Tensor] = {}

    def __call__(self, tensor: Tensor) -> Tensor:
        with self._mode, torch.no_grad():
            if tensor.layout is not torch.strided or is_traceable_wrapper_subclass(tensor):
                return self._mode.from_tensor(tensor)
            storage = tensor.untyped_storage()
            key = (storage._cdata, tensor.dtype)
            if key not in self._bases:
                size = storage.nbytes() // tensor.element_size()
                self._bases[key] = torch.empty(size, dtype=tensor.dtype, device="cpu")
            fake = self._bases[key].as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        return fake.requires_grad_(tensor.requires_grad)


HALVES = (torch.bfloat16, torch.float16)
NORMS = {
    torch.ops.aten.native_layer_norm.default: 2,
    torch.ops.aten.native_group_norm.default: 1,
    torch.ops.aten.native_batch_norm.default: 1,
}
"""Norms that keep statistics, and where their weight stands."""


ASKED = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
"""Operators that give a value itself."""


class Answers(TorchDispatchMode):
    """What fake tensors do not know, or know wrongly.

    A value that the step asks for, as ``if mask.any():`` does, is answered by a hint. Statistics of a norm of a
    half-precision input are float32 where its weight is, and always on a GPU; fake kernels (of torch 2.13) say half.
    A CPU's LSTM keeps a workspace; fake ones have none.

    Args:
        model: names the places that asked.
        hint: the answer, or a function of the tensor that gives it; None lets the question fail.
        on_cuda: whether the CPU's tensors stand in for a GPU's.
    """

    def __init__(self, model: nn.Module, hint: Hint | None, on_cuda: bool):
        super().__init__()
        self._model, self._hint, self._on_cuda = model, hint, on_cuda
        self.places: dict[str, None] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        try:
            output = func(*args, **(kwargs or {}))
        except DataDependentOutputException:
            if self._hint is None or func not in ASKED:
                raise
            frames = reversed([frame for frame, _ in traceback.walk_stack(sys._getframe())])
            self.places[place(frames, self._model)] = None
            answer = self._hint(args[0]) if callable(self._hint) else self._hint
            return bool(answer) if func is torch.ops.aten.equal.default else answer
        if func in NORMS and args[0].dtype in HALVES:
            weight = args[NORMS[func]]
            if self._on_cuda or (weight is not None and weight.dtype == torch.float32):
                return (output[0], *(statistic.float() for statistic in output[1:]))
        if func is torch.ops.aten.native_group_norm_backward.default and args[1].dtype in HALVES:
            return (output[0].to(args[1].dtype), *output[1:])
        if func is LSTM and not self._on_cuda:
            return (*output[:WORKSPACE], torch.empty(lstm_workspace(args), dtype=torch.uint8))
        return output
