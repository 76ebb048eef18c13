"""The handle of a tuning: tensors, switches, merging, leaving."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftlib
from peftlib import Adapter, FullFineTuning, LoRA, PeftlibError, PrefixTuning
from peftlib.errors import CheckpointError, StateError
from tests.twin import assert_untouched, classes, randomize, snapshot


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


X = torch.randn(3, 6)


def tuned(model: nn.Module, name: str = "default", method: Any = None, **options: Any) -> peftlib.Tuning:
    tuning = peftlib.attach(model, LoRA(rank=2) if method is None else method, name=name, **options)
    randomize(tuning)
    return tuning


# -- tensors -----------------------------------------------------------------------------------------------------------


def test_names_counts_and_state() -> None:
    model = Net()
    base = set(model.state_dict())
    tuning = tuned(model, targets=["a"])
    assert tuning.name == "default"
    assert [n for n, _ in tuning.named_parameters()] == ["a.lora.a", "a.lora.b"] == list(tuning.state_dict())
    assert tuning.num_parameters == sum(p.numel() for p in tuning.parameters()) == 24
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in tuning.parameters())
    assert base <= set(model.state_dict())
    state = tuning.state_dict()
    assert not any(t.requires_grad for t in state.values())
    state["a.lora.a"].zero_()  # the same memory
    assert not dict(tuning.named_parameters())["a.lora.a"].any()
    assert repr(tuning) == "Tuning('default', 1 sites, 24 parameters, enabled)"


def test_a_state_comes_back() -> None:
    model = Net()
    tuning = tuned(model)
    state = {k: v.clone() for k, v in tuning.state_dict().items()}
    out = model(X)
    randomize(tuning)
    assert not torch.equal(model(X), out)
    tuning.load_state_dict(state)
    assert torch.equal(model(X), out)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("a.lora.b"), "missing: a.lora.b"),
        (lambda s: s.update({"a.lora.c": torch.zeros(1)}), "unexpected: a.lora.c"),
        (
            lambda s: s.update({"a.lora.b": torch.zeros(2, 6)}),
            r"shape of a.lora.b: \(2, 6\), expected \(6, 2\)",
        ),
        (lambda s: s.clear(), "missing: a.lora.a; missing: a.lora.b; missing: b.lora.a"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_whole(
    change: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    tuning = tuned(Net())
    before = {k: v.clone() for k, v in tuning.state_dict().items()}
    state = {k: torch.zeros_like(v) for k, v in before.items()}
    change(state)
    with pytest.raises(CheckpointError, match=message):
        tuning.load_state_dict(state)
    assert all(torch.equal(v, before[k]) for k, v in tuning.state_dict().items())


# -- switches ----------------------------------------------------------------------------------------------------------


def test_disabling_gives_the_base_and_enabling_the_same_as_before() -> None:
    model = Net()
    base = model(X)
    tuning = tuned(model)
    out = model(X)
    assert tuning.disable() is tuning
    assert torch.equal(model(X), base)
    tuning.disable()
    assert tuning.enable() is tuning
    assert torch.equal(model(X), out)
    tuning.enable()
    assert torch.equal(model(X), out)


def test_disabled_restores_whatever_was() -> None:
    model = Net()
    base, tuning = model(X), tuned(model)
    with tuning.disabled() as same:
        assert same is tuning
        with tuning.disabled():
            assert torch.equal(model(X), base)
        assert not tuning.enabled
    assert tuning.enabled
    with pytest.raises(KeyError), tuning.disabled():
        raise KeyError
    assert tuning.enabled
    tuning.disable()
    with tuning.disabled():
        pass
    assert not tuning.enabled


def test_tunings_act_in_the_order_in_which_they_came_whatever_was_switched() -> None:
    model = nn.Sequential(nn.Linear(6, 6)).double()
    x = X.double()
    one = tuned(model, "one", Adapter(dim=2), targets=["0"])
    two = tuned(model, "two", Adapter(dim=3, activation="tanh"), targets=["0"])
    out = model(x)
    one.disable()
    alone = model(x)
    one.enable()
    assert torch.equal(model(x), out)
    assert not torch.equal(alone, out)
    two.disable()
    one.disable()
    two.enable()
    assert torch.equal(model(x), alone)


def test_use_enables_exactly_the_named_ones() -> None:
    model = Net()
    base = model(X)
    outputs = {}
    for name in ("a", "b", "c"):
        tuned(model, name)
    for name in ("a", "b", "c"):
        peftlib.use(model, name)
        outputs[name] = model(X)
    assert {n for n, t in peftlib.tunings(model).items() if t.enabled} == {"c"}
    with peftlib.use(model, "a", "b") as context:
        assert context is not None
        assert {n for n, t in peftlib.tunings(model).items() if t.enabled} == {"a", "b"}
        with peftlib.use(model):
            assert torch.equal(model(X), base)
        assert {n for n, t in peftlib.tunings(model).items() if t.enabled} == {"a", "b"}
    assert torch.equal(model(X), outputs["c"])
    with pytest.raises(StateError, match="no tuning 'd'; it has: 'a', 'b', 'c'"):
        peftlib.use(model, "a", "d")
    assert torch.equal(model(X), outputs["c"])
    with pytest.raises(StateError, match="it has: none"):
        peftlib.use(Net(), "a")


def test_use_undoes_what_it_switched_if_one_cannot_be() -> None:
    model = Net()
    stays = peftlib.attach(model, FullFineTuning(keep_base=False), targets=["a"], name="stays")
    other = tuned(model, "other")
    lora = tuned(model, "lora")
    lora.disable()
    with pytest.raises(StateError, match="keep_base=True"):
        peftlib.use(model, "lora")
    assert (stays.enabled, other.enabled, lora.enabled) == (True, True, False)


def test_use_survives_a_tuning_that_leaves_inside() -> None:
    model = Net()
    one, two = tuned(model, "one"), tuned(model, "two")
    with peftlib.use(model, "two"):
        one.detach()
    assert list(peftlib.tunings(model)) == ["two"]
    assert two.enabled


def test_tunings_is_a_copy() -> None:
    model = Net()
    tuned(model, "one")
    peftlib.tunings(model).clear()
    assert list(peftlib.tunings(model)) == ["one"]
    assert peftlib.tunings(Net()) == {}


# -- merging -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keep", [None, "cpu"])
def test_merging_and_unmerging(dtype: torch.dtype, keep: str | None) -> None:
    model = Net().to(dtype)
    before = snapshot(model)
    x = X.to(dtype)
    tuning = tuned(model)
    out = model(x)
    assert tuning.merge(keep=keep) is tuning
    assert tuning.merged
    assert repr(tuning).endswith("merged)")
    assert not torch.equal(model.a.weight, before["a.weight"])
    # One rounding of each weight, in the model's dtype.
    bound = 40 * torch.finfo(dtype).eps * out.abs().max()
    assert (model(x) - out).abs().max() <= bound
    assert tuning.merge().merged
    tuning.unmerge()
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    assert torch.equal(model(x), out)
    assert not tuning.merged
    tuning.unmerge()


def test_the_originals_wait_where_they_are_told() -> None:
    model = Net()
    pointers = {n: p.data_ptr() for n, p in model.named_parameters()}
    tuning = tuned(model, targets=["a"])
    tuning.merge()
    assert model.a.weight.data_ptr() != pointers["a.weight"]
    tuning.unmerge()
    assert model.a.weight.data_ptr() == pointers["a.weight"]  # exchanged, not copied


def test_a_merged_tuning_refuses_what_it_cannot_do() -> None:
    model = Net()
    tuning = tuned(model)
    tuning.merge()
    weight = model.a.weight.clone()
    for refused in (tuning.disable, lambda: tuning.load_state_dict(tuning.state_dict())):
        with pytest.raises(StateError, match="merged"):
            refused()
    assert tuning.enable().merged
    assert torch.equal(model.a.weight, weight)


def test_detaching_a_merged_tuning_gives_the_base_back() -> None:
    model = Net()
    before, kinds = snapshot(model), classes(model)
    tuned(model).merge().detach()
    assert_untouched(model, before, kinds)


def test_what_cannot_be_merged_leaves_everything_as_it_was() -> None:
    model = Net()
    mixed = tuned(model, "mixed", {"a": LoRA(rank=2), "b": Adapter(dim=2)})
    before, out = snapshot(model), model(X)
    with pytest.raises(PeftlibError, match="nonlinearity"):
        mixed.merge()
    assert not mixed.merged
    assert torch.equal(model(X), out)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    mixed.disable()
    with pytest.raises(StateError, match="is disabled; enable"):
        mixed.merge()


def test_a_result_that_is_not_finite_is_refused() -> None:
    model = Net()
    tuning = tuned(model)
    next(tuning.parameters()).data[0, 0] = float("nan")
    before = snapshot(model)
    with pytest.raises(PeftlibError, match="not finite"):
        tuning.merge()
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items() if "_peft" not in k)
    overflow = Net().half()
    large = peftlib.attach(overflow, LoRA(rank=2))
    with torch.no_grad():
        for parameter in large.parameters():
            parameter.fill_(6e4)
    with pytest.raises(PeftlibError, match="not finite"):
        large.merge()


def test_several_tunings_merge_one_at_a_time() -> None:
    model = Net()
    before = snapshot(model)
    one, two = tuned(model, "one"), tuned(model, "two")
    with pytest.raises(StateError, match="another enabled delta"):
        one.merge()
    two.disable()
    one.merge()
    merged = model(X)
    two.enable()
    assert not torch.equal(model(X), merged)
    with pytest.raises(StateError, match="'one' merged into it already"):
        two.merge()
    assert torch.equal(one.unmerge().model.a.weight, before["a.weight"])


def test_a_tied_weight_is_not_merged() -> None:
    model = Net()
    model.b.weight = model.a.weight
    tuning = tuned(model, targets=["a"])
    with pytest.raises(PeftlibError, match="shared with 'b'"):
        tuning.merge()


def test_parameters_keep_their_identity_through_a_merge() -> None:
    model = Net()
    parameter = model.a.weight
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    tuning = tuned(model).merge()
    assert model.a.weight is parameter is optimizer.param_groups[0]["params"][0]
    tuning.unmerge()
    assert model.a.weight is parameter


# -- leaving -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_tunings_leave_in_any_order(order: tuple[int, ...]) -> None:
    model = Net()
    before, kinds, base = snapshot(model), classes(model), model(X)
    made = [
        tuned(model, "lora"),
        tuned(model, "adapter", Adapter(dim=2)),
        tuned(model, "bias", {"a.weight": LoRA(rank=2)}),
    ]
    for i, index in enumerate(order):
        others = list(order[i + 1 :])
        made[index].detach()
        assert list(peftlib.tunings(model)) == [made[j].name for j in sorted(others)]
    assert_untouched(model, before, kinds)
    assert torch.equal(model(X), base)
    assert not [k for m in model.modules() for k in m.__dict__ if "peft" in k]
    assert not any(m._forward_hooks for m in model.modules())


def test_a_detached_handle_refuses_everything(tmp_path: Any) -> None:
    tuning = tuned(Net(), "chat")
    tuning.detach()
    assert repr(tuning) == "Tuning('chat', detached)"
    for use in (
        tuning.enable, tuning.disable, tuning.merge, tuning.unmerge, tuning.detach, tuning.fold, tuning.state_dict,
        lambda: list(tuning.parameters()), lambda: tuning.num_parameters, lambda: tuning.load_state_dict({}),
        lambda: tuning.save(tmp_path / "x"), lambda: tuning.disabled().__enter__(),
    ):  # fmt: skip
        with pytest.raises(StateError, match="'chat' was detached"):
            use()


def test_a_name_is_free_again_after_leaving() -> None:
    model = Net()
    tuned(model).detach()
    again = tuned(model)
    assert again.attached
    assert list(peftlib.tunings(model)) == ["default"]


def test_a_class_changed_since_is_not_undone_blindly() -> None:
    model = Net()
    tuning = tuned(model, targets=["a"])
    out = model(X)

    class Later(type(model.a)):  # what fully_shard does to a module
        pass

    opened = type(model.a)
    model.a.__class__ = Later
    with pytest.raises(PeftlibError, match="changed its class after"):
        tuning.detach()
    assert tuning.attached
    assert torch.equal(model(X), out)
    model.a.__class__ = opened
    tuning.detach()
    assert type(model.a) is nn.Linear


def test_only_the_tuning_gets_gradients_and_optimizers_see_only_it() -> None:
    model = Net()
    tuning = tuned(model, targets=["a"])
    model(X).sum().backward()
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
    assert {id(p) for p in tuning.parameters()} == {
        id(dict(model.named_parameters())[n]) for n in with_gradient
    }


def test_folding_needs_something_to_fold() -> None:
    with pytest.raises(PeftlibError, match="no reparametrization to fold"):
        tuned(Net()).fold()


def test_folding_a_mixed_tuning_folds_what_can_be() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn, self.fc = nn.MultiheadAttention(4, 2), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.attn(x, x, x)[0])

    model, x = Both(), torch.randn(3, 1, 4)
    tuning = tuned(model, "t", {"attn": PrefixTuning(length=2, hidden=3), "fc": LoRA(rank=1)}, example=x)
    out, lora = model(x), copy.deepcopy(tuning.state_dict()["fc.lora.a"])
    tuning.fold()
    assert torch.equal(model(x), out)
    assert torch.equal(tuning.state_dict()["fc.lora.a"], lora)
    assert set(tuning.sites) == {"attn", "fc"}
    assert tuning.num_parameters == 2 * 2 * 4 + 8
