"""What oneDNN's LSTM keeps for its backward: it alone knows how much, so it is asked."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

LSTM = torch.ops.aten.mkldnn_rnn_layer.default
BATCH_FIRST = -2  # where that argument stands
WORKSPACE = 3  # and the workspace among the results
TRIED = 2**26
"""About the bytes of workspace up to which a layer is run; for longer sequences the line is continued."""


class _Like(tuple[torch.Size, torch.dtype]):
    """Shape and type of a tensor."""


def lstm_workspace(args: Sequence[Any]) -> int:
    """Bytes of the workspace that the operator makes for (fake) arguments.

    A layer of zeros is run for it. The bytes are those of this machine's kernel, rounded to pages by it; where they
    are many, a line through two shorter sequences gives them to within a few pages.
    """
    return _workspace(*(_Like((a.shape, a.dtype)) if isinstance(a, Tensor) else _hashable(a) for a in args))


@functools.lru_cache
def _workspace(tokens: _Like, weight: _Like, *layer: Any) -> int:
    shape, dtype = tokens
    axis = 1 if layer[BATCH_FIRST] else 0
    length, rows = shape[axis], shape[1 - axis]

    def run(steps: int) -> int:
        of = list(shape)
        of[axis] = steps
        args = (_Like((torch.Size(of), dtype)), weight, *layer)
        with unset_fake_temporarily():
            made = (torch.zeros(a[0], dtype=a[1]) if isinstance(a, _Like) else a for a in args)
            return int(LSTM(*made)[WORKSPACE].nbytes)

    gates, width = weight[0]
    # a step's gates, and two layers' worth of three states and their gradients
    longest = max(TRIED // (4 * rows * (gates + 12 * max(width, gates // 4))), 2)
    if length <= longest:
        return run(length)
    low, high = run(longest // 2), run(longest)
    return high + (high - low) * (length - longest) // (longest - longest // 2)


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
