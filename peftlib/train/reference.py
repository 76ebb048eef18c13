"""The reference of a policy: the same model under other tunings, the base alone, or another module."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from peftlib import PeftlibError, tunings, use
from peftlib.train.evaluation import mode

Reference = Sequence[str] | nn.Module
"""Names of the tunings that make it (none: the base), or a module of its own."""


@contextlib.contextmanager
def as_reference(model: nn.Module, reference: Reference) -> Iterator[nn.Module]:
    """The reference, in eval mode and without gradients, while the context lasts.

    Raises:
        PeftlibError: the reference is the policy itself.
    """
    if isinstance(reference, str):
        raise PeftlibError(f"reference={reference!r} has to be a sequence of names: ({reference!r},).")
    other = reference if isinstance(reference, nn.Module) else model
    if other is model:
        names = list(reference) if not isinstance(reference, nn.Module) else None
        now = [name for name, tuning in tunings(model).items() if tuning.enabled]
        if names is None or set(now) == set(names):
            raise PeftlibError(
                f"The policy and its reference are the same: {type(model).__name__} with the tunings "
                f"{now or '(none)'}. Enable the policy's tuning; the reference is the base, reference=(), or a frozen "
                "tuning's name."
            )
    with torch.no_grad(), contextlib.ExitStack() as stack:
        if other is model:
            assert not isinstance(reference, nn.Module)
            stack.enter_context(use(model, *reference))
        stack.enter_context(mode(other, False))
        yield other
