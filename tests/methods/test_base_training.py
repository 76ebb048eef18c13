"""Full, partial and bias-only fine-tuning: what is trained, and that the base comes back bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftlib
from peftlib import BitFit, FullFineTuning, LoRA, PartialFineTuning, PeftlibError
from tests.twin import assert_untouched, classes, randomize, snapshot


class Net(nn.Module):
    """Convolution, batch norm, and a tied pair of linears."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 4, 3, bias=False)
        self.norm = nn.BatchNorm1d(4)
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(self.norm(self.conv(x)).mean(-1)).relu())


def train(model: nn.Module, tuning: peftlib.Tuning, steps: int = 3, **options: Any) -> None:
    optimizer = torch.optim.AdamW(tuning.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 3, 8)).square().mean().backward()
        optimizer.step()


METHODS: dict[str, tuple[Callable[..., Any], int]] = {
    "full": (FullFineTuning, 36 + 8 + 16 + 4 + 4),
    "partial": (lambda **o: PartialFineTuning(targets=["norm", "b.bias"], **o), 8 + 4),
    "bitfit": (BitFit, 4 + 4 + 4),
}


@pytest.mark.parametrize("name", list(METHODS))
@pytest.mark.parametrize("keep_base", [True, False])
def test_training_equals_training_the_module_itself(name: str, keep_base: bool) -> None:
    make, count = METHODS[name]
    model = Net()
    twin = copy.deepcopy(model)
    tuning = peftlib.attach(model, make(keep_base=keep_base))
    assert tuning.num_parameters == count
    theirs = {id(model.get_parameter(n)): p for n, p in twin.named_parameters()}
    mine = {id(p) for p in tuning.parameters()}
    for one, other in theirs.items():
        other.requires_grad_(one in mine)
    if name == "bitfit":  # a norm of which only the bias is trained keeps its statistics
        twin.norm.momentum = 0.0
    torch.manual_seed(1)
    train(model, tuning)
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW([theirs[id(p)] for p in tuning.parameters()], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        twin(torch.randn(5, 3, 8)).square().mean().backward()
        optimizer.step()
    assert all(torch.equal(model.get_parameter(n), p) for n, p in twin.named_parameters())
    assert torch.equal(model.norm.running_mean, twin.norm.running_mean)


@pytest.mark.parametrize("name", list(METHODS))
def test_disabling_and_detaching_are_exact(name: str) -> None:
    model = Net()
    before, kinds = snapshot(model), classes(model)
    flags = [p.requires_grad for p in model.parameters()]
    tuning = peftlib.attach(model, METHODS[name][0]())
    train(model, tuning)
    tuned = snapshot(model)
    assert not all(torch.equal(tuned[k], before[k]) for k in before)
    with tuning.disabled():
        now = model.state_dict()
        assert all(torch.equal(now[k], before[k]) for k in before)
        assert not any(p.requires_grad for p in tuning.parameters())
    assert all(torch.equal(model.state_dict()[k], tuned[k]) for k in tuned)
    train(model, tuning)  # the optimizer's parameters are still the model's
    tuning.detach()
    assert_untouched(model, before, kinds)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", list(METHODS))
def test_without_a_kept_base_there_is_no_second_copy_and_no_way_back(name: str) -> None:
    kept, gone = Net(), Net()
    with_base = peftlib.attach(kept, METHODS[name][0]())
    without = peftlib.attach(gone, METHODS[name][0](keep_base=False))

    def held(tuning: peftlib.Tuning) -> int:
        return sum(t.numel() for part in tuning.parts for t in part.delta.state_dict().values())

    assert held(with_base) >= with_base.num_parameters
    assert held(without) == 0
    for leave in (without.disable, without.detach, lambda: without.disabled().__enter__()):
        with pytest.raises(PeftlibError, match="keep_base=True"):
            leave()
    assert without.enabled
    assert without.attached
    train(gone, without)


@pytest.mark.parametrize("keep_base", [True, False])
@pytest.mark.parametrize("name", list(METHODS))
def test_a_file_holds_what_was_trained_and_statistics(name: str, keep_base: bool, tmp_path: Path) -> None:
    model = Net()
    fresh = copy.deepcopy(model)
    before = snapshot(fresh)
    tuning = peftlib.attach(model, METHODS[name][0](keep_base=keep_base))
    train(model, tuning)
    tuning.save(tmp_path / "t.safetensors")
    keys = {k for k in tuning.state_dict() if "running" in k or "tracked" in k}
    assert len(keys) == (0 if name == "bitfit" else 3)
    loaded = peftlib.load(fresh, tmp_path / "t.safetensors")
    assert all(torch.equal(fresh.state_dict()[k], v) for k, v in model.state_dict().items())
    if keep_base:
        loaded.detach()
        assert all(torch.equal(fresh.state_dict()[k], v) for k, v in before.items())


def test_a_disabled_tuning_saves_its_tuned_values(tmp_path: Path) -> None:
    model = Net()
    tuning = peftlib.attach(model, FullFineTuning())
    train(model, tuning)
    on = {k: v.clone() for k, v in tuning.state_dict().items()}
    tuning.disable()
    assert all(torch.equal(v, on[k]) for k, v in tuning.state_dict().items())
    tuning.load_state_dict({k: torch.zeros_like(v) for k, v in on.items()})
    assert model.conv.weight.any()
    tuning.enable()
    assert not model.conv.weight.any()


# -- one weight, several claims ----------------------------------------------------------------------------------------


def test_two_tunings_of_one_weight_take_turns() -> None:
    model = Net()
    before = snapshot(model)
    first = peftlib.attach(model, FullFineTuning(), name="first")
    with pytest.raises(PeftlibError, match="trained by another enabled tuning"):
        peftlib.attach(model, BitFit(), name="second")
    assert list(peftlib.tunings(model)) == ["first"]
    first.disable()
    second = peftlib.attach(model, PartialFineTuning(targets=["a"]), name="second")
    train(model, second)
    with pytest.raises(PeftlibError, match="trained by another enabled tuning"):
        first.enable()
    assert not first.enabled
    ours = model.a.weight.detach().clone()
    peftlib.use(model, "first")
    assert torch.equal(model.a.weight, before["a.weight"])
    train(model, first)
    peftlib.use(model, "second")
    assert torch.equal(model.a.weight, ours)
    peftlib.use(model)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    second.detach()
    first.detach()
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


def test_a_tied_weight_is_one_weight_under_both_names() -> None:
    model = Net()
    tuning = peftlib.attach(model, FullFineTuning(), targets=["a", "b"])
    assert tuning.num_parameters == 16 + 4 + 4
    assert model.a.weight is model.b.weight
    tuning.detach()
    assert model.a.weight is model.b.weight
    peftlib.attach(model, FullFineTuning(), targets=["a"], name="at a")
    with pytest.raises(PeftlibError, match="trained by another enabled tuning"):
        peftlib.attach(model, FullFineTuning(), targets=["b"], name="at b")
    assert list(peftlib.tunings(model)) == ["at a"]
    peftlib.attach(model, BitFit(), targets=["b"], name="bias of b")  # that one is not shared


def test_an_update_is_not_merged_into_a_weight_that_another_tuning_trains() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    full = peftlib.attach(model, FullFineTuning(), name="full")
    lora = peftlib.attach(model, LoRA(rank=2), targets=["0"], name="lora")
    randomize(lora)
    with pytest.raises(PeftlibError, match="trained by another enabled tuning"):
        lora.merge()
    assert not lora.merged
    full.disable()
    lora.merge()
    merged = model[0].weight.detach().clone()
    with pytest.raises(PeftlibError, match="merged"):
        full.enable()
    assert not full.enabled
    assert torch.equal(model[0].weight, merged)
    lora.unmerge()
    full.enable()


def test_a_lora_on_top_of_a_trained_weight_in_one_tuning() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    before = snapshot(model)
    tuning = peftlib.attach(model, {"": FullFineTuning(), "1": LoRA(rank=2)})
    randomize(tuning)
    x = torch.randn(3, 4)
    out = model(x)
    tuning.merge()
    torch.testing.assert_close(model(x), out, rtol=1e-5, atol=1e-5)
    tuning.detach()
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


# -- what is trained ---------------------------------------------------------------------------------------------------


def test_bitfit_trains_each_kind_of_bias_and_nothing_else() -> None:
    model = nn.ModuleDict(
        {
            "attn": nn.MultiheadAttention(4, 2, add_bias_kv=True),
            "lstm": nn.LSTM(4, 3, num_layers=2, bidirectional=True, proj_size=2),
            "conv": nn.Conv2d(2, 5, 3),
            "norm": nn.LayerNorm(4),
            "rms": nn.RMSNorm(4),
            "bilinear": nn.Bilinear(2, 3, 4),
            "plain": nn.Linear(4, 4, bias=False),
            "embed": nn.Embedding(5, 4),
        }
    )
    tuning = peftlib.attach(model, BitFit())
    expected = {"attn.in_proj_bias", "attn.out_proj.bias", "conv.bias", "norm.bias", "bilinear.bias"}
    expected |= {
        f"lstm.bias_{kind}_l{layer}{way}"
        for kind in ("ih", "hh")
        for layer in (0, 1)
        for way in ("", "_reverse")
    }
    assert {n for n, p in model.named_parameters() if p.requires_grad} == expected
    assert {n.replace("bitfit.", "") for n, _ in tuning.named_parameters()} == expected
    assert tuning.num_parameters == 12 + 4 + 5 + 4 + 4 + 8 * 12


def test_bitfit_on_a_recurrent_network_really_learns() -> None:
    model = nn.LSTM(3, 4)
    before = snapshot(model)
    x = torch.randn(5, 2, 3)
    base = model(x)[0]
    tuning = peftlib.attach(model, BitFit())
    optimizer = torch.optim.SGD(tuning.parameters(), lr=1.0)
    model(x)[0].square().sum().backward()
    optimizer.step()
    assert not torch.equal(model(x)[0], base)
    changed = {k for k, v in model.state_dict().items() if k in before and not torch.equal(v, before[k])}
    assert changed == {"bias_ih_l0", "bias_hh_l0"}
    tuning.detach()
    assert torch.equal(model(x)[0], base)


@pytest.mark.parametrize(
    "targets, trained",
    [
        (["2"], {"2.weight", "2.bias"}),
        ("2", {"2.weight", "2.bias"}),
        (["1", "2.bias"], {"1.weight", "1.bias", "2.bias"}),
        (["0.weight"], {"0.weight"}),
        (["*", "!1"], {"0.weight", "0.bias", "2.weight", "2.bias"}),
        ([nn.Linear, "!0", "!1"], {"2.weight", "2.bias"}),
        ([lambda name, module: name == "1"], {"1.weight", "1.bias"}),
    ],
)
@pytest.mark.parametrize("given", ["method", "attach"])
def test_partial_trains_the_named_part(targets: Any, trained: set[str], given: str) -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    if given == "method":
        peftlib.attach(model, PartialFineTuning(targets=targets))
    else:
        peftlib.attach(model, PartialFineTuning(), targets=targets)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


@pytest.mark.parametrize(
    "make, targets, frozen",
    [
        (FullFineTuning, ["!head"], {"head.weight", "head.bias"}),
        (FullFineTuning, ["!*.bias"], {"head.bias", "body.0.bias", "body.1.bias", "body.2.bias"}),
        (FullFineTuning, ["!0.weight", "!body.1"], {"body.0.weight", "body.1.weight", "body.1.bias"}),
        (
            PartialFineTuning,
            ["body", "!body.0"],
            {"body.0.weight", "body.0.bias", "head.weight", "head.bias"},
        ),
        (PartialFineTuning, ["*", "!head.bias"], {"head.bias"}),
        (BitFit, ["!head"], {n for n, _ in Nested().named_parameters() if "head" in n or "weight" in n}),
    ],
)
def test_exclusions_reach_inside_a_target(
    make: Any, targets: list[str], frozen: set[str], tmp_path: Path
) -> None:
    model = Nested()
    fresh = copy.deepcopy(model)
    tuning = peftlib.attach(model, make(), targets=targets, example=torch.zeros(2, 4))
    assert {n for n, p in model.named_parameters() if not p.requires_grad and "_peft" not in n} == frozen
    randomize(tuning)
    tuning.save(tmp_path / "t.safetensors")
    loaded = peftlib.load(fresh, tmp_path / "t.safetensors")
    assert [n for n, _ in loaded.named_parameters()] == [n for n, _ in tuning.named_parameters()]


def test_integer_parameters_are_left_alone() -> None:
    model = nn.Linear(4, 4)
    model.steps = nn.Parameter(torch.zeros(3, dtype=torch.long), requires_grad=False)
    assert peftlib.attach(model, FullFineTuning()).num_parameters == 20


@pytest.mark.parametrize(
    "model, make, message",
    [
        (nn.Linear(4, 4, bias=False), lambda: BitFit(), "BitFit finds no place"),
        (nn.Sequential(nn.ReLU()), lambda: FullFineTuning(), "finds no place|nothing to train|no parameter"),
        (nn.Linear(4, 4), lambda: PartialFineTuning(), "no default place: name one with targets"),
        (nn.Linear(4, 4), lambda: PartialFineTuning(targets=[]), "names nothing to train"),
        (nn.Linear(4, 4), lambda: PartialFineTuning(targets=["wieght"]), "'weight'"),
        (nn.Linear(4, 4), lambda: FullFineTuning(dtype=torch.bfloat16), "dtype= does not apply"),
    ],
)
def test_what_cannot_be_trained_is_refused(model: nn.Module, make: Callable[[], Any], message: str) -> None:
    before, kinds = snapshot(model), classes(model)
    with pytest.raises(PeftlibError, match=message):
        peftlib.attach(model, make())
    assert_untouched(model, before, kinds)
    assert all(p.requires_grad for p in model.parameters())


def test_bitfit_refuses_a_target_without_a_bias() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4))
    with pytest.raises(PeftlibError, match="no parameter inside that it could train"):
        peftlib.attach(model, BitFit(), targets=["0"])
    with pytest.raises(PeftlibError, match="no floating-point parameter that it could train"):
        peftlib.attach(model, BitFit(), targets=["1.weight"])
    assert peftlib.attach(model, BitFit(), targets=["1.bias"]).num_parameters == 4
