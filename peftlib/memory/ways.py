"""Ways to train, and the function that estimates each of them once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from peftlib.errors import PeftlibError, ProbeError
from peftlib.memory.estimate import REPEATING, estimate_memory
from peftlib.memory.examples import Examples
from peftlib.memory.report import MemoryReport
from peftlib.memory.sharding import ShardedOver


@dataclass(frozen=True)
class Way:
    """One way to train.

    Attributes:
        method: a name in the plan.
        batch: rows of a (micro-)batch, on each rank.
        length: positions, or None for the example's.
        checkpointing: what is computed twice, as in :func:`estimate_memory`.
        accumulate: micro-batches in a step.
        ranks: how many share weights, gradients and optimizer state.
    """

    method: str
    batch: int
    length: int | None = None
    checkpointing: Any = None
    accumulate: int = 1
    ranks: int = 1

    @property
    def again(self) -> str:
        """What is computed twice, in a word: yes, no, or which modules."""
        if self.checkpointing is None:
            return "no"
        return "yes" if self.checkpointing is True else f"{self.checkpointing}"

    def __str__(self) -> str:
        length = "" if self.length is None else f" x {self.length}"
        again = {"no": "", "yes": ", checkpointing"}.get(self.again, f", checkpointing {self.again}")
        return f"{self.method}, {self.batch}{length}{again}"


def example_of(examples: Examples, batch: int, length: int | None) -> Any:
    """An example of a size.

    Raises:
        ProbeError: the user's function of (batch, length) fails.
    """
    try:
        return examples(batch, length)
    except PeftlibError:
        raise
    except Exception as error:
        given = f"{batch}" if length is None else f"{batch}, {length}"
        raise ProbeError(
            f"example({given}) gave no example ({type(error).__name__}: {error}): it is called as example(batch), "
            "and as example(batch, length) where lengths= is given"
        ) from error


def estimator(
    model: Callable[[str], nn.Module], examples: Examples, told: Callable[[], object] = int, **options: Any
) -> Callable[[Way], MemoryReport]:
    """A function that estimates a way to train, and remembers what it found.

    Args:
        model: gives the model of a method's name, prepared.
        examples: gives the examples.
        told: called before each estimate.
        options: of :func:`estimate_memory`.
    """
    found: dict[Way, MemoryReport] = {}

    def estimate(way: Way) -> MemoryReport:
        # from the second micro-batch on, each needs what the second does
        way = dataclasses.replace(way, accumulate=min(way.accumulate, REPEATING))
        if way in found:
            return found[way]
        if way.ranks > 1:
            whole = estimate(dataclasses.replace(way, ranks=1))
            shard = ShardedOver(way.ranks)
            found[way] = shard(model(way.method), whole, optimizer=options["optimizer"])
        else:
            told()
            found[way] = estimate_memory(
                model(way.method),
                example_of(examples, way.batch, way.length),
                accumulate=way.accumulate,
                checkpointing=way.checkpointing,
                **options,
            )
        return found[way]

    return estimate
