"""Causal attention over a prefix in two calls, against one softmax written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from peftlib import attention
from peftlib.attention import PrefixScope
from peftlib.kernels import causal_prefix as module
from peftlib.kernels import reference
from peftlib.kernels.causal_prefix import can_split, causal_prefix
from tests.twin import assert_twins

D = torch.float64


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each use of the two calls: no test of them shall pass without."""
    found: list[int] = []
    monkeypatch.setattr(attention, "causal_prefix", lambda *a: found.append(1) or causal_prefix(*a))
    return found


def leaves(B: int = 2, H: int = 3, T: int = 5, P: int = 2, E: int = 4, dtype: torch.dtype = D) -> Any:
    """q, k and v as views of one projection, as models make them, and a prefix (P, H, E) for all rows."""
    qkv = torch.randn(B, T, 3, H, E, dtype=D).to(dtype).requires_grad_()
    own = [torch.randn(P, H, E, dtype=D).to(dtype).requires_grad_() for _ in range(2)]
    return {"qkv": qkv, "key": own[0], "value": own[1]}


def scoped(t: dict[str, Tensor], **options: Any) -> Tensor:
    query, key, value = t["qkv"].permute(2, 0, 3, 1, 4)
    with PrefixScope(t["key"], t["value"]):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, **options)


def naive(t: dict[str, Tensor], scale: float | None = None) -> Tensor:
    query, key, value = t["qkv"].permute(2, 0, 3, 1, 4)
    own = (p.transpose(0, 1).expand(len(query), -1, -1, -1) for p in (t["key"], t["value"]))
    return reference.causal_prefix(query, key, value, *own, scale=scale)


@given(
    B=st.sampled_from([1, 2]),
    H=st.sampled_from([1, 3]),
    T=st.sampled_from([1, 2, 7, 33, 65]),
    P=st.sampled_from([1, 5, 40]),
    E=st.sampled_from([1, 4, 9]),
    scale=st.sampled_from([None, 0.3, 2.0]),
)
@settings(max_examples=60)
@pytest.mark.usefixtures("poisoned_memory")
def test_equals_one_softmax(B: int, H: int, T: int, P: int, E: int, scale: float | None) -> None:
    module.LONG = 0
    t = leaves(B, H, T, P, E)
    assert_twins(lambda: scoped(t, scale=scale), lambda: naive(t, scale), t)
    with torch.no_grad():
        torch.testing.assert_close(scoped(t, scale=scale), naive(t, scale))


def test_a_prefix_for_each_row(calls: list[int]) -> None:
    t = leaves()
    rows = {
        "qkv": t["qkv"],
        **{n: torch.randn(2, 2, 3, 4, dtype=D, requires_grad=True) for n in ("key", "value")},
    }

    def twin() -> Tensor:
        each = [{n: v[i : i + 1] if n == "qkv" else v[i] for n, v in rows.items()} for i in range(2)]
        return torch.cat([naive(one) for one in each])

    assert_twins(lambda: scoped(rows), twin, rows)
    assert calls


def test_large_scores_and_a_prefix_that_outweighs_the_rest_stay_finite(calls: list[int]) -> None:
    for factors in ((60.0, 1.0), (1.0, 60.0), (60.0, 60.0)):
        t = leaves()
        t["qkv"] = (t["qkv"] * factors[0]).detach().requires_grad_()
        t["key"] = (t["key"] * factors[1]).detach().requires_grad_()
        assert_twins(lambda t=t: scoped(t), lambda t=t: naive(t), t)
    assert calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_errors_are_those_of_one_call(calls: list[int], dtype: torch.dtype, monkeypatch: Any) -> None:
    """Against float64: no farther off than torch's one call with a mask is in that dtype, and rounding once more."""
    t = leaves(2, 2, 130, 7, 16, dtype)
    exact = {n: v.detach().to(D).requires_grad_() for n, v in t.items()}
    weight = torch.randn(2, 2, 130, 16, dtype=D)

    def run(t: dict[str, Tensor], which: Any) -> list[Tensor]:
        y = which(t)
        return [y, *torch.autograd.grad(y, list(t.values()), weight.to(y.dtype))]

    true, ours = run(exact, naive), run(t, scoped)
    assert len(calls) == 1
    monkeypatch.setattr(module, "LONG", 10**9)
    one = run(t, scoped)
    assert len(calls) == 1
    for ours_i, one_i, true_i in zip(ours, one, true, strict=True):
        error, own = ((v.to(D) - true_i).norm() / true_i.norm() for v in (ours_i, one_i))
        assert error <= 1.5 * own + torch.finfo(dtype).eps, (dtype, float(error), float(own))


def test_no_mask_and_no_copy_of_the_batch() -> None:
    """No tensor of T columns and rows, none with a prefix for each row, and K and V kept as they came."""
    t = leaves(3, 2, 64, 5, 8)
    made: list[tuple[torch.dtype, int]] = []

    class New(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            mine = t["qkv"].untyped_storage().data_ptr()
            for o in out if isinstance(out, (tuple, list)) else [out]:
                if o.untyped_storage().data_ptr() != mine:
                    made.append((o.dtype, o.untyped_storage().nbytes()))
            return out

    kept: list[Tensor] = []
    with New(), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        scoped(t)
    assert {dtype for dtype, _ in made} == {D}, "a mask"
    assert max(n for _, n in made) == 8 * 3 * 2 * 64 * 8, "wider than the output"
    assert max(k.untyped_storage().nbytes() for k in kept) == t["qkv"].untyped_storage().nbytes()
    sizes = {k.untyped_storage().data_ptr(): k.untyped_storage().nbytes() for k in kept}
    out, lse, own = 3 * 2 * 64 * 8, 3 * 2 * 64, 2 * 5 * 2 * 8
    assert sum(sizes.values()) == 8 * (t["qkv"].numel() + out + lse + own)


def test_gradients_of_gradients(calls: list[int]) -> None:
    t = leaves(1, 2, 3, 2, 2)
    assert torch.autograd.gradgradcheck(
        lambda *v: scoped(dict(zip(t, v, strict=True)), scale=0.7), tuple(t.values())
    )
    assert calls


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(calls: list[int], reentrant: bool) -> None:
    t, found = leaves(), []
    for run in (
        lambda *v: checkpoint(lambda *v: scoped(dict(zip(t, v, strict=True))), *v, use_reentrant=reentrant),
        lambda *v: naive(dict(zip(t, v, strict=True))),
    ):
        run(*t.values()).square().sum().backward()
        found.append([p.grad for p in t.values()])
        for p in t.values():
            p.grad = None
    torch.testing.assert_close(*found)
    assert calls


def test_where_one_call_is_right(calls: list[int]) -> None:
    """What forbids the flash kernel, needs derivatives that it does not have, or has to be seen further out."""
    t = leaves()
    with sdpa_kernel(SDPBackend.MATH):
        assert_twins(lambda: scoped(t), lambda: naive(t), t)
    run = lambda qkv: scoped({**t, "qkv": qkv})  # noqa: E731
    plain = lambda qkv: naive({**t, "qkv": qkv})  # noqa: E731
    forward = (torch.func.jvp(f, (t["qkv"],), (t["qkv"],))[1] for f in (run, plain))
    with sdpa_kernel(SDPBackend.MATH):
        torch.testing.assert_close(*forward)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert_twins(lambda: compiled(t["qkv"]), lambda: naive(t), t)
    with PrefixScope(torch.randn(1, 3, 4, dtype=D), torch.randn(1, 3, 4, dtype=D)):
        assert not torch.allclose(scoped(t), naive(t))
    dropped = scoped(t, dropout_p=0.5)
    assert not torch.allclose(dropped, naive(t))
    assert not calls
    with torch.autocast("cpu", torch.bfloat16):
        assert scoped({n: v.float() for n, v in t.items()}).dtype == torch.bfloat16
        assert not calls
        scoped({n: v.bfloat16() for n, v in t.items()})
        assert calls


def test_features_that_do_not_lie_together_take_one_call(calls: list[int]) -> None:
    t = leaves()
    t["qkv"] = torch.randn(2, 4, 3, 3, 5, dtype=D).transpose(1, 4).requires_grad_()
    assert_twins(lambda: scoped(t), lambda: naive(t), t)
    assert not calls


def test_fake_tensors_take_the_same_way(calls: list[int]) -> None:
    with FakeTensorMode():
        t = leaves()
        y = scoped(t)
        grads = torch.autograd.grad(y.sum(), list(t.values()))
    assert calls
    assert y.shape == (2, 3, 5, 4)
    assert [g.shape for g in grads] == [v.shape for v in t.values()]


def test_short_sequences_take_one_call(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONG", 6)
    t = leaves()
    assert_twins(lambda: scoped(t), lambda: naive(t), t)
    assert not calls
    query = key = value = torch.randn(1, 1, 6, 4)
    own = torch.randn(1, 1, 2, 4)
    assert can_split(query, key, value, (own, own))
    assert not can_split(query, key[:, :, :5], value[:, :, :5], (own, own))
