"""The thin products of a low-rank update as Triton kernels: each reads its large tensor once.

Sums over many blocks go into float32 partial results, one for each block, which ``reduce_partial`` then adds up in the
order of their numbers: no atomics, so that the same call gives the same bits.

A tile's offsets are int64 throughout (N IN may pass 2^31). Products accumulate in float32.

Shape legend: N rows, IN and OUT features, R rank, RP rank padded to a power of two from 16 on (what
``tl.dot`` takes); K partial results; ``which`` counts linears of one ``x``, whose factors stand below each other.
"""

from __future__ import annotations

import triton
import triton.language as tl

from peftlib.kernels.triton_dropout import kept
from peftlib.kernels.triton_float import dot, rounded


@triton.jit
def shrink_kernel(
    x, a, seed, s, scale, threshold, N, IN, R, x_n, x_i,
    RP: tl.constexpr, BN: tl.constexpr, BI: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """s_RN = scale a drop(x)ᵀ. Programs: blocks of rows x linears."""
    blocks = tl.cdiv(N, BN)
    which = tl.program_id(0) // blocks
    n = (tl.program_id(0) % blocks).to(tl.int64) * BN + tl.arange(0, BN)
    r = tl.arange(0, RP)
    drawn = tl.load(seed)
    sum_rn = tl.zeros((RP, BN), tl.float32)
    for i0 in range(0, IN, BI):
        i = i0 + tl.arange(0, BI).to(tl.int64)
        x_ni = tl.load(x + n[:, None] * x_n + i * x_i, (n < N)[:, None] & (i < IN), 0)
        x_ni = tl.where(kept(drawn, n, i0, which, threshold, BI), x_ni, 0).to(x_ni.dtype)
        a_ri = tl.load(a + (which * R + r).to(tl.int64)[:, None] * IN + i, (r < R)[:, None] & (i < IN), 0)
        sum_rn = dot(a_ri, tl.trans(x_ni), sum_rn, PRECISION)
    at = s + (which * R + r).to(tl.int64)[:, None] * N + n
    tl.store(at, rounded(sum_rn * scale, s.dtype.element_ty), (r < R)[:, None] & (n < N))


@triton.jit
def rank_gradients_kernel(
    dy, b, s, g_partial, db_partial, scale, N, OUT, R, chunk, dy_n, dy_o,
    RP: tl.constexpr, BN: tl.constexpr, BO: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """g_RN = scale bᵀ dyᵀ and db_OR = (s dy)ᵀ, in parts. Programs: chunks of rows x blocks of out features."""
    blocks = tl.cdiv(OUT, BO)
    k, j = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    o = j.to(tl.int64) * BO + tl.arange(0, BO)
    r = tl.arange(0, RP).to(tl.int64)
    b_or = tl.load(b + o[:, None] * R + r, (o < OUT)[:, None] & (r < R), 0)
    sum_or = tl.zeros((BO, RP), tl.float32)
    for n0 in range(0, chunk, BN):
        n = k.to(tl.int64) * chunk + n0 + tl.arange(0, BN)
        dy_no = tl.load(dy + n[:, None] * dy_n + o * dy_o, (n < N)[:, None] & (o < OUT), 0)
        s_rn = tl.load(s + r[:, None] * N + n, (r < R)[:, None] & (n < N), 0)
        g_nr = dot(dy_no, b_or, tl.zeros((BN, RP), tl.float32), PRECISION) * scale
        at = g_partial + (j * R + r).to(tl.int64)[None, :] * N + n[:, None]
        tl.store(at, g_nr, (n < N)[:, None] & (r < R))
        sum_or = dot(tl.trans(dy_no), tl.trans(s_rn), sum_or, PRECISION)
    tl.store(db_partial + (k.to(tl.int64) * OUT + o)[:, None] * R + r, sum_or, (o < OUT)[:, None] & (r < R))


@triton.jit
def factor_gradient_kernel(
    x, g, seed, da_partial, threshold, N, IN, R, count, chunk, x_n, x_i,
    RP: tl.constexpr, BN: tl.constexpr, BI: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """da_RI = g drop(x), in parts. Programs: chunks of rows x linears x blocks of in features."""
    blocks = tl.cdiv(IN, BI)
    j, k = tl.program_id(0) % blocks, tl.program_id(0) // blocks // count
    which = tl.program_id(0) // blocks % count
    i = j.to(tl.int64) * BI + tl.arange(0, BI)
    r = tl.arange(0, RP)
    drawn = tl.load(seed)
    sum_ri = tl.zeros((RP, BI), tl.float32)
    for n0 in range(0, chunk, BN):
        n = k.to(tl.int64) * chunk + n0 + tl.arange(0, BN)
        x_ni = tl.load(x + n[:, None] * x_n + i * x_i, (n < N)[:, None] & (i < IN), 0)
        x_ni = tl.where(kept(drawn, n, j * BI, which, threshold, BI), x_ni, 0).to(x_ni.dtype)
        g_rn = tl.load(g + (which * R + r).to(tl.int64)[:, None] * N + n, (r < R)[:, None] & (n < N), 0)
        sum_ri = dot(g_rn, x_ni, sum_ri, PRECISION)
    at = da_partial + ((k.to(tl.int64) * count + which) * R + r)[:, None] * IN + i
    tl.store(at, sum_ri, (r < R)[:, None] & (i < IN))


@triton.jit
def add_input_gradient_kernel(
    dx, g, a, seed, threshold, N, IN, R, count, dx_n, dx_i,
    RP: tl.constexpr, BN: tl.constexpr, BI: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds to dx the sum over linears of drop'(gᵀ a), rounded once. Programs: blocks of rows x of in features."""
    blocks = tl.cdiv(IN, BI)
    j = tl.program_id(0) % blocks
    n = (tl.program_id(0) // blocks).to(tl.int64) * BN + tl.arange(0, BN)
    i = j.to(tl.int64) * BI + tl.arange(0, BI)
    r = tl.arange(0, RP)
    drawn = tl.load(seed)
    inside = (n < N)[:, None] & (i < IN)
    at = dx + n[:, None] * dx_n + i * dx_i
    sum_ni = tl.load(at, inside, 0).to(tl.float32)
    for which in range(count):
        row = (which * R + r).to(tl.int64)
        g_rn = tl.load(g + row[:, None] * N + n, (r < R)[:, None] & (n < N), 0)
        a_ri = tl.load(a + row[:, None] * IN + i, (r < R)[:, None] & (i < IN), 0)
        part = dot(tl.trans(g_rn), a_ri, tl.zeros((BN, BI), tl.float32), PRECISION)
        sum_ni += tl.where(kept(drawn, n, j * BI, which, threshold, BI), part, 0)
    tl.store(at, rounded(sum_ni, dx.dtype.element_ty), inside)


@triton.jit
def reduce_partial_kernel(partial, out, K, M, BM: tl.constexpr):
    """out_M = the sum of partial_KM over K, in the order of K. Programs: blocks of M."""
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    total = tl.zeros((BM,), tl.float32)
    for k in range(K):
        total += tl.load(partial + tl.cast(k, tl.int64) * M + m, m < M, 0)
    tl.store(out + m, rounded(total, out.dtype.element_ty), m < M)
