"""The Triton kernels against their naive twins: on a GPU, or on the CPU under triton's interpreter.

Not collected by itself: triton decides when it is imported whether it interprets, so ``test_triton.py`` runs this file
in a process of its own, with ``TRITON_INTERPRET=1`` or on a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.checkpoint import checkpoint

import peftlib
from peftlib import LoRA
from peftlib.kernels import gpu, products, reference, triton_ops
from peftlib.kernels.low_rank import add_low_rank, low_rank_linear
from peftlib.kernels.routed import add_routed
from peftlib.kernels.shared_input import LowRankLinear, can_share, low_rank_linears
from tests.twin import randomize

D = torch.float64
DEVICE = "cpu" if triton_ops.INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
rows_ = st.sampled_from([0, 1, 2, 63, 65])
widths = st.sampled_from([1, 7, 40, 130, 150])
ranks = st.sampled_from([1, 3, 8, 16, 17, 64])
dtypes = st.sampled_from(DTYPES)
few = settings(max_examples=int(os.environ.get("EXAMPLES", "5")))


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels run for small inputs and, interpreted, on a CPU; and fresh memory is NaN."""
    if DEVICE == "cpu":
        monkeypatch.setattr(gpu, "takes", lambda x: True)
        monkeypatch.setattr(gpu, "_found", dict.fromkeys(keys(), True))
    monkeypatch.setattr(products, "ENOUGH", 0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def keys() -> list[tuple[torch.device, torch.dtype, int]]:
    return [(torch.device("cpu"), dtype, rank) for dtype in DTYPES for rank in (16, 32, 64)]


def make(*shape: int, dtype: torch.dtype = torch.float32, strided: bool = False) -> Tensor:
    """Random numbers; strided: neither axis contiguous."""
    if strided:
        wide = make(shape[-1] * 2, *shape[:-1], dtype=dtype)
        return wide[::2].movedim(0, -1)
    return torch.randn(*shape, dtype=D).to(DEVICE, dtype)


def seed_of(number: int = 2**40 + 5) -> Tensor:
    return torch.tensor(number, device=DEVICE)


def close(found: Tensor, twin: Callable[..., Tensor], *given: Tensor) -> None:
    """No further from the twin in float64 than the twin in this dtype is, or than a rounding of each number."""
    truth, rounded = twin(*(t.to(D) for t in given)), twin(*given)
    assert found.shape == truth.shape
    assert found.dtype == given[0].dtype
    assert found.isfinite().all()
    eps = torch.finfo(found.dtype).eps
    allowed = 1.5 * (rounded.to(D) - truth).norm() + eps * truth.norm() + 1e-30
    assert (found.to(D) - truth).norm() <= allowed


# -- each operator ---------------------------------------------------------------------------------------------------


@given(n=rows_, i=widths, rank=ranks, dtype=dtypes, strided=st.booleans(), p=st.sampled_from([0.0, 0.3]))
@few
def test_products_with_dropout(
    n: int, i: int, rank: int, dtype: torch.dtype, strided: bool, p: float
) -> None:
    torch.manual_seed(n + i)
    count, seed = 1 + rank % 2, seed_of()
    x, dx = make(n, i, dtype=dtype, strided=strided), make(n, i, dtype=dtype, strided=strided)
    a, g = make(count * rank, i, dtype=dtype), make(count * rank, n, dtype=dtype)
    keeps = [reference.kept_by_counter(seed, n, i, w, p) for w in range(count)]

    def shrunk(x: Tensor, a: Tensor) -> Tensor:
        return torch.cat([a_i @ (x * k).T for a_i, k in zip(a.chunk(count), keeps, strict=True)]) * 2

    def gradient(x: Tensor, g: Tensor) -> Tensor:
        return torch.cat([g_i @ (x * k) for g_i, k in zip(g.chunk(count), keeps, strict=True)])

    def added(dx: Tensor, a: Tensor, g: Tensor) -> Tensor:
        pairs = zip(g.chunk(count), a.chunk(count), keeps, strict=True)
        return dx + sum(g_i.T @ a_i * k for g_i, a_i, k in pairs)

    close(triton_ops.shrink(x, a, seed, 2.0, p, count), shrunk, x, a)
    close(triton_ops.factor_gradient(x, g, seed, p, count), gradient, x, g)
    before = dx.clone()
    triton_ops.add_input_gradient(dx, g, a, seed, p, count)
    close(dx, added, before, a, g)


@given(n=rows_, o=st.sampled_from([1, 40, 130, 300]), rank=ranks, dtype=dtypes, strided=st.booleans())
@few
def test_one_pass_over_the_gradient(n: int, o: int, rank: int, dtype: torch.dtype, strided: bool) -> None:
    torch.manual_seed(n + o)
    dy, b, s = (
        make(n, o, dtype=dtype, strided=strided),
        make(o, rank, dtype=dtype),
        make(rank, n, dtype=dtype),
    )
    g, db = triton_ops.rank_gradients(dy, b, s, 0.5)
    close(g, lambda dy, b: 0.5 * b.T @ dy.T, dy, b)
    close(db, lambda dy, s: (s @ dy).T, dy, s)


@given(
    which=st.lists(st.integers(-1, 2), min_size=1, max_size=5),
    t=st.sampled_from([1, 3, 17, 33]),
    c=widths,
    rank=ranks,
    dtype=dtypes,
    strided=st.booleans(),
)
@few
def test_routed(which: list[int], t: int, c: int, rank: int, dtype: torch.dtype, strided: bool) -> None:
    torch.manual_seed(t + c)
    b = len(which)
    x, factor = make(b, t, c, dtype=dtype, strided=strided), make(3, rank, c, dtype=dtype)
    s, scale = make(b, t, rank, dtype=dtype), make(3)
    rows = torch.tensor(which, dtype=torch.int32, device=DEVICE)
    own = torch.tensor([[float(u == w) for u in range(3)] for w in which], device=DEVICE)  # (B, U)

    def of_rows(factor: Tensor) -> Tensor:
        return torch.einsum("bu,urc->brc", own.to(factor.dtype), factor)

    def shrunk(x: Tensor, factor: Tensor) -> Tensor:
        return x @ of_rows(factor * scale.to(factor.dtype)[:, None, None]).mT

    def outer(s: Tensor, x: Tensor) -> Tensor:
        return torch.einsum("bu,btr,btc->urc", own.to(x.dtype), s, x)

    close(triton_ops.routed_shrink(x, factor, rows, scale), shrunk, x, factor)
    turned = factor.mT.contiguous().mT
    assert torch.equal(
        triton_ops.routed_shrink(x, factor, rows, scale), triton_ops.routed_shrink(x, turned, rows, scale)
    )
    close(triton_ops.routed_expand(x, s, factor, rows), lambda x, s, f: x + s @ of_rows(f), x, s, factor)
    close(triton_ops.routed_expand(None, s, factor, rows), lambda s, f: s @ of_rows(f), s, factor)
    close(triton_ops.routed_outer(s, x, rows, 3), outer, s, x)


@pytest.mark.parametrize("n, i", [(300, 40), (40, 300)])
def test_many_blocks_and_the_same_bits_twice(n: int, i: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks of several blocks in each direction."""
    monkeypatch.setattr(triton_ops, "PROGRAMS", 8)
    x, a, g, dy = make(n, i), make(3, i), make(3, n), make(n, i)
    b, s, seed = make(i, 3), make(3, n), seed_of()
    keep = reference.kept_by_counter(seed, n, i, 0, 0.1)
    close(triton_ops.factor_gradient(x, g, seed, 0.1, 1), lambda x, g: g @ (x * keep), x, g)
    grad, db = triton_ops.rank_gradients(dy, b, s, 1.0)
    close(grad, lambda dy, b: b.T @ dy.T, dy, b)
    close(db, lambda dy, s: (s @ dy).T, dy, s)
    again = triton_ops.rank_gradients(dy, b, s, 1.0)
    assert torch.equal(grad, again[0])
    assert torch.equal(db, again[1])
    first, second = (triton_ops.factor_gradient(x, g, seed, 0.1, 1) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(triton_ops.shrink(x, a, seed, 1.0, 0.1, 1), triton_ops.shrink(x, a, seed, 1.0, 0.1, 1))


# -- the mask --------------------------------------------------------------------------------------------------------


def test_the_published_vectors_of_philox() -> None:
    """Of the twin, from the authors' known answers for philox4x32-7 and -10."""
    ones = tuple(torch.tensor(0xFFFFFFFF) for _ in range(4))
    zeros = tuple(torch.tensor(0) for _ in range(4))
    run = lambda c, k, rounds: [int(w) for w in reference.philox(c, k, rounds)]  # noqa: E731
    assert run(zeros, (0, 0), 10) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert run(ones, (0xFFFFFFFF, 0xFFFFFFFF), 10) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    assert run(zeros, (0, 0), 7) == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]


@pytest.mark.parametrize("p", [1e-6, 0.05, 0.5, 0.9])
def test_each_element_is_dropped_with_that_probability_and_independently(p: float) -> None:
    """Of what the kernel draws: seen in a gradient that is one wherever an element is kept."""
    n, i = 192, 640
    masks = []
    for number in (1, 2, 2**61 + 1):
        keep, *ones = (make(*shape, dtype=torch.float16) for shape in ((n, i), (1, n), (1, i)))
        triton_ops.add_input_gradient(keep.zero_(), *(t.fill_(1) for t in ones), seed_of(number), p, 1)
        assert set(keep.unique().tolist()) <= {0.0, 1.0}
        assert torch.equal(keep != 0, reference.kept_by_counter(seed_of(number), n, i, 0, p))
        masks.append(1 - keep.to(D))
    exact = 1 - triton_ops.keep_probability(p)
    assert abs(exact - p) < 2**-15
    mask = masks[0]
    assert abs(mask.mean() - exact) < 4.5 * (exact * (1 - exact) / mask.numel()) ** 0.5
    if p > 0.01:
        pairs = [(mask[:, :-k], mask[:, k:]) for k in (1, 2, 4, 8)] + [(mask[:-1], mask[1:])]
        for one, other in [*pairs, (masks[0], masks[1]), (masks[1], masks[2])]:
            together = (one * other).mean()
            assert abs(together - exact**2) < 4.5 * (exact**2 * (1 - exact**2) / one.numel()) ** 0.5
        spread = mask.mean(1).var() / (exact * (1 - exact) / i)
        assert abs(spread - 1) < 0.4


def test_forward_and_backward_draw_the_same_and_each_linear_its_own() -> None:
    n, i, p, count, seed = 37, 50, 0.4, 3, seed_of(7)
    x, a = torch.ones(n, i, device=DEVICE), torch.eye(i, device=DEVICE).repeat(count, 1)
    # A = 1 and G = 1 let the masks of all three kernels through.
    forward = triton_ops.shrink(x, a[: i * count], seed, 1.0, p, count).view(count, i, n).mT
    backward = triton_ops.factor_gradient(
        x, torch.eye(n, device=DEVICE).repeat(count, 1), seed, p, count
    ).view(count, n, i)
    assert torch.equal(forward, backward)
    dx = torch.zeros(n, i, device=DEVICE)
    ones = torch.ones(count, n, device=DEVICE), torch.ones(count, i, device=DEVICE)
    triton_ops.add_input_gradient(dx, *ones, seed, p, count)
    assert torch.equal(dx, backward.sum(0))
    assert not torch.equal(backward[0], backward[1])


# -- behind the library's own functions ------------------------------------------------------------------------------


def inputs(dtype: torch.dtype = torch.float32, rank: int = 3) -> dict[str, Tensor]:
    shapes = {
        "x": (5, 9, 20),
        "weight": (30, 20),
        "bias": (30,),
        "a": (rank, 20),
        "b": (30, rank),
        "y": (5, 9, 30),
    }
    return {n: make(*shape, dtype=dtype).requires_grad_() for n, shape in shapes.items()}


def linear(t: dict[str, Tensor], p: float) -> Tensor:
    return low_rank_linear(t["x"], t["weight"], t["bias"], t["a"], t["b"], 2.0, p)


def opaque(t: dict[str, Tensor], p: float) -> Tensor:
    return add_low_rank(t["y"], t["x"], t["a"], t["b"], 2.0, p)


def naive(which: Callable[..., Tensor], t: dict[str, Tensor], p: float) -> Tensor:
    """The same in plain operators on float64, with the mask that the same generator leads to."""
    x = t["x"]
    if p:
        seed = torch.randint(2**62, (), device=DEVICE)
        keep = reference.kept_by_counter(seed, 45, 20, 0, p).view_as(x)
        x = x * keep / triton_ops.keep_probability(p)
    base = t["y"] if which is opaque else torch.nn.functional.linear(t["x"], t["weight"], t["bias"])
    return base + reference.low_rank(x, t["a"], t["b"], 2.0)


both = pytest.mark.parametrize(
    "run, names", [(linear, ("x", "weight", "bias", "a", "b")), (opaque, ("x", "a", "b", "y"))]
)


@both
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_values_and_all_gradients(
    run: Callable[..., Tensor], names: tuple[str, ...], dtype: torch.dtype, p: float, used: list[str]
) -> None:
    low = inputs(dtype)
    exact = {n: t.detach().to(D).requires_grad_() for n, t in low.items()}
    seeded = lambda f: lambda: (torch.manual_seed(3), f())[1]  # noqa: E731
    truth = gradients_of(seeded(lambda: naive(run, exact, p)), {n: exact[n] for n in names})
    twin = gradients_of(seeded(lambda: naive(run, low, p)), {n: low[n] for n in names})
    ours = gradients_of(seeded(lambda: run(low, p)), {n: low[n] for n in names})
    for name, value in truth.items():
        error, allowed = ((t[name].to(D) - value).norm() / value.norm() for t in (ours, twin))
        assert error <= 1.5 * allowed + torch.finfo(dtype).eps / 8, name
    assert ("shrink" in used) == bool(p)
    assert "rank_gradients" in used
    with torch.no_grad():
        assert torch.equal(seeded(lambda: run(low, p))(), ours["output"]) or not p


def gradients_of(run: Callable[[], Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    out = run()
    torch.manual_seed(1234)
    weight = torch.randn(out.shape, dtype=D).to(out)
    grads = torch.autograd.grad(out, list(leaves.values()), weight)
    return {"output": out.detach()} | dict(zip(leaves, grads, strict=True))


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operators that were called."""
    names: list[str] = []
    for name in ("shrink", "factor_gradient", "add_input_gradient", "rank_gradients"):
        op = getattr(triton_ops, name)
        monkeypatch.setattr(triton_ops, name, lambda *a, op=op, name=name: names.append(name) or op(*a))
    return names


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("second", [False, True])
def test_linears_of_one_input(p: float, second: bool, used: list[str]) -> None:
    t = inputs()
    linears = [
        LowRankLinear(make(o, 20), None, make(3, 20).requires_grad_(), make(o, 3).requires_grad_())
        for o in (30, 10, 30)
    ]
    leaves = {"x": t["x"]} | {f"{n}{i}": getattr(one, n) for i, one in enumerate(linears) for n in "ab"}
    assert can_share(t["x"], linears, p)
    uneven = [*linears, linears[0]._replace(a=make(4, 20).requires_grad_(), b=make(30, 4).requires_grad_())]
    assert can_share(t["x"], uneven, p) == (not p)

    def twin() -> Tensor:
        x, outs = t["x"], []
        seed = torch.randint(2**62, (), device=DEVICE) if p else None
        for i, one in enumerate(linears):
            dropped = x
            if seed is not None:
                keep = reference.kept_by_counter(seed, 45, 20, i, p).view_as(x)
                dropped = x * keep / triton_ops.keep_probability(p)
            outs.append(x @ one.weight.T + reference.low_rank(dropped, one.a, one.b, 2.0))
        return torch.cat(outs, -1)

    def run(which: Callable[[], Tensor]) -> dict[str, Tensor]:
        torch.manual_seed(3)
        if not second:
            return gradients_of(which, leaves)
        grads = torch.autograd.grad(which().square().sum(), list(leaves.values()), create_graph=True)
        return gradients_of(lambda: torch.cat([g.flatten() for g in grads]) / 100, leaves)

    ours, theirs = run(lambda: torch.cat(low_rank_linears(t["x"], linears, 2.0, p), -1)), run(twin)
    for name, value in theirs.items():
        assert (ours[name] - value).norm() <= 1e-5 * value.norm(), name
    assert ("shrink" in used) == bool(p)
    assert "rank_gradients" in used


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("second", [False, True])
def test_rows_of_several_tunings(dtype: torch.dtype, second: bool) -> None:
    leaves = {
        "y": make(5, 3, 30, dtype=dtype),
        "x": make(5, 3, 20, dtype=dtype),
        "a": make(3, 4, 20, dtype=dtype),
        "b": make(3, 4, 30, dtype=dtype),
    }
    rows, scale = torch.tensor([2, -1, 0, 0, 2], dtype=torch.int32, device=DEVICE), make(3)

    def run(which: Callable[..., Tensor], to: torch.dtype) -> dict[str, Tensor]:
        given = {n: t.detach().to(to).requires_grad_() for n, t in leaves.items()}
        if not second:
            return gradients_of(lambda: which(*given.values(), rows, scale), given)
        y = which(*given.values(), rows, scale)
        grads = torch.autograd.grad(y.square().sum(), list(given.values()), create_graph=True)
        return gradients_of(lambda: torch.cat([g.flatten() for g in grads]) / 100, given)

    twin = lambda y, *rest: y + reference.routed(*rest)  # noqa: E731
    ours, plain, truth = run(add_routed, dtype), run(twin, dtype), run(twin, D)
    for name, value in truth.items():
        error, allowed = ((t[name].to(D) - value).norm() / value.norm() for t in (ours, plain))
        assert error <= 1.5 * allowed + torch.finfo(dtype).eps / 8, name
    if not second:
        assert not ours["a"][1].any()  # nobody's
        assert torch.equal(ours["output"][1], leaves["y"][1])


def test_routed_batches_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(20, 24), nn.Tanh(), nn.Linear(24, 20)).to(DEVICE)
    leaves = {"x": make(5, 7, 20).requires_grad_()}
    for name, rank in (("one", 2), ("two", 5)):
        tuning = peftlib.attach(model, LoRA(rank=rank, alpha=rank + 1), name=name, freeze=False)
        leaves |= {f"{name}.{n}": parameter for n, parameter in randomize(tuning, 0.3).items()}
    names = ["two", None, "one", "one", "two"]

    def run() -> Tensor:
        with peftlib.route(model, names):
            return model(leaves["x"])

    calls: list[int] = []
    shrink = triton_ops.routed_shrink
    monkeypatch.setattr(triton_ops, "routed_shrink", lambda *a: calls.append(1) or shrink(*a))
    ours = gradients_of(run, leaves)
    with torch.no_grad():
        torch.testing.assert_close(run(), ours["output"])
    assert calls
    calls.clear()
    monkeypatch.setattr(gpu, "takes", lambda x: False)
    for name, value in gradients_of(run, leaves).items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-4)
    assert not calls


def test_second_derivatives() -> None:
    t = {n: v.detach().requires_grad_() for n, v in inputs().items()}
    leaves = [t[n] for n in ("x", "a", "b")]

    def penalty(run: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        torch.manual_seed(3)
        grads = torch.autograd.grad(run().square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    for ours, theirs in zip(
        penalty(lambda: linear(t, 0.3)), penalty(lambda: naive(linear, t, 0.3)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_checkpoints_and_seeds_replay_the_same_elements(use_reentrant: bool | None, used: list[str]) -> None:
    model = nn.Sequential(nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 30)).to(DEVICE)
    leaves = dict(randomize(peftlib.attach(model, LoRA(rank=3, dropout=0.3), targets=["0", "2"])))
    leaves["x"] = make(5, 9, 20).requires_grad_()

    def run(again: bool | None) -> list[Tensor]:
        torch.manual_seed(3)
        y = model(leaves["x"]) if again is None else checkpoint(model, leaves["x"], use_reentrant=again)
        y.square().sum().backward()
        grads = [t.grad.clone() for t in leaves.values()]
        for t in leaves.values():
            t.grad = None
        return [y.detach(), *grads]

    for one, other in zip(run(use_reentrant), run(None), strict=True):
        assert torch.equal(one, other)
    torch.manual_seed(4)
    assert not torch.equal(model(leaves["x"]), run(None)[0])
    assert {"shrink", "factor_gradient", "add_input_gradient"} <= set(used)


def test_under_the_compiler(used: list[str]) -> None:
    t = inputs()
    leaves = {n: t[n] for n in ("x", "a", "b")}
    backend = "aot_eager" if triton_ops.INTERPRETED else "inductor"
    fast = torch.compile(lambda: linear(t, 0.3), backend=backend, fullgraph=True)
    names = list(leaves)
    torch.manual_seed(3)
    first, second = fast(), fast()
    assert not torch.equal(first, second)
    # Which elements were dropped shows where A and B let single ones through; here the mean must be that of the base.
    eager = linear(t, 0.3)
    assert first.shape == eager.shape
    if triton_ops.INTERPRETED:  # the very draws of eager torch
        torch.manual_seed(3)
        found = gradients_of(fast, leaves)
        torch.manual_seed(3)
        expected = gradients_of(lambda: linear(t, 0.3), leaves)
        for n in ("output", *names):
            torch.testing.assert_close(found[n], expected[n], rtol=1e-4, atol=1e-4)
        assert "shrink" in used


def test_where_they_do_not_run(used: list[str]) -> None:
    t = inputs()
    wide = {n: v.detach().to(D).requires_grad_() for n, v in t.items()}
    linear(wide, 0.3).sum().backward()
    large = inputs(rank=65)
    linear(large, 0.3).sum().backward()
    rest = {n: v.detach() for n, v in t.items()}
    torch.func.grad(lambda x: linear(rest | {"x": x}, 0.0).sum())(rest["x"])
    torch.vmap(lambda x: linear(rest | {"x": x}, 0.0))(rest["x"])
    assert not used


def test_under_autocast() -> None:
    t = inputs()
    with torch.autocast(DEVICE, torch.bfloat16):
        torch.manual_seed(3)
        y = linear(t, 0.3)
    low = {n: v.detach().to(torch.bfloat16) for n, v in t.items()}
    torch.manual_seed(3)
    torch.testing.assert_close(y, linear({n: v.requires_grad_() for n, v in low.items()}, 0.3))


# -- operators of torch ----------------------------------------------------------------------------------------------


def calls() -> dict[str, tuple[Any, ...]]:
    x, a, g, s, b = make(40, 20), make(6, 20), make(6, 40), make(3, 40), make(20, 3)
    seed, which = seed_of(), torch.tensor([0, -1], dtype=torch.int32, device=DEVICE)
    xb, factor, sb = make(2, 5, 20), make(3, 4, 20), make(2, 5, 4)
    return {
        "shrink": (x, a, seed, 2.0, 0.3, 2),
        "factor_gradient": (x, g, seed, 0.3, 2),
        "add_input_gradient": (x, g, a, seed, 0.3, 2),
        "rank_gradients": (x, b, s, 2.0),
        "routed_shrink": (xb, factor, which, make(3)),
        "routed_expand": (xb, sb, factor, which),
        "routed_outer": (sb, xb, which, 3),
    }


@pytest.mark.parametrize("name", list(calls()))
def test_opcheck(name: str) -> None:
    torch.use_deterministic_algorithms(False)
    given = calls()[name]
    torch.library.opcheck(getattr(triton_ops, name), given)
    if name == "shrink":
        x, a, *rest = given
        torch.library.opcheck(triton_ops.shrink, (x.requires_grad_(), a.requires_grad_(), *rest))


def test_gradients_of_the_shrinking_operator() -> None:
    x, a, seed = make(10, 12).requires_grad_(), make(4, 12).requires_grad_(), seed_of()
    keep = [reference.kept_by_counter(seed, 10, 12, w, 0.3) for w in range(2)]
    twin = lambda: torch.cat([a_i @ (x * k).T for a_i, k in zip(a.chunk(2), keep, strict=True)]) * 2  # noqa: E731
    ours = gradients_of(lambda: triton_ops.shrink(x, a, seed, 2.0, 0.3, 2), {"x": x, "a": a})
    theirs = gradients_of(twin, {"x": x, "a": a})
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-4)


def test_fake_tensors_follow() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for name, given in calls().items():
            fake = [
                mode.from_tensor(v) if isinstance(v, Tensor) and not isinstance(v, FakeTensor) else v
                for v in given
            ]
            out = getattr(triton_ops, name)(*fake)
            assert out is None or all(
                isinstance(t, FakeTensor) for t in (out if isinstance(out, tuple) else (out,))
            )
        t = {n: v.detach().requires_grad_() for n, v in inputs().items()}
        linear(t, 0.3).sum().backward()
        assert t["a"].grad.shape == t["a"].shape


# -- the trial -------------------------------------------------------------------------------------------------------


def test_a_trial_passes_where_the_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_found", {})
    for dtype in DTYPES:
        assert gpu._worst_error(torch.device(DEVICE), dtype, 16) < 0.02
    x = make(40, 20)
    assert gpu.ready(x, x, 8)
    assert list(gpu._found) == [(x.device, torch.float32, 16)]


@pytest.mark.parametrize("what", ["raises", "wrong"])
def test_what_fails_its_trial_is_logged_once_and_torch_runs(
    what: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(gpu, "_found", {})

    def shrink(x: Tensor, a: Tensor, *rest: Any) -> Tensor:
        if what == "raises":
            raise RuntimeError("no kernel image\nis available")
        return a @ x.T * 1.1

    monkeypatch.setattr(triton_ops, "shrink", shrink)
    t = inputs()
    for _ in range(2):
        linear(t, 0.3).sum().backward()
    assert len(caplog.records) == 1
    reason = "RuntimeError: no kernel image" if what == "raises" else "a result is off by"
    assert reason in caplog.text
    monkeypatch.setattr(gpu, "_found", {})

    def full(*given: Any) -> Tensor:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(triton_ops, "shrink", full)
    with pytest.raises(torch.OutOfMemoryError):
        linear(t, 0.3)
    assert not gpu._found


def test_without_triton_torch_runs_and_says_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(gpu, "_found", {})

    def missing() -> Any:
        raise ImportError("No module named 'triton'")

    monkeypatch.setattr(gpu, "operators", missing)
    linear(inputs(), 0.3).sum().backward()
    assert not caplog.records
    assert set(gpu._found.values()) == {False}
