"""A model made without memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from peftlib.attach import attach
from peftlib.errors import PeftlibError
from peftlib.report import format_bytes

NEGLIGIBLE = 2**20
"""Bytes of tables that a factory may well compute for real."""


def build_on_meta(factory: Callable[[], nn.Module]) -> nn.Module:
    """The factory's model, made on the meta device; a warning if it has real parameters all the same.

    Raises:
        PeftlibError: it is no factory of modules, or does not work on meta.

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
        raise PeftlibError(
            f"the factory does not work on the meta device ({type(error).__name__}: {error}). Where it needs values, "
            "let it make them under torch.device('cpu')"
        ) from error
    if not isinstance(model, nn.Module):
        raise PeftlibError(f"the factory gave {type(model).__name__}, no nn.Module: return the model")
    tensors = [*model.parameters(), *model.buffers()]
    lazy = [name for name, own in model.named_modules() if any(map(is_lazy, own._parameters.values()))]
    if lazy:
        raise PeftlibError(
            f"the factory's model has parameters without a shape yet, in {', '.join(map(repr, lazy))}: call the model "
            "once in the factory, or make these modules with their sizes"
        )
    real = sum(tensor.nbytes for tensor in tensors if not tensor.is_meta)
    if real > NEGLIGIBLE:
        warnings.warn(
            f"the factory allocates {format_bytes(real)} of real weights although it is called on the meta device: "
            "make the model from its configuration, and load no weights in it",
            stacklevel=2,
        )
    return model


def prepared(factory: Callable[[], nn.Module], method: Any, example: Any) -> nn.Module:
    """The factory's model with a method on it, None for the model as it comes."""
    model = build_on_meta(factory)
    if method is not None:
        attach(model, method, example=example)
    return model
