"""The low-rank update of a linear map, ``y = x Wᵀ + c + s (drop(x) Aᵀ) Bᵀ``, as one autograd function.

What it does that plain operators do not:

- it adds into the base's output and into dX in place, while nobody else can have seen them;
- it keeps the rank as the row axis, ``S = s A xᵀ`` and ``G = s Bᵀ dYᵀ`` (R, N), the layout matrix products like best;
- it keeps ``x`` and S for the backward, and no dropped copy of ``x`` and no mask.

Plain operators run where they do as well (no gradient, few rows, under the compiler) and where only they are right
(``torch.func``, forward-mode derivatives, nested tensors, tensor subclasses).

Shape legend: N rows (all leading axes), I in features, O out features, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from peftlib.kernels import gpu, reference
from peftlib.kernels.products import ByCounter, Whole, dropping, rank_gradients, rows

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FEW = 32
"""Rows up to which an autograd function costs more time than it saves."""


def low_rank_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float, p: float = 0.0
) -> Tensor:
    """``x Wᵀ + bias + s (drop(x) Aᵀ) Bᵀ``, a new tensor.

    Args:
        x: (..., I), left as it is.
        weight: (O, I).
        bias: (O,) or None.
        a: (R, I), any floating dtype: the computation is in that of ``x``, or in autocast's.
        b: (O, R).
        scaling: s.
        p: probability with which an element of ``x`` is dropped from the update; the kept ones are over 1 - p.

    Example:
        >>> x, weight, a, b = torch.ones(3, 4), torch.zeros(2, 4), torch.ones(1, 4), torch.ones(2, 1)
        >>> low_rank_linear(x, weight, None, a, b, scaling=0.5)[0]
        tensor([2., 2.])
    """
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if not fuses(x, weight):
        return _composed(F.linear(x, weight, bias), x, a, b, scaling, p)
    worth = pays(x, a)
    if a.dtype is not x.dtype:
        a, b = a.to(x.dtype), b.to(x.dtype)
    if not torch.is_grad_enabled():
        y = F.linear(x, weight, bias)
        if p and worth:  # as with grad: a reentrant checkpoint runs it both ways and needs the same
            rows(y).t().addmm_(b, dropping(p, x, a).shrink(rows(x), a, scaling))
        else:
            rows(y).t().addmm_(b, F.linear(a, rows(F.dropout(x, p) if p else x)), alpha=scaling)
        return y
    if not worth:
        return _composed(F.linear(x, weight, bias), x, a, b, scaling, p)
    return _LowRank.apply(x, a, b, weight, bias, None, scaling, dropping(p, x, a))


def add_low_rank(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float, p: float = 0.0) -> Tensor:
    """``y + s (drop(x) Aᵀ) Bᵀ`` in y's dtype, a new tensor: for a ``y`` that others may hold.

    Args:
        y: (..., O), left as it is.
        x: (..., I), left as it is.
        a: (R, I), any floating dtype: the computation is in that of ``x``.
        b: (O, R).
        scaling: s.
        p: probability with which an element of ``x`` is dropped.

    Example:
        >>> x, y, a, b = torch.ones(3, 4), torch.ones(3, 2), torch.ones(1, 4), torch.ones(2, 1)
        >>> add_low_rank(y, x, a, b, scaling=0.5)[0]
        tensor([3., 3.])
    """
    if fuses(x, y) and y.shape[:-1] == x.shape[:-1] and autocast_dtype(x) is None:
        worth = pays(x, a)
        if a.dtype is not x.dtype:
            a, b = a.to(x.dtype), b.to(x.dtype)
        if worth and torch.is_grad_enabled():
            return _LowRank.apply(x, a, b, None, None, y, scaling, dropping(p, x, a))
        if worth and p:
            s_RN = dropping(p, x, a).shrink(rows(x), a, scaling)
            return torch.addmm(rows(y), s_RN.t(), b.t()).view(y.shape)
    return _composed(y, x, a, b, scaling, p)


def pays(x: Tensor, a: Tensor) -> bool:
    """Whether the autograd function is worth its calls; the same with and without grad."""
    return a.requires_grad and x.numel() > FEW * x.shape[-1]


def _composed(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float, p: float) -> Tensor:
    """``y`` plus the update in operators that anything can look into: autograd, a compiler, a transform."""
    if a.dtype is x.dtype is y.dtype and autocast_dtype(x) is None:
        if torch.compiler.is_compiling() and y.shape[:-1] == x.shape[:-1]:
            if p and gpu.ready(x, a, len(a)):
                s_RN = ByCounter(p, x).shrink(rows(x), a, 1.0)
            else:
                s_RN = F.linear(a, rows(F.dropout(x, p) if p else x))
            # The layout of the autograd function: with Bᵀ contiguous, the backward that autograd derives has it too.
            return torch.addmm(rows(y), s_RN.t(), b.t().contiguous(), alpha=scaling).view(y.shape)
        x = F.dropout(x, p) if p else x
        if x.dim() == y.dim() == 2:
            return torch.addmm(y, F.linear(x, a), b.t(), alpha=scaling)
    else:
        x = F.dropout(x, p) if p else x
    # A factor's dtype never becomes the model's.
    return y + reference.low_rank(x, a.to(x.dtype), b.to(x.dtype), scaling).to(y.dtype)


def fuses(x: Tensor, other: Tensor) -> bool:
    """Whether a custom function and in-place sums are right for these tensors, here and now."""
    return (
        type(x) in gpu.PLAIN
        and type(other) in gpu.PLAIN
        and x.dtype in _FLOATS
        and x.dtype is other.dtype
        and x.layout is torch.strided
        and not x.is_nested
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and not torch.jit.is_tracing()  # type: ignore[attr-defined]
    )


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype in which autocast would multiply ``x``, or ``None``."""
    kind = "cpu" if x.is_cpu else x.device.type
    if not torch.is_autocast_enabled(kind) or x.dtype is torch.float64:
        return None
    return torch.get_autocast_dtype(kind)


class _LowRank(torch.autograd.Function):
    """With ``weight`` the whole linear map; without it, what is added to ``y``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        y: Tensor | None,
        scaling: float,
        drop: Whole,
    ) -> Tensor:
        ctx.scaling, ctx.drop = scaling, drop
        s_RN = drop.shrink(rows(x), a, scaling)
        if y is None:
            assert weight is not None
            out = F.linear(x, weight, bias)
            # In this orientation no factor has to be copied into another layout first.
            rows(out).t().addmm_(b, s_RN)
        else:
            out = torch.addmm(rows(y), s_RN.t(), b.t()).view(y.shape)
        ctx.save_for_backward(x, a, b, weight, bias, s_RN if ctx.needs_input_grad[2] else None)
        # Autograd would not let the caller change a view in place.
        return torch.ops.aten._unsafe_view(out, out.shape) if out._is_view() else out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        kind = dy.device.type
        if torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                return _LowRank.backward(ctx, dy)
        x, a, b, weight, bias, s_RN = ctx.saved_tensors
        *needs, need_y, _, _ = ctx.needs_input_grad
        rest = dy if need_y else None, None, None
        if torch.is_grad_enabled():  # the saved S would count as a constant in what is differentiated again
            return *_differentiable(needs, dy, (x, a, b, weight, bias), ctx.scaling, ctx.drop), *rest
        need_x, need_a, need_b, need_weight, need_bias = needs
        x_NI, dy_NO = rows(x), rows(dy)
        scale = ctx.scaling / ctx.drop.kept
        dx, da = None, None
        g_RN, db = rank_gradients(dy_NO, b, s_RN, scale, need_x or need_a, need_b)
        if g_RN is not None:
            dx, da = ctx.drop.gradients(x_NI, a, g_RN, dy_NO, weight, need_x, need_a)
        dweight = dy_NO.t() @ x_NI if need_weight else None
        dbias = dy_NO.sum(0) if need_bias else None
        return None if dx is None else dx.view(x.shape), da, db, dweight, dbias, *rest


def _differentiable(
    needs: Sequence[bool],
    dy: Tensor,
    inputs: Sequence[Tensor | None],
    scaling: float,
    drop: Whole,
) -> list[Tensor | None]:
    """The gradients of (x, a, b, weight, bias) as a graph of their own, S computed anew from ``x`` and ``a``."""
    # New views: where x depends on a (a layer called twice), only what this very call contributes.
    x, a, b, weight, bias = (None if t is None else t.view_as(t) for t in inputs)
    assert x is not None
    assert a is not None
    assert b is not None
    y = reference.low_rank(drop.naive(x), a, b, scaling)
    if weight is not None:
        y = y + F.linear(x, weight, bias)
    wanted = [t for t, need in zip((x, a, b, weight, bias), needs, strict=True) if need]
    grads = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))  # type: ignore[arg-type]
    return [next(grads) if need else None for need in needs]
