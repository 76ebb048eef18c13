"""Computations that keep their inputs alone: the same values and gradients of any order, whatever stands around."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from peftlib.kernels import recomputed as module
from peftlib.kernels.recomputed import recomputed
from tests.twin import assert_twins

D = torch.float64
Leaves = dict[str, Tensor]


def normed(x: Tensor, weight: Tensor | None, down: Tensor) -> Tensor:
    return F.gelu(F.linear(F.layer_norm(x, x.shape[-1:], weight), down)).square()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each use of the autograd function: no test of it shall pass without it."""
    found: list[int] = []
    apply = module._Recomputed.apply
    monkeypatch.setattr(module._Recomputed, "apply", lambda *args: found.append(1) or apply(*args))
    return found


def leaves(*trained: str, dtype: torch.dtype = D) -> Leaves:
    made = {"x": torch.randn(3, 5, 7), "weight": torch.randn(7), "down": torch.randn(2, 7)}
    return {name: t.to(dtype).requires_grad_(name in trained) for name, t in made.items()}


def kept(run: Callable[[], Tensor]) -> list[Tensor]:
    found: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
        run()
    return found


@pytest.mark.parametrize("trained", [("x", "weight", "down"), ("x",), ("down",), ("weight", "down")])
@pytest.mark.usefixtures("poisoned_memory")
def test_equals_the_plain_call_and_keeps_its_inputs_alone(calls: list[int], trained: tuple[str, ...]) -> None:
    t = leaves(*trained)
    wanted = {name: t[name] for name in trained}
    assert_twins(lambda: recomputed(normed, *t.values()), lambda: normed(*t.values()), wanted)
    assert {id(k) for k in kept(lambda: recomputed(normed, *t.values()))} <= {id(v) for v in t.values()}
    assert len(calls) == 2
    for none in (torch.no_grad, torch.inference_mode):
        with none():
            assert torch.equal(recomputed(normed, *t.values()), normed(*t.values()))
    assert len(calls) == 2


def test_a_missing_tensor_stays_missing(calls: list[int]) -> None:
    t = leaves("x", "down")
    run = lambda which: which(t["x"], None, t["down"])  # noqa: E731
    assert_twins(lambda: run(lambda *a: recomputed(normed, *a)), lambda: run(normed), {"x": t["x"]})
    assert calls


def test_gradients_of_gradients(calls: list[int]) -> None:
    t = leaves("x", "weight", "down")
    assert torch.autograd.gradgradcheck(lambda *a: recomputed(normed, *a), tuple(t.values()))
    # One input made of another: what only this call contributes, once.
    x = t["x"].detach().requires_grad_()
    twin, ours = (
        torch.autograd.grad(
            torch.autograd.grad(run(x, None, x[0, :2]).sum(), x, create_graph=True)[0].sum(), x
        )[0]
        for run in (normed, lambda *a: recomputed(normed, *a))
    )
    torch.testing.assert_close(ours, twin)
    assert calls


@pytest.mark.parametrize("reentrant", [False, True])
def test_inside_a_checkpoint(calls: list[int], reentrant: bool) -> None:
    found = []
    t = leaves("x", "weight", "down")
    for run in (lambda *a: checkpoint(partial(recomputed, normed), *a, use_reentrant=reentrant), normed):
        run(*t.values()).sum().backward()
        found.append([p.grad for p in t.values()])
        for p in t.values():
            p.grad = None
    torch.testing.assert_close(*found)
    assert calls


def test_autocast_of_the_forward_holds_in_the_backward(calls: list[int]) -> None:
    t = leaves("x", "weight", "down", dtype=torch.float32)

    def run(which: Callable[..., Tensor]) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            y = which(*t.values())
        return [y, *torch.autograd.grad(y, list(t.values()), torch.ones_like(y))]

    for ours, plain in zip(run(lambda *a: recomputed(normed, *a)), run(normed), strict=True):
        assert ours.dtype == plain.dtype
        torch.testing.assert_close(ours, plain, rtol=0, atol=0)
    assert calls


def test_transforms_and_the_compiler_take_the_function_itself(calls: list[int]) -> None:
    t = leaves("x", "weight", "down")
    ours = lambda x: recomputed(normed, x, t["weight"], t["down"])  # noqa: E731
    plain = lambda x: normed(x, t["weight"], t["down"])  # noqa: E731
    torch.testing.assert_close(torch.func.vmap(ours)(t["x"]), plain(t["x"]))
    jacobians = (torch.func.jacrev(f)(t["x"]) for f in (ours, plain))
    torch.testing.assert_close(*jacobians)
    forward = (torch.func.jvp(f, (t["x"],), (t["x"],))[1] for f in (ours, plain))
    torch.testing.assert_close(*forward)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    assert_twins(lambda: compiled(t["x"]), lambda: plain(t["x"]), t)
    assert not calls
