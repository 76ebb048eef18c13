"""The low-rank update of a linear-like host: one kernel with the base's product where that is plain.

Shape legend: R rank, I in features, O out features; B rows of a batch, N what each of them has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftlib.kernels.low_rank import add_low_rank, fuses, low_rank_linear
from peftlib.kernels.routed import add_routed, can_route
from peftlib.kernels.shared_input import LowRankLinear
from peftlib.methods.base import (
    first_argument,
    map_first,
    plain_class,
)
from peftlib.methods.linear import is_transposed
from peftlib.methods.lora_deltas import LowRank, wide, zeros_along
from peftlib.methods.rowwise import Rows, own_parameters, rowwise
from peftlib.open_attention import Projection

if TYPE_CHECKING:
    from peftlib.methods.lora import LoRA


_OPEN_LINEARS = (nn.Linear.forward, Projection.forward)
"""Forwards known to be ``F.linear(x, self.weight, self.bias)`` and nothing else: there the update needs no base."""
_BLOCK = 1 << 18
"""Elements of a weight that are widened at a time."""


class LinearLoRA(LowRank):
    """``a_RI``, ``b_OR`` beside any module that maps I features to O."""

    def __init__(self, method: LoRA, host: nn.Module, shape: tuple[int, int], **where: Any):
        self.rows = tuple(method.rows or ())
        covered = sum(stop - start for start, stop in self.rows) if self.rows else shape[1]
        super().__init__(
            method, host, (max(1, len(self.rows)) * method.rank, shape[0]), (covered, method.rank), **where
        )
        self.out_features = shape[1]
        # What waits for whom, and the deltas that are given the same tensor, this one among them.
        self.together: tuple[Any, ...] = ()

    def start(self, init: str) -> None:
        if self.rows:
            for part in self.a.chunk(len(self.rows)):
                nn.init.kaiming_uniform_(part, a=math.sqrt(5)) if init == "kaiming" else nn.init.normal_(
                    part, std=1 / part.shape[0]
                )
            nn.init.zeros_(self.b)
        else:
            super().start(init)

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.rows or self.magnitude is not None:
            return super().forward(base, *args, **kwargs)
        p = self.p if self.training else 0.0
        if type(base) is partial and base.func in _OPEN_LINEARS and len(args) == 1:
            if self.together and not p and not torch.compiler.is_compiling() and torch.is_grad_enabled():
                y = self.together[0].take(self.together[1:], self, args[0])
                if y is not None:
                    return y
            return low_rank_linear(args[0], *self.linear(), self.scaling, p)
        x = first_argument(args, kwargs)
        add: Callable[[Tensor], Tensor] = lambda y: add_low_rank(y, x, self.a, self.b, self.scaling, p)  # noqa: E731
        return map_first(base(*args, **kwargs), add)

    def linear(self) -> LowRankLinear:
        host: Any = self._host[0]
        own: Any = host._parameters
        ours: Any = self._parameters
        if "weight" in own and "a" in ours and not host._peft_weights:
            # Past nn.Module.__getattr__, which takes as long as one of the products.
            return LowRankLinear(own["weight"], own.get("bias"), ours["a"], ours["b"])
        return LowRankLinear(host.weight, host.bias, self.a, self.b)

    def ready_to_share(self) -> bool:
        """Whether a call of the host, as it is now, would begin with this delta and the host's own product."""
        host = self._host[0]
        first = next(iter(host.__dict__.get("_peft_active", ())), None)
        dropping = self.p and self.training
        return first is self and not dropping and plain_class(host).forward in _OPEN_LINEARS

    def update(self, x: Tensor) -> Tensor:
        s = F.linear(self.drop(x), self.a.to(x.dtype)) * self.scaling
        b = self.b.to(x.dtype)
        return F.linear(s, b) if not self.rows else self._spread(s, b, lambda s, b: F.linear(s, b), -1)

    def alike(self) -> Hashable:
        if self.rows or self.magnitude is not None:
            return super().alike(), self.rows
        # Ranks and scales may differ: see routed.
        return type(self), self.p, self.training, self.a.dtype

    @classmethod
    def routed(cls, rows: Rows, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``y_B += (x_B A_Bᵀ) B_Bᵀ`` with the matrices of each row, padded to the largest rank."""
        deltas: Any = rows.deltas
        first = deltas[0]
        if first.rows or first.magnitude is not None:
            return rowwise(rows, base, args, kwargs)
        x = first_argument(args, kwargs)
        at = rows.axis(x)
        output = base(*args, **kwargs)
        fresh = type(base) is partial and base.func in _OPEN_LINEARS and not torch.is_grad_enabled()

        def add(y: Tensor) -> Tensor:
            x_BNI = at.split(first.drop(x), len(rows)).reshape(len(rows), -1, x.shape[-1])
            y_B = at.split(y, len(rows))
            y_BNO = y_B.reshape(len(rows), -1, y.shape[-1])
            if can_route(y, x, (d.a for d in deltas)):
                a_URI, b_URO = rows.kept("factors", partial(_factors, rows), own_parameters)
                new_BNO = add_routed(y_BNO, x_BNI, a_URI, b_URO, *rows.by_tuning("scaling", x.device))
                return at.join(new_BNO.view(y_B.shape))
            a_BIR, b_BRO = rows.kept("rows", partial(_by_row, rows), own_parameters)
            # The sum in the output's dtype, as without routing: a factor's (dtype=) never becomes the model's.
            s_BNR, b_BRO = torch.bmm(x_BNI, a_BIR.to(x.dtype)).to(y.dtype), b_BRO.to(y.dtype)
            if fresh and fuses(x, y) and y_BNO.data_ptr() == y.data_ptr():
                # Nobody else has seen this output, and reshaping did not copy it.
                y_BNO.baddbmm_(s_BNR, b_BRO)
                return y
            return at.join(torch.baddbmm(y_BNO, s_BNR, b_BRO).view(y_B.shape))

        return map_first(output, add)

    def _spread(self, s: Tensor, b: Tensor, product: Callable[[Tensor, Tensor], Tensor], axis: int) -> Tensor:
        """Each slice's product at its own output features, zeros between them."""
        sizes = [stop - start for start, stop in self.rows]
        pieces, at = [], 0
        for (start, stop), s_i, b_i in zip(
            self.rows, s.chunk(len(self.rows), axis), b.split(sizes), strict=True
        ):
            piece = product(s_i, b_i)
            if start > at:
                pieces.append(zeros_along(piece, start - at, axis))
            pieces.append(piece)
            at = stop
        if at < self.out_features:
            pieces.append(zeros_along(pieces[0], self.out_features - at, axis))
        return torch.cat(pieces, axis)

    def update_weight(self, old: Tensor) -> Tensor:
        if self.rows or self.magnitude is not None:
            return super().update_weight(old)
        wide = torch.promote_types(old.dtype, torch.float32)
        a, b = self.a.to(wide), self.b.to(wide)
        left, right = (a.T, b.T) if is_transposed(self._host[0]) else (b, a)
        if old.dtype == wide:
            return torch.addmm(old, left, right, alpha=self.scaling)
        # A narrow weight widens block by block in one small buffer, so that no wide copy of it is ever written.
        new, rows = torch.empty_like(old), max(1, _BLOCK // old.shape[1])
        buffer = old.new_empty((min(rows, old.shape[0]), old.shape[1]), dtype=wide)
        for old_part, new_part, left_part in zip(*(t.split(rows) for t in (old, new, left)), strict=True):
            part = buffer[: old_part.shape[0]].copy_(old_part)
            new_part.copy_(part.addmm_(left_part, right, alpha=self.scaling))
        return new

    def delta_weight(self) -> Tensor:
        a, b = wide(self.a), wide(self.b)
        dense_OI = self._spread(a, b, lambda a, b: b @ a, 0) if self.rows else b @ a
        return self.scaling * (dense_OI.T if is_transposed(self._host[0]) else dense_OI)


def _factors(rows: Rows) -> tuple[Tensor, Tensor]:
    """``A`` (U, R, I) and ``Bᵀ`` (U, R, O) of each delta."""
    return rows.together(lambda d: d.a), rows.together(lambda d: d.b.T)


def _by_row(rows: Rows) -> tuple[Tensor, Tensor]:
    """``Aᵀ`` (B, I, R) and ``s Bᵀ`` (B, R, O) of each row's delta."""
    a_BRI, b_BRO = map(rows.by_row, _factors(rows))
    a_BIR, b_BRO = a_BRI.mT, b_BRO * rows.scalars("scaling", b_BRO)
    # What is kept lies in the order in which the products read it; what is not is read once.
    return (a_BIR, b_BRO) if torch.is_grad_enabled() else (a_BIR.contiguous(), b_BRO.contiguous())
