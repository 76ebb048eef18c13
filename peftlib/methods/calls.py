"""Calls by argument name, the tensors in what they return, and what their caches say."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

LENGTHS = ("seq_length", "seq_len", "cache_length", "seen_tokens", "length", "offset", "pos", "position")
"""Attributes by which caches of different makes tell how many positions they hold."""


def argument_names(forward: Callable[..., Any]) -> list[str]:
    """Names of the positional parameters of a bound or unbound forward, without the receiver, whatever its name."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [n for n, p in inspect.signature(forward).parameters.items() if p.kind in kinds]
    return names if inspect.ismethod(forward) else names[1:]


def by_name(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name; what the signature does not name is ``"#i"``."""
    found = {names[i] if i < len(names) else f"#{i}": value for i, value in enumerate(args)}
    return {**found, **kwargs}


def back(
    names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any], changed: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call with changed arguments, each where it stood."""
    new_args = tuple(
        changed.get(names[i] if i < len(names) else f"#{i}", value) for i, value in enumerate(args)
    )
    return new_args, {key: changed.get(key, value) for key, value in kwargs.items()}


def is_filled(cache: Any) -> bool:
    """Whether a key/value cache holds positions already: by what it says of itself, else by its tensors."""
    if isinstance(cache, Tensor):
        return cache.numel() > 0 and not _is_blank(cache)
    if hasattr(cache, "get_seq_length"):
        return bool(cache.get_seq_length() > 0)
    for name in LENGTHS:
        length = getattr(cache, name, None)
        if isinstance(length, (int, Tensor)):
            return bool(length > 0)
    if isinstance(cache, Mapping):
        return any(is_filled(value) for value in cache.values())
    if isinstance(cache, (tuple, list)):
        return any(is_filled(value) for value in cache)
    held = vars(cache).values() if hasattr(cache, "__dict__") else ()
    return any(is_filled(value) for value in held if isinstance(value, (Tensor, list, tuple, dict)))


def holds_floats(value: Any) -> bool:
    """Whether floating-point tensors lie in a container or an object (modules and functions are not looked into)."""
    if isinstance(value, Tensor):
        return value.is_floating_point() and value.numel() > 0
    if isinstance(value, Mapping):
        return any(holds_floats(v) for v in value.values())
    if isinstance(value, (tuple, list)):
        return any(holds_floats(v) for v in value)
    if isinstance(value, nn.Module) or callable(value) or not hasattr(value, "__dict__"):
        return False
    return any(holds_floats(v) for v in vars(value).values() if isinstance(v, (Tensor, list, tuple, Mapping)))


def _is_blank(cache: Tensor) -> bool:
    """Whether its first vector was never written: a cache that was allocated in full beforehand."""
    if torch.compiler.is_compiling() or cache.is_meta or isinstance(cache, FakeTensor) or not cache.dim():
        return False
    return not bool(cache[(0,) * (cache.dim() - 1)].any())


def tensors_of(output: Any) -> Iterator[Tensor]:
    """Every tensor in an output of tensors, tuples, mappings and dataclasses."""
    for _, tensor in named_tensors(output):
        yield tensor


def named_tensors(output: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in an output with a path such as ``"logits"`` or ``"hidden_states.0"``."""
    if isinstance(output, Tensor):
        yield path, output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from named_tensors(value, f"{path}.{key}" if path else str(key))
    elif isinstance(output, (tuple, list)):
        for i, value in enumerate(output):
            yield from named_tensors(value, f"{path}.{i}" if path else str(i))
    elif hasattr(output, "__dataclass_fields__"):
        for key in output.__dataclass_fields__:
            yield from named_tensors(getattr(output, key), f"{path}.{key}" if path else key)
