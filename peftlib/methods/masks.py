"""A mask with P visible positions more in front.

Shape legend: P prompt length, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

HIDDEN = -1e4
"""What an additive mask hides it gives this or less (the smallest finite value, -inf, -1e9 and BERT's -1e4 do)."""


def lengthen_mask(
    mask: Tensor, extra: int, *, hides: bool = False, square: bool = False, axis: int = -1
) -> Tensor:
    """The mask with ``extra`` visible positions in front.

    Args:
        mask: boolean, integer (0 and 1), or floating point. A floating one is added to scores if it is square or has
            more than two axes, else it marks with 1.
        extra: P.
        hides: nonzero marks what is hidden, not what is seen.
        square: the last two axes are (T, T), rows that see columns; both grow. Else only ``axis`` does.
        axis: the axis of positions of a mask that is not square.

    The real rows see the whole prompt. The prompt's rows see what a causal or a bidirectional model with virtual tokens
    would let them: the columns that every real row sees, if these are two or more, and all of the prompt; else, for
    that is a causal mask, only the prompt so far. So no later token leaks into the prompt, prefix language models
    and padding included. (Of a single token nobody can tell; it counts as causal.)
    """
    additive = mask.is_floating_point() and (square or (mask.dim() > 2 and axis in (-1, mask.dim() - 1)))
    seen: float = 0 if hides or additive else 1
    # F.pad counts axes from the last.
    before = [0, 0] * (mask.dim() - 1 - axis % mask.dim())
    wider = F.pad(mask, (*before, extra, 0), value=bool(seen) if mask.dtype == torch.bool else seen)
    if not square:
        return wider
    visible = mask > HIDDEN if additive else (mask != 0) ^ hides
    asks = visible.any(-1, keepdim=True)
    common = (visible | ~asks).all(-2, keepdim=True) & visible.any(-2, keepdim=True)
    both_ways = (common.sum(-1) > 1).any()
    order = torch.ones(extra, extra, dtype=torch.bool, device=mask.device).tril()
    corner = (order | both_ways).expand(*mask.shape[:-2], extra, extra)
    columns = (common & both_ways).expand(*mask.shape[:-2], extra, mask.shape[-1])
    top = torch.cat([corner, columns], -1)
    if additive:
        rows = torch.zeros_like(top, dtype=mask.dtype).masked_fill(~top, torch.finfo(mask.dtype).min)
    else:
        rows = (top ^ hides).to(mask.dtype)
    return torch.cat([rows, wider], -2)
