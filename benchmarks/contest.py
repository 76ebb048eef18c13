"""What a case hands to the runner: contestants that were seen to compute the same, and how to run each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


class Disagreement(Exception):
    """Contestants compute different things: no number is taken of them."""


class Unavailable(Exception):
    """The case cannot run here, and why."""


@dataclass(frozen=True, kw_only=True)
class Contest:
    """Contestants of one case.

    Attributes:
        runs: name -> what is measured; the first is the floor.
        check: raises :class:`Disagreement`, or says in words what was compared.
        missing: contestants that could not take part -> why.
        before: name -> what puts things back before each run, not measured.
        count: pieces of work in one run.
        piece: what a piece is ("token", "linear").
    """

    runs: Mapping[str, Callable[[], Any]]
    check: Callable[[], str]
    missing: Mapping[str, str] = field(default_factory=dict)
    before: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    count: int = 1
    piece: str = ""


def agree(found: Mapping[str, Tensor], expected: Tensor, without: Tensor | float, tolerance: float) -> None:
    """Raise if one of the found differs from the expected by more than a share of what the tuning changes.

    Raises:
        Disagreement: ``|found - expected| > tolerance |expected - without|``, with the name and both numbers.

    >>> import torch
    >>> agree({"ours": torch.tensor([2.0])}, torch.tensor([2.0]), torch.tensor([1.0]), 1e-3)
    >>> agree({"ours": torch.tensor([1.5])}, torch.tensor([2.0]), torch.tensor([1.0]), 1e-3)
    Traceback (most recent call last):
        ...
    benchmarks.contest.Disagreement: ours is off by 0.5 of what the tuning changes; 0.001 is allowed
    """
    expected = expected.detach().double()
    change = (expected - (without.detach().double() if isinstance(without, Tensor) else without)).norm()
    for name, value in found.items():
        # not `>`: a NaN must not pass
        if not (error := float((value.detach().double() - expected).norm() / change)) <= tolerance:
            raise Disagreement(
                f"{name} is off by {error:.3g} of what the tuning changes; {tolerance:g} is allowed"
            )


def tolerance(value: Tensor) -> float:
    """The share of a tuning's change that rounding in this dtype may take."""
    return 2e-3 if value.dtype.itemsize >= 4 else 0.1
