"""One site of a combination: what the sum is exactly, what is stored of it, and how far the two are apart."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from peftlib.methods.base import Method, Site, placement
from peftlib.methods.factors import Factors, Ranges, ranges_of, read, truncated_svd, write
from peftlib.methods.lora import LoRA
from peftlib.methods.partial import PartialFineTuning
from peftlib.methods.trained import BaseTraining
from peftlib.part import Part
from peftlib.sums import DENSE, Sum

Terms = list[tuple[float, Part]]
"""The weights of a site's updates with the parts that have them."""


@dataclass
class Summed:
    """One site's result.

    Attributes:
        method: what the result is of.
        tensors: by their names in the delta, as they will be stored.
        residual: Frobenius norm of what is stored less what it should be.
        size: Frobenius norm of what it should be.
        facts: those of the site that the method needs.
    """

    method: Method
    tensors: dict[str, Tensor]
    residual: float
    size: float
    facts: Mapping[str, Any] = field(default_factory=dict)


def low_rank(terms: Terms, how: str, rank: int | None, add: Sum) -> Summed:
    """The sum of ``s B A``, of the rank asked for or the least that is exact."""
    deltas: list[Any] = [part.delta for _, part in terms]
    ranges = ranges_of(deltas[0])
    # Ranges stay ranges if all have the same; the dense sums weigh elements of the whole weight.
    if how in DENSE or any(ranges_of(delta) != ranges for delta in deltas):
        ranges = ()
    own, exact = _read(terms, ranges)
    heights = [stop - start for start, stop in ranges]
    if ranges and _wanted(rank, how, own) > min(exact.a_ERI.shape[2], *heights):
        # More than the lowest range can have: one matrix of all rows has room for it.
        ranges = ()
        own, exact = _read(terms, ranges)
    rank = min(_wanted(rank, how, own), exact.largest_rank)
    target_EOI = None
    if how in DENSE:
        target_EOI = add([(weight, factors.dense()) for weight, factors in own])
        result = truncated_svd(target_EOI, rank)
    else:
        result = exact.truncated(rank) if rank < exact.rank else exact
    dtype = functools.reduce(torch.promote_types, (delta.a.dtype for delta in deltas))
    stored = Factors(result.b_EOR.to(dtype), result.a_ERI.to(dtype))
    kept = Factors(stored.b_EOR.to(exact.b_EOR.dtype), stored.a_ERI.to(exact.a_ERI.dtype))
    if target_EOI is not None:
        residual, size = _norm(kept.dense() - target_EOI), _norm(target_EOI)
    else:
        residual, size = Factors.total([(1.0, kept), (-1.0, exact)]).norm(), exact.norm()
    # What is left of updates that cancel out is rounding, and so is its distance to anything.
    noise = 1e-14 * math.fsum(abs(weight) * factors.norm() for weight, factors in own)
    residual, size = (0.0 if value <= noise else value for value in (residual, size))
    part = terms[0][1]
    usual = placement(Site(part.name, part.host, part.parameter))["dtype"]
    method = LoRA(rank=result.rank, rows=ranges or None, dtype=None if dtype == usual else dtype)
    return Summed(method, write(stored, part.delta, ranges), residual, size)


def _read(terms: Terms, ranges: Ranges) -> tuple[list[tuple[float, Factors]], Factors]:
    own = [(weight, read(part.delta, ranges)) for weight, part in terms]
    return own, Factors.total(own)


def _wanted(rank: int | None, how: str, own: list[tuple[float, Factors]]) -> int:
    ranks = [factors.rank for _, factors in own]
    if how in DENSE:
        return max(ranks) if rank is None else rank
    if rank is None:
        return max(ranks) if how == "svd" else sum(ranks)
    return min(rank, sum(ranks))


def values(terms: Terms, add: Sum) -> Summed:
    """The base plus the sum of the differences to it, for each parameter that any of them trains."""
    host = terms[0][1].host
    deltas: list[tuple[float, Any]] = [(weight, part.delta) for weight, part in terms]
    kinds = {type(part.method) for _, part in terms}
    method = (kinds.pop() if len(kinds) == 1 else PartialFineTuning)()
    assert isinstance(method, BaseTraining)
    names = [n for n in host._parameters if any(n in delta.names for _, delta in deltas)]
    tensors: dict[str, Tensor] = {}
    residuals, sizes = [0.0], [0.0]
    for name in names:
        given = [(weight, delta) for weight, delta in deltas if name in delta.names]
        base = given[0][1].base(name).detach()
        wide = torch.float32 if base.device.type == "mps" else torch.float64
        target = add([(w, dict(d.tensors())[name].detach().to(wide) - base.to(wide)) for w, d in given])
        tensors[name] = (base.to(wide) + target).to(base.dtype)
        residuals.append(_norm(tensors[name].to(wide) - base.to(wide) - target))
        sizes.append(_norm(target))
    for name in method.statistics(host, names):
        tensors[name] = deltas[0][1].base(name)
    return Summed(method, tensors, math.hypot(*residuals), math.hypot(*sizes), {"names": names})


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor))
