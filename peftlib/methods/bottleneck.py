"""The bottleneck itself: a small MLP on a module's features, after the module or beside it.

For the backward it keeps what it acts on and tensors of the bottleneck's width, and nothing as wide besides.

Shape legend: M bottleneck.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftlib.errors import PeftlibError
from peftlib.kernels.recomputed import recomputed
from peftlib.methods.base import Delta, first_argument, map_first, map_nested
from peftlib.methods.rowwise import Rows, rowwise

if TYPE_CHECKING:
    from peftlib.methods.adapter import Adapter

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}


class Bottleneck(Delta):
    """``s U act(D h + d) + u`` on the feature axis; a 1x1 convolution where that axis is not the last."""

    def __init__(self, method: Adapter, sizes: tuple[int, int, int], axis: int, **where: Any):
        super().__init__()
        inside, dim, out = sizes
        self.activation, self.parallel, self.scale = (
            method.activation,
            method.placement == "parallel",
            method.scale,
        )
        self.axis = axis
        self.norm = nn.LayerNorm(inside, **where) if method.layer_norm else None
        self.down = nn.Parameter(torch.empty(dim, inside, **where))
        self.down_bias = nn.Parameter(torch.zeros(dim, **where))
        self.up = nn.Parameter(torch.zeros(out, dim, **where))
        self.up_bias = nn.Parameter(torch.zeros(out, **where))
        if self.down.device.type != "meta":
            nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def extra_repr(self) -> str:
        dim, inside = self.down.shape
        place = "parallel" if self.parallel else "sequential"
        return f"{inside} -> {dim} -> {self.up.shape[0]}, {self.activation}, {place}"

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.parallel:
            # First the side branch: the host may change its input in place.
            aside = self._bottleneck(first_argument(args, kwargs))
            return map_first(base(*args, **kwargs), lambda f: self._beside(f, aside))
        return map_first(base(*args, **kwargs), lambda f: f + self._bottleneck(f))

    def alike(self) -> Hashable:
        setting = (self.activation, self.parallel, self.scale, self.axis, self.norm is None)
        return type(self), setting, self.down.shape, self.up.shape, self.down.dtype

    @classmethod
    def routed(cls, rows: Rows, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return rowwise(rows, base, args, kwargs)

    def _bottleneck(self, h: Tensor) -> Tensor:
        if h.is_nested:
            # A padded batch in an nn.TransformerEncoder; most activations have no backward for these.
            return map_nested(self._bottleneck, h)
        wanted = self.down.shape[1]
        if h.dim() < 1 or h.dim() <= self.axis or h.shape[self.axis] != wanted:
            raise PeftlibError(
                f"An adapter for {wanted} features on axis {self.axis} met a tensor of shape {tuple(h.shape)}. Attach "
                "with example=, so that the width is seen instead of guessed, or set Adapter(axis=...)."
            )
        last = self.axis in (-1, h.dim() - 1)
        norm = self.norm
        run = functools.partial(_narrow, self.activation, -1 if last else self.axis)
        small = (h, self.down, self.down_bias, *((None, None) if norm is None else (norm.weight, norm.bias)))
        # A normalized or transposed copy of h would be kept besides h itself.
        a = run(*small) if last and norm is None else recomputed(run, *small)
        up, up_bias = _like(self.up, a), _like(self.up_bias, a)
        if self.scale != 1:
            # Scaled where it is narrow: no pass over all features forward or backward.
            a, up_bias = a * self.scale, up_bias * self.scale
        out = F.linear(a, up, up_bias)
        return out if last else out.movedim(-1, self.axis)

    @staticmethod
    def _beside(f: Tensor, update: Tensor) -> Tensor:
        if not f.is_nested and update.shape != f.shape:
            raise PeftlibError(
                f"A parallel adapter made {tuple(update.shape)} of its module's input, and the module "
                f"{tuple(f.shape)}. Use placement='sequential', or a module that keeps all but the feature axis."
            )
        return f + update

    def merged(self) -> Any:
        raise PeftlibError(
            "An adapter cannot be merged: there is a nonlinearity between its two matrices. Keep it attached."
        )


def _narrow(
    activation: str,
    axis: int,
    h: Tensor,
    down: Tensor,
    down_bias: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """``act(D norm(h) + d)``, (..., M), of features on an axis of ``h``."""
    h = h if axis == -1 else h.movedim(axis, -1)
    if weight is not None:
        assert bias is not None
        h = F.layer_norm(h, weight.shape, _like(weight, h), _like(bias, h))
    return ACTIVATIONS[activation](F.linear(h, _like(down, h), _like(down_bias, h)))


def _like(parameter: Tensor, h: Tensor) -> Tensor:
    return parameter if parameter.dtype == h.dtype else parameter.to(h.dtype)
