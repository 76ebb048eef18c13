"""What stands in for real tensors, for the values in them, and for a GPU's attention."""

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


class Hint(TorchDispatchMode):
    """Answers for fake tensors that are asked for their value, as ``if mask.any():`` does.

    Args:
        answer: what they say, or a function of the tensor; None lets the question fail.
    """

    def __init__(self, answer: Value | Callable[[Tensor], Value] | None):
        super().__init__()
        self._answer = answer

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        try:
            return func(*args, **(kwargs or {}))
        except DataDependentOutputException:
            if self._answer is None or func is not torch.ops.aten._local_scalar_dense.default:
                raise
            return self._answer(args[0]) if callable(self._answer) else self._answer


class FusedAttention(TorchFunctionMode):
    """Takes a GPU's choice of attention: with dropout it is fused too, where a CPU would write the scores down.

    A closed ``nn.MultiheadAttention`` calls its attention out of sight and is left as it is.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            if len(args) > 4:
                args = (*args[:4], 0.0, *args[5:])
            kwargs = {name: value for name, value in kwargs.items() if name != "dropout_p"}
        return func(*args, **kwargs)
