"""The Triton kernels as operators of torch, ``torch.ops.peftlib``: what autograd, the compiler and fake tensors see.

Blocks follow from shapes and dtypes alone, never from a timing, and sums have a fixed order: the same call on the same
GPU and versions gives the same bits. There is no autotuning for that reason.

This file is imported where a GPU asks for it (``gpu.operators``), and triton with it.

Shape legend: N rows, I in features, O out features, R rank; ``count`` linears of one ``x`` stand below each other in
the factors and in what has R rows. T in B T I: what each row of a batch has; U tunings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from torch.library import triton_op, wrap_triton

from peftlib.kernels.gpu import padded
from peftlib.kernels.triton_low_rank import (
    add_input_gradient_kernel,
    factor_gradient_kernel,
    rank_gradients_kernel,
    reduce_partial_kernel,
    shrink_kernel,
)
from peftlib.kernels.triton_routed import routed_expand_kernel, routed_outer_kernel, routed_shrink_kernel

PROGRAMS = 256
"""About two for each multiprocessor of a large GPU."""
LEVELS = 1 << 16

INTERPRETED = triton.knobs.runtime.interpret


def threshold(p: float) -> int:
    """16 random bits below it drop an element: p to the nearest of 65535 steps."""
    return min(max(round(p * LEVELS), 1), LEVELS - 1) if p else 0


def keep_probability(p: float) -> float:
    """The probability with which the kernels keep an element."""
    return 1 - threshold(p) / LEVELS


def _operator(name: str, fake: Callable[..., Any], mutates: tuple[str, ...] = ()) -> Callable[..., Any]:
    """Register an operator; the compiler sees into it, unless its kernels are interpreted and cannot be traced."""
    define: Any = torch.library.custom_op if INTERPRETED else triton_op

    def decorate(function: Callable[..., Any]) -> Any:
        made = define(f"peftlib::{name}", function, mutates_args=mutates)
        made.register_fake(fake)
        return made

    return decorate


def _wide(dtype: torch.dtype) -> int:
    """Columns of a tile. Exact float32 products run without tensor cores, and larger ones would not fit registers."""
    return 32 if dtype is torch.float32 else 128


def _warps(dtype: torch.dtype) -> int:
    return 8 if dtype is torch.float32 else 4


def _precision(dtype: torch.dtype) -> str:
    """Of products: in float32 as exact as torch's own, TF32 only where that is allowed."""
    matmul = torch.backends.cuda.matmul
    # The older of the two switches raises where the newer one was used.
    new = getattr(matmul, "fp32_precision", None)
    allowed = matmul.allow_tf32 if new is None else new == "tf32"
    return "tf32" if allowed and dtype is torch.float32 else "ieee"


def _chunk(n: int, block: int, columns: int) -> int:
    """Rows of a chunk, in whole blocks, so that chunks x columns are about as many as ``PROGRAMS``."""
    return block * max(1, triton.cdiv(triton.cdiv(n, block) * columns, PROGRAMS))


# -- dropout: S, dA and dX -------------------------------------------------------------------------------------------


def _shrink_fake(x: Tensor, a: Tensor, seed: Tensor, scale: float, p: float, count: int) -> Tensor:
    return x.new_empty(a.shape[0], x.shape[0])


@_operator("shrink", _shrink_fake)
def shrink(x: Tensor, a: Tensor, seed: Tensor, scale: float, p: float, count: int) -> Tensor:
    """``S = scale A drop(x)ᵀ`` (count R, N) for ``x`` (N, I), ``a`` (count R, I), ``seed`` () int64."""
    (n, i), rank = x.shape, a.shape[0] // count
    if not n:
        return x.new_empty(a.shape[0], 0)
    a, s = a.contiguous(), x.new_empty(a.shape[0], n)
    block = 64 if n >= 64 * PROGRAMS // 2 else 32
    wrap_triton(shrink_kernel)[(triton.cdiv(n, block) * count,)](
        x, a, seed, s, scale, threshold(p), n, i, rank, x.stride(0), x.stride(1),
        RP=padded(rank), BN=block, BI=_wide(x.dtype), PRECISION=_precision(x.dtype), num_warps=_warps(x.dtype),
    )  # fmt: skip
    return s


def _factor_gradient_fake(x: Tensor, g: Tensor, seed: Tensor, p: float, count: int) -> Tensor:
    return x.new_empty(g.shape[0], x.shape[1])


@_operator("factor_gradient", _factor_gradient_fake)
def factor_gradient(x: Tensor, g: Tensor, seed: Tensor, p: float, count: int) -> Tensor:
    """``dA = G drop(x)`` (count R, I), the dropped elements zero, for ``x`` (N, I), ``g`` (count R, N)."""
    (n, i), rank = x.shape, g.shape[0] // count
    if not n:
        return x.new_zeros(g.shape[0], i)
    block, wide = 32, _wide(x.dtype)
    columns = triton.cdiv(i, wide) * count
    chunk = _chunk(n, block, columns)
    chunks = triton.cdiv(n, chunk)
    partial = x.new_empty(chunks, g.shape[0], i, dtype=torch.float32)
    wrap_triton(factor_gradient_kernel)[(chunks * columns,)](
        x, g.contiguous(), seed, partial, threshold(p), n, i, rank, count, chunk, x.stride(0), x.stride(1),
        RP=padded(rank), BN=block, BI=wide, PRECISION=_precision(x.dtype), num_warps=_warps(x.dtype),
    )  # fmt: skip
    return _reduced(partial, x.dtype)


def _add_input_gradient_fake(dx: Tensor, g: Tensor, a: Tensor, seed: Tensor, p: float, count: int) -> None:
    return None


@_operator("add_input_gradient", _add_input_gradient_fake, ("dx",))
def add_input_gradient(dx: Tensor, g: Tensor, a: Tensor, seed: Tensor, p: float, count: int) -> None:
    """``dX += Σ drop'(Gᵀ A)`` over the linears, in place, for ``dx`` (N, I), ``g`` (count R, N), ``a`` (count R, I)."""
    (n, i), rank = dx.shape, a.shape[0] // count
    if not dx.numel():
        return
    block, wide = 32, _wide(dx.dtype)
    wrap_triton(add_input_gradient_kernel)[(triton.cdiv(n, block) * triton.cdiv(i, wide),)](
        dx, g.contiguous(), a.contiguous(), seed, threshold(p), n, i, rank, count, dx.stride(0), dx.stride(1),
        RP=padded(rank), BN=block, BI=wide, PRECISION=_precision(dx.dtype), num_warps=_warps(dx.dtype),
    )  # fmt: skip


def _shrink_backward(ctx: Any, ds: Tensor) -> Any:
    x, a, seed = ctx.saved_tensors
    scale, p, count = ctx.settings
    need_x, need_a = ctx.needs_input_grad[:2]
    g = ds * scale
    da = factor_gradient(x, g, seed, p, count) if need_a else None
    dx = torch.zeros_like(x) if need_x else None
    if dx is not None:
        add_input_gradient(dx, g, a, seed, p, count)
    return dx, da, None, None, None, None


def _shrink_context(ctx: Any, inputs: Any, output: Tensor) -> None:
    x, a, seed, *ctx.settings = inputs
    ctx.save_for_backward(x, a, seed)


shrink.register_autograd(_shrink_backward, setup_context=_shrink_context)


# -- one pass over dY ------------------------------------------------------------------------------------------------


def _rank_gradients_fake(dy: Tensor, b: Tensor, s: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(s), torch.empty_like(b, memory_format=torch.contiguous_format)


@_operator("rank_gradients", _rank_gradients_fake)
def rank_gradients(dy: Tensor, b: Tensor, s: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """``G = scale Bᵀ dYᵀ`` (R, N) and ``dB = (S dY)ᵀ`` (O, R) for ``dy`` (N, O), ``b`` (O, R), ``s`` (R, N)."""
    (n, o), rank = dy.shape, b.shape[1]
    if not n:
        return torch.empty_like(s), torch.zeros_like(b, memory_format=torch.contiguous_format)
    block, wide = 32, 2 * _wide(dy.dtype)
    columns = triton.cdiv(o, wide)
    chunk = _chunk(n, block, columns)
    chunks = triton.cdiv(n, chunk)
    g_partial = dy.new_empty(columns, rank, n, dtype=torch.float32)
    db_partial = dy.new_empty(chunks, o, rank, dtype=torch.float32)
    wrap_triton(rank_gradients_kernel)[(chunks * columns,)](
        dy, b.contiguous(), s.contiguous(), g_partial, db_partial, scale, n, o, rank, chunk,
        dy.stride(0), dy.stride(1),
        RP=padded(rank), BN=block, BO=wide, PRECISION=_precision(dy.dtype), num_warps=8,
    )  # fmt: skip
    return _reduced(g_partial, dy.dtype), _reduced(db_partial, dy.dtype)


def _reduced(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over the first axis, in its order."""
    out = partial.new_empty(partial.shape[1:], dtype=dtype)
    size = out.numel()
    wrap_triton(reduce_partial_kernel)[(triton.cdiv(size, 512),)](
        partial, out, partial.shape[0], size, BM=512
    )
    return out


# -- routed batches --------------------------------------------------------------------------------------------------


def _routed_blocks(t: int, dtype: torch.dtype) -> dict[str, Any]:
    # A decoded token is alone in its row: no block of T is smaller than tl.dot takes.
    return {
        "BT": 16 if t <= 16 else 32,
        "BC": _wide(dtype),
        "PRECISION": _precision(dtype),
        "num_warps": _warps(dtype),
    }


def _routed_shrink_fake(x: Tensor, factor: Tensor, which: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:2], factor.shape[1])


@_operator("routed_shrink", _routed_shrink_fake)
def routed_shrink(x: Tensor, factor: Tensor, which: Tensor, scale: Tensor) -> Tensor:
    """``s_b = scale_u x_b factor_uᵀ`` (B, T, R), u = which[b], zeros where that is -1.

    For ``x`` (B, T, C), ``factor`` (U, R, C), ``which`` (B,) int32, ``scale`` (U,) float32.
    """
    (b, t, c), rank = x.shape, factor.shape[1]
    s = x.new_empty(b, t, rank)
    if s.numel():
        blocks = _routed_blocks(t, x.dtype)
        wrap_triton(routed_shrink_kernel)[(b * triton.cdiv(t, blocks["BT"]),)](
            x, factor, which, scale, s, t, c, rank, *x.stride(), *factor.stride(), RP=padded(rank), **blocks
        )
    return s


def _routed_expand_fake(y: Tensor | None, s: Tensor, factor: Tensor, which: Tensor) -> Tensor:
    return s.new_empty(*s.shape[:2], factor.shape[2])


@_operator("routed_expand", _routed_expand_fake)
def routed_expand(y: Tensor | None, s: Tensor, factor: Tensor, which: Tensor) -> Tensor:
    """``y_b + s_b factor_u`` (B, T, C), u = which[b]; ``y`` alone where that is -1; zeros for y where it is None.

    For ``y`` (B, T, C), ``s`` (B, T, R), ``factor`` (U, R, C), ``which`` (B,) int32.
    """
    (b, t, rank), c = s.shape, factor.shape[2]
    out = s.new_empty(b, t, c)
    if out.numel():
        blocks = _routed_blocks(t, s.dtype)
        grid = (b * triton.cdiv(t, blocks["BT"]) * triton.cdiv(c, blocks["BC"]),)
        strides = (0, 0, 0) if y is None else y.stride()
        wrap_triton(routed_expand_kernel)[grid](
            y, s.contiguous(), factor, which, out, t, c, rank, *strides, *factor.stride(),
            RP=padded(rank), **blocks,
        )  # fmt: skip
    return out


def _routed_outer_fake(s: Tensor, x: Tensor, which: Tensor, tunings: int) -> Tensor:
    return x.new_empty(tunings, s.shape[2], x.shape[2])


@_operator("routed_outer", _routed_outer_fake)
def routed_outer(s: Tensor, x: Tensor, which: Tensor, tunings: int) -> Tensor:
    """``Σ s_bᵀ x_b`` over the rows b of each tuning, (U, R, C), for ``s`` (B, T, R), ``x`` (B, T, C)."""
    (b, t, rank), c = s.shape, x.shape[2]
    out = x.new_empty(tunings, rank, c)
    if out.numel():
        blocks = _routed_blocks(t, x.dtype)
        wrap_triton(routed_outer_kernel)[(tunings * triton.cdiv(c, blocks["BC"]),)](
            s.contiguous(), x, which, out, b, t, c, rank, *x.stride(), RP=padded(rank), **blocks
        )
    return out
