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
from torch.utils._python_dispatch import TorchDispatchMode

import peftlib
from peftlib import (
    Adapter,
    BitFit,
    FullFineTuning,
    LoRA,
    NewHead,
    PeftlibError,
    PrefixTuning,
    PromptTuning,
    PTuningV1,
    PTuningV2,
    TokenRows,
)
from peftlib.container import Reading, read, write
from peftlib.errors import CheckpointError, StateError
from peftlib.fingerprint import fingerprint
from peftlib.methods.base import METHODS, Delta, Method, Site
from peftlib.targets import Tree
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


IDS = torch.tensor([[1, 5, 3], [4, 5, 6]])

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
    "prompt": (PromptTuning(length=2), {"example": IDS}),
    "encoder": (PTuningV1(length=2, hidden=3), {"example": IDS}),
    "template": (PTuningV1(length=1, encoder="mlp", hidden=3, placeholder_id=5), {}),
    "tokens": (TokenRows(ids=[7, 5]), {}),
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
    one = fingerprint(Tree(model))
    assert fingerprint(Tree(Net())) == one  # other values
    assert one["class"] == "Net"
    assert one["parameters"] == sum(p.numel() for p in model.parameters())
    peftlib.attach(model, LoRA(rank=2))
    peftlib.attach(model, FullFineTuning(), name="full")
    assert fingerprint(Tree(model)) == one
    assert fingerprint(Tree(Net(4)))["shapes"] != one["shapes"]
    renamed = Net()
    renamed.final = renamed.head
    del renamed.head
    assert fingerprint(Tree(renamed))["shapes"] != one["shapes"]


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
        (lambda about, t: about["plan"][0]["config"].update(rank=100), "shape of up.lora.a"),
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


# -- what a file may hold, and where it goes ---------------------------------------------------------------------------


def test_a_rank_above_the_width_loads_again_though_attaching_refuses_it(tmp_path: Path) -> None:
    model = Net()
    peftlib.attach(model, LoRA(rank=8, alpha=4), targets=["up"]).save(tmp_path / "t.safetensors")
    about, _ = read(tmp_path / "t.safetensors")
    about["plan"][0]["config"]["rank"] = 20
    wide = {"up.lora.a": torch.randn(20, 8), "up.lora.b": torch.randn(24, 20)}
    write(tmp_path / "t.safetensors", wide, about)
    with pytest.raises(PeftlibError, match="rank 20 is larger"):
        peftlib.attach(Net(), LoRA(rank=20), targets=["up"])
    fresh = Net()
    loaded = peftlib.load(fresh, tmp_path / "t.safetensors")
    x = torch.randn(3, 8)
    delta = wide["up.lora.b"] @ wide["up.lora.a"] * (4 / 20)
    torch.testing.assert_close(
        fresh.up(x), torch.nn.functional.linear(x, fresh.up.weight + delta, fresh.up.bias)
    )
    loaded.save(tmp_path / "again.safetensors")
    peftlib.load(Net(), tmp_path / "again.safetensors")


@pytest.mark.parametrize("plan", list(PLANS))
def test_a_base_without_values_keeps_the_tunings_until_it_has_some(plan: str, tmp_path: Path) -> None:
    method, options = PLANS[plan]
    model = Net().eval()
    base = copy.deepcopy(model.state_dict())
    tuning = peftlib.attach(model, method, **options)
    randomize(tuning)
    tuning.save(tmp_path / "t.safetensors")
    with torch.device("meta"):
        empty = Net().eval()
    before, kinds = list(empty.state_dict()), classes(empty)
    if any(isinstance(m, (FullFineTuning, BitFit)) for m in tuning.sites.values()):
        with pytest.raises(CheckpointError, match="on the meta device: there are no values to exchange"):
            peftlib.load(empty, tmp_path / "t.safetensors")
        assert (list(empty.state_dict()), classes(empty)) == (before, kinds)
        assert not peftlib.tunings(empty)
        return
    loaded = peftlib.load(empty, tmp_path / "t.safetensors")
    assert all(not t.is_meta for t in loaded.state_dict().values())
    empty.load_state_dict(base, assign=True, strict=False)
    assert torch.equal(empty(IDS), model(IDS))


def test_every_tensor_that_was_read_has_memory_of_its_own(tmp_path: Path) -> None:
    tuning = peftlib.attach(Net(), LoRA(rank=2), targets=["up", "down"])
    tuning.save(tmp_path / "t.safetensors")
    loaded = peftlib.load(Net(), tmp_path / "t.safetensors")
    storages = [p.untyped_storage() for p in loaded.parameters()]
    assert len({s.data_ptr() for s in storages}) == len(storages)
    assert [s.nbytes() for s in storages] == [p.nbytes for p in loaded.parameters()]


def test_values_are_read_straight_into_the_parameters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuning = peftlib.attach(Net(), LoRA(rank=2), targets=["up"])
    tuning.save(tmp_path / "t.safetensors")
    places: set[int] = set()
    plain = Reading.tensors

    def noted(self: Reading, names: Any = None) -> dict[str, Tensor]:
        found = plain(self, names)
        places.update(t.data_ptr() for t in found.values())
        return found

    monkeypatch.setattr(Reading, "tensors", noted)
    loaded = peftlib.load(Net(), tmp_path / "t.safetensors")
    assert {p.data_ptr() for p in loaded.parameters()} == places


# -- the values of the base --------------------------------------------------------------------------------------------


def test_a_hash_of_the_base_tells_other_values(tmp_path: Path) -> None:
    model = Net()
    fresh = copy.deepcopy(model)
    other, half = copy.deepcopy(model), copy.deepcopy(model).bfloat16()
    with torch.no_grad():
        other.norm.bias[3] += 1e-6
        other.up.weight[0, 0] += 1e-6
    tuning = peftlib.attach(model, LoRA(rank=2), targets=["up"])
    # A second tuning trains the base's own values in place; the hash is of the base.
    full = peftlib.attach(model, {"norm": FullFineTuning()}, name="full")
    randomize(full)
    path = tmp_path / "t.safetensors"
    tuning.save(path, hash_base=True)
    peftlib.load(fresh, path)
    before, kinds = snapshot(other), classes(other)
    with pytest.raises(
        CheckpointError, match=r"other values: '(up.weight|norm.bias)' differs, and 1 more of 13"
    ):
        peftlib.load(other, path)
    assert_untouched(other, before, kinds)
    with pytest.raises(
        CheckpointError, match=r"parameters in float32; this is Net with \d+ parameters in bfloat16"
    ):
        peftlib.load(half, path)
    with torch.device("meta"):
        empty = Net()
    with pytest.raises(CheckpointError, match="has no value that a hash could be of"):
        peftlib.load(empty, path)
    tuning.save(path)
    peftlib.load(other, path)


def test_what_is_not_the_base_any_more_is_not_hashed(tmp_path: Path) -> None:
    model = Net()
    tuning = peftlib.attach(model, LoRA(rank=2), targets=["up"])
    tuning.merge()
    with pytest.raises(StateError, match=r"'up.weight' has 'default' merged into it"):
        tuning.save(tmp_path / "t.safetensors", hash_base=True)
    tuning.unmerge()
    kept = peftlib.attach(model, {"norm": FullFineTuning(keep_base=False)}, name="full")
    with pytest.raises(StateError, match=r"'norm.(weight|bias)' is trained with keep_base=False"):
        kept.save(tmp_path / "t.safetensors", hash_base=True)
    assert not list(tmp_path.iterdir())


def test_forged_hashes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    peftlib.attach(Net(), LoRA(rank=2), targets=["up"]).save(path, hash_base=True)
    about, tensors = read(path)
    for values in ("x", [], {}, {**about["base"]["values"], "more": "0"}):
        write(path, tensors, {**about, "base": {**about["base"], "values": values}})
        with pytest.raises(CheckpointError, match="one hash for each parameter"):
            peftlib.load(Net(), path)


class Largest(TorchDispatchMode):
    """The largest tensor with values that is made within."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                self.nbytes = max(self.nbytes, tensor.nbytes)
        return out


def bent(value: Any, by: int) -> Any:
    """Every number in nested lists and objects made huge."""
    if isinstance(value, dict):
        return {k: bent(v, by) for k, v in value.items()}
    if isinstance(value, list):
        return [bent(v, by) for v in value]
    return value * by if type(value) is int and value > 0 else value


@pytest.mark.parametrize("plan", list(PLANS))
def test_sizes_that_a_file_only_claims_are_never_allocated(plan: str, tmp_path: Path) -> None:
    method, options = PLANS[plan]
    path = tmp_path / "t.safetensors"
    fresh = Net()
    before, kinds = snapshot(fresh), classes(fresh)
    peftlib.attach(Net(), method, **options).save(path)
    about, tensors = read(path)
    refusals = 0
    for part in range(len(about["plan"])):
        for field in ("config", "sites"):
            changed = copy.deepcopy(about)
            changed["plan"][part][field] = bent(changed["plan"][part][field], 10**9)
            if changed == about:
                continue
            write(path, tensors, changed)
            with Largest() as seen, pytest.raises(PeftlibError):
                peftlib.load(fresh, path)
            assert seen.nbytes < 1e5
            assert_untouched(fresh, before, kinds)
            refusals += 1
    assert refusals or plan in ("full", "bitfit")


def test_deltas_of_one_host_keep_their_order_though_one_method_stands_twice(tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({"l1": nn.Linear(4, 4), "l2": nn.Linear(4, 4)})

    model, twice = make(), LoRA(rank=2)
    methods = {"l1": twice, "l*": peftlib.Adapter(dim=2), "l2": twice}
    tuning = peftlib.attach(model, methods, name="t")
    randomize(tuning)
    tuning.save(tmp_path / "t")
    loaded = make()
    peftlib.load(loaded, tmp_path / "t")
    x = torch.randn(3, 4)
    for name in ("l1", "l2"):
        kinds = [type(d) for d in model[name]._peft_active]
        assert [type(d) for d in loaded[name]._peft_active] == kinds
        assert torch.equal(loaded[name](x), model[name](x))
    assert [type(d).__name__ for d in loaded["l2"]._peft_active] == ["Bottleneck", "LinearLoRA"]


def test_what_is_no_model_no_path_or_no_file_is_said_to_be_so(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    tuning = peftlib.attach(model, LoRA(rank=2), targets=["0"], name="t")
    tuning.save(tmp_path / "t")
    with pytest.raises(PeftlibError, match=r"load needs an nn\.Module; got Tuning"):
        peftlib.load(tuning, tmp_path / "t")  # type: ignore[arg-type]
    for act in (lambda: tuning.save(None), lambda: peftlib.load(model, None)):  # type: ignore[arg-type]
        with pytest.raises(PeftlibError, match="named by a str or a path; got NoneType"):
            act()
    with pytest.raises(CheckpointError, match=r"is a directory.*peftlib\.hf\.load"):
        peftlib.load(model, tmp_path)


@pytest.mark.parametrize("axis", [1.5, None, "x", [], True])
def test_sizes_of_an_adapter_that_are_no_integers_are_refused(tmp_path: Path, axis: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    peftlib.attach(model, peftlib.Adapter(dim=2), targets=["0"], name="t").save(tmp_path / "t")
    about, tensors = read(tmp_path / "t")
    about["plan"][0]["sites"]["0"]["axis"] = axis
    write(tmp_path / "forged", tensors, about)
    with pytest.raises(CheckpointError, match="its sizes are no integers"):
        peftlib.load(nn.Sequential(nn.Linear(4, 4)), tmp_path / "forged")
