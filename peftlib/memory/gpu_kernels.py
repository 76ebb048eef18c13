"""A GPU's kernels on CPU tensors: what they keep, and in which types.

Left out on purpose: autocast's rarer differences (padding by reflection, 3-d pools and FFTs are float32 on a CPU only,
a matrix times a vector on a GPU not), and what cuDNN's recurrent layers keep.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

HALVES = (torch.bfloat16, torch.float16)
FLOAT_ON_CUDA = """
    acos asin cosh erfinv exp expm1 log log10 log1p log2 reciprocal rsqrt sinh tan pow softplus logsumexp
    layer_norm native_layer_norm rms_norm group_norm norm frobenius_norm nuclear_norm cosine_similarity dist pdist
    renorm upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d
    upsample_bicubic2d upsample_trilinear3d _upsample_bilinear2d_aa _upsample_bicubic2d_aa
    _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d
""".split()  # noqa: SIM905
"""What CUDA's autocast computes in float32 and a CPU's leaves alone."""
FLOAT_RESULT_ON_CUDA = (
    "prod", "softmax", "log_softmax", "cumprod", "cumsum", "linalg_vector_norm", "linalg_matrix_norm", "sum",
)  # fmt: skip
"""The same, by asking for a float32 result."""
WIDEST_ON_CUDA = (
    "addcdiv", "addcmul", "atan2", "bilinear", "cross", "dot", "vdot", "grid_sampler", "index_put", "tensordot",
    "scatter_add",
)  # fmt: skip
"""What CUDA's autocast computes in the widest type that it is given."""
CHECKS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")


class GPUKernels(TorchFunctionMode):
    """Takes a GPU's kernels where a CPU has others.

    Attention with dropout is fused, and so is the RMS norm; dropout keeps a mask of one byte, not of the input's type;
    autocast follows CUDA's lists (torch 2.13: ATen/autocast_mode.h).
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (body := _body(func)) is not None:
            with self:  # what it calls comes by here again
                return body(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if torch.is_autocast_enabled("cpu"):
            args, kwargs = _cast(name, args, kwargs)
        if name == "scaled_dot_product_attention":
            if len(args) > 4:
                args = (*args[:4], 0.0, *args[5:])
            kwargs = {name: value for name, value in kwargs.items() if name != "dropout_p"}
        if name == "dropout" and _drops(*args, **kwargs):
            return torch.native_dropout(args[0] if args else kwargs["input"], 0.5, True)[0]
        if name == "rms_norm":
            return _rms_norm(*args, **kwargs)
        return func(*args, **kwargs)


@functools.cache
def _body(func: Any) -> Callable[..., Any] | None:
    """What a function of torch's that is written in Python does, without its first question: does a mode take it?"""
    if not isinstance(func, FunctionType) or not func.__module__.startswith("torch."):
        return None
    code = func.__code__
    # a method that calls its super's, which torch gives the same name, would come back here for ever
    if not set(CHECKS) & set(code.co_names) or "__class__" in code.co_freevars:
        return None
    unasked = {**func.__globals__, **dict.fromkeys(CHECKS, lambda *_: False)}
    body = FunctionType(code, unasked, func.__name__, func.__defaults__, func.__closure__)
    body.__kwdefaults__ = func.__kwdefaults__
    return body


def _cast(name: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
    floats = {
        t.dtype for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.is_floating_point()
    }
    if name in FLOAT_ON_CUDA or (name in WIDEST_ON_CUDA and torch.float32 in floats):
        args, kwargs = pytree.tree_map_only(
            Tensor, lambda t: t.float() if t.dtype in HALVES else t, (args, kwargs)
        )
    elif name in FLOAT_RESULT_ON_CUDA and floats & set(HALVES):
        if not any(isinstance(value, torch.dtype) for value in (*args, *kwargs.values())):
            kwargs = {**kwargs, "dtype": torch.float32}
    return args, kwargs


def _drops(input: Tensor, p: float = 0.5, train: bool = True) -> bool:  # noqa: A002
    return train and 0 < p < 1


def _rms_norm(input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: Any = None) -> Any:  # noqa: A002
    return _RMSNorm.apply(input, weight, len(normalized_shape))


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
