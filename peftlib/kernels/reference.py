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


def philox(counter: tuple[Tensor, ...], key: tuple[int, int], rounds: int) -> tuple[Tensor, ...]:
    """Philox-4x32 (Salmon et al. 2011): four 32-bit words of each counter, int64 tensors of values below 2^32."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        (high0, low0), (high1, low1) = _multiplied(c0, 0xD2511F53), _multiplied(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


_WORD = 0xFFFFFFFF


def _multiplied(c: Tensor, by: int) -> tuple[Tensor, Tensor]:
    """The high and the low word of a product of words: by 16 bits at a time, since 64 would leave int64."""
    low, high = c * (by & 0xFFFF), c * (by >> 16)
    middle = (low >> 16) + (high & 0xFFFF)
    return (high >> 16) + (middle >> 16), ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def kept_by_counter(seed: Tensor, n: int, i: int, which: int, p: float) -> Tensor:
    """(n, i) bool: what the Triton kernels keep: 16 bits an element, eight elements a counter, seven rounds."""
    column = torch.arange(-(-i // 8), device=seed.device).expand(n, -1)
    row = torch.arange(n, device=seed.device)[:, None].expand_as(column)
    key = int(seed) & _WORD, int(seed) >> 32
    words = philox((column, row, torch.full_like(row, which), torch.zeros_like(row)), key, rounds=7)
    halves = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], -1)
    threshold = min(max(round(p * 65536), 1), 65535) if p else 0
    return halves.flatten(1)[:, :i] >= threshold


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


def routed(x_BTI: Tensor, a_URI: Tensor, b_URO: Tensor, which: Tensor, scale_U: Tensor) -> Tensor:
    """``s_u (x_b A_uᵀ) B_uᵀ`` (B, T, O) with u = which[b], zeros where that is -1; B is given as (U, R, O)."""
    zero = x_BTI.new_zeros(x_BTI.shape[1], b_URO.shape[2])
    return torch.stack(
        [
            zero if u < 0 else (x @ a_URI[u].mT @ b_URO[u]) * scale_U[u].to(x.dtype)
            for x, u in zip(x_BTI, which.tolist(), strict=True)
        ]
    )
