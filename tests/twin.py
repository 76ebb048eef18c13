"""What tests of one method share: compare a module with a naive twin, in values and in every gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import peftlib


def randomize(tuning: peftlib.Tuning, scale: float = 1.0) -> dict[str, nn.Parameter]:
    """Give every trained parameter random values (many start at zero, where much would go unseen)."""
    with torch.no_grad():
        for parameter in tuning.parameters():
            parameter.normal_(std=scale)
    return dict(tuning.named_parameters())


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def gradients(run: Callable[[], Tensor], leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The output, and the gradient of a fixed random weighting of it with respect to each leaf."""
    out = run()
    torch.manual_seed(1234)
    weight = torch.randn(out.shape, dtype=out.dtype)  # randn_like would follow the strides
    grads = torch.autograd.grad(out, list(leaves.values()), weight, allow_unused=True)
    return {"output": out.detach()} | {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
    }


def assert_twins(
    ours: Callable[[], Tensor], naive: Callable[[], Tensor], leaves: Mapping[str, Tensor], **tolerance: Any
) -> None:
    """Both give the same output and the same gradients, none of them zero all over unless both are."""
    tolerance = tolerance or {"rtol": 1e-9, "atol": 1e-10}
    expected = gradients(naive, leaves)
    for name, value in gradients(ours, leaves).items():
        torch.testing.assert_close(
            value, expected[name], msg=lambda m, name=name: f"{name}: {m}", **tolerance
        )


def assert_untouched(model: nn.Module, before: Mapping[str, Tensor], classes: list[type]) -> None:
    """Values bit for bit, classes and keys as they were."""
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert [type(m) for m in model.modules()] == classes


def classes(model: nn.Module) -> list[type]:
    return [type(m) for m in model.modules()]
