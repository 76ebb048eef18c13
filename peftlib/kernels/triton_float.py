"""Products and roundings that the interpreter, too, does as a GPU does: it holds bfloat16 as bits."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, to, precision: tl.constexpr):
    """``to + a b``, in float32."""
    if INTERPRETED:
        # It would multiply the bits. Wider factors give the same products.
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, to, input_precision=precision)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """``x`` in another dtype, the nearest number there."""
    if INTERPRETED and dtype == tl.bfloat16:
        # It would cut bits off: half a step up first, or a little less where that makes ties even.
        bits = x.to(tl.uint32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(dtype)
