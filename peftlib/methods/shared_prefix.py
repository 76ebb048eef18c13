"""What all sites of a prefix tuning share, made once for each forward of the model.

The root's delta runs the MLP when the model begins, and holds its result while the model runs; sites take it from
there. Nothing of it outlives the forward but the graph that autograd keeps. Sites that run by themselves (a part of the
model called directly, a block recomputed in a checkpoint) run the MLP again, so that no graph is used twice.

Shape legend: P prefix length, D model width, M hidden width.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Hashable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from peftlib.methods.base import Delta
from peftlib.methods.rows import FrozenCache, autocast_of

_RUNNING: contextvars.ContextVar[Mapping[Any, tuple[Any, Tensor]]] = contextvars.ContextVar(
    "running", default=MappingProxyType({})
)
"""For each MLP whose model runs in this thread: in which state it was run, and the result."""


class SharedPrefix(nn.Module):
    """``h_PM = tanh(W1 table_PD + b1)``, which every site's own last layer turns into its keys and values."""

    def __init__(self, length: int, width: int, hidden: int, **where: Any):
        super().__init__()
        self.table = nn.Parameter(torch.empty(length, width, **where))
        self.down = nn.Linear(width, hidden, **where)
        self._cache = FrozenCache()
        if self.table.device.type != "meta":
            nn.init.normal_(self.table)

    def forward(self) -> Tensor:
        return self._cache(tuple(self.parameters()), self._compute)

    def _compute(self) -> Tensor:
        return torch.tanh(self.down(self.table))

    def hidden(self) -> Tensor:
        """H for a site: that of the forward which is running, where there is one."""
        if torch.compiler.is_compiling():
            # The compiler makes one of equal computations.
            return self()
        state, h_PM = _RUNNING.get().get(self, (None, None))
        if h_PM is not None and state == self._state():
            return h_PM
        # A checkpoint counts what is kept inside it, and there it shall not matter who ran the MLP.
        hooked = torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
        with saved_tensors_hooks(Tensor.detach, lambda t: t) if hooked else contextlib.nullcontext():
            return self()

    def _state(self) -> Any:
        """Of two equal states, one can take what was computed in the other."""
        return (
            torch.is_grad_enabled(),
            # A block recomputed in a backward has a graph of its own.
            torch._C._current_graph_task_id(),
            torch._C._are_functorch_transforms_active(),
            autocast_of(self.table.device.type),
            *((id(p), p._version) for p in self.parameters() if not p.is_inference()),
        )


class Shared(Delta):
    """Holds what all sites of a tuning share, at the root, and runs it once for all of them."""

    passive: ClassVar[bool] = True

    def __init__(self, module: SharedPrefix):
        super().__init__()
        self.mlp = module

    def alike(self) -> Hashable:
        return type(self).__name__

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return base(*args, **kwargs)
        mlp: Any = self.mlp
        token = _RUNNING.set({**_RUNNING.get(), mlp: (mlp._state(), mlp())})
        try:
            return base(*args, **kwargs)
        finally:
            _RUNNING.reset(token)

    def merged(self) -> tuple[()]:
        return ()  # no weight of the root's changes; the sites refuse, by their names
