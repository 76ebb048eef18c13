"""What a training is at, besides its values, its optimizer and the random state: all that the next step depends on."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from peftlib.train.history import History


@dataclass
class State:
    """What, besides values, optimizer and random state, the next step depends on."""

    step: int = 0
    epoch: int = 0
    position: int = 0
    """Batches of this epoch that are done."""
    epoch_rng: dict[str, Tensor] = field(default_factory=dict)
    """The random state when this epoch's iterator was made."""
    skips: int = 0
    best: float | None = None
    best_values: dict[str, Tensor] = field(default_factory=dict)
    best_buffers: dict[str, Tensor] = field(default_factory=dict)
    """Of the model, at the best values; only those that were not as at the start."""
    waited: int = 0
    stopped: bool = False
    history: History = field(default_factory=History)
