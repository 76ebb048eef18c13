"""Linears of one input computed together equal the same ones apart, whatever happens between their calls."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import peftlib
from peftlib import Adapter, LoRA
from peftlib.kernels import reference, shared_input
from peftlib.kernels.shared_input import LowRankLinear, low_rank_linears
from peftlib.methods.shared_input import WITH
from tests.twin import gradients, randomize

D = torch.float64


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many linears each run of the autograd function had."""
    sizes: list[int] = []
    apply = shared_input._LowRankLinears.apply
    monkeypatch.setattr(
        shared_input._LowRankLinears, "apply", lambda *args: sizes.append(len(args) // 4) or apply(*args)
    )
    return sizes


def close(ours: dict[str, Tensor], twin: dict[str, Tensor]) -> None:
    assert ours.keys() == twin.keys()
    for name, value in ours.items():
        torch.testing.assert_close(
            value, twin[name], rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )


# -- the kernel --------------------------------------------------------------------------------------------------------


def made(
    lead: list[int], inside: int, outs: list[int], ranks: list[int], bias: bool, dtype: torch.dtype = D
) -> tuple[Tensor, list[LowRankLinear], dict[str, Tensor]]:
    make = lambda *shape: torch.randn(*shape, dtype=D).to(dtype)  # noqa: E731
    x = make(*lead, inside).requires_grad_()
    linears = [
        LowRankLinear(
            make(o, inside),
            make(o) if bias else None,
            make(r, inside).requires_grad_(),
            make(o, r).requires_grad_(),
        )
        for o, r in zip(outs, ranks, strict=True)
    ]
    named = {f"{n}{i}": t for i, one in enumerate(linears) for n, t in (("a", one.a), ("b", one.b))}
    return x, linears, {"x": x, **named}


def joined(outputs: Any) -> Tensor:
    """One tensor to which every element of every output contributes in its own way."""
    return torch.cat([(y * (i + 1)).flatten() for i, y in enumerate(outputs)])


@given(
    lead=st.lists(st.sampled_from([0, 1, 2, 5]), max_size=3),
    inside=st.sampled_from([1, 3, 63]),
    outs=st.lists(st.sampled_from([1, 4, 33]), min_size=1, max_size=4),
    rank=st.integers(1, 5),
    bias=st.booleans(),
    s=st.sampled_from([1.0, -0.3]),
    frozen=st.sets(st.sampled_from(["x", "a0", "b0", "a1", "b1"])),
)
@settings(max_examples=100)
@pytest.mark.usefixtures("poisoned_memory")
def test_equals_its_twin(
    lead: list[int], inside: int, outs: list[int], rank: int, bias: bool, s: float, frozen: set[str]
) -> None:
    ranks = [rank + i for i in range(len(outs))]
    x, linears, leaves = made(lead, inside, outs, ranks, bias)
    for name in frozen & leaves.keys():
        leaves.pop(name).requires_grad_(False)
    if leaves:
        close(
            gradients(lambda: joined(low_rank_linears(x, linears, s)), leaves),
            gradients(lambda: joined(reference.low_rank_linear(x, *one, s) for one in linears), leaves),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_errs_no_more_than_its_twin_does_in_that_dtype(dtype: torch.dtype) -> None:
    x, linears, leaves = made([4, 64], 96, [80, 48, 80], [8, 8, 8], True, dtype)
    wide = {n: t.detach().to(D).requires_grad_() for n, t in leaves.items()}
    wide_linears = [
        LowRankLinear(one.weight.to(D), one.bias.to(D), wide[f"a{i}"], wide[f"b{i}"])  # type: ignore[union-attr]
        for i, one in enumerate(linears)
    ]
    truth = gradients(
        lambda: joined(reference.low_rank_linear(wide["x"], *one, 2.0) for one in wide_linears), wide
    )
    twin = gradients(lambda: joined(reference.low_rank_linear(x, *one, 2.0) for one in linears), leaves)
    ours = gradients(lambda: joined(low_rank_linears(x, linears, 2.0)), leaves)
    for name, value in truth.items():
        error = (ours[name].double() - value).norm() / value.norm()
        allowed = (twin[name].double() - value).norm() / value.norm()
        assert error <= 1.5 * allowed + torch.finfo(dtype).eps / 8, name


def test_second_derivatives() -> None:
    _, linears, leaves = made([2, 2], 3, [2, 3], [1, 2], True)

    def run(*values: Tensor) -> Tensor:
        t = dict(zip(leaves, values, strict=True))
        given = [LowRankLinear(one.weight, one.bias, t[f"a{i}"], t[f"b{i}"]) for i, one in enumerate(linears)]
        return joined(low_rank_linears(t["x"], given, 2.0))

    assert torch.autograd.gradcheck(run, tuple(leaves.values()))
    assert torch.autograd.gradgradcheck(run, tuple(leaves.values()))


@pytest.mark.parametrize("create_graph", [False, True])
def test_an_output_that_nobody_uses_gives_no_gradient(create_graph: bool) -> None:
    x, linears, leaves = made([2, 3], 4, [3, 5], [2, 2], False)
    first, _ = low_rank_linears(x, linears, 2.0)
    found = torch.autograd.grad(
        first.sum(), list(leaves.values()), allow_unused=True, create_graph=create_graph
    )
    expected = torch.autograd.grad(
        reference.low_rank_linear(x, *linears[0], 2.0).sum(), list(leaves.values()), allow_unused=True
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if theirs is not None:
            torch.testing.assert_close(ours, theirs)


def test_outputs_may_be_changed_in_place_and_a_backward_may_be_inside_autocast() -> None:
    x, linears, leaves = made([2, 3], 4, [3, 5], [2, 2], True, torch.float32)

    def changed(outputs: Any) -> Tensor:
        one, two = outputs
        return joined((one.mul_(2).relu_(), two.add_(1)))

    twin = gradients(lambda: changed([reference.low_rank_linear(x, *one, 2.0) for one in linears]), leaves)
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        y = changed(low_rank_linears(x, linears, 2.0))
    torch.manual_seed(1234)
    weight = torch.randn(y.shape)
    with torch.autocast("cpu", torch.bfloat16):
        grads = torch.autograd.grad(y, list(leaves.values()), weight)
    for name, grad in zip(leaves, grads, strict=True):
        torch.testing.assert_close(grad, twin[name], rtol=1e-5, atol=1e-5)


# -- sites of a model --------------------------------------------------------------------------------------------------


class QKV(nn.Module):
    """``how`` says what happens between the calls."""

    def __init__(self, how: str = "plain") -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.q, self.k, self.v, self.other = (nn.Linear(6, n) for n in (6, 4, 4, 4))
        self.how = how

    def forward(self, x: Tensor, skip: bool = False) -> Tensor:
        h = self.first(x)
        if skip:
            return self.q(h) + self.other(h * 2).sum()
        if self.how == "reversed":
            v, k, q = self.v(h), self.k(h), self.q(h)
        elif self.how == "changed":
            q = self.q(h)
            with torch.no_grad():
                h2 = h.clone()
            h2.add_(1)
            k, v = self.k(h), self.v(h2 + h - h2.detach())
        elif self.how == "view":
            q, k, v = self.q(h), self.k(h.view(h.shape)), self.v(h)
        else:
            q, k, v = self.q(h), self.k(h), self.v(h)
        return (q.tanh().sum(-1, keepdim=True) * k.exp() * v) + self.other(h * 2)


HOWS = ["plain", "reversed", "changed", "view"]


def pair(
    how: str = "plain", **fields: Any
) -> tuple[nn.Module, nn.Module, Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """The same model with sites that share and sites that do not, and their leaves."""
    torch.manual_seed(1)
    model = QKV(how).to(D)
    apart = copy.deepcopy(model)
    x = torch.randn(3, 5, 6, dtype=D, requires_grad=True)
    ours = peftlib.attach(model, LoRA(rank=2, alpha=6, **fields), targets=["*"], example=x)
    theirs = peftlib.attach(apart, LoRA(rank=2, alpha=6, **fields), targets=["*"])
    randomize(ours)
    theirs.load_state_dict(ours.state_dict())
    return (
        model,
        apart,
        x,
        {"x": x, **dict(ours.named_parameters())},
        {"x": x, **dict(theirs.named_parameters())},
    )


@pytest.mark.parametrize("how", HOWS)
def test_sites_together_equal_sites_apart(how: str, shared: list[int]) -> None:
    model, apart, x, ours, theirs = pair(how)
    for _ in range(3):
        close(gradients(lambda: model(x), ours), gradients(lambda: apart(x), theirs))
    assert set(shared) == {3 if how in ("plain", "reversed") else 2}
    assert len(shared) == 3
    with torch.no_grad():
        torch.testing.assert_close(model(x), apart(x))


def test_the_group_is_in_the_file_and_in_copies(tmp_path: Any, shared: list[int]) -> None:
    model, apart, x, _, _ = pair()
    tuning = peftlib.tunings(model)["default"]
    facts = {part.name: part.facts for part in tuning.parts}
    assert {name: f.get(WITH) for name, f in facts.items()} == {
        "first": None,
        "q": "q",
        "k": "q",
        "v": "q",
        "other": None,
    }
    tuning.save(tmp_path / "t.safetensors")
    fresh = QKV().to(D)
    fresh.load_state_dict({k: v for k, v in model.state_dict().items() if "_peft" not in k})
    peftlib.load(fresh, tmp_path / "t.safetensors")
    expected = apart(x)
    model(x)
    for twin in (fresh, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        shared.clear()
        torch.testing.assert_close(twin(x), expected)
        assert shared == [3]
    # A copy made while results wait has nothing waiting.
    h = torch.randn(3, 5, 6, dtype=D)
    model.q(h)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin.k(h), apart.k(h))


def test_results_that_nobody_asks_for_end_it(shared: list[int]) -> None:
    model, apart, x, ours, theirs = pair()
    for _ in range(4):
        torch.testing.assert_close(model(x, skip=True), apart(x, skip=True))
    assert shared == [3, 3]
    close(gradients(lambda: model(x), ours), gradients(lambda: apart(x), theirs))


def test_a_result_is_handed_out_once_and_for_the_very_tensor(shared: list[int]) -> None:
    model, apart, _, _, _ = pair()
    h = torch.randn(3, 5, 6, dtype=D)
    model.q(h)
    with torch.no_grad():
        h.add_(1)
    torch.testing.assert_close(model.k(h), apart.k(h))  # another version
    torch.testing.assert_close(model.v(h.clone()), apart.v(h))  # another tensor
    model, apart, _, _, _ = pair()
    model.q(h)
    one, two = model.k(h), model.k(h)
    assert one is not two
    torch.testing.assert_close(one, two)
    model, apart, _, _, _ = pair()
    model.q(h)
    with torch.no_grad():
        for m in (model, apart):
            m.k.weight.mul_(2)
    torch.testing.assert_close(model.k(h), apart.k(h))  # another weight


@pytest.mark.parametrize(
    "prepare",
    [
        lambda model: peftlib.attach(model, Adapter(dim=2), targets=["k"], name="second"),
        lambda model: model.k.weight.requires_grad_(),
        lambda model: model.k.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
        lambda model: model.k.register_forward_hook(lambda module, args, out: out * 2),
        lambda model: peftlib.tunings(model)["default"].parts[0].delta.a.requires_grad_(False),
    ],
    ids=["another delta after", "a trained weight", "another input", "another output", "a frozen factor"],
)
def test_what_stands_around_one_site(prepare: Callable[[nn.Module], Any]) -> None:
    model, apart, x, _, _ = pair()
    for m in (model, apart):
        torch.manual_seed(0)
        prepare(m)
        for tuning in peftlib.tunings(m).values():
            if tuning.name == "second":
                randomize(tuning)
    found = []
    for m in (model, apart):
        leaves = {"x": x} | {n: p for n, p in m.named_parameters() if p.requires_grad}
        found.append(gradients(lambda m=m: m(x), leaves))
    close(*found)


def test_two_tunings_of_one_model(shared: list[int]) -> None:
    model, apart, x, _, _ = pair()
    for m, example in ((model, x), (apart, None)):
        torch.manual_seed(0)
        randomize(peftlib.attach(m, LoRA(rank=3), targets=["q", "k"], name="second", example=example))
    shared.clear()  # the probe's fake forward ran it as well
    close({"y": model(x)}, {"y": apart(x)})
    with peftlib.use(model, "second"), peftlib.use(apart, "second"):
        close({"y": model(x)}, {"y": apart(x)})
    peftlib.tunings(model)["default"].disable()
    peftlib.tunings(apart)["default"].disable()
    close({"y": model(x)}, {"y": apart(x)})
    assert shared == [3, 2, 2]


def test_a_replica_is_not_in_the_group_of_its_original(shared: list[int]) -> None:
    model, _, _, _, _ = pair()
    delta = peftlib.tunings(model)["default"].parts[1].delta
    x = torch.randn(9, 5, 6, dtype=D)
    handing, *group = delta.together
    replica = delta._replicate_for_data_parallel()
    replica.a, replica.b = delta.a, delta.b
    assert handing.take(group, replica, x) is None
    assert not shared
    assert handing.take(group, delta, x) is not None


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints(use_reentrant: bool, shared: list[int]) -> None:
    model, apart, x, ours, theirs = pair()
    for _ in range(2):
        for m in (model, apart):
            checkpoint(m, x, use_reentrant=use_reentrant).square().sum().backward()
        close(
            {n: t.grad for n, t in ours.items() if n != "x"},
            {n: t.grad for n, t in theirs.items() if n != "x"},
        )
    assert shared


def test_where_it_goes_one_by_one(shared: list[int]) -> None:
    model, _, x, _, _ = pair(dropout=0.5)
    model(x)
    model.eval()(x)
    assert shared == [3]
    shared.clear()
    model, apart, x, _, _ = pair()
    with torch.no_grad():
        model(x)
    with torch.inference_mode():
        model(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert copy.deepcopy(model).float()(x.float()).dtype == torch.bfloat16
    torch._dynamo.reset()
    fast = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(fast(x), apart(x))
    torch.testing.assert_close(torch.vmap(model)(x), apart(x))
    assert not shared
    model(x)
    assert shared == [3]


def test_who_drops_is_not_computed_along(shared: list[int]) -> None:
    """One member of a group in training, with dropout, the others in eval."""
    model, apart, x, _, _ = pair(dropout=0.5)
    for m in (model, apart):
        m.eval()
        m.k.train()
    outputs = []
    for m in (model, apart):
        torch.manual_seed(3)
        outputs.append(m(x))
    close({"y": outputs[0]}, {"y": outputs[1]})
    assert shared == [2]


def test_factors_of_another_dtype_go_one_by_one(shared: list[int]) -> None:
    model, apart, x, _, _ = pair()
    for m in (model, apart):
        peftlib.tunings(m)["default"].parts[1].delta.float()
    torch.testing.assert_close(model(x), apart(x), rtol=1e-12, atol=1e-12)
    assert not shared


def test_the_input_is_kept_once_and_estimates_are_measurements() -> None:
    model, _, x, _, _ = pair()
    x = x.detach()
    tuning = peftlib.tunings(model)["default"]
    optimizer = torch.optim.AdamW(tuning.parameters())

    def step() -> None:
        output = model(x)
        result = output.square().mean()
        result.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    assert peftlib.measure_memory(step, model=model) == peftlib.estimate_memory(model, x)
