"""Rows of a batch through the factors of different tunings, ``y_b + s_u (x_b A_uᵀ) B_uᵀ`` with u = which[b].

The Triton kernels read each row's factors where they are; plain operators copy them for every row and multiply batches,
which their callers do (``LinearLoRA.routed``) where :func:`can_route` is false.

Shape legend: B rows of a batch, T what each of them has, I in features, O out features, R rank, U tunings.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from peftlib.kernels import gpu, reference
from peftlib.kernels.low_rank import autocast_dtype, fuses


def can_route(y: Tensor, x: Tensor, factors: Iterable[Tensor]) -> bool:
    """Whether :func:`add_routed` is right for an output, an input and each tuning's A, here and now."""
    if not gpu.takes(x) or not x.numel() or not fuses(x, y) or autocast_dtype(x) is not None:
        return False
    largest = max(factors, key=len)
    return gpu.ready(x, largest, len(largest))


def add_routed(
    y_BTO: Tensor, x_BTI: Tensor, a_URI: Tensor, b_URO: Tensor, which: Tensor, scale_U: Tensor
) -> Tensor:
    """``y_b + s_u (x_b A_uᵀ) B_uᵀ`` (B, T, O), a new tensor; ``y_b`` where ``which[b]`` is -1.

    Args:
        y_BTO: left as it is.
        x_BTI: left as it is, of y's dtype, as are the factors.
        a_URI: smaller ranks have zeros below.
        b_URO: the Bᵀ.
        which: (B,) int32, the tuning of each row, or -1.
        scale_U: (U,) float32, s of each tuning.
    """
    return _Routed.apply(y_BTO, x_BTI, a_URI, b_URO, which, scale_U)


class _Routed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, a_URI: Tensor, b_URO: Tensor, which: Tensor, scale_U: Tensor
    ) -> Tensor:
        ops = gpu.operators()
        with torch.cuda.device_of(x):
            s_BTR = ops.routed_shrink(x, a_URI, which, scale_U)
            out: Tensor = ops.routed_expand(y, s_BTR, b_URO, which)
        ctx.save_for_backward(x, a_URI, b_URO, which, scale_U, s_BTR)
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, a_URI, b_URO, which, scale_U, s_BTR = ctx.saved_tensors
        need_y, need_x, need_a, need_b, _, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():  # the saved S would count as a constant in what is differentiated again
            x, a_URI, b_URO = (t.view_as(t) for t in (x, a_URI, b_URO))
            wanted = [t for t in (x, a_URI, b_URO) if t.requires_grad]
            update = reference.routed(x, a_URI, b_URO, which, scale_U)
            grads = iter(torch.autograd.grad(update, wanted, dy, create_graph=True, materialize_grads=True))
            rest = [next(grads) if t.requires_grad else None for t in (x, a_URI, b_URO)]
            return dy if need_y else None, *rest, None, None
        ops = gpu.operators()
        dx: Tensor | None = None
        da: Tensor | None = None
        db: Tensor | None = None
        if need_x or need_a:
            g_BTR = ops.routed_shrink(dy, b_URO, which, scale_U)
            dx = ops.routed_expand(None, g_BTR, a_URI, which) if need_x else None
            da = ops.routed_outer(g_BTR, x, which, len(a_URI)) if need_a else None
        if need_b:
            db = ops.routed_outer(s_BTR, dy, which, len(a_URI))
        return dy if need_y else None, dx, da, db, None, None
