"""Which elements a GPU's dropout drops, drawn from a seed and an element's place: no mask, no positions.

One call of Philox-4x32 gives 128 random bits, here to eight neighbours in a row of ``x``, 16 each: an element is
dropped if its 16 bits are below a threshold. The counter is (column / 8, row, which of the linears that share ``x``,
0), so that every tile of every kernel, forward and backward, draws the same whatever its size.

Seven rounds are the fewest that pass every test of BigCrush (Salmon et al., "Parallel random numbers: as easy as 1, 2,
3", 2011, table 2). Ten rounds for 32 bits an element would take longer than reading ``x``.
"""

from __future__ import annotations

import triton
import triton.language as tl

ROUNDS = tl.constexpr(7)


@triton.jit
def kept(seed, n, i0, which, threshold, columns: tl.constexpr):
    """(rows, columns) bool: whether x[n, i0:i0 + columns] are kept; ``i0`` is a multiple of 8."""
    row = n.to(tl.uint32)[:, None]
    group = (i0 // 8 + tl.arange(0, columns // 8)).to(tl.uint32)[None, :]
    row, group = tl.broadcast(row, group)
    w0, w1, w2, w3 = tl.philox(seed, group, row, group * 0 + which, group * 0, ROUNDS)
    # Words and their halves in order along the row: joins add axes of two behind.
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    halves = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(halves, (n.shape[0], columns)) >= threshold
