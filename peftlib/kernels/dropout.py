"""Which elements dropout drops, as sorted positions: drawn again from a seed instead of kept as a mask.

Between one dropped element and the next lies a geometric gap, so that a draw costs p random numbers an element where
a mask costs one. Nothing is kept but the seed. The seed comes from torch's own generator: the same under
``manual_seed``, and again the same where a checkpoint replays that generator.

A draw has a fixed number of positions, so that its size never depends on chance (a GPU need not wait for it, and
fake tensors can follow). Those past the last element stand for none.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_SURE = 36.0
"""More positions would be needed once in e^36 = 4e15 draws."""


def draw_seed() -> int:
    """A seed from torch's default generator on the CPU, which no device has to wait for."""
    seed = torch.randint(2**62, ())
    # Where there are only fake values, any will do.
    return 0 if isinstance(seed, FakeTensor) else int(seed)


def how_many(n: int, p: float) -> int:
    """Positions enough for n elements dropped with probability p, by Bernstein's bound."""
    return min(n, math.ceil(n * p + _SURE / 3 + math.sqrt(_SURE**2 / 9 + 2 * _SURE * n * p * (1 - p))))


def dropped(seed: int, n: int, p: float, device: torch.device) -> Tensor:
    """Ascending flat positions, int64, of those among n elements that are dropped with probability 0 < p < 1.

    Values of n or more stand for no element. A gap of k elements has probability p (1 - p)^(k - 1) to within 2^-24,
    the step of a float32 random number.
    """
    generator = torch.Generator("cpu" if device.type == "meta" else device).manual_seed(seed)
    gaps = torch.rand(how_many(n, p), generator=generator, device=device, dtype=torch.float32)
    gaps = gaps.neg_().log1p_().mul_(1 / math.log1p(-p))
    return gaps.to(torch.int64).add_(1).cumsum(0).sub_(1).clamp_(max=n)


def with_spare(*shape: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """New memory of a shape: flat with one element more, where positions past the end lead, and in the shape."""
    flat = like.new_empty(math.prod(shape) + 1)
    return flat, flat[:-1].view(shape)


def zeroed(x: Tensor, positions: Tensor) -> Tensor:
    """A copy of ``x`` with zeros at flat positions."""
    flat, copy = with_spare(*x.shape, like=x)
    copy.copy_(x)
    flat.index_fill_(0, positions, 0)
    return copy
