"""One delta at one host, and all that is known of it: what a tuning is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from peftlib.errors import CheckpointError
from peftlib.methods.base import Delta, Method


@dataclass
class Part:
    """One delta at one host.

    Attributes:
        name: site name (dotted module or parameter name).
        host: the open module.
        parameter: own name of a raw-weight site's parameter, else ``None``.
        delta: the module that runs there.
        method: the configuration that built it.
        facts: what the probe learned for it.
        key: its key in the host's deltas.
        opened: further modules that were opened so that this site runs.
        built: False for a part that the method added itself (shared modules at the root).
        entry: which line of the plan it belongs to; a method may stand in several.
    """

    name: str
    host: nn.Module
    parameter: str | None
    delta: Delta
    method: Method
    facts: Mapping[str, Any]
    key: str
    opened: Sequence[nn.Module] = ()
    built: bool = True
    entry: int = 0

    @property
    def prefix(self) -> str:
        return f"{self.name}.{self.delta.label}" if self.name else self.delta.label


def check_state(own: Mapping[str, Tensor], given: Mapping[str, Tensor], what: str) -> None:
    """Raise a CheckpointError that names every missing, unexpected and mis-shaped key."""
    problems = [f"missing: {k}" for k in own if k not in given]
    problems += [f"unexpected: {k}" for k in given if k not in own]
    problems += [
        f"shape of {k}: {tuple(given[k].shape)}, expected {tuple(own[k].shape)}"
        for k in own
        if k in given and own[k].shape != given[k].shape
    ]
    if problems:
        shown = "; ".join(problems[:12]) + (f"; and {len(problems) - 12} more" if len(problems) > 12 else "")
        raise CheckpointError(f"The state does not fit {what}. {shown}. Attach the method it was saved from.")
