"""Saving and loading tunings: what a file restores, and the bases and models it refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import peftlib
from peftlib import Adapter, BitFit, FullFineTuning, LoRA, NewHead, PeftlibError, PrefixTuning, PTuningV2
from peftlib.checkpoint import fingerprint
from peftlib.container import read, write
from peftlib.errors import CheckpointError, StateError
from peftlib.methods.base import METHODS, Delta, Method, Site
from tests.twin import assert_untouched, classes, randomize, snapshot


class Net(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.attn = nn.MultiheadAttention(width, 2, batch_first=True)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 11)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.attn(x, x, x, need_weights=False)[0]
        return self.head(self.norm(x + self.down(self.up(x).relu())))


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])

PLANS: dict[str, tuple[Any, dict[str, Any]]] = {
    "lora": (LoRA(rank=2, alpha=5.0, use_rslora=True), {}),
    "dora": (LoRA(rank=2, use_dora=True, dropout=0.1), {"targets": ["up", "k_proj"]}),
    "rows": (LoRA(rank=2, rows=[(0, 8), (16, 24)]), {"targets": ["up"]}),
    "raw": (LoRA(rank=2), {"targets": ["in_proj_weight", "up.weight"]}),
    "wider": (LoRA(rank=2, dtype=torch.float64), {"targets": ["up"]}),
    "embedding": (LoRA(rank=2), {"targets": [nn.Embedding]}),
    "adapter": (Adapter(dim=3, placement="parallel", scale=2.0), {"targets": ["up"], "example": IDS}),
    "prefix": (PrefixTuning(length=2, hidden=3), {"example": IDS}),
    "prompts": (PTuningV2(length=2, dropout=0.2), {"example": IDS}),
    "full": (FullFineTuning(), {}),
    "bitfit": (BitFit(), {}),
    "head": (LoRA(rank=2, head=NewHead(3)), {"targets": ["up"], "example": IDS}),
    "named head": (Adapter(dim=2, head="head"), {"targets": ["down"]}),
    "mixed": (
        {"up": LoRA(rank=1), "down": LoRA(rank=2), "*up": Adapter(dim=2), "norm": FullFineTuning()},
        {},
    ),
    "root": (Adapter(dim=2), {"targets": [""], "example": IDS}),
}


@pytest.mark.parametrize("plan", list(PLANS))
def test_a_file_restores_the_tuning_on_a_fresh_base(plan: str, tmp_path: Path) -> None:
    method, options = PLANS[plan]
    model = Net().eval()
    fresh = copy.deepcopy(model)
    base, before, kinds = fresh(IDS), snapshot(fresh), classes(fresh)
    tuning = peftlib.attach(model, method, name="chat", **options)
    randomize(tuning)
    path = tmp_path / "t.safetensors"
    tuning.save(path)
    loaded = peftlib.load(fresh, path)
    assert torch.equal(fresh(IDS), model(IDS))
    assert fresh(IDS).shape != base.shape or not torch.equal(fresh(IDS), base)
    assert repr(loaded) == repr(tuning)
    # A head is a part of its own by then.
    plain = {n: replace(m, head=None) for n, m in tuning.sites.items()}
    assert {n: str(m) for n, m in loaded.sites.items()} == {n: str(m) for n, m in plain.items()}
    assert [(n, p.dtype, p.requires_grad) for n, p in loaded.named_parameters()] == [
        (n, p.dtype, True) for n, p in tuning.named_parameters()
    ]
    loaded.save(tmp_path / "again.safetensors")
    first, second = read(path), read(tmp_path / "again.safetensors")
    assert first[0] == second[0]
    assert all(torch.equal(first[1][k], v) for k, v in second[1].items())
    loaded.detach()
    assert_untouched(fresh, before, kinds)


@pytest.mark.parametrize("plan", list(PLANS))
def test_a_file_holds_the_tuning_and_nothing_of_the_base(plan: str, tmp_path: Path) -> None:
    method, options = PLANS[plan]
    model = Net()
    tuning = peftlib.attach(model, method, **options)
    tuning.save(tmp_path / "t.safetensors")
    tensors = load_file(tmp_path / "t.safetensors")
    assert set(tensors) == set(tuning.state_dict())
    assert sum(t.numel() for t in tensors.values()) == tuning.num_parameters


def test_the_name_may_change_and_training_may_stop(tmp_path: Path) -> None:
    model = Net()
    fresh = copy.deepcopy(model)
    tuning = peftlib.attach(model, LoRA(rank=2), targets=["up"], name="chat")
    randomize(tuning)
    path = tmp_path / "t.safetensors"
    tuning.save(path)
    for name in ("one", "two"):
        loaded = peftlib.load(fresh, path, name=name, trainable=name == "one")
        assert loaded.name == name
        assert all(p.requires_grad == (name == "one") for p in loaded.parameters())
    assert peftlib.load(fresh, path).name == "chat"
    with pytest.raises(StateError, match="'chat' already"):
        peftlib.load(fresh, path)
    with pytest.raises(PeftlibError, match="without"):
        peftlib.load(fresh, path, name="a.b")


def test_loading_works_beside_other_tunings_and_freezes(tmp_path: Path) -> None:
    model = Net()
    fresh = copy.deepcopy(model)
    tuning = peftlib.attach(model, LoRA(rank=2), targets=["up"], name="chat")
    randomize(tuning)
    tuning.save(tmp_path / "t.safetensors")
    other = peftlib.attach(fresh, LoRA(rank=3), targets=["up", "down"], name="other")
    peftlib.load(fresh, tmp_path / "t.safetensors")
    other.detach()
    assert torch.equal(fresh(IDS), model(IDS))
    plain = copy.deepcopy(model)
    peftlib.tunings(plain)["chat"].detach()
    peftlib.load(plain, tmp_path / "t.safetensors")
    assert {n for n, p in plain.named_parameters() if p.requires_grad} == {
        n for n, _ in plain.named_parameters() if "_peft" in n
    }


def test_a_tuning_of_another_width_of_number_takes_the_hosts(tmp_path: Path) -> None:
    model = Net()
    half = copy.deepcopy(model).bfloat16()
    tuning = peftlib.attach(model, LoRA(rank=2), targets=["up"])
    randomize(tuning)
    tuning.save(tmp_path / "t.safetensors")
    loaded = peftlib.load(half, tmp_path / "t.safetensors")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert half(IDS).dtype == torch.bfloat16


# -- the base ----------------------------------------------------------------------------------------------------------


def test_the_fingerprint_is_of_names_and_shapes_alone() -> None:
    model = Net()
    one = fingerprint(model)
    assert fingerprint(Net()) == one  # other values
    assert one["class"] == "Net"
    assert one["parameters"] == sum(p.numel() for p in model.parameters())
    peftlib.attach(model, LoRA(rank=2))
    peftlib.attach(model, FullFineTuning(), name="full")
    assert fingerprint(model) == one
    assert fingerprint(Net(4))["shapes"] != one["shapes"]
    renamed = Net()
    renamed.final = renamed.head
    del renamed.head
    assert fingerprint(renamed)["shapes"] != one["shapes"]


@pytest.mark.parametrize("change", ["width", "missing", "more"])
def test_another_base_is_refused_and_left_alone(change: str, tmp_path: Path) -> None:
    model = Net()
    peftlib.attach(model, LoRA(rank=2), targets=["up"]).save(tmp_path / "t.safetensors")
    other = Net(4 if change == "width" else 8)
    if change == "missing":
        other.norm = nn.Identity()
    if change == "more":
        other.extra = nn.Linear(2, 2)
    before, kinds = snapshot(other), classes(other)
    with pytest.raises(CheckpointError, match="made for another base: Net with"):
        peftlib.load(other, tmp_path / "t.safetensors")
    assert_untouched(other, before, kinds)
    assert not peftlib.tunings(other)


Change = Callable[[dict[str, Any], dict[str, Tensor]], Any]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda about, t: t.pop("up.lora.b"), "missing: up.lora.b"),
        (lambda about, t: t.update({"up.lora.c": torch.zeros(1)}), "unexpected: up.lora.c"),
        (lambda about, t: t.update({"up.lora.b": torch.zeros(3)}), "shape of up.lora.b"),
        (
            lambda about, t: about["plan"][0].update(method="Magic"),
            "method 'Magic', which this program does not have",
        ),
        (lambda about, t: about["plan"][0]["config"].update(depth=3), r"unknown setting.* depth"),
        (lambda about, t: about["plan"][0]["config"].update(rank=-1), "rank=-1"),
        (lambda about, t: about["plan"][0]["config"].update(dtype="torch.nn"), "dtype 'torch.nn'"),
        (lambda about, t: about["plan"][0]["config"].update(rank=100), "rank 100 is larger"),
        (lambda about, t: about["plan"][0].update(sites={"upp": {}}), "'upp' matches nothing"),
        (lambda about, t: about["plan"][0].update(sites={"norm": {}}), "cannot carry LoRA"),
        (lambda about, t: about.pop("plan"), "does not describe a tuning: its plan"),
        (lambda about, t: about.update(name=3), "its name is missing or of another kind"),
    ],
)
def test_a_file_that_does_not_fit_is_explained_and_the_model_left_alone(
    change: Change, message: str, tmp_path: Path
) -> None:
    model = Net()
    fresh = copy.deepcopy(model)
    before, kinds = snapshot(fresh), classes(fresh)
    path = tmp_path / "t.safetensors"
    peftlib.attach(model, LoRA(rank=2), targets=["up"]).save(path)
    about, tensors = read(path)
    change(about, tensors)
    write(path, tensors, about)
    with pytest.raises(CheckpointError, match=message):
        peftlib.load(fresh, path)
    assert_untouched(fresh, before, kinds)
    assert all(p.requires_grad for p in fresh.parameters())


def test_what_cannot_be_written_is_explained(tmp_path: Path) -> None:
    with torch.device("meta"):
        empty = Net()
    with pytest.raises(CheckpointError, match=r"no values yet: 'up.lora.a' is on the meta device"):
        peftlib.attach(empty, LoRA(rank=2), targets=["up"]).save(tmp_path / "t.safetensors")
    with pytest.raises(CheckpointError, match="There is no file"):
        peftlib.load(Net(), tmp_path / "none.safetensors")
    assert not list(tmp_path.iterdir())


# -- methods of one's own ----------------------------------------------------------------------------------------------


def test_a_method_of_ones_own_is_found_by_its_name(tmp_path: Path) -> None:
    class Shift(Delta):
        def __init__(self, width: int):
            super().__init__()
            self.by = nn.Parameter(torch.zeros(width))

        def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return base(*args, **kwargs) + self.by

    @dataclass(frozen=True, kw_only=True)
    class Shifting(Method):
        width: int = 1

        def refuses(self, site: Site) -> str | None:
            return None

        def build(self, sites: Sequence[Site]) -> dict[str, Delta]:
            return {s.name: Shift(self.width) for s in sites}

    model = Net()
    fresh = copy.deepcopy(model)
    tuning = peftlib.attach(model, Shifting(width=8), targets=["norm"])
    randomize(tuning)
    tuning.save(tmp_path / "t.safetensors")
    peftlib.load(fresh, tmp_path / "t.safetensors")
    assert torch.equal(fresh(IDS), model(IDS))
    del METHODS["Shifting"]
    with pytest.raises(CheckpointError, match=r"'Shifting'.*must be imported before loading"):
        peftlib.load(copy.deepcopy(fresh), tmp_path / "t.safetensors", name="x")
