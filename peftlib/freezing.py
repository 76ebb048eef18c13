"""Freezing a base, and giving back what trained before, whatever the order in which tunings leave."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from peftlib.methods.trained import hold_statistics, release_statistics

FLAGS = "_peft_flags"


def hold_flags(model: nn.Module, modules: Sequence[nn.Module], freeze: bool) -> None:
    """Remember which base parameters train, and freeze them and the running statistics.

    The memory lies at each module, with a count of the roots that hold it, so that tunings of a model and of a
    part of it may leave in any order.
    """
    new = []
    for module in modules:
        if not module._parameters:
            continue
        flags = module.__dict__.get(FLAGS)
        if flags is None:
            flags = module.__dict__[FLAGS] = [
                0,
                {n: p.requires_grad for n, p in module._parameters.items() if p is not None},
            ]
            new.append(module)
        flags[0] += 1
    if freeze:
        for module in new:
            for parameter in module._parameters.values():
                if parameter is not None:
                    parameter.requires_grad_(False)
            hold_statistics(module)
    model.__dict__["_peft_held"] = list(modules)


def restore_flags(model: nn.Module) -> None:
    for module in model.__dict__.pop("_peft_held"):
        flags = module.__dict__.get(FLAGS)
        if flags is None:
            continue
        flags[0] -= 1
        if flags[0] == 0:
            del module.__dict__[FLAGS]
            release_statistics(module)
            for name, flag in flags[1].items():
                parameter = module._parameters.get(name)
                if parameter is not None and parameter.requires_grad != flag:
                    parameter.requires_grad_(flag)
