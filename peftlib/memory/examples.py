"""An example of another size: as many rows, as many positions as asked for, without values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from peftlib.errors import PeftlibError
from peftlib.probe import Call, as_call


class Examples:
    """Examples of one kind for any batch and length.

    Args:
        example: a forward's arguments as elsewhere (a tensor, a tuple, a dict). The tensors' first axes are the batch,
            but for 1 and what is another tensor's sequence, as in a (T, T) mask. If the first tensor of that batch
            holds ids (B, T) or vectors (B, T, D), every other axis as long as its second is the sequence. Or a function
            ``(batch, length) -> example``, which needs no such guess.

    Raises:
        PeftlibError: there is no tensor in it, or the tensors' first axes differ.
    """

    def __init__(self, example: Any):
        self._function: Callable[..., Any] | None = None
        self.batch, self.length, self._shape = 1, None, torch.Size()
        self._example: Any = example
        if callable(example) and not isinstance(example, Tensor):
            self._function = example
            return
        args, kwargs = as_call(example)
        self._example = Call(args, kwargs) if args and kwargs else kwargs or args
        tensors = [t for t in pytree.tree_leaves(self._example) if isinstance(t, Tensor) and t.dim()]
        if not tensors:
            raise PeftlibError(
                f"the example is {type(example).__name__} without a tensor in it: give a tensor, a tuple or a dict of "
                "them, or a function (batch, length) -> example"
            )
        self.batch = _batch(tensors)
        first = next(tensor for tensor in tensors if tensor.shape[0] == self.batch)
        self._shape = first.shape
        if (first.dim() == 2 and not first.is_floating_point()) or first.dim() == 3:
            self.length = first.shape[1]

    def __call__(self, batch: int, length: int | None) -> Any:
        """An example of this size; tensors that are resized lie on meta.

        Raises:
            PeftlibError: the sequence cannot be told from the batch or is nowhere to be seen.
        """
        if self._function is not None:
            return self._function(batch) if length is None else self._function(batch, length)
        if batch == self.batch and length in (None, self.length):
            return self._example
        if length not in (None, self.length):
            if self.length is None:
                raise PeftlibError(
                    "lengths= was given, and the example shows no sequence: it begins with neither (B, T) ids nor "
                    "(B, T, D) vectors. Give a function (batch, length) -> example instead"
                )
            if self._shape.count(self.length) > 1:
                raise PeftlibError(
                    f"two axes of the example's first tensor {tuple(self._shape)} are {self.length} long, so the "
                    "sequence cannot be told from the other one: give an example of other sizes, or a function "
                    "(batch, length) -> example"
                )

        def resized(tensor: Tensor) -> Tensor:
            shape = [
                batch
                if axis == 0 and size == self.batch
                else length
                if length and size == self.length
                else size
                for axis, size in enumerate(tensor.shape)
            ]
            if shape == list(tensor.shape):
                return tensor
            return torch.empty(shape, dtype=tensor.dtype, device="meta", requires_grad=tensor.requires_grad)

        return pytree.tree_map_only(Tensor, resized, self._example)


def _batch(tensors: list[Tensor]) -> int:
    """The size that is the batch's."""
    many = [tensor.shape for tensor in tensors if tensor.dim() > 1] or [tensor.shape for tensor in tensors]
    firsts = {shape[0] for shape in many}
    later = {size for shape in many for size in shape[1:] if shape[0] != size}
    # but for what is another tensor's sequence, and for what one tensor has for all rows
    found = firsts - later
    found = found - {1} or found
    if len(found) == 1:
        return found.pop()
    raise PeftlibError(
        f"the example's tensors begin with axes of {' and '.join(map(str, sorted(firsts)))}, so the batch cannot be "
        f"told: {', '.join(str(tuple(shape)) for shape in many)}. Give a function (batch, length) -> example instead"
    )
