"""A cheap computation that keeps its inputs for the backward and nothing of what it makes on the way.

What a checkpoint does, for a function of tensors without random numbers: no hooks, no generator states, and under the
compiler, which decides itself what to keep, and inside ``torch.func`` transforms simply the function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from peftlib.kernels.low_rank import fuses


def recomputed(run: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
    """``run(*tensors)``, which the backward runs again instead of having kept its intermediate results.

    Args:
        run: a function of these tensors, the first of them never None, and of constants; it returns new memory.
        tensors: kept as they are. Gradients of any order reach them.

    Example:
        >>> x = torch.tensor([0.5, 1.0], requires_grad=True)
        >>> recomputed(lambda x: x.exp().exp().exp(), x).sum().backward()
        >>> torch.allclose(x.grad, x.exp() * x.exp().exp() * x.exp().exp().exp())
        True
    """
    x = tensors[0]
    assert x is not None
    if torch.is_grad_enabled() and fuses(x, x):
        return _Recomputed.apply(run, *tensors)
    return run(*tensors)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
        ctx.run = run
        ctx.save_for_backward(*tensors)
        kind = tensors[0].device.type  # type: ignore[union-attr]
        ctx.autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        return run(*tensors)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        again = torch.is_grad_enabled()
        _, *needs = ctx.needs_input_grad
        with torch.enable_grad(), torch.autocast(*ctx.autocast):
            # New tensors: where one input depends on another, only what this very call contributes.
            tensors = [
                t if t is None else t.view_as(t) if again else t.detach().requires_grad_(need)
                for t, need in zip(ctx.saved_tensors, needs, strict=True)
            ]
            y = ctx.run(*tensors)
        wanted = [t for t, need in zip(tensors, needs, strict=True) if need]
        grads = iter(torch.autograd.grad(y, wanted, dy, create_graph=again))  # type: ignore[arg-type]
        return None, *(next(grads) if need else None for need in needs)
