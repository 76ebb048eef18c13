"""Watching one forward: which modules run with which shapes, which of them calls SDPA and with which heads.

Left out on purpose: tracing. Only module calls and SDPA calls are seen; a hand-written softmax(q @ k.T) is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from peftlib.attention import attention_with_weights
from peftlib.copies import spared
from peftlib.methods.base import CHILD, first_tensor
from peftlib.methods.calls import tensors_of
from peftlib.methods.linear import linear_shape
from peftlib.site import can_open_attention, close_host, is_open, open_host


@dataclass
class Trace:
    """What the example showed of one module.

    Attributes:
        calls: how often its forward ran.
        input: shape of its first tensor argument in the first call, or ``None``.
        output: shape of its first output tensor in the first call, or ``None``.
        is_floating: whether that input was floating point (an embedding's is not).
        inputs: shape of the first tensor argument of every call.
        outputs: shape of the first output tensor of every call.
        call: positional and keyword arguments of the first call.
    """

    calls: int = 0
    input: tuple[int, ...] | None = None
    output: tuple[int, ...] | None = None
    is_floating: bool = True
    inputs: list[tuple[int, ...] | None] = field(default_factory=list)
    outputs: list[tuple[int, ...] | None] = field(default_factory=list)
    call: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})


@dataclass
class Attention:
    """Geometry of the SDPA calls made by one module, which is an attention site.

    Attributes:
        heads: key/value heads of the call (the smallest seen), each counted once where a model repeats it for its
            group of queries.
        key_size, value_size: features per head.
        width: query heads times features per head.
        calls: SDPA calls in the example.
        mixed: whether calls differ in the size of a head, so that no one prefix fits them.
        queries: shape of the query of every call.
    """

    heads: int
    key_size: int
    value_size: int
    width: int
    calls: int = 1
    mixed: bool = False
    queries: list[tuple[int, ...]] = field(default_factory=list, compare=False)


@dataclass
class Record:
    """Everything one forward showed."""

    traces: dict[str, Trace] = field(default_factory=dict)
    attention: dict[str, Attention] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    """Leaves in the order in which they ran; ``"name!"`` marks an SDPA call in the module ``name``."""
    heads: list[str] = field(default_factory=list)
    foreign: set[str] = field(default_factory=set)
    """Modules that call F.multi_head_attention_forward themselves, whose SDPA cannot be reached."""
    reads: dict[str, str] = field(default_factory=dict)
    """Parameters read while no module that has them ran, each with the module whose forward read it."""
    output: Any = None
    values: dict[str, tuple[Tensor, Tensor]] | None = None
    """Keys and values of each attention's first call, where a real forward was asked for them."""


def observe(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], record: Record, prefix: str = ""
) -> Any:
    opened = []
    for module in list(model.modules()):
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # asks the mask for its values
        if can_open_attention(module) and not is_open(module):
            open_host(module)
            opened.append(module)
    stack: list[str] = []
    produced: dict[Any, tuple[str, Tensor]] = {}
    handles = []

    def before(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            stack.append(name)
            trace = record.traces.setdefault(name, Trace())
            trace.calls += 1
            given = first_tensor([*args, *kwargs.values()])
            trace.inputs.append(None if given is None else tuple(given.shape))
            if trace.calls == 1:
                trace.call = spared((args, kwargs))
                if given is not None:
                    trace.input, trace.is_floating = tuple(given.shape), given.is_floating_point()

        return hook

    def after(name: str, leaf: bool, linear: bool) -> Callable[..., None]:
        def hook(_: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
            if stack and stack[-1] == name:
                stack.pop()
            result = first_tensor(output)
            trace = record.traces[name]
            trace.outputs.append(None if result is None else tuple(result.shape))
            if result is not None and trace.output is None:
                trace.output = tuple(result.shape)
            if leaf:
                record.order.append(name)
            if linear and result is not None:
                produced[_storage(result)] = (name, result)

        return hook

    for name, module in _named(model, prefix):
        leaf = not any(k != CHILD for k in module._modules)
        handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True, prepend=True))
        handles.append(
            module.register_forward_hook(
                after(name, leaf, linear_shape(module) is not None), with_kwargs=True
            )
        )
    try:
        with _Watch(stack, record, _owners(model, prefix)):
            output = model(*args, **kwargs)
    except Exception as error:
        error.peft_where = stack[-1] if stack else ""  # type: ignore[attr-defined]
        raise
    finally:
        for handle in handles:
            handle.remove()
        for module in opened:
            close_host(module)
    for leaf_value in tensors_of(output):
        name, whole = produced.get(_storage(leaf_value), ("", leaf_value))
        # Keys and values returned for a cache are views with an axis more, of heads.
        if name and name not in record.heads and leaf_value.dim() <= whole.dim():
            record.heads.append(name)
    return output


def _storage(tensor: Tensor) -> Any:
    return tensor.untyped_storage()._cdata


def _named(
    module: nn.Module, prefix: str = "", seen: set[int] | None = None
) -> Iterator[tuple[str, nn.Module]]:
    seen = set() if seen is None else seen
    if id(module) in seen:
        return
    seen.add(id(module))
    yield prefix, module
    for key, child in module._modules.items():
        if child is not None and key != CHILD:
            yield from _named(child, f"{prefix}.{key}" if prefix else key, seen)


def _owners(model: nn.Module, prefix: str) -> dict[int, dict[str, str]]:
    """For each parameter, by id: the modules that have it, each with the name it has there."""
    found: dict[int, dict[str, str]] = {}
    for owner, module in _named(model, prefix):
        for own, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), {})[owner] = own
    return found


_LIKE = {
    torch.zeros_like,
    torch.ones_like,
    torch.empty_like,
    torch.full_like,
    torch.rand_like,
    torch.randn_like,
}
_LIKE |= {Tensor.new_zeros, Tensor.new_ones, Tensor.new_empty, Tensor.new_full, Tensor.new_tensor}
_AS_OTHER = {Tensor.to, Tensor.type_as, Tensor.expand_as, Tensor.view_as, Tensor.reshape_as}
"""What asks a tensor, or all but its first one, for no values: only for shape, dtype or device."""
_RESHAPES = (Tensor.reshape, torch.reshape, Tensor.flatten, torch.flatten)
_REPEATS = (Tensor.repeat_interleave, torch.repeat_interleave)


def _repeats(source: Any, result: Any) -> int:
    """How often in a row ``result`` (..., H, S, E) holds each head of ``source``."""
    if not isinstance(source, Tensor) or not isinstance(result, Tensor) or result.dim() < 4:
        return 1
    rows = result.shape[:-2].numel()
    if source.shape[:-3] == result.shape[:-3] and source.shape[-2:] == result.shape[-2:]:
        return result.shape[-3] // source.shape[-3]
    for axis, (size, stride) in enumerate(zip(source.shape, source.stride(), strict=True)):
        if stride == 0 and size > 1 and source.shape[:axis].numel() * size == rows:
            return size
    return 1


class _Watch(TorchFunctionMode):
    """Note which module makes each SDPA call, how many heads its keys had before they were repeated, and who reads
    a parameter of others.
    """

    def __init__(self, stack: list[str], record: Record, owners: dict[int, dict[str, str]]):
        self._stack = stack
        self._record = record
        self._owners = owners
        self._repeated: dict[Any, tuple[int, Tensor]] = {}
        """Storage of a tensor of repeated heads -> how often, and the tensor, so that the storage is not used again."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention or func is attention_with_weights:
            self._note(
                *(args[i] if i < len(args) else kwargs[n] for i, n in enumerate(("query", "key", "value")))
            )
        elif func is F.multi_head_attention_forward and self._stack:
            self._record.foreign.add(self._stack[-1])
        result = func(*args, **kwargs)
        if func not in _LIKE and first_tensor(result) is not None:
            self._note_reads(args[:1] if func in _AS_OTHER else (*args, *kwargs.values()))
        if func in _RESHAPES or func in _REPEATS:
            times = _repeats(args[0] if args else kwargs.get("input"), result)
            if times > 1:
                self._repeated[_storage(result)] = (times, result)
        return result

    def _note_reads(self, given: Any) -> None:
        for tensor in tensors_of(given):
            owners = self._owners.get(id(tensor))
            if owners and owners.keys().isdisjoint(self._stack):
                reader = self._stack[-1] if self._stack else ""
                for owner, own in owners.items():
                    self._record.reads.setdefault(f"{owner}.{own}", reader)

    def _heads(self, tensor: Tensor) -> int:
        """The heads that differ in a call's key or value."""
        if tensor.dim() < 4 or tensor.stride(-3) == 0:
            return 1
        return tensor.shape[-3] // self._repeated.get(_storage(tensor), (1,))[0]

    def _note(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        name = self._stack[-1] if self._stack else ""
        heads = max(self._heads(key), self._heads(value))
        query_heads = query.shape[-3] if query.dim() >= 4 else 1
        if self._record.values is not None:
            self._record.values.setdefault(name, (key, value))
        known = self._record.attention.get(name)
        if known is None:
            self._record.attention[name] = Attention(
                heads, key.shape[-1], value.shape[-1], query_heads * key.shape[-1]
            )
            self._record.order.append(f"{name}!")
        else:
            known.calls += 1
            if (key.shape[-1], value.shape[-1]) == (known.key_size, known.value_size):
                known.heads = min(known.heads, heads)
            else:
                known.mixed = True
        self._record.attention[name].queries.append(tuple(query.shape))
