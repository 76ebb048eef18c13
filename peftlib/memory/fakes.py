"""What stands in for real tensors, for the values in them, and for a GPU's kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

Value = bool | int | float


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


class Answers(TorchDispatchMode):
    """What fake tensors do not know, or know wrongly.

    A value that the model asks for, as ``if mask.any():`` does, is answered by a hint. And statistics of a norm of a
    half-precision input are float32 where its weight is, and always on a GPU; fake kernels (of torch 2.13) say half.

    Args:
        hint: the answer, or a function of the tensor that gives it; None lets the question fail.
        on_cuda: whether the CPU's tensors stand in for a GPU's.
    """

    def __init__(self, hint: Value | Callable[[Tensor], Value] | None, on_cuda: bool):
        super().__init__()
        self._hint, self._on_cuda = hint, on_cuda
        self.answers = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        try:
            output = func(*args, **(kwargs or {}))
        except DataDependentOutputException:
            if self._hint is None or func is not torch.ops.aten._local_scalar_dense.default:
                raise
            self.answers += 1
            return self._hint(args[0]) if callable(self._hint) else self._hint
        if func in NORMS and args[0].dtype in HALVES:
            weight = args[NORMS[func]]
            if self._on_cuda or (weight is not None and weight.dtype == torch.float32):
                return (output[0], *(statistic.float() for statistic in output[1:]))
        if func is torch.ops.aten.native_group_norm_backward.default and args[1].dtype in HALVES:
            return (output[0].to(args[1].dtype), *output[1:])
        return output


class GPUKernels(TorchFunctionMode):
    """Takes a GPU's kernels where a CPU has others.

    Attention with dropout is fused, and so is the RMS norm; dropout keeps a mask of one byte, not of the input's type.
    A closed ``nn.MultiheadAttention`` calls its attention out of sight and is left as it is.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            if len(args) > 4:
                args = (*args[:4], 0.0, *args[5:])
            kwargs = {name: value for name, value in kwargs.items() if name != "dropout_p"}
        if func is F.dropout and self._drops(*args, **kwargs):
            return torch.native_dropout(args[0] if args else kwargs["input"], 0.5, True)[0]
        if func in (F.rms_norm, torch.rms_norm):
            return self._rms_norm(*args, **kwargs)
        return func(*args, **kwargs)

    @staticmethod
    def _drops(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> bool:  # noqa: A002
        return training and not inplace and 0 < p < 1

    @staticmethod
    def _rms_norm(x: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: Any = None) -> Any:
        return _RMSNorm.apply(x, weight, len(normalized_shape))


class _RMSNorm(torch.autograd.Function):
    """The tensors of the fused kernel: it keeps its input and one float32 per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, axes: int) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[: x.dim() - axes], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), None if weight is None else torch.empty_like(weight), None
