"""Causal attention over a prefix that all queries see and real keys that they see up to their own.

One softmax over both, ``softmax([q Kₚᵀ, causal(q Kᵀ)] · scale) [Vₚ; V]``, as two calls of torch's flash kernel whose
results are weighted by their log-sum-exps. In contrast to one call there is no mask of T×(P + T), which would keep the
kernel from skipping what causality hides, and no copy of K and V behind the prefix; a prefix of stride 0 along the
batch is read where it lies. With the log-sum-exp of both together, the kernel's own backward gives each part's exact
gradients.

Left out on purpose: CUDA, where a causal bias of torch's keeps flash kernels eligible; masks and dropout, which the
kernel does not take together with causality.

Shape legend: B batch, H heads, T queries and keys, P prefix positions, E head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftlib.kernels import reference
from peftlib.kernels.low_rank import autocast_dtype, fuses

LONG = 512
"""Keys from which two calls cost less time than one with a mask, in float32 and in bfloat16 (one thread, AVX-512)."""
_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def can_split(query: Tensor, key: Tensor, value: Tensor, prefix: tuple[Tensor, Tensor]) -> bool:
    """Whether :func:`causal_prefix` is right for these tensors, here and now, and worth it."""
    shape = query.shape
    return (
        query.is_cpu
        and len(shape) == 4
        and shape[2] >= max(LONG, 1)
        and key.shape == shape == value.shape
        and all(t.shape[:2] == shape[:2] and t.shape[3] == shape[3] and t.shape[2] for t in prefix)
        and all(fuses(query, t) for t in (key, value, *prefix))
        and autocast_dtype(query) in (None, query.dtype)
        # What torch asks before it takes the kernel; torch._fused_sdp_choice would not answer for fake tensors.
        and torch._C._get_flash_sdp_enabled()
        and all(t.stride(-1) == 1 for t in (query, key, value, *prefix))
    )


def causal_prefix(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix: tuple[Tensor, Tensor],
    scale: float | None = None,
) -> Tensor:
    """``softmax([q Kₚᵀ, causal(q Kᵀ)] · scale) [Vₚ; V]`` where :func:`can_split` holds.

    Args:
        query: (B, H, T, E).
        key: (B, H, T, E).
        value: (B, H, T, E).
        prefix: Kₚ and Vₚ, (B, H, P, E), of stride 0 along B where all rows have the same.
        scale: ``None`` is E^-1/2.
    """
    return _CausalPrefix.apply(query, key, value, *prefix, scale)


class _CausalPrefix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, own_key: Tensor, own_value: Tensor, scale: Any
    ) -> Tensor:
        out, real_BHT = _FLASH(query, key, value, 0.0, True, scale=scale)
        aside, own_BHT = _FLASH(query, own_key, own_value, 0.0, False, scale=scale)
        out.lerp_(aside, torch.sigmoid(own_BHT - real_BHT).unsqueeze(-1).to(out.dtype))
        total_BHT = torch.logaddexp(real_BHT, own_BHT)
        ctx.save_for_backward(query, key, value, own_key, own_value, out, total_BHT)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        query, key, value, own_key, own_value, out, total_BHT = ctx.saved_tensors
        if torch.is_grad_enabled():  # torch's kernel has no second derivative
            tensors = [t.view_as(t) for t in (query, key, value, own_key, own_value)]
            twin = reference.causal_prefix(*tensors, scale=ctx.scale)
            needs = ctx.needs_input_grad
            wanted = [t for t, need in zip(tensors, needs, strict=False) if need]
            grads = iter(torch.autograd.grad(twin, wanted, dout, create_graph=True))
            return *(next(grads) if need else None for need in needs[:5]), None
        result, scale = (out, total_BHT, 0.0), ctx.scale
        dquery, dkey, dvalue = _FLASH_BACKWARD(dout, query, key, value, *result, True, scale=scale)
        aside, *down = _FLASH_BACKWARD(dout, query, own_key, own_value, *result, False, scale=scale)
        return dquery.add_(aside), dkey, dvalue, *down, None
