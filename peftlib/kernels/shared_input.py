"""Several low-rank linears of one input as one autograd function: q, k and v; gate and up.

``y_i = x W_iᵀ + c_i + s (x A_iᵀ) B_iᵀ``. One product with all the A in it, one saved ``x``, and one dX into which every
part is added in place, where plain operators (and separate functions) make a dX each and sum them.

Each linear drops elements of its own. Only the Triton kernels do that in one go; elsewhere linears with dropout go one
by one, and so do trained weights and what runs under autocast.

Shape legend: N rows, I in features, O out features, R the ranks of all together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from peftlib.kernels import gpu, reference
from peftlib.kernels.low_rank import autocast_dtype, fuses, pays
from peftlib.kernels.products import ByCounter, Whole, in_one_pass, rank_gradients, rows


class LowRankLinear(NamedTuple):
    """``weight`` (O, I), ``bias`` (O,) or None, ``a`` (R, I), ``b`` (O, R)."""

    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor


def can_share(x: Tensor, linears: Sequence[LowRankLinear], p: float = 0.0) -> bool:
    """Whether :func:`low_rank_linears` is right for these tensors, here and now, and worth it."""
    if not torch.is_grad_enabled() or autocast_dtype(x) is not None:
        return False
    first = linears[0].a
    if p and not (gpu.ready(x, first, len(first)) and all(len(one.a) == len(first) for one in linears)):
        return False
    return all(
        fuses(x, one.weight)
        and pays(x, one.a)
        and one.a.dtype is one.b.dtype is x.dtype
        and not one.weight.requires_grad
        and not (one.bias is not None and one.bias.requires_grad)
        for one in linears
    )


def low_rank_linears(
    x: Tensor, linears: Sequence[LowRankLinear], scaling: float, p: float = 0.0
) -> tuple[Tensor, ...]:
    """``x W_iᵀ + c_i + s (drop_i(x) A_iᵀ) B_iᵀ`` for each linear, where :func:`can_share` holds.

    Args:
        x: (..., I), left as it is.
        linears: what differs between them.
        scaling: s.
        p: probability with which an element of ``x`` is dropped from an update, for each linear by itself.

    Example:
        >>> x, weight, a, b = torch.ones(3, 4), torch.zeros(2, 4), torch.ones(1, 4), torch.ones(2, 1)
        >>> one, two = low_rank_linears(x, [LowRankLinear(weight, None, a, b)] * 2, scaling=0.5)
        >>> two[0]
        tensor([2., 2.])
    """
    drop = ByCounter(p, x, len(linears)) if p else Whole()
    # One step to whoever watches torch's functions: a weight that it reads is not read outside its module.
    with torch._C.DisableTorchFunction():
        return _LowRankLinears.apply(x, scaling, drop, *(t for one in linears for t in one))


def _parts(flat: Sequence[Any]) -> list[LowRankLinear]:
    return [LowRankLinear(*flat[i : i + 4]) for i in range(0, len(flat), 4)]


class _LowRankLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scaling: float, drop: Whole, *flat: Any) -> tuple[Tensor, ...]:
        linears = _parts(flat)
        s_RN = drop.shrink(rows(x), torch.cat([one.a for one in linears]), scaling)
        outs = []
        for one, s in zip(linears, s_RN.split([len(one.a) for one in linears]), strict=True):
            out = F.linear(x, one.weight, one.bias)
            rows(out).t().addmm_(one.b, s)
            outs.append(torch.ops.aten._unsafe_view(out, out.shape) if out._is_view() else out)
        ctx.save_for_backward(x, s_RN, *flat)
        ctx.scaling, ctx.drop = scaling, drop
        ctx.set_materialize_grads(False)
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> Any:
        x, s_RN, *flat = ctx.saved_tensors
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                return _LowRankLinears.backward(ctx, *dys)
        linears, scale = _parts(flat), ctx.scaling / ctx.drop.kept
        need_x, _, _, *needs = ctx.needs_input_grad
        if torch.is_grad_enabled():  # the saved S would count as a constant in what is differentiated again
            dx, *rest = _differentiable([need_x, *needs], dys, x, linears, ctx.scaling, ctx.drop)
            return dx, None, None, *rest
        sizes = [len(one.a) for one in linears]
        x_NI, a_RI = rows(x), torch.cat([one.a for one in linears])
        g_RN = x_NI.new_zeros(s_RN.shape)
        dx_NI: Any = None
        grads: list[Tensor | None] = []
        for one, s, g, dy in zip(linears, s_RN.split(sizes), g_RN.split(sizes), dys, strict=True):
            grads += [None] * 4
            if dy is None:  # nobody used it: no gradient, not one of zeros
                continue
            dy_NO = rows(dy)
            if in_one_pass(dy_NO, one.b):
                given, grads[-1] = rank_gradients(dy_NO, one.b, s, scale, True, True)
                assert given is not None
                g.copy_(given)
            else:
                g.addmm_(one.b.t(), dy_NO.t(), beta=0, alpha=scale)
                grads[-1] = (s @ dy_NO).t()
            if need_x:
                dx_NI = dy_NO @ one.weight if dx_NI is None else dx_NI.addmm_(dy_NO, one.weight)
        for i, (da, dy) in enumerate(
            zip(ctx.drop.factor_gradient(x_NI, g_RN).split(sizes), dys, strict=True)
        ):
            grads[4 * i + 2] = None if dy is None else da
        if dx_NI is not None:
            dx_NI = ctx.drop.input_gradient(dx_NI, g_RN, a_RI).view(x.shape)
        return dx_NI, None, None, *(grad if need else None for grad, need in zip(grads, needs, strict=True))


def _differentiable(
    needs: Sequence[bool],
    dys: Sequence[Tensor | None],
    x: Tensor,
    linears: Sequence[LowRankLinear],
    scaling: float,
    drop: Whole,
) -> list[Tensor | None]:
    """The gradients of ``x`` and of each linear's tensors as a graph of their own."""
    # New views: where x depends on a factor, only what this very call contributes.
    flat = [t if t is None else t.view_as(t) for t in (x, *(t for one in linears for t in one))]
    view = flat[0]
    assert view is not None
    ys = [
        F.linear(view, one.weight, one.bias) + reference.low_rank(drop.naive(view, i), one.a, one.b, scaling)
        for i, one in enumerate(_parts(flat[1:]))
    ]
    given = [(y, dy) for y, dy in zip(ys, dys, strict=True) if dy is not None]
    wanted = [t for t, need in zip(flat, needs, strict=True) if need]
    grads = iter(
        torch.autograd.grad(
            [y for y, _ in given],
            wanted,  # type: ignore[arg-type]
            [dy for _, dy in given],
            create_graph=True,
            allow_unused=True,
        )
    )
    return [next(grads) if need else None for need in needs]
