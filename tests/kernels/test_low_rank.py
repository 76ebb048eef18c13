"""The low-rank kernel against its naive twin: values, every gradient, every dtype, and what may stand around it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import peftlib
from peftlib import LoRA
from peftlib.kernels import low_rank, reference
from peftlib.kernels.dropout import draw_seed, dropped
from peftlib.kernels.low_rank import add_low_rank, low_rank_linear
from tests.twin import gradients, randomize

D = torch.float64
sizes = st.sampled_from([1, 2, 3, 7, 63])
INPUTS = ("x", "weight", "bias", "a", "b", "y")


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each time that the autograd function ran: no test of it shall pass on plain operators."""
    calls: list[int] = []
    apply = low_rank._LowRank.apply
    monkeypatch.setattr(low_rank._LowRank, "apply", lambda *args: calls.append(1) or apply(*args))
    return calls


def inputs(
    lead: tuple[int, ...] = (5, 9),
    inside: int = 7,
    outside: int = 6,
    rank: int = 3,
    dtype: torch.dtype = D,
    trained: tuple[str, ...] = INPUTS,
) -> dict[str, Tensor]:
    shapes = {
        "x": (*lead, inside),
        "weight": (outside, inside),
        "bias": (outside,),
        "a": (rank, inside),
        "b": (outside, rank),
        "y": (*lead, outside),
    }
    made = {name: torch.randn(shape, dtype=D).to(dtype) for name, shape in shapes.items()}
    return {name: t.requires_grad_(name in trained) for name, t in made.items()}


def linear(t: dict[str, Tensor], s: float = 2.0, p: float = 0.0, x: Tensor | None = None) -> Tensor:
    return low_rank_linear(t["x"] if x is None else x, t["weight"], t["bias"], t["a"], t["b"], s, p)


def opaque(t: dict[str, Tensor], s: float = 2.0, p: float = 0.0, x: Tensor | None = None) -> Tensor:
    return add_low_rank(t["y"], t["x"] if x is None else x, t["a"], t["b"], s, p)


def naive_linear(t: dict[str, Tensor], s: float = 2.0, p: float = 0.0, at: Tensor | None = None) -> Tensor:
    return reference.low_rank_linear(t["x"], t["weight"], t["bias"], t["a"], t["b"], s, at, p)


def naive_opaque(t: dict[str, Tensor], s: float = 2.0, p: float = 0.0, at: Tensor | None = None) -> Tensor:
    return reference.add_low_rank(t["y"], t["x"], t["a"], t["b"], s, at, p)


Kernel = Callable[..., Tensor]
KERNELS = [
    pytest.param(linear, naive_linear, ("x", "weight", "bias", "a", "b"), id="linear"),
    pytest.param(opaque, naive_opaque, ("x", "a", "b", "y"), id="opaque"),
]
both = pytest.mark.parametrize("kernel, naive, names", KERNELS)


def seeded(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def again() -> Tensor:
        torch.manual_seed(3)
        return run()

    return again


def close(ours: dict[str, Tensor], twin: dict[str, Tensor]) -> None:
    assert ours.keys() == twin.keys()
    for name, value in ours.items():
        torch.testing.assert_close(
            value, twin[name], rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )


# -- values and gradients ----------------------------------------------------------------------------------------------


@given(
    lead=st.lists(st.sampled_from([0, 1, 2, 5]), max_size=3),
    inside=sizes,
    outside=sizes,
    rank=st.integers(1, 9),
    p=st.sampled_from([0.0, 0.3]),
    s=st.sampled_from([1.0, 2.0, -0.3]),
    trained=st.sets(st.sampled_from(INPUTS)),
    which=st.sampled_from([0, 1]),
    few=st.sampled_from([-1, 1000]),
)
@settings(max_examples=200)
@pytest.mark.usefixtures("poisoned_memory")
def test_equals_its_twin(
    lead: list[int],
    inside: int,
    outside: int,
    rank: int,
    p: float,
    s: float,
    trained: set[str],
    which: int,
    few: int,
) -> None:
    kernel, naive, names = KERNELS[which].values
    low_rank.FEW = few
    torch.manual_seed(inside)
    t = inputs(tuple(lead), inside, outside, rank, trained=tuple(trained))
    wanted = {name: t[name] for name in names if name in trained}
    fused = few < 0 and "a" in trained
    if not wanted or (p and not fused):
        return  # plain operators drop by a mask of torch's
    before = {name: value.detach().clone() for name, value in t.items()}

    def twin() -> Tensor:
        at = dropped(draw_seed(), t["x"].numel(), p, t["x"].device) if p else None
        return naive(t, s, p, at)

    close(gradients(seeded(lambda: kernel(t, s, p)), wanted), gradients(seeded(twin), wanted))
    assert all(torch.equal(value, before[name]) for name, value in t.items()), "an input was overwritten"
    with torch.no_grad():
        close({"no grad": seeded(lambda: kernel(t, s, p))()}, {"no grad": seeded(twin)()})


@both
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize(
    "see",
    [
        lambda x: x[..., ::2],
        lambda x: x[..., :7].transpose(0, 1),
        lambda x: x[:, :1, :7].expand(5, 9, 7),
        lambda x: x[..., 3:10],
        lambda x: x[..., :7].permute(2, 0, 1).contiguous().permute(1, 2, 0),
    ],
    ids=["strided", "transposed", "expanded", "offset", "features first"],
)
def test_any_strides(
    kernel: Kernel,
    naive: Kernel,
    names: tuple[str, ...],
    see: Callable[[Tensor], Tensor],
    p: float,
    fused: list[int],
) -> None:
    wide = torch.randn(5, 9, 14, dtype=D, requires_grad=True)
    x = lambda: see(wide)[:, :, :7]  # noqa: E731
    t = inputs(tuple(x().shape[:-1]))
    leaves = {"x": wide} | {n: t[n] for n in names if n != "x"}

    def twin() -> Tensor:
        at = dropped(draw_seed(), x().numel(), p, wide.device) if p else None
        return naive(t | {"x": x()}, 2.0, p, at)

    close(gradients(seeded(lambda: kernel(t, 2.0, p, x())), leaves), gradients(seeded(twin), leaves))
    # A gradient may come with any strides as well.
    for grad in (
        torch.ones((), dtype=D).expand(*t["y"].shape),
        torch.randn(*reversed(t["y"].shape), dtype=D).mT.mT,
    ):
        grad = grad.reshape(t["y"].shape)
        ours = torch.autograd.grad(kernel(t), [t[n] for n in names], grad)
        theirs = torch.autograd.grad(naive(t), [t[n] for n in names], grad)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)
    assert len(fused) == 3


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_errs_no_more_than_its_twin_does_in_that_dtype(
    kernel: Kernel, naive: Kernel, names: tuple[str, ...], dtype: torch.dtype, p: float
) -> None:
    exact = inputs((4, 64), 96, 80, 8)
    low = {n: t.detach().to(dtype).requires_grad_() for n, t in exact.items()}
    exact = {n: t.detach().to(D).requires_grad_() for n, t in low.items()}
    torch.manual_seed(3)
    at = dropped(draw_seed(), low["x"].numel(), p, low["x"].device) if p else None
    truth = gradients(lambda: naive(exact, 2.0, p, at), {n: exact[n] for n in names})
    twin = gradients(lambda: naive(low, 2.0, p, at), {n: low[n] for n in names})
    ours = gradients(seeded(lambda: kernel(low, 2.0, p)), {n: low[n] for n in names})
    for name, value in truth.items():
        assert ours[name].dtype == dtype
        error = (ours[name].double() - value).norm() / value.norm()
        allowed = (twin[name].double() - value).norm() / value.norm()
        assert error <= 1.5 * allowed + torch.finfo(dtype).eps / 8, name


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wider_factors_compute_in_the_dtype_of_the_input(
    kernel: Kernel, naive: Kernel, names: tuple[str, ...], dtype: torch.dtype, fused: list[int]
) -> None:
    t = inputs((4, 8), dtype=dtype)
    t |= {n: torch.randn(t[n].shape, dtype=D, requires_grad=True) for n in ("a", "b")}
    rounded = t | {n: t[n].to(dtype) for n in ("a", "b")}
    ours = kernel(t)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, naive(rounded), rtol=0.05, atol=0.05)
    grads = torch.autograd.grad(ours.sum(), [t["a"], t["b"]])
    assert [g.dtype for g in grads] == [D, D]
    assert fused
    with torch.no_grad():
        assert kernel(t).dtype == dtype


# -- derivatives of derivatives, transforms ----------------------------------------------------------------------------


@both
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_second_derivatives(
    kernel: Kernel, naive: Kernel, names: tuple[str, ...], p: float, fused: list[int]
) -> None:
    t = inputs((2, 3), 4, 3, 2)

    def run(*values: Tensor) -> Tensor:
        torch.manual_seed(3)
        return kernel(dict(zip(names, values, strict=True)) | {"y": values[-1]}, 2.0, p)

    values = tuple(t[n] for n in names)
    assert torch.autograd.gradcheck(run, values)
    assert torch.autograd.gradgradcheck(run, values)
    assert fused


def test_second_derivatives_of_a_layer_that_meets_itself(fused: list[int]) -> None:
    """x depends on A: only each call's own part may be counted in it."""
    t = inputs((3,), 4, 4, 2)
    leaves = [t[n] for n in ("x", "weight", "bias", "a", "b")]

    def penalty(apply: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        x, weight, bias, a, b = leaves
        y = apply(apply(x, weight, bias, a, b, 2.0).tanh(), weight, bias, a, b, 2.0)
        grads = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    for ours, theirs in zip(penalty(low_rank_linear), penalty(reference.low_rank_linear), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    assert len(fused) == 2


@both
def test_function_transforms(kernel: Kernel, naive: Kernel, names: tuple[str, ...], fused: list[int]) -> None:
    t = inputs((4, 3))
    rest = {n: v.detach() for n, v in t.items()}
    values = tuple(rest[n] for n in names)

    def of(run: Kernel) -> Callable[..., Tensor]:
        return lambda *values: run(rest | dict(zip(names, values, strict=True))).square().sum()

    where = tuple(range(len(names)))
    torch.testing.assert_close(
        torch.func.grad(of(kernel), where)(*values), torch.func.grad(of(naive), where)(*values)
    )
    tangents = tuple(torch.randn_like(v) for v in values)
    torch.testing.assert_close(
        torch.func.jvp(of(kernel), values, tangents), torch.func.jvp(of(naive), values, tangents)
    )

    def one(run: Kernel) -> Callable[..., Any]:
        def loss(a: Tensor, x: Tensor, y: Tensor) -> Tensor:
            return run(rest | {"a": a, "x": x, "y": y}).square().sum()

        return torch.vmap(torch.func.grad(loss), (None, 0, 0))

    args = (rest["a"], rest["x"], rest["y"])
    torch.testing.assert_close(one(kernel)(*args), one(naive)(*args))
    with torch.autograd.forward_ad.dual_level():
        dual = {n: torch.autograd.forward_ad.make_dual(t[n], torch.ones_like(t[n])) for n in names}
        ours, theirs = (
            torch.autograd.forward_ad.unpack_dual(run(t | dual)).tangent for run in (kernel, naive)
        )
    torch.testing.assert_close(ours, theirs)
    assert not fused


@both
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_without_a_break(
    kernel: Kernel, naive: Kernel, names: tuple[str, ...], backend: str, fused: list[int]
) -> None:
    torch._dynamo.reset()
    t = inputs((4, 16))
    leaves = {n: t[n] for n in names}
    fast = torch.compile(lambda: kernel(t), backend=backend, fullgraph=True)
    close(gradients(fast, leaves), gradients(lambda: naive(t), leaves))
    with torch.no_grad():
        torch.testing.assert_close(fast(), naive(t))
    assert not fused


def test_export_and_tracing(fused: list[int]) -> None:
    model = nn.Linear(7, 6, dtype=D)
    tuning = peftlib.attach(model, LoRA(rank=3))
    randomize(tuning)
    x = torch.randn(5, 9, 7, dtype=D)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x))
    fused.clear()
    with pytest.warns(DeprecationWarning, match="trace"):
        traced = torch.jit.trace(model, (x,), check_trace=False)
    assert not fused
    torch.testing.assert_close(traced(2 * x), model(2 * x))


# -- autocast, checkpoints, hooks --------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("backward_inside", [False, True])
@pytest.mark.parametrize("few", [-1, 1000])
def test_autocast(
    kernel: Kernel,
    naive: Kernel,
    names: tuple[str, ...],
    backward_inside: bool,
    few: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(low_rank, "FEW", few)
    t = inputs((4, 16), 32, 24, dtype=torch.float32)
    found = []
    for run in (kernel, naive):
        with torch.autocast("cpu", torch.bfloat16):
            y = run(t)
            if backward_inside:
                y.sum().backward()
        if not backward_inside:
            y.sum().backward()
        found.append([y.detach()] + [t[n].grad for n in names])
        for n in names:
            t[n].grad = None
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            found[-1].append(run(t))
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).float().norm() <= 0.01 * theirs.float().norm()
    wide = {n: v.double() for n, v in t.items()}
    with torch.autocast("cpu", torch.bfloat16):
        assert kernel(wide).dtype == D


@both
def test_a_backward_inside_autocast_stays_in_the_dtype_of_its_forward(
    kernel: Kernel, naive: Kernel, names: tuple[str, ...]
) -> None:
    t = inputs((4, 16), dtype=torch.float32)
    y = kernel(t)
    expected = torch.autograd.grad(y.sum(), [t[n] for n in names], retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(y.sum(), [t[n] for n in names])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_checkpoints_replay_the_same_dropout(use_reentrant: bool, p: float, fused: list[int]) -> None:
    model = nn.Sequential(nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 6)).to(D)
    tuning = peftlib.attach(model, LoRA(rank=3, dropout=p), targets=["0", "2"])
    leaves = {"x": torch.randn(5, 9, 7, dtype=D, requires_grad=True), **randomize(tuning)}
    x = leaves["x"]
    plain = gradients(seeded(lambda: model(x)), leaves)
    if use_reentrant:
        close(reentrant(model, leaves), plain)
    else:
        close(gradients(seeded(lambda: checkpoint(model, x, use_reentrant=False)), leaves), plain)
    assert len(fused) == (4 if use_reentrant else 6)


def reentrant(model: nn.Module, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """As ``gradients``, by a backward: a reentrant checkpoint does without autograd.grad."""
    torch.manual_seed(3)
    out = checkpoint(model, leaves["x"], use_reentrant=True)
    torch.manual_seed(1234)
    out.backward(torch.randn(out.shape, dtype=out.dtype))
    found = {"output": out.detach()} | {n: leaf.grad for n, leaf in leaves.items()}
    for leaf in leaves.values():
        leaf.grad = None
    return found


@both
@pytest.mark.parametrize("lead", [(9,), (5, 9), ()])
def test_its_output_may_be_changed_in_place(
    kernel: Kernel, naive: Kernel, names: tuple[str, ...], lead: tuple[int, ...]
) -> None:
    t = inputs(lead)
    leaves = {n: t[n] for n in names}
    close(
        gradients(lambda: kernel(t).mul_(2).relu_(), leaves),
        gradients(lambda: naive(t).mul(2).relu(), leaves),
    )


def test_what_it_needs_again_may_not_be_changed_in_place() -> None:
    t = inputs()
    x = t["x"] * 1
    y = linear(t, x=x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_graph_may_be_used_twice() -> None:
    t = inputs()
    y = linear(t, p=0.3).square().sum()
    first = torch.autograd.grad(y, [t["x"], t["a"], t["b"]], retain_graph=True)
    second = torch.autograd.grad(y, [t["x"], t["a"], t["b"]])
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


# -- what it keeps -----------------------------------------------------------------------------------------------------


def kept(run: Callable[[], Tensor], known: list[Tensor]) -> int:
    """Bytes that the graph of a call keeps besides what is there anyway."""
    there = {t.untyped_storage().data_ptr() for t in known}
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in there:
            found[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = run()
    assert y.requires_grad
    return sum(found.values())


@both
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_it_keeps_x_and_s_alone(kernel: Kernel, naive: Kernel, names: tuple[str, ...], p: float) -> None:
    t = inputs((5, 9), rank=3, trained=("x", "a", "b"))
    assert kept(lambda: kernel(t, p=p), list(t.values())) == 5 * 9 * 3 * 8
    frozen = t | {"b": t["b"].detach()}
    assert kept(lambda: kernel(frozen, p=p), list(frozen.values())) == 0


def test_a_checkpointed_memory_estimate_is_the_measurement() -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))
    tuning = peftlib.attach(model, LoRA(rank=4, dropout=0.2), targets=["0", "2"])
    x = torch.randn(6, 16)
    optimizer = torch.optim.AdamW(tuning.parameters())

    def step() -> None:
        output = model(x)
        result = output.square().mean()
        result.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    assert peftlib.measure_memory(step, model=model) == peftlib.estimate_memory(model, x)


# -- where it has to stand back ----------------------------------------------------------------------------------------


class Halved(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


class Wrapped(Tensor):
    """A subclass that any operator of torch may meet."""


@pytest.mark.parametrize(
    "make", [nn.Linear, Halved, lambda i, o: nn.MultiheadAttention(i, 1, batch_first=True)]
)
def test_only_a_plain_linear_is_computed_without_its_forward(
    make: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = []
    inner = peftlib.methods.lora_linear.low_rank_linear
    monkeypatch.setattr(
        peftlib.methods.lora_linear, "low_rank_linear", lambda *args: whole.append(1) or inner(*args)
    )
    host = make(6, 6).to(D)
    x = torch.randn(2, 9, 6, dtype=D)
    run = (lambda: host(x, x, x)[0]) if isinstance(host, nn.MultiheadAttention) else lambda: host(x)
    before = run()
    tuning = peftlib.attach(host, LoRA(rank=2), targets=[""])
    torch.testing.assert_close(run(), before, rtol=1e-12, atol=1e-12)
    assert len(whole) == {nn.Linear: 1, Halved: 0}.get(make, 4)
    randomize(tuning)
    after = run()
    tuning.merge() if make is not Halved else tuning.disable()
    torch.testing.assert_close(run(), before if make is Halved else after, rtol=1e-9, atol=1e-9)


def test_an_output_that_is_its_own_input_is_left_alone() -> None:
    class Same(nn.Module):
        in_features = out_features = 6

        def forward(self, x: Tensor) -> Tensor:
            return x

    host = Same()
    tuning = peftlib.attach(
        nn.Sequential(nn.Linear(6, 6, dtype=D), host), LoRA(rank=2, dtype=D), targets=["1"]
    )
    randomize(tuning)
    x = torch.randn(9, 6, dtype=D)
    before = x.clone()
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            y = host(x)
        assert torch.equal(x, before)
        assert not torch.equal(y, before)


def test_two_tunings_and_a_trained_base_at_one_host(fused: list[int]) -> None:
    host = nn.Linear(7, 6, dtype=D)
    weight, bias = host.weight.detach().clone(), host.bias.detach().clone()
    x = torch.randn(5, 9, 7, dtype=D, requires_grad=True)
    first = peftlib.attach(host, LoRA(rank=2), name="first", freeze=False)
    second = peftlib.attach(host, LoRA(rank=3, alpha=6), name="second", freeze=False)
    leaves = {"x": x, "weight": host.weight, "bias": host.bias}
    for tuning in (first, second):
        leaves |= {f"{tuning.name}.{n}": p for n, p in randomize(tuning).items()}
    assert torch.equal(host.weight, weight)
    assert torch.equal(host.bias, bias)

    def naive() -> Tensor:
        y = F.linear(x, host.weight, host.bias)
        for name, s in (("first", 1.0), ("second", 2.0)):
            y = y + reference.low_rank(x, leaves[f"{name}.lora.a"], leaves[f"{name}.lora.b"], s)
        return y

    close(gradients(lambda: host(x), leaves), gradients(naive, leaves))
    assert len(fused) == 2


@pytest.mark.parametrize(
    "call", [lambda host, x: host(x), lambda host, x: host(input=x)], ids=["args", "keyword"]
)
def test_forward_hooks_see_the_input_and_the_tuned_output(call: Callable[..., Tensor]) -> None:
    host = nn.Linear(7, 6, dtype=D)
    randomize(peftlib.attach(host, LoRA(rank=2)))
    x = torch.randn(5, 9, 7, dtype=D)
    plain = call(host, x)
    host.register_forward_hook(lambda module, args, out: out * 2)
    torch.testing.assert_close(call(host, x), 2 * plain)


def test_subclasses_and_nested_tensors(fused: list[int]) -> None:
    host = nn.Linear(7, 6, dtype=D)
    randomize(peftlib.attach(host, LoRA(rank=2)))
    x = torch.randn(5, 9, 7, dtype=D)
    plain = host(x)
    fused.clear()
    torch.testing.assert_close(host(x.as_subclass(Wrapped)).as_subclass(Tensor), plain)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says once in a process that they are a prototype
        nested = torch.nested.nested_tensor(list(x.unbind()))
    torch.testing.assert_close(torch.stack(host(nested).unbind()), plain)
    assert not fused
