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
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from peftlib.kernels import reference
from peftlib.kernels.dropout import draw_seed, dropped, with_spare, zeroed

_PLAIN = (Tensor, nn.Parameter, FakeTensor)
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
        s_RN = F.linear(a, rows(_drop(x, p, worth) if p else x))
        rows(y).t().addmm_(b, s_RN, alpha=scaling)
        return y
    if not worth:
        return _composed(F.linear(x, weight, bias), x, a, b, scaling, p)
    return _LowRank.apply(x, a, b, weight, bias, None, scaling, p, draw_seed() if p else 0)


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
            return _LowRank.apply(x, a, b, None, None, y, scaling, p, draw_seed() if p else 0)
        if worth and p:
            return _composed(y, _drop(x, p, worth), a, b, scaling, 0.0)
    return _composed(y, x, a, b, scaling, p)


def pays(x: Tensor, a: Tensor) -> bool:
    """Whether the autograd function is worth its calls; the same with and without grad."""
    return a.requires_grad and x.numel() > FEW * x.shape[-1]


def _drop(x: Tensor, p: float, seeded: bool) -> Tensor:
    """Dropout as the call would do it with grad: a reentrant checkpoint runs it both ways and needs the same."""
    if not seeded:
        return F.dropout(x, p)
    return zeroed(x, dropped(draw_seed(), x.numel(), p, x.device)).mul_(1 / (1 - p))


def _composed(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float, p: float) -> Tensor:
    """``y`` plus the update in plain operators."""
    x = F.dropout(x, p) if p else x
    if a.dtype is x.dtype is y.dtype and autocast_dtype(x) is None:
        if torch.compiler.is_compiling() and y.shape[:-1] == x.shape[:-1]:
            # The layout of the autograd function: with Bᵀ contiguous, the backward that autograd derives has it too.
            s_RN = F.linear(a, rows(x))
            return torch.addmm(rows(y), s_RN.t(), b.t().contiguous(), alpha=scaling).view(y.shape)
        if x.dim() == y.dim() == 2:
            return torch.addmm(y, F.linear(x, a), b.t(), alpha=scaling)
    # A factor's dtype never becomes the model's.
    return y + reference.low_rank(x, a.to(x.dtype), b.to(x.dtype), scaling).to(y.dtype)


def fuses(x: Tensor, other: Tensor) -> bool:
    """Whether a custom function and in-place sums are right for these tensors, here and now."""
    return (
        type(x) in _PLAIN
        and type(other) in _PLAIN
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


def rows(x: Tensor) -> Tensor:
    """(..., C) as (N, C), of the same storage where its strides allow."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


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
        p: float,
        seed: int,
    ) -> Tensor:
        ctx.settings = scaling, p, seed
        x_NI = rows(x)
        s_RN = scaled(
            a, zeroed(x_NI, dropped(seed, x.numel(), p, x.device)) if p else x_NI, scaling / (1 - p)
        )
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
        scaling, p, seed = ctx.settings
        *needs, need_y, _, _, _ = ctx.needs_input_grad
        rest = dy if need_y else None, None, None, None
        positions = dropped(seed, x.numel(), p, x.device) if p else None
        if torch.is_grad_enabled():  # the saved S would count as a constant in what is differentiated again
            return *_differentiable(needs, dy, (x, a, b, weight, bias), scaling, positions, p), *rest
        need_x, need_a, need_b, need_weight, need_bias = needs
        dx = da = db = dweight = dbias = None
        x_NI, dy_NO = rows(x), rows(dy)
        if need_x or need_a:
            g_RN = scaled(b.t(), dy_NO, scaling / (1 - p))
            if need_a:
                da = g_RN @ (x_NI if positions is None else zeroed(x_NI, positions))
            if need_x:
                dx = _input_gradient(dy_NO, weight, g_RN, a, positions).view(x.shape)
        if need_b:
            db = (s_RN @ dy_NO).t()
        if need_weight:
            dweight = dy_NO.t() @ x_NI
        if need_bias:
            dbias = dy_NO.sum(0)
        return dx, da, db, dweight, dbias, *rest


def scaled(factor_RC: Tensor, rows_NC: Tensor, scaling: float) -> Tensor:
    """``s factor rowsᵀ``, (R, N)."""
    if scaling == 1:
        return F.linear(factor_RC, rows_NC)
    # beta=0: what the new memory holds is not read
    out_RN = rows_NC.new_empty(factor_RC.shape[0], rows_NC.shape[0])
    return out_RN.addmm_(factor_RC, rows_NC.t(), beta=0, alpha=scaling)


def _input_gradient(
    dy_NO: Tensor, weight: Tensor | None, g_RN: Tensor, a: Tensor, positions: Tensor | None
) -> Tensor:
    """``dY W + Gᵀ A``, without the second term at the dropped positions and without the first if W is None."""
    if positions is None:
        return g_RN.t() @ a if weight is None else (dy_NO @ weight).addmm_(g_RN.t(), a)
    flat, dx_NI = with_spare(dy_NO.shape[0], a.shape[1], like=a)
    if weight is None:
        torch.mm(g_RN.t(), a, out=dx_NI)
        flat.index_fill_(0, positions, 0)
    else:
        torch.mm(dy_NO, weight, out=dx_NI)
        kept = flat.index_select(0, positions)
        dx_NI.addmm_(g_RN.t(), a)
        flat.index_copy_(0, positions, kept)
    return dx_NI


def _differentiable(
    needs: Sequence[bool],
    dy: Tensor,
    inputs: Sequence[Tensor | None],
    scaling: float,
    positions: Tensor | None,
    p: float,
) -> list[Tensor | None]:
    """The gradients of (x, a, b, weight, bias) as a graph of their own, S computed anew from ``x`` and ``a``."""
    # New views: where x depends on a (a layer called twice), only what this very call contributes.
    x, a, b, weight, bias = (None if t is None else t.view_as(t) for t in inputs)
    assert x is not None
    assert a is not None
    assert b is not None
    y = reference.low_rank(reference.drop(x, positions, p), a, b, scaling)
    if weight is not None:
        y = y + F.linear(x, weight, bias)
    wanted = [t for t, need in zip((x, a, b, weight, bias), needs, strict=True) if need]
    grads = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))  # type: ignore[arg-type]
    return [next(grads) if need else None for need in needs]
