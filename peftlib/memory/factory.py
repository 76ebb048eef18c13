"""A model made without memory."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from peftlib.attach import attach
from peftlib.errors import PeftlibError
from peftlib.report import format_bytes

NEGLIGIBLE = 2**20
"""Bytes of tables that a factory may well compute for real."""


def build_on_meta(factory: Callable[[], nn.Module], *, warn: bool = True) -> nn.Module:
    """The factory's model, made on the meta device; a warning if it has real tensors all the same.

    Raises:
        PeftlibError: it is no factory of modules, raises an error of its own, or does not work on meta.

    Example:
        >>> build_on_meta(lambda: nn.Linear(10**6, 10**6)).weight.device
        device(type='meta')
    """
    if isinstance(factory, nn.Module) or not callable(factory):
        raise PeftlibError(
            f"the factory is {type(factory).__name__}: give a function without arguments that makes the model, so that "
            "it can be made on the meta device"
        )
    try:
        with torch.device("meta"):
            model = factory()
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        if isinstance(error, NotImplementedError) or "meta" in str(error).lower():
            raise PeftlibError(
                f"the factory does not work on the meta device ({said}). Where it needs values, let it make them under "
                "torch.device('cpu')"
            ) from error
        *_, last = traceback.extract_tb(error.__traceback__)
        raise PeftlibError(
            f"the factory raised {said} ({Path(last.filename).name}, line {last.lineno})"
        ) from error
    if not isinstance(model, nn.Module):
        raise PeftlibError(f"the factory gave {type(model).__name__}, no nn.Module: return the model")
    lazy = [name for name, own in model.named_modules() if any(map(is_lazy, own._parameters.values()))]
    if lazy:
        raise PeftlibError(
            f"the factory's model has parameters without a shape yet, in {', '.join(map(repr, lazy))}: call the model "
            "once in the factory, or make these modules with their sizes"
        )
    real = _real_bytes(model)
    if warn and real > NEGLIGIBLE:
        warnings.warn(
            f"the factory allocates {format_bytes(real)} of real tensors although it is called on the meta device: "
            "make the model from its configuration, and load no weights in it",
            stacklevel=2,
        )
    return model


def prepared(
    factory: Callable[[], nn.Module], method: Any, example: Any | None, *, warn: bool = True
) -> nn.Module:
    """The factory's model with a method on it, None for the model as it comes."""
    model = build_on_meta(factory, warn=warn)
    if method is not None:
        attach(model, method, example=example)
    return model


def _real_bytes(model: nn.Module) -> int:
    """Bytes of parameters, buffers and tensors in plain attributes that are not on meta."""
    tensors = [
        t for module in model.modules() for t in pytree.tree_leaves(vars(module)) if isinstance(t, Tensor)
    ]
    storages = {
        t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if t.device.type != "meta"
    }
    return sum(storages.values())
