"""The naive twins: what each kernel computes, in plain differentiable operators, and nothing about speed.

They are what the tests compare with, and what runs where a kernel cannot: inside ``torch.func`` transforms, under
the compiler, in a backward that is itself differentiated.

Shape legend: N rows (all leading axes), I in features, O out features, R rank; B batch, H heads, T queries and keys,
P prefix positions, E head width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def drop(x: Tensor, dropped: Tensor | None, p: float) -> Tensor:
    """``x`` with the elements at the flat positions ``dropped`` at zero and the others over ``1 - p``.

    Positions past the last element stand for none; ``None`` drops nothing.
    """
    if dropped is None:
        return x
    keep = torch.ones(x.numel() + 1, dtype=x.dtype, device=x.device)
    keep[dropped] = 0
    return x * keep[:-1].view(x.shape) / (1 - p)


def low_rank(x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """``s (x Aᵀ) Bᵀ`` for ``x`` (..., I), ``a`` (R, I), ``b`` (O, R)."""
    return F.linear(F.linear(x, a), b) * scaling


def low_rank_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scaling: float,
    dropped: Tensor | None = None,
    p: float = 0.0,
) -> Tensor:
    """``x Wᵀ + bias + s (drop(x) Aᵀ) Bᵀ`` for ``x`` (..., I), ``weight`` (O, I), ``a`` (R, I), ``b`` (O, R)."""
    return F.linear(x, weight, bias) + low_rank(drop(x, dropped, p), a, b, scaling)


def causal_prefix(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    own_key: Tensor,
    own_value: Tensor,
    *,
    scale: float | None = None,
) -> Tensor:
    """``softmax([q Kₚᵀ, causal(q Kᵀ)] · scale) [Vₚ; V]`` for (B, H, T, E) and a prefix (B, H, P, E)."""
    query = query * (query.shape[-1] ** -0.5 if scale is None else scale)
    hidden = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).triu(1)
    real = (query @ key.mT).masked_fill(hidden, -math.inf)
    weights = torch.cat([query @ own_key.mT, real], -1).softmax(-1)
    return weights @ torch.cat([own_value, value], -2)


def add_low_rank(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scaling: float,
    dropped: Tensor | None = None,
    p: float = 0.0,
) -> Tensor:
    """``y + s (drop(x) Aᵀ) Bᵀ`` for ``y`` (..., O), ``x`` (..., I), ``a`` (R, I), ``b`` (O, R)."""
    return y + low_rank(drop(x, dropped, p), a, b, scaling)
