"""The tunings of a model by name, and which of them act."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from peftlib.errors import PeftlibError, StateError
from peftlib.site import TUNINGS

if TYPE_CHECKING:
    from peftlib.tuning import Tuning

ENABLED = "_peft_enabled"
"""Attribute of a model: the names of its enabled tunings, so that no switch has to look at all there are."""
AXES = "_peft_axes"
"""Attribute of a model: where its sites have the rows of a batch, as ``route`` learned it."""


def registry(model: nn.Module) -> dict[str, Tuning]:
    return model.__dict__.get(TUNINGS, {})


def enabled(model: nn.Module) -> Collection[str]:
    """Names of the enabled tunings, in the order in which they were enabled."""
    return model.__dict__.get(ENABLED, {})


def tunings(model: nn.Module) -> dict[str, Tuning]:
    """The tunings on a model by name, in the order they were attached.

    Example:
        >>> import torch, peftlib
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> _ = peftlib.attach(model, peftlib.LoRA(rank=2), targets=["0"], name="chat")
        >>> list(peftlib.tunings(model))
        ['chat']
    """
    return dict(registry(model))


class use:
    """Enable exactly the named tunings; a function, and a context manager that restores what was before.

    Args:
        model: a model with tunings.
        *names: tunings to enable; none of them means the base alone.

    Raises:
        StateError: a name that the model has no tuning of.

    Example:
        >>> import torch, peftlib
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> a = peftlib.attach(model, peftlib.LoRA(rank=2), targets=["0"], name="a")
        >>> b = peftlib.attach(model, peftlib.LoRA(rank=2), targets=["0"], name="b")
        >>> _ = peftlib.use(model, "b")
        >>> a.enabled, b.enabled
        (False, True)
        >>> with peftlib.use(model, "a", "b"):
        ...     print(a.enabled, b.enabled)
        True True
        >>> a.enabled
        False
    """

    def __init__(self, model: nn.Module, *names: str):
        have = registry(model)
        for name in names:
            if name not in have:
                raise StateError(
                    f"The model has no tuning {name!r}; it has: {', '.join(map(repr, have)) or 'none'}."
                )
        self._model = model
        self._before = list(enabled(model))
        _enable_only(have, self._before, names)

    def __enter__(self) -> use:
        return self

    def __exit__(self, *exc: object) -> None:
        have = registry(self._model)
        now = list(enabled(self._model))
        _enable_only(have, now, [n for n in self._before if n in have])


def _enable_only(have: Mapping[str, Tuning], now: Sequence[str], names: Sequence[str]) -> None:
    wanted = set(names)
    leaving = [have[n] for n in now if n not in wanted]
    coming = [have[n] for n in names if not have[n].enabled]
    # Leaving first: two tunings of the same base parameter may follow one another, never overlap.
    done: list[Callable[[], Any]] = []
    try:
        for tuning in leaving:
            tuning.disable()
            done.append(tuning.enable)
        for tuning in coming:
            tuning.enable()
            done.append(tuning.disable)
    except PeftlibError:
        for undo in reversed(done):
            undo()
        raise
