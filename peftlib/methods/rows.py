"""Values computed from parameters, kept while nothing can change them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

T = TypeVar("T")
_VERSION = operator.attrgetter("_version")


class FrozenCache:
    """Recompute with gradients; without, keep the result until a parameter's version or memory changes.

    Generation calls a reparametrizing MLP once per token otherwise. A change behind autograd's back (``p.data.copy_``)
    does not raise a parameter's version; such a caller clears by training mode, a move, or :meth:`clear`.
    """

    _key: Any = None
    _value: Any = None
    _held: Sequence[Any] = ()

    def __call__(self, parameters: Sequence[Tensor], compute: Callable[[], T]) -> T:
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or isinstance(parameters[0], FakeTensor):
            self.clear()
            return compute()
        try:
            # At C's speed: generation asks this of hundreds of factors for each token.
            key = (
                autocast_of(parameters[0].device.type),
                *map(_VERSION, parameters),
                *map(Tensor.data_ptr, parameters),
            )
        except RuntimeError:  # inference tensors have no version
            self.clear()
            return compute()
        if key != self._key:
            self._key, self._value = key, compute()
            # While the old storage is held, no new one gets its address.
            self._held = [p.untyped_storage() for p in parameters]
        return self._value

    def clear(self) -> None:
        self._key, self._value, self._held = None, None, ()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # copies and pickles start empty

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.clear()


def autocast_of(device: str) -> torch.dtype | None:
    """The dtype that autocast computes in, if it is on."""
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None
