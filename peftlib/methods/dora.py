"""The magnitude of DoRA and its norm, by expansion, without forming W + s B A.

``|W_o + s B_o A|^2 = |W_o|^2 + 2 s (W A^T)_o . B_o + s^2 B_o (A A^T) B_o^T`` for each output row o. ``W A^T`` is the
host's own forward on the R rows of A, so an opaque host serves as well; its ``|W_o|`` is read once with an identity.

Shape legend: G groups (1 for linear), O outputs per group, F inputs per output (in / G times the kernel), R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peftlib.methods.base import plain_class
from peftlib.methods.linear import CONVOLUTIONS, is_transposed

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""What a host can compute in; narrower floats are storage."""


class Magnitude(nn.Module):
    """Trained magnitude m per output, with the host's weight as a reference.

    Args:
        host: linear-like or convolution.
        low_rank: the update's module, whose ``a`` and ``b`` have their final shapes.
    """

    def __init__(self, host: nn.Module, low_rank: Any, **where: Any):
        super().__init__()
        self._host = (host,)
        self.groups = host.groups if isinstance(host, CONVOLUTIONS) else 1
        self.m = nn.Parameter(torch.empty(low_rank.b.shape[0], **where))
        # Of an opaque base only. Not part of any file: it belongs to the base.
        self.register_buffer("base_squares", None, persistent=False)
        if self.m.device.type != "meta":
            self.derive(low_rank.a)
            weight = self._weight_OF()
            squares = self.base_squares if weight is None else _squares(weight)
            with torch.no_grad():
                self.m.copy_(squares.sqrt())

    def derive(self, a: Tensor) -> None:
        """Read the row norms of an opaque base; ``a`` gives device and dtype."""
        if self._weight_OF() is None:
            self.base_squares = self._opaque_squares(a)

    def forward(self, a: Tensor, b: Tensor, s: float) -> tuple[Tensor, Tensor]:
        """``(m / norm, bias)``, both shaped to broadcast over the host's output."""
        with torch.no_grad():
            norm = self._squares(a, b, s).clamp_min(0).sqrt()
            norm = torch.where(norm > 0, norm, torch.ones_like(norm))
        host: Any = self._host[0]
        scale = self.m / norm.to(self.m.dtype)
        bias = self._bias(a).to(self.m.dtype)
        if isinstance(host, CONVOLUTIONS):
            ones = (1,) * (host.weight.dim() - 2)
            return scale.view(-1, *ones), bias.view(-1, *ones)
        return scale, bias

    def rescale(self, new: Tensor, read: Tensor) -> Tensor:
        """``m W' / |V|`` for a merged weight W' in the host's layout, and V = W + s B A."""
        rows = 1 if is_transposed(self._host[0]) else 0
        shape = [-1 if d == rows else 1 for d in range(new.dim())]
        norm = read.flatten(1).norm(dim=1) if rows == 0 else read.norm(dim=0)
        return new * (self.m.to(new.dtype) / torch.where(norm > 0, norm, 1)).view(shape)

    def _squares(self, a: Tensor, b: Tensor, s: float) -> Tensor:
        a_GRF = a.unflatten(0, (self.groups, -1)).flatten(2)
        b_GOR = b.flatten(1).unflatten(0, (self.groups, -1))
        weight = self._weight_OF()
        if weight is None:
            squares = self.base_squares
            product_GOR = self._linear_part(a).T.unsqueeze(0)
        else:
            squares = _squares(weight)
            product_GOR = weight.unflatten(0, (self.groups, -1)) @ a_GRF.to(weight.dtype).mT
        wide = torch.promote_types(b.dtype, torch.float32)
        a_GRF, b_GOR, product_GOR = a_GRF.to(wide), b_GOR.to(wide), product_GOR.to(wide)
        cross = (product_GOR * b_GOR).sum(-1).flatten()
        quadratic = ((b_GOR @ (a_GRF @ a_GRF.mT)) * b_GOR).sum(-1).flatten()
        return squares + 2 * s * cross + s * s * quadratic

    def _weight_OF(self) -> Tensor | None:
        weight = getattr(self._host[0], "weight", None)
        if not isinstance(weight, Tensor) or weight.dtype not in FLOATS:
            return None
        return weight.detach().T if is_transposed(self._host[0]) else weight.detach().flatten(1)

    def _run(self, rows: Tensor) -> Tensor:
        """The host's own forward, without any delta, in the dtype it computes in."""
        host = self._host[0]
        tensors = (*host._parameters.values(), *host._buffers.values())
        dtype = next((t.dtype for t in tensors if t is not None and t.dtype in FLOATS), rows.dtype)
        output: Tensor = plain_class(host).forward(host, rows.to(dtype))
        return output.to(rows.dtype)

    def _bias(self, a: Tensor) -> Tensor:
        host = self._host[0]
        if self._weight_OF() is not None:
            bias = getattr(host, "bias", None)
            return a.new_zeros(()).expand(self.m.shape[0]) if bias is None else bias
        with torch.no_grad():
            return self._run(a.new_zeros(1, a.shape[1]))[0]

    def _linear_part(self, rows: Tensor) -> Tensor:
        return self._run(rows) - self._bias(rows)

    @torch.no_grad()
    def _opaque_squares(self, a: Tensor, block: int = 512) -> Tensor:
        width = a.shape[1]
        total: Any = 0
        for start in range(0, width, block):
            rows = torch.eye(min(block, width - start), width, dtype=a.dtype, device=a.device).roll(start, 1)
            total = total + self._linear_part(rows).float().square().sum(0)
        return total


def _squares(weight_OF: Tensor) -> Tensor:
    wide = torch.promote_types(weight_OF.dtype, torch.float32)
    return torch.linalg.vector_norm(weight_OF, dim=1, dtype=wide).square()
