"""What an operator reads: the storages behind tensors of any kind (plain, wrapped, sparse), and their values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def unwraps(kind: type) -> bool:
    """Whether a tensor type computes by calling operators on other tensors."""
    return kind.__torch_dispatch__ is not Tensor.__torch_dispatch__ and not issubclass(kind, FakeTensor)  # type: ignore[attr-defined]


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, Mapping):
        yield from tensors_in(list(value.values()))


def storages_of(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    """What holds a tensor's bytes: several storages for a wrapper or a sparse tensor, none for opaque layouts."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            # some also keep what is no tensor, such as the devices they are spread over
            if isinstance(part := getattr(tensor, name), Tensor):
                yield from storages_of(part)
    elif tensor.layout is torch.strided:
        yield tensor.untyped_storage()
    elif tensor.layout is torch.sparse_coo:
        yield from storages_of(tensor._indices())
        yield from storages_of(tensor._values())


def asks(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether an operator's result depends, beyond numbers in it, on what stands in a tensor."""
    if func is torch.ops.aten.index.Tensor:
        return any(index is not None and index.dtype == torch.bool for index in args[1])
    return not _VALUES.isdisjoint(func.tags)


_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
