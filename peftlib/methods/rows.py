"""Values computed from parameters, kept while nothing can change them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class FrozenCache:
    """Recompute with gradients; without, keep the result until a parameter's version, storage or dtype changes.

    Generation calls a reparametrizing MLP once per token otherwise. A change behind autograd's back (``p.data.copy_``)
    does not raise a parameter's version; such a caller clears by training mode, a move, or :meth:`clear`.
    """

    def __init__(self) -> None:
        self._key: Any = None
        self._value: Any = None

    def __call__(self, parameters: Sequence[Tensor], compute: Callable[[], T]) -> T:
        if (
            torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or any(p.is_inference() for p in parameters)
        ):
            self.clear()
            return compute()
        key = tuple((p._version, p.data_ptr(), p.dtype) for p in parameters)
        if key != self._key or torch.is_autocast_enabled():
            self._key, self._value = key, compute()
        return self._value

    def clear(self) -> None:
        self._key = self._value = None

    def __getstate__(self) -> dict[str, Any]:
        return {}  # copies and pickles start empty

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.clear()
