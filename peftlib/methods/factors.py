"""A LoRA update as plain stacks of factors, whatever its host, and what can be done with them without forming B A.

A site's update is E matrices side by side, ``B_e A_e``: one for a linear layer or an embedding, one per group of a
convolution, per matrix of a stack, per range of ``rows=``. Sums stack the factors; norms and the best approximation of
a lower rank go through QR of the factors, (O + I) R^2 instead of O I min(O, I).

Shape legend: E matrices, O out features, I in features, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from peftlib.errors import PeftlibError
from peftlib.methods.base import Delta
from peftlib.methods.lora_deltas import ConvLoRA, EmbeddingLoRA, LowRank, ParameterLoRA
from peftlib.methods.lora_linear import LinearLoRA

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Factors:
    """``B A`` for each of E matrices: ``b_EOR``, ``a_ERI``."""

    b_EOR: Tensor
    a_ERI: Tensor

    @property
    def rank(self) -> int:
        return self.a_ERI.shape[1]

    @property
    def largest_rank(self) -> int:
        """What the matrices can have at most."""
        return min(self.b_EOR.shape[1], self.a_ERI.shape[2])

    def dense(self) -> Tensor:
        return self.b_EOR @ self.a_ERI

    @staticmethod
    def total(terms: Sequence[tuple[float, Factors]]) -> Factors:
        """``sum_t w_t B_t A_t``, exactly: the factors side by side."""
        return Factors(
            torch.cat([weight * factors.b_EOR for weight, factors in terms], 2),
            torch.cat([factors.a_ERI for _, factors in terms], 1),
        )

    def norm(self) -> float:
        """The Frobenius norm of all matrices together."""
        (_, left), (_, right) = torch.linalg.qr(self.b_EOR, "r"), torch.linalg.qr(self.a_ERI.mT, "r")
        return float(torch.linalg.vector_norm(left @ right.mT))

    def truncated(self, rank: int) -> Factors:
        """The best approximation of a lower rank (Eckart and Young 1936), its two factors of equal size."""
        (q_b, left), (q_a, right) = torch.linalg.qr(self.b_EOR), torch.linalg.qr(self.a_ERI.mT)
        inner = truncated_svd(left @ right.mT, rank)
        return Factors(q_b @ inner.b_EOR, inner.a_ERI @ q_a.mT)


def truncated_svd(dense_EOI: Tensor, rank: int) -> Factors:
    """The best approximation of dense matrices by ones of a rank.

    Raises:
        PeftlibError: values that are not finite.
    """
    if not dense_EOI.isfinite().all():
        raise PeftlibError(f"The sum is not finite in {dense_EOI.dtype}. Scale the weights down.")
    u, s, v = torch.linalg.svd(dense_EOI, full_matrices=False)
    root = s[:, :rank].sqrt()
    return Factors(u[:, :, :rank] * root[:, None, :], root[:, :, None] * v[:, :rank])


def is_low_rank(delta: Delta) -> bool:
    """Whether the delta is a sum ``W + s B A`` and nothing else (DoRA rescales it)."""
    return isinstance(delta, ParameterLoRA) or (isinstance(delta, LowRank) and delta.magnitude is None)


def ranges_of(delta: Delta) -> Ranges:
    """The ranges of ``rows=``, empty where the update is one for all."""
    return delta.rows if isinstance(delta, LinearLoRA) else ()


def read(delta: Delta, ranges: Ranges = ()) -> Factors:
    """The factors with the scale in b, in float64 where the device has it.

    Args:
        delta: one of :func:`is_low_rank`.
        ranges: those of the delta, to have them as matrices of their own, padded with zeros to one height; else the
            update is one matrix of all output features.
    """
    assert isinstance(delta, (LowRank, ParameterLoRA))
    wide = torch.float32 if delta.a.device.type == "mps" else torch.float64
    a, b = delta.a.detach().to(wide), delta.b.detach().to(wide) * delta.scaling
    if isinstance(delta, EmbeddingLoRA):
        return Factors(b.unsqueeze(0), a.T.unsqueeze(0))
    if isinstance(delta, ConvLoRA):
        groups = delta._host[0].groups
        return Factors(b.flatten(1).unflatten(0, (groups, -1)), a.flatten(1).unflatten(0, (groups, -1)))
    own = ranges_of(delta)
    if not own:
        return Factors(b.reshape(-1, *b.shape[-2:]), a.reshape(-1, *a.shape[-2:]))
    a_ERI = a.unflatten(0, (len(own), -1))
    pieces = b.split([stop - start for start, stop in own])
    if ranges:
        height = max(piece.shape[0] for piece in pieces)
        return Factors(torch.stack([F.pad(piece, (0, 0, 0, height - len(piece))) for piece in pieces]), a_ERI)
    assert isinstance(delta, LinearLoRA)
    whole = b.new_zeros(delta.out_features, a.shape[0])
    rank = a_ERI.shape[1]
    for i, ((start, stop), piece) in enumerate(zip(own, pieces, strict=True)):
        whole[start:stop, i * rank : (i + 1) * rank] = piece
    return Factors(whole.unsqueeze(0), a.unsqueeze(0))


def write(factors: Factors, like: Delta, ranges: Ranges = ()) -> dict[str, Tensor]:
    """``{"a": ..., "b": ...}`` as a delta of the same host has them, of these factors' rank and scale 1."""
    assert isinstance(like, (LowRank, ParameterLoRA))
    a, b = factors.a_ERI, factors.b_EOR
    if isinstance(like, EmbeddingLoRA):
        return {"a": a[0].T, "b": b[0]}
    if isinstance(like, ConvLoRA):
        return {
            "a": a.flatten(0, 1).unflatten(1, like.a.shape[1:]),
            "b": b.flatten(0, 1).unflatten(1, (-1, *like.b.shape[2:])),
        }
    if ranges:
        b = torch.cat([piece[: stop - start] for piece, (start, stop) in zip(b, ranges, strict=True)])
        return {"a": a.flatten(0, 1), "b": b}
    stack = like.a.shape[:-2]
    return {"a": a.reshape(*stack, *a.shape[1:]), "b": b.reshape(*stack, *b.shape[1:])}
