"""The thin products of a low-rank update, and how its dropout comes about.

Three ways to drop, with one set of methods: not at all; by sorted positions, which plain operators fill in
(``dropout``); by a counter inside the Triton kernels (``triton_dropout``). A forward settles on one, and its backward
has the same object: none of them holds more than a seed.

Shape legend: N rows, I in features, O out features, R rank.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from peftlib.kernels import gpu, reference
from peftlib.kernels.dropout import draw_seed, dropped, with_spare, zeroed

ENOUGH = 1 << 24
"""Elements of dY from which a second reading costs more than the launches of three kernels do."""


class Whole:
    """Nothing is dropped; ``kept`` is the share that stays."""

    kept = 1.0

    def shrink(self, x_NI: Tensor, a: Tensor, scale: float) -> Tensor:
        """``scale A drop(x)ᵀ`` (R, N), what is kept over its share."""
        return scaled(a, x_NI, scale)

    def gradients(
        self,
        x_NI: Tensor,
        a: Tensor,
        g_RN: Tensor,
        dy_NO: Tensor,
        weight: Tensor | None,
        need_x: bool,
        need_a: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """``dY W + drop'(Gᵀ A)``, without the first term if there is no weight, and ``G drop(x)``."""
        da = self.factor_gradient(x_NI, g_RN) if need_a else None
        base = dy_NO @ weight if need_x and weight is not None else None
        return self.input_gradient(base, g_RN, a) if need_x else None, da

    def factor_gradient(self, x_NI: Tensor, g_RN: Tensor) -> Tensor:
        """``G drop(x)`` (R, I), the dropped elements zero."""
        return g_RN @ x_NI

    def input_gradient(self, base_NI: Tensor | None, g_RN: Tensor, a: Tensor) -> Tensor:
        """``base + drop'(Gᵀ A)`` (N, I), in the memory of the base if there is one."""
        return g_RN.t() @ a if base_NI is None else base_NI.addmm_(g_RN.t(), a)

    def naive(self, x: Tensor, which: int = 0) -> Tensor:
        """``drop(x)`` in differentiable operators, as linear number ``which`` of those that share ``x`` drops."""
        return x


class ByPosition(Whole):
    def __init__(self, p: float):
        self.p, self.kept, self.seed = p, 1 - p, draw_seed()

    def positions(self, x: Tensor) -> Tensor:
        return dropped(self.seed, x.numel(), self.p, x.device)

    def shrink(self, x_NI: Tensor, a: Tensor, scale: float) -> Tensor:
        return scaled(a, zeroed(x_NI, self.positions(x_NI)), scale / self.kept)

    def gradients(
        self,
        x_NI: Tensor,
        a: Tensor,
        g_RN: Tensor,
        dy_NO: Tensor,
        weight: Tensor | None,
        need_x: bool,
        need_a: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        positions = self.positions(x_NI)
        da = g_RN @ zeroed(x_NI, positions) if need_a else None
        if not need_x:
            return None, da
        flat, dx_NI = with_spare(*x_NI.shape, like=a)
        if weight is None:
            torch.mm(g_RN.t(), a, out=dx_NI)
            flat.index_fill_(0, positions, 0)
        else:
            torch.mm(dy_NO, weight, out=dx_NI)
            kept = flat.index_select(0, positions)
            dx_NI.addmm_(g_RN.t(), a)
            flat.index_copy_(0, positions, kept)
        return dx_NI, da

    def naive(self, x: Tensor, which: int = 0) -> Tensor:
        return reference.drop(x, self.positions(x), self.p)


class ByCounter(Whole):
    """Also for several linears of one ``x``: their factors stand below each other, and each drops its own."""

    def __init__(self, p: float, x: Tensor, count: int = 1):
        # On the device: a graph captured once draws anew each time, and under the compiler a number would break it.
        self.seed = torch.randint(2**62, (), device=x.device)
        self.p, self.count, self.kept = p, count, gpu.operators().keep_probability(p)

    def shrink(self, x_NI: Tensor, a: Tensor, scale: float) -> Tensor:
        ops = gpu.operators()
        # Triton launches on the current device, which a compiler sets itself, and autograd for a backward.
        with nullcontext() if torch.compiler.is_compiling() else torch.cuda.device_of(x_NI):
            s_RN: Tensor = ops.shrink(x_NI, a, self.seed, scale / self.kept, self.p, self.count)
        return s_RN

    def factor_gradient(self, x_NI: Tensor, g_RN: Tensor) -> Tensor:
        da: Tensor = gpu.operators().factor_gradient(x_NI, g_RN, self.seed, self.p, self.count)
        return da

    def input_gradient(self, base_NI: Tensor | None, g_RN: Tensor, a: Tensor) -> Tensor:
        dx_NI = g_RN.new_zeros(g_RN.shape[1], a.shape[1]) if base_NI is None else base_NI
        gpu.operators().add_input_gradient(dx_NI, g_RN, a, self.seed, self.p, self.count)
        return dx_NI

    def naive(self, x: Tensor, which: int = 0) -> Tensor:
        n, i = rows(x).shape
        keep = reference.kept_by_counter(self.seed, n, i, which, self.p)
        return x * keep.view(x.shape) / self.kept


def dropping(p: float, x: Tensor, a: Tensor) -> Whole:
    """How the elements of ``x`` are dropped with probability ``p``; draws a seed from torch's generator if p > 0."""
    if not p:
        return Whole()
    return ByCounter(p, x) if gpu.ready(x, a, len(a)) else ByPosition(p)


def rank_gradients(
    dy_NO: Tensor, b: Tensor, s_RN: Tensor | None, scale: float, need_g: bool, need_b: bool
) -> tuple[Tensor | None, Tensor | None]:
    """``G = scale Bᵀ dYᵀ`` (R, N) and ``dB = (S dY)ᵀ`` (O, R), in one pass over ``dY`` where that pays."""
    if need_g and need_b and in_one_pass(dy_NO, b):
        both: tuple[Tensor, Tensor] = gpu.operators().rank_gradients(dy_NO, b, s_RN, scale)
        return both
    g_RN = scaled(b.t(), dy_NO, scale) if need_g else None
    return g_RN, (s_RN @ dy_NO).t() if need_b and s_RN is not None else None


def in_one_pass(dy_NO: Tensor, b: Tensor) -> bool:
    """Whether one kernel gives both of :func:`rank_gradients`."""
    return dy_NO.numel() >= ENOUGH and gpu.ready(dy_NO, b, b.shape[1])


def scaled(factor_RC: Tensor, rows_NC: Tensor, scaling: float) -> Tensor:
    """``s factor rowsᵀ``, (R, N)."""
    if scaling == 1:
        return F.linear(factor_RC, rows_NC)
    # beta=0: what the new memory holds is not read
    out_RN = rows_NC.new_empty(factor_RC.shape[0], rows_NC.shape[0])
    return out_RN.addmm_(factor_RC, rows_NC.t(), beta=0, alpha=scaling)


def rows(x: Tensor) -> Tensor:
    """(..., C) as (N, C), of the same storage where its strides allow."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
