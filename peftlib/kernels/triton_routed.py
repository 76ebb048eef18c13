"""Rows of a batch through the factors of different tunings, as Triton kernels: no factor is copied for a row.

Every kernel is told for each row which tuning's factors it takes, -1 for none. Each result has one program that adds it
up in a fixed order: no atomics, so that the same call gives the same bits.

Shape legend: B rows of a batch, T what each has, C and D features, R rank, RP padded as ``tl.dot`` wants it, U tunings.
"""

from __future__ import annotations

import triton
import triton.language as tl

from peftlib.kernels.triton_float import dot, rounded


@triton.jit
def routed_shrink_kernel(
    x, factor, which, scale, s, T, C, R, x_b, x_t, x_c, f_u, f_r, f_c,
    RP: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """s_BTR = scale_u x factor_uᵀ, zeros for rows of none. Programs: rows x blocks of T."""
    blocks = tl.cdiv(T, BT)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    t = (tl.program_id(0) % blocks) * BT + tl.arange(0, BT).to(tl.int64)
    r = tl.arange(0, RP).to(tl.int64)
    u = tl.load(which + row)
    sum_tr = tl.zeros((BT, RP), tl.float32)
    if u >= 0:
        for c0 in range(0, C, BC):
            c = c0 + tl.arange(0, BC).to(tl.int64)
            x_tc = tl.load(x + row * x_b + t[:, None] * x_t + c * x_c, (t < T)[:, None] & (c < C), 0)
            at = factor + u * f_u + r * f_r + c[:, None] * f_c
            f_cr = tl.load(at, (c < C)[:, None] & (r < R), 0)
            sum_tr = dot(x_tc, f_cr, sum_tr, PRECISION)
        sum_tr *= tl.load(scale + u)
    tl.store(
        s + (row * T + t)[:, None] * R + r, rounded(sum_tr, s.dtype.element_ty), (t < T)[:, None] & (r < R)
    )


@triton.jit
def routed_expand_kernel(
    y, s, factor, which, out, T, C, R, y_b, y_t, y_c, f_u, f_r, f_c,
    RP: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out_BTC = y + s factor_u, or without y if it is None. Programs: rows x blocks of T x of C."""
    blocks_c, blocks_t = tl.cdiv(C, BC), tl.cdiv(T, BT)
    c = (tl.program_id(0) % blocks_c) * BC + tl.arange(0, BC).to(tl.int64)
    t = (tl.program_id(0) // blocks_c % blocks_t) * BT + tl.arange(0, BT).to(tl.int64)
    row = (tl.program_id(0) // blocks_c // blocks_t).to(tl.int64)
    r = tl.arange(0, RP).to(tl.int64)
    u = tl.load(which + row)
    inside = (t < T)[:, None] & (c < C)
    sum_tc = tl.zeros((BT, BC), tl.float32)
    if y is not None:
        sum_tc += tl.load(y + row * y_b + t[:, None] * y_t + c * y_c, inside, 0)
    if u >= 0:
        s_tr = tl.load(s + (row * T + t)[:, None] * R + r, (t < T)[:, None] & (r < R), 0)
        f_rc = tl.load(factor + u * f_u + r[:, None] * f_r + c * f_c, (r < R)[:, None] & (c < C), 0)
        sum_tc = dot(s_tr, f_rc, sum_tc, PRECISION)
    tl.store(out + (row * T + t)[:, None] * C + c, rounded(sum_tc, out.dtype.element_ty), inside)


@triton.jit
def routed_outer_kernel(
    s, x, which, out, B, T, C, R, x_b, x_t, x_c,
    RP: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out_URC = the sum of sᵀ x over the rows of each tuning, in their order. Programs: tunings x blocks of C."""
    blocks = tl.cdiv(C, BC)
    u = (tl.program_id(0) // blocks).to(tl.int64)
    c = (tl.program_id(0) % blocks) * BC + tl.arange(0, BC).to(tl.int64)
    r = tl.arange(0, RP).to(tl.int64)
    sum_rc = tl.zeros((RP, BC), tl.float32)
    for row in range(B):
        at_row = tl.cast(row, tl.int64)
        if tl.load(which + row) == u:
            for t0 in range(0, T, BT):
                t = t0 + tl.arange(0, BT).to(tl.int64)
                s_tr = tl.load(s + (at_row * T + t)[:, None] * R + r, (t < T)[:, None] & (r < R), 0)
                at = x + at_row * x_b + t[:, None] * x_t + c * x_c
                x_tc = tl.load(at, (t < T)[:, None] & (c < C), 0)
                sum_rc = dot(tl.trans(s_tr), x_tc, sum_rc, PRECISION)
    tl.store(
        out + (u * R + r)[:, None] * C + c, rounded(sum_rc, out.dtype.element_ty), (r < R)[:, None] & (c < C)
    )
