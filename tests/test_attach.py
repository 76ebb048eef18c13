"""Attaching: what is given, what is left as it was, and what it costs in operations."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftlib
from peftlib import Adapter, BitFit, FullFineTuning, LoRA, NewHead, PeftlibError, PTuningV2
from peftlib.copies import structural_copy
from peftlib.errors import ProbeError, StateError, TargetError
from peftlib.methods.base import METHODS, Delta, Method, Site
from tests.twin import assert_untouched, classes, randomize, snapshot


class Net(nn.Module):
    def __init__(self, width: int = 6):
        super().__init__()
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.b(self.a(x).relu())))


X = torch.randn(2, 6)


# -- what a call may look like -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("example", [X, (X,), [X], {"x": X}], ids=["tensor", "tuple", "list", "mapping"])
def test_an_example_may_be_given_in_any_form(example: Any) -> None:
    tuning = peftlib.attach(Net(), LoRA(rank=2), example=example)
    assert list(tuning.sites) == ["a", "b"]


def test_a_model_may_carry_its_own_example() -> None:
    class Carries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2)

        @property
        def dummy_inputs(self) -> dict[str, Tensor]:
            return {"x": torch.zeros(3, 1, 4)}

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x)[0]

    assert list(peftlib.attach(Carries(), PTuningV2(length=2)).sites) == ["attention"]


def test_a_mapping_mixes_methods_and_sizes() -> None:
    model = Net()
    first, second, third = LoRA(rank=1), LoRA(rank=3), Adapter(dim=2)
    tuning = peftlib.attach(model, {"a": first, "b": second, nn.LayerNorm: third, "out": NewHead(7)})
    assert tuning.sites == {"a": first, "b": second, "norm": third, "out": NewHead(7)}
    assert tuning.num_parameters == 12 + 36 + (2 * 2 * 6 + 2 + 6) + 7 * 7
    assert model(X).shape == (2, 7)


def test_mapping_keys_may_be_groups_types_and_predicates() -> None:
    model = Net()
    tuning = peftlib.attach(
        model, {("a", "b"): LoRA(rank=1), (lambda n, m: n == "norm"): BitFit(), "": Adapter(dim=2)}, example=X
    )
    assert list(tuning.sites) == ["a", "b", "norm", ""]


@pytest.mark.parametrize("lora_first", [True, False])
def test_a_place_takes_different_methods_in_the_order_of_the_mapping(lora_first: bool) -> None:
    model = Net().double()
    weight, bias = model.a.weight.clone(), model.a.bias.clone()
    pair = (LoRA(rank=2), Adapter(dim=2)) if lora_first else (Adapter(dim=2), LoRA(rank=2))
    tuning = peftlib.attach(model, dict(zip(("a", "*a"), pair, strict=True)))
    assert list(tuning.sites) == (["a", "a (adapter)"] if lora_first else ["a", "a (lora)"])
    randomize(tuning)
    p = {k.split(".")[-1]: v for k, v in tuning.named_parameters()}
    x = torch.randn(2, 6, dtype=torch.float64)

    def low(h: Tensor) -> Tensor:
        return h + (x @ p["a"].T) @ p["b"].T

    def bottle(h: Tensor) -> Tensor:
        return h + (h @ p["down"].T + p["down_bias"]).relu() @ p["up"].T + p["up_bias"]

    base = x @ weight.T + bias
    torch.testing.assert_close(model.a(x), bottle(low(base)) if lora_first else low(bottle(base)))


@pytest.mark.parametrize(
    "model, method, options, message",
    [
        ("not a module", LoRA(), {}, "needs an nn.Module; got str"),
        (nn.Linear, LoRA(), {}, "needs an nn.Module"),
        (Net(), LoRA, {}, r"the class. Write LoRA\(\.\.\.\)"),
        (Net(), "lora", {}, "a method such as LoRA"),
        (Net(), None, {}, "a method such as LoRA"),
        (Net(), {}, {}, r"mapping .* is empty"),
        (Net(), {"a": 8}, {}, "value at 'a' must be a method; got 8"),
        (Net(), {"a": LoRA(rank=1)}, {"targets": ["b"]}, "leave targets= out"),
        (Net(), {"a": LoRA(rank=1), "*a": LoRA(rank=2)}, {}, "'a' is matched twice by LoRA"),
        (Net(), {"a": LoRA(rank=1), "zzz": LoRA(rank=1)}, {}, "'zzz' matches nothing"),
        (Net(), {"a": LoRA(rank=1), "b": LoRA(rank=9)}, {}, "rank 9 is larger"),
        (Net(), LoRA(rank=1), {"name": ""}, "non-empty string"),
        (Net(), LoRA(rank=1), {"name": "a.b"}, "without '.' and ':'"),
        (Net(), LoRA(rank=1), {"name": "a:b"}, "without '.' and ':'"),
        (Net(), LoRA(rank=1), {"name": 3}, "non-empty string"),
        (Net(), LoRA(rank=1), {"example": torch.zeros(2, 5)}, "could not be run through Net, in 'a'"),
        (Net(), LoRA(rank=1), {"example": {"y": X}}, "could not be run through Net.*'y'"),
        (Net(), LoRA(rank=1), {"targets": ["norm"]}, "none of which can carry LoRA"),
        (nn.Sequential(nn.Flatten()), LoRA(rank=1), {}, "finds no place in Sequential by default"),
    ],
)
def test_bad_input_is_explained_and_leaves_the_model_alone(
    model: Any, method: Any, options: dict[str, Any], message: str
) -> None:
    state = (snapshot(model), classes(model)) if isinstance(model, nn.Module) else None
    with pytest.raises(PeftlibError, match=message):
        peftlib.attach(model, method, **options)
    if state is not None:
        assert_untouched(model, *state)
        assert all(p.requires_grad for p in model.parameters())
        assert not [k for m in model.modules() for k in m.__dict__ if "peft" in k]


def test_errors_are_of_one_family_and_their_kind() -> None:
    model = Net()
    for method, options, kind in (
        (LoRA(rank=1), {"targets": ["zzz"]}, TargetError),
        (PTuningV2(length=1), {}, ProbeError),
        (LoRA(rank=1), {"example": "x"}, ProbeError),
    ):
        with pytest.raises(kind):
            peftlib.attach(model, method, **options)
        assert issubclass(kind, PeftlibError)
    peftlib.attach(model, LoRA(rank=1))
    with pytest.raises(StateError, match=r"'default' already.*It has: 'default'"):
        peftlib.attach(model, LoRA(rank=1))
    assert issubclass(PeftlibError, ValueError)


# -- all or nothing ----------------------------------------------------------------------------------------------------


@pytest.fixture
def failing() -> Any:
    """A method whose second delta fails at a chosen moment."""

    class Breaks(Delta):
        def __init__(self, at: str):
            super().__init__()
            self.at = at
            self.extra = nn.Parameter(torch.zeros(1))

        def check_switch(self, on: bool) -> None:
            if self.at == "check":
                raise RuntimeError("broken")

        def switch(self, on: bool) -> None:
            if self.at == "switch" and on:
                raise RuntimeError("broken")

    @dataclass(frozen=True, kw_only=True)
    class Failing(Method):
        at: str = "build"

        def refuses(self, site: Site) -> str | None:
            return None

        def build(self, sites: Sequence[Site]) -> dict[str, Delta]:
            if self.at == "build":
                raise RuntimeError("broken")
            return {s.name: Breaks(self.at if i else "") for i, s in enumerate(sites)}

    yield Failing
    del METHODS["Failing"]


@pytest.mark.parametrize("at", ["build", "check", "switch"])
@pytest.mark.parametrize("other", [False, True])
def test_a_failure_at_any_moment_undoes_everything(failing: Any, at: str, other: bool) -> None:
    model = Net()
    flags = [True, False, True, True, True, True, False, True]
    for parameter, flag in zip(model.parameters(), flags, strict=True):
        parameter.requires_grad_(flag)
    if other:
        peftlib.attach(model, LoRA(rank=2), targets=["a"], name="other")
    before, kinds, out = snapshot(model), classes(model), model(X)
    wanted = [p.requires_grad for p in model.parameters()]
    with pytest.raises(RuntimeError, match="broken"):
        peftlib.attach(model, {"*": failing(at=at)}, name="failing")
    assert_untouched(model, before, kinds)
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert torch.equal(model(X), out)
    assert list(peftlib.tunings(model)) == ["other"] * other
    peftlib.attach(model, LoRA(rank=1), targets=["a"], name="failing")  # the name is free


def test_a_host_that_cannot_be_opened_undoes_those_before() -> None:
    model = Net()
    model.b.forward = lambda x: x
    before, kinds = snapshot(model), classes(model)
    with pytest.raises(PeftlibError, match="forward of its own in the instance"):
        peftlib.attach(model, LoRA(rank=2), targets=["a", "b"])
    assert_untouched(model, before, kinds)
    assert all(p.requires_grad for p in model.parameters())


def test_a_site_on_mixed_devices_is_refused() -> None:
    model = Net()
    model.b.bias = nn.Parameter(torch.empty(6, device="meta"))
    before, kinds = {k: v for k, v in snapshot(model).items() if not v.is_meta}, classes(model)
    with pytest.raises(PeftlibError, match=r"'b' has tensors on mixed devices \(cpu, meta\)"):
        peftlib.attach(model, LoRA(rank=2), targets=["a", "b"])
    assert classes(model) == kinds
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


# -- freezing ----------------------------------------------------------------------------------------------------------


def trains(model: nn.Module) -> set[str]:
    return {n for n, p in model.named_parameters() if p.requires_grad and "_peft" not in n}


def test_flags_return_when_the_last_tuning_leaves_whatever_the_order() -> None:
    for first_leaves in (True, False):
        model = Net()
        model.norm.requires_grad_(False)
        before = trains(model)
        one = peftlib.attach(model, LoRA(rank=1), targets=["a"], name="one")
        assert trains(model) == set()
        two = peftlib.attach(model, LoRA(rank=1), targets=["b"], name="two", freeze=False)
        assert trains(model) == set()
        (one if first_leaves else two).detach()
        assert trains(model) == set()
        (two if first_leaves else one).detach()
        assert trains(model) == before


def test_a_second_attach_freezes_nothing_that_is_being_trained() -> None:
    model = Net()
    peftlib.attach(model, FullFineTuning(), targets=["out"], name="full")
    assert trains(model) == {"out.weight", "out.bias"}
    peftlib.attach(model, LoRA(rank=1), targets=["a"], name="lora")
    assert trains(model) == {"out.weight", "out.bias"}


def test_without_freezing_the_base_keeps_training() -> None:
    model = Net()
    model.norm.requires_grad_(False)
    before = trains(model)
    tuning = peftlib.attach(model, LoRA(rank=1), targets=["a"], freeze=False)
    assert trains(model) == before
    model(X).sum().backward()
    assert model.b.weight.grad is not None
    tuning.detach()
    assert trains(model) == before


@pytest.mark.parametrize("outer_first", [True, False])
@pytest.mark.parametrize("outer_leaves_first", [True, False])
def test_a_model_and_a_part_of_it_may_both_be_roots(outer_first: bool, outer_leaves_first: bool) -> None:
    inner = Net()
    outer = nn.Sequential(inner, nn.Linear(3, 2))
    before, kinds, out = snapshot(outer), classes(outer), outer(X)
    calls = [
        lambda: peftlib.attach(outer, LoRA(rank=1), targets=["0.a", "1"], name="outer"),
        lambda: peftlib.attach(inner, LoRA(rank=1), targets=["a"], name="inner"),
    ]
    made = [call() for call in (calls if outer_first else reversed(calls))]
    assert trains(outer) == set()
    for tuning in made:
        randomize(tuning)
    assert not torch.equal(outer(X), out)
    by_name = {t.name: t for t in made}
    for name in ("outer", "inner") if outer_leaves_first else ("inner", "outer"):
        by_name[name].detach()
    assert_untouched(outer, before, kinds)
    assert torch.equal(outer(X), out)
    assert trains(outer) == set(before)


# -- what it costs -----------------------------------------------------------------------------------------------------


def operations(run: Callable[[], Any]) -> int:
    """How many Python and C calls a piece of code makes: a measure of work that no machine's load can disturb."""
    count = 0

    def notice(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(notice)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("enabled", ["all", "one"])
def test_the_250th_tuning_costs_what_the_second_did(enabled: str) -> None:
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(20)))
    costs = {}
    for i in range(250):
        attach = lambda i=i: peftlib.attach(model, LoRA(rank=1), name=f"tuning{i}")  # noqa: E731
        if i in (1, 249):
            costs[i] = operations(attach)
        else:
            attach()
        if enabled == "one":
            peftlib.tunings(model)[f"tuning{i}"].disable()
    assert len(peftlib.tunings(model)) == 250
    assert costs[249] <= 1.03 * costs[1]


def test_every_use_of_a_tuning_costs_the_same_however_many_there_are(tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(20)))
    path = tmp_path / "tuning.safetensors"
    costs: dict[str, list[int]] = {}

    def switch_and_back(name: str) -> None:
        peftlib.use(model, name)
        peftlib.use(model, "tuning0")

    def within(context: Any) -> None:
        with context:
            pass

    def merged_and_back(tuning: peftlib.Tuning) -> None:
        tuning.merge()
        tuning.unmerge()

    for i in range(120):
        tuning = peftlib.attach(model, LoRA(rank=1), name=f"tuning{i}")
        if i in (1, 119):
            peftlib.use(model, "tuning0")
            first = peftlib.tunings(model)["tuning0"]
            work: dict[str, Callable[[], Any]] = {
                "use": lambda t=tuning: switch_and_back(t.name),
                "disabled": lambda t=first: within(t.disabled()),
                "route": lambda t=tuning: within(peftlib.route(model, ["tuning0", t.name])),
                "merge": lambda t=first: merged_and_back(t),
                "state_dict": tuning.state_dict,
                "parameters": lambda t=tuning: list(t.parameters()),
                "idle_sites": tuning.idle_sites,
                "save": lambda t=tuning: t.save(path),
                "load": lambda: peftlib.load(model, path, name="loaded"),
                "probe": lambda: structural_copy(model, torch.clone),
            }
            for name, run in work.items():
                run()  # once before, so that nothing is counted that happens only once
                if name == "load":
                    peftlib.tunings(model)["loaded"].detach()
                costs.setdefault(name, []).append(operations(run))
            peftlib.tunings(model)["loaded"].detach()
        tuning.disable()
    for name, (before, after) in costs.items():
        # A copy for the probe looks at the place of each tuning, though not into it.
        assert after <= 1.1 * before, (name, before, after)


def test_attaching_to_a_deep_model_is_linear_in_its_sites() -> None:
    costs = []
    for layers in (10, 40):
        with torch.device("meta"):
            model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(layers)))
        peftlib.attach(model, LoRA(rank=1), name="first").detach()
        for method in (LoRA(rank=1), FullFineTuning(), Adapter(dim=2)):
            cost = operations(lambda m=model, k=method: peftlib.attach(m, k, targets=[nn.Linear]).detach())
            costs.append(cost)
    for few, many in zip(costs[:3], costs[3:], strict=True):
        assert many <= 4.4 * few


def test_a_tuning_on_a_copy_is_its_own() -> None:
    model = Net()
    tuning = peftlib.attach(model, LoRA(rank=2), targets=["a"])
    other = copy.deepcopy(model)
    randomize(tuning)
    assert not torch.equal(model(X), other(X))
    twin = peftlib.tunings(other)["default"]
    assert twin.model is other
    twin.detach()
    assert type(other.a) is nn.Linear
    assert tuning.attached
