"""Merging, and the merged state dict: against weights written out by hand, and against whoever else is at a weight."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import peftlib
from peftlib import (
    Adapter,
    BitFit,
    FullFineTuning,
    LoRA,
    NewHead,
    PartialFineTuning,
    PeftlibError,
    PrefixTuning,
    PromptTuning,
    PTuningV2,
    TokenRows,
)
from peftlib.errors import StateError
from peftlib.methods.lora_deltas import LowRank
from peftlib.targets import Tree
from tests.contract import close, differences, snapshot
from tests.twin import randomize
from tests.zoo import HOSTS, Int8Linear, seeded


class Net(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).tanh())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 4), nn.Linear(4, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids).sin())


X, IDS = torch.randn(3, 6), torch.arange(6).view(2, 3)


def tuned(model: nn.Module, name: str, method: Any, **options: Any) -> peftlib.Tuning:
    tuning = peftlib.attach(model, method, name=name, **options)
    randomize(tuning, 0.5)
    return tuning


def exported(model: nn.Module, fresh: nn.Module) -> nn.Module:
    """A plain model with the export of a tuned one in it; the tuned one is as it was."""
    before = snapshot(model)
    state = peftlib.merged_state_dict(model)
    assert not differences(before, snapshot(model))
    plain = fresh.state_dict()
    assert list(state) == list(plain)
    assert {k: (v.shape, v.dtype, v.device) for k, v in state.items()} == {
        k: (v.shape, v.dtype, v.device) for k, v in plain.items()
    }
    assert not any(v.requires_grad for v in state.values())
    fresh.load_state_dict(state)
    return fresh


# -- what is no change of a weight -------------------------------------------------------------------------------------

UNMERGEABLE = {
    "prefix": (PrefixTuning(length=2, hidden=3), "it adds keys and values"),
    "ptuning-v2": (PTuningV2(length=2), "it adds keys and values"),
    "prompt": (PromptTuning(length=2), "it adds positions"),
    "adapter": (Adapter(dim=2), "a nonlinearity between"),
    "head": (NewHead(3), "it replaces a layer of another shape"),
}


@pytest.mark.parametrize("method, reason", UNMERGEABLE.values(), ids=UNMERGEABLE)
def test_what_is_no_change_of_a_weight_says_why_and_where(method: Any, reason: str) -> None:
    host = HOSTS["decoder"]
    model = host.model()
    tuning = peftlib.attach(model, method, example=host.example())
    site = next(iter(tuning.sites))
    for refused in (tuning.merge, lambda: peftlib.merged_state_dict(model)):
        with pytest.raises(PeftlibError, match=reason) as caught:
            refused()
        assert repr(site) in str(caught.value) or not site
    tuning.disable()
    assert close(exported(model, host.model()).state_dict(), host.model().state_dict())
    tuning.enable()
    # Other tunings at other weights do not hide it.
    tuned(model, "lora", LoRA(rank=1))
    with pytest.raises(PeftlibError, match=reason):
        peftlib.merged_state_dict(model)


def test_a_part_of_a_prompted_model_does_not_lose_its_prompt_in_silence() -> None:
    host = HOSTS["decoder"]
    model = host.model()
    peftlib.attach(model, PromptTuning(length=2), example=host.example())
    with pytest.raises(PeftlibError, match="it adds positions"):
        peftlib.merged_state_dict(model.embed)
    assert list(peftlib.merged_state_dict(model.head)) == ["weight", "bias"]


# -- against weights written out by hand -------------------------------------------------------------------------------


@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 4),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    st.floats(-4, 4).filter(lambda s: abs(s) > 0.01),
)
def test_a_merged_weight_is_the_exact_sum_rounded_once(
    inputs: int, outputs: int, rank: int, dtype: torch.dtype, alpha: float
) -> None:
    model = nn.Linear(inputs, outputs).to(dtype)
    rank = min(rank, inputs, outputs)
    tuning = tuned(model, "t", LoRA(rank=rank, alpha=alpha))
    a, b = tuning.state_dict()["lora.a"].double(), tuning.state_dict()["lora.b"].double()
    exact = model.weight.double() + alpha / rank * b @ a
    state = peftlib.merged_state_dict(model)
    tuning.merge()
    assert torch.equal(model.weight, state["weight"])
    # Half a unit in the last place of the dtype, and what float32 may lose before that.
    bound = exact.abs() * torch.finfo(dtype).eps / 2 + torch.finfo(dtype).smallest_normal
    size = model.weight.double().abs() + alpha**2 * (b.abs() @ a.abs()) + exact.abs()
    wide = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    assert ((model.weight.double() - exact).abs() <= bound + 8 * wide * size).all()


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_narrow_weight_wider_than_a_block_is_the_same_sum(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peftlib.methods.lora_linear._BLOCK", 7 * rows)
    model = nn.Linear(7, 5).bfloat16()
    tuning = tuned(model, "t", LoRA(rank=2))
    a, b = (tuning.state_dict()[f"lora.{k}"].double() for k in "ab")
    expected = (model.weight.double() + b @ a).bfloat16()
    torch.testing.assert_close(peftlib.merged_state_dict(model)["weight"], expected, rtol=2**-8, atol=0)


ENABLED = ("plain", "weight", "dora", "rows")


@pytest.mark.parametrize("order", list(itertools.permutations(ENABLED, 3)))
@pytest.mark.parametrize("transposed", [False, True])
def test_several_at_one_weight_act_in_the_order_in_which_the_model_takes_them(
    order: tuple[str, ...], transposed: bool
) -> None:
    """DoRA divides by the norm of the weight that it reads, whatever ran before it; a raw weight's update is read."""
    if transposed:
        conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
        make = lambda: nn.Sequential(conv1d(6, 6)).double()  # noqa: E731
    else:
        make = lambda: nn.Sequential(nn.Linear(6, 6)).double()  # noqa: E731
    methods = {
        "plain": {"0": LoRA(rank=2)},
        "weight": {"0.weight": LoRA(rank=1)},
        "dora": {"0": LoRA(rank=2, use_dora=True)},
        "rows": {"0": LoRA(rank=1, rows=[(1, 3), (4, 6)])},
    }
    with seeded(0):
        model = make()
    fresh = copy.deepcopy(model)
    for name in order:
        tuned(model, name, methods[name])
    torch.testing.assert_close(exported(model, fresh)(X.double()), model(X.double()), rtol=1e-9, atol=1e-10)


def test_one_tuning_with_a_raw_weight_and_dora_on_top_merges_right() -> None:
    model = nn.Sequential(nn.Linear(6, 6)).double()
    tuning = tuned(model, "t", {"0": LoRA(rank=2, use_dora=True), "0.weight": LoRA(rank=1)})
    x = X.double()
    out = model(x)
    before = snapshot(model)
    tuning.merge()
    torch.testing.assert_close(model(x), out, rtol=1e-9, atol=1e-10)
    tuning.unmerge()
    assert not differences(before, snapshot(model))


def test_attention_projections_of_several_tunings() -> None:
    model = nn.MultiheadAttention(8, 2, batch_first=True).double()
    fresh, x = copy.deepcopy(model), torch.randn(2, 5, 8).double()
    tuned(model, "one", LoRA(rank=2), targets=["q_proj", "out_proj"])
    tuned(model, "two", LoRA(rank=1), targets=["q_proj", "v_proj"])
    tuned(model, "three", BitFit(), targets=["in_proj_bias"])
    torch.testing.assert_close(exported(model, fresh)(x, x, x)[0], model(x, x, x)[0], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("targets", [["q_proj"], ["v_proj", "k_proj"], ["k_proj", "out_proj"], ["attn"]])
def test_projections_fused_into_one_weight(targets: list[str]) -> None:
    """Each row of the fused weight is written once, those of no projection as they were."""
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, batch_first=True)}).bfloat16()
    tuning = tuned(model, "t", LoRA(rank=2, alpha=3), targets=targets)
    expected = {k: v.clone() for k, v in model.state_dict().items() if "_peft" not in k}
    for site in tuning.sites:
        which = "qkv".find(site.rpartition(".")[2][0])
        a, b = (tuning.state_dict()[f"{site}.lora.{k}"].double() for k in "ab")
        key = "attn.out_proj.weight" if which < 0 else "attn.in_proj_weight"
        part = expected[key] if which < 0 else expected[key][8 * which : 8 * which + 8]
        part.copy_((part.double() + 1.5 * b @ a).bfloat16())
    state = peftlib.merged_state_dict(model)
    for key, value in expected.items():
        torch.testing.assert_close(state[key], value, rtol=2**-8, atol=0)
    tuning.merge()
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())


def test_what_is_trained_in_place_is_in_the_export() -> None:
    model, fresh = Net(), Net()
    tuned(model, "full", PartialFineTuning(targets=["a"]))
    tuned(model, "bias", BitFit(), targets=["b"])
    lora = tuned(model, "lora", LoRA(rank=2))
    torch.testing.assert_close(exported(model, fresh)(X), model(X))
    lora.disable()
    assert torch.equal(exported(model, fresh)(X), model(X))


def test_an_export_outlives_the_tuning() -> None:
    model = Net()
    tuning = tuned(model, "full", FullFineTuning())
    out, state = model(X), peftlib.merged_state_dict(model)
    tuning.detach()
    fresh = Net()
    fresh.load_state_dict(state)
    assert torch.equal(fresh(X), out)


def test_use_chooses_what_is_exported() -> None:
    model = Net()
    base = model(X)
    tuned(model, "a", LoRA(rank=2))
    tuned(model, "b", Adapter(dim=2))
    with peftlib.use(model, "a"):
        torch.testing.assert_close(exported(model, Net())(X), model(X))
    with peftlib.use(model):
        assert torch.equal(exported(model, Net())(X), base)


def test_a_part_of_a_model_and_a_model_around_a_tuned_part() -> None:
    inner = Net()
    outer = nn.Sequential(nn.Linear(6, 6), inner)
    tuned(inner, "inner", LoRA(rank=2))
    assert torch.allclose(exported(outer, nn.Sequential(nn.Linear(6, 6), Net()))(X), outer(X), atol=1e-6)
    tuned(outer, "outer", LoRA(rank=1))
    assert torch.allclose(exported(inner, Net())(X), inner(X), atol=1e-6)


def test_a_merged_tuning_is_in_the_export_with_another_on_top() -> None:
    model = Net().double()
    one = tuned(model, "one", LoRA(rank=2))
    two = tuned(model, "two", LoRA(rank=1))
    out = model(X.double())
    two.disable()
    one.merge()
    two.enable()
    torch.testing.assert_close(exported(model, Net().double())(X.double()), out, rtol=1e-9, atol=1e-10)


def test_metadata_and_extra_state_stay() -> None:
    class Extra(Net):
        version = None

        def get_extra_state(self) -> Any:
            return {"step": 3}

        def set_extra_state(self, state: Any) -> None:
            self.version = state

    model = Extra()
    keys = list(model.state_dict()._metadata)
    tuned(model, "t", LoRA(rank=1))
    state = peftlib.merged_state_dict(model)
    assert list(state._metadata) == keys
    fresh = Extra()
    fresh.load_state_dict(state)
    assert fresh.version == {"step": 3}


def test_a_state_dict_that_hides_a_changed_weight_is_refused() -> None:
    model = Net()
    model.register_state_dict_post_hook(lambda module, state, prefix, _: state.__delitem__("a.weight"))
    tuned(model, "t", LoRA(rank=1))
    with pytest.raises(PeftlibError, match="'a' is not in the model's state_dict"):
        peftlib.merged_state_dict(model)
    with pytest.raises(PeftlibError, match=r"needs an nn\.Module; got dict"):
        peftlib.merged_state_dict({})  # type: ignore[arg-type]


# -- shared weights ----------------------------------------------------------------------------------------------------


def test_a_tied_weight_is_refused_by_both() -> None:
    model = Tied()
    for target in ("embed", "head"):
        tuning = tuned(model, target, LoRA(rank=2), targets=[target])
        for refused in (tuning.merge, lambda: peftlib.merged_state_dict(model)):
            with pytest.raises(PeftlibError, match=f"weight of '{target}' is shared with"):
                refused()
        tuning.detach()


def test_token_rows_follow_through_a_tie_and_nothing_else_does() -> None:
    model, fresh = Tied(), Tied()
    rows = tuned(model, "rows", TokenRows(ids=[2, 5]))
    out = model(IDS)
    before = snapshot(model)
    plain = exported(model, fresh)
    torch.testing.assert_close(plain(IDS), out)
    assert plain.head.weight is plain.embed.weight
    rows.merge()
    torch.testing.assert_close(model(IDS), out)
    assert model.head.weight is model.embed.weight
    rows.unmerge()
    assert not differences(before, snapshot(model))
    # An update of the embedding alone would be seen by the output layer as well.
    tuned(model, "lora", {"embed": LoRA(rank=2)})
    with pytest.raises(PeftlibError, match="shared with 'head'"):
        peftlib.merged_state_dict(model)


def test_a_lora_beside_token_rows_in_one_tuning_is_refused_where_the_weight_is_tied() -> None:
    model = Tied()
    tuning = tuned(model, "both", {("embed",): TokenRows(ids=[1]), "embed": LoRA(rank=2)})
    before = snapshot(model)
    for refused in (tuning.merge, lambda: peftlib.merged_state_dict(model)):
        with pytest.raises(PeftlibError, match="shared with 'head'"):
            refused()
    assert not differences(before, snapshot(model))


def test_one_module_that_has_a_weight_under_two_names() -> None:
    class Twice(nn.Linear):
        def __init__(self) -> None:
            super().__init__(6, 6)
            self.again = self.weight

    model = Twice()
    tuning = tuned(model, "t", LoRA(rank=1), targets=[""])
    with pytest.raises(PeftlibError, match="is shared with"):
        tuning.merge()


def test_a_module_that_runs_twice_and_lies_under_two_names() -> None:
    host = HOSTS["recycled"]
    model = host.model()
    tuned(model, "t", LoRA(rank=2))
    assert close(host.run(exported(model, host.model())), host.run(model))


def test_storage_that_is_shared_without_a_shared_parameter() -> None:
    """The tuning acts at one of them only, and so does the merge."""
    model = Net()
    model.b.weight = nn.Parameter(model.a.weight.data)
    tuning = tuned(model, "t", LoRA(rank=2), targets=["a"])
    out, pointer = model(X), model.a.weight.data_ptr()
    torch.testing.assert_close(tuning.merge().model(X), out)
    assert model.b.weight.data_ptr() == pointer
    tuning.unmerge()
    assert model.a.weight.data_ptr() == pointer


# -- whoever else is there ---------------------------------------------------------------------------------------------


def test_another_tuning_at_the_same_projection_is_not_reordered() -> None:
    model = nn.MultiheadAttention(8, 2)
    one = tuned(model, "one", LoRA(rank=2), targets=["q_proj"])
    two = tuned(model, "two", Adapter(dim=2), targets=["q_proj"])
    with pytest.raises(StateError, match="'q_proj' carries another enabled delta"):
        one.merge()
    two.disable()
    one.merge()


def test_a_prefix_at_an_attention_does_not_mind_merged_projections() -> None:
    model, x = nn.MultiheadAttention(8, 2).double(), torch.randn(4, 2, 8).double()
    one = tuned(model, "one", LoRA(rank=2), targets=["q_proj"])
    tuned(model, "two", PTuningV2(length=3), example=(x, x, x))
    out = model(x, x, x)[0]
    one.merge()
    torch.testing.assert_close(model(x, x, x)[0], out, rtol=1e-9, atol=1e-10)
    with pytest.raises(PeftlibError, match="it adds keys and values"):
        peftlib.merged_state_dict(model)


def test_a_merge_costs_what_it_does_however_many_tunings_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted, not timed: the modules and deltas that a merge looks at."""
    looked: list[Any] = []
    model = Net()
    first = tuned(model, "first", LoRA(rank=1))
    visit, merged = Tree._visit, LowRank.merged
    monkeypatch.setattr(Tree, "_visit", lambda self, m, *rest: (looked.append(m), visit(self, m, *rest))[1])
    monkeypatch.setattr(LowRank, "merged", lambda self: (looked.append(self), merged(self))[1])

    def count() -> int:
        looked.clear()
        first.merge().unmerge()
        peftlib.merged_state_dict(model)
        return len(looked)

    alone = count()
    for i in range(20):
        peftlib.attach(model, LoRA(rank=1) if i % 2 else BitFit(), name=str(i)).disable()
    assert count() == alone == 2 * (3 + 2)  # the root and two linears, and the two deltas there


# -- any number of cycles, whatever is around --------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [None, "cpu"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_cycles_leave_every_bit(dtype: torch.dtype, keep: str | None) -> None:
    model = Net().to(dtype)
    with torch.no_grad():  # values that arithmetic does not bring back: signed zeros, denormals
        model.a.weight[0, :3] = torch.tensor([-0.0, torch.finfo(dtype).smallest_normal / 4, 0.0], dtype=dtype)
    bits = {k: v.view(torch.uint8).clone() for k, v in model.state_dict().items()}
    tuning = tuned(model, "t", {"a": LoRA(rank=2), "b": LoRA(rank=3, use_dora=True)})
    for i in range(50):
        tuning.merge(keep=keep)
        if i % 7 == 0:
            model(X.to(dtype))
        tuning.unmerge()
    assert all(torch.equal(model.state_dict()[k].view(torch.uint8), v) for k, v in bits.items())


def test_merging_in_inference_mode_or_under_autocast_is_the_same_merge() -> None:
    model = Net()
    tuning = tuned(model, "t", LoRA(rank=2))
    expected = tuning.merge().model.a.weight.clone()
    tuning.unmerge()
    with torch.inference_mode(), torch.autocast("cpu"):
        state = peftlib.merged_state_dict(model)
        tuning.merge()
    assert torch.equal(model.a.weight, expected)
    assert torch.equal(state["a.weight"], expected)
    # Nothing is left of the mode: the weights can be trained, the gradient passes.
    model(X.clone().requires_grad_()).sum().backward()
    tuning.unmerge()


@pytest.mark.parametrize("keep", [None, "cpu"])
def test_failing_in_the_middle_leaves_no_weight_merged(keep: str | None) -> None:
    model = Net()
    tuning = tuned(model, "t", LoRA(rank=2))
    tuning.state_dict()["b.lora.b"][0, 0] = float("inf")  # the second of two
    before = snapshot(model)
    for refused in (lambda: tuning.merge(keep=keep), lambda: peftlib.merged_state_dict(model)):
        with pytest.raises(PeftlibError, match=r"Merging into 'b' gives values that are not finite"):
            refused()
        assert not differences(before, snapshot(model))
    assert not tuning.merged


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("where", ["base", "tuning"])
def test_what_is_not_finite_is_found_wherever_it_is(bad: float, dtype: torch.dtype, where: str) -> None:
    model = Net().to(dtype)
    tuning = tuned(model, "t", LoRA(rank=2), targets=["b"])
    with torch.no_grad():
        (model.b.weight if where == "base" else tuning.state_dict()["b.lora.a"])[-1, -1] = bad
    with pytest.raises(PeftlibError, match="not finite"):
        tuning.merge()


def test_large_values_whose_sum_overflows_are_finite() -> None:
    model = Net().half()
    tuning = tuned(model, "t", LoRA(rank=2), targets=["b"])
    with torch.no_grad():
        model.b.weight.fill_(6e4)
        tuning.state_dict()["b.lora.b"].zero_()
    tuning.merge()
    assert (model.b.weight == 6e4).all()


def test_a_model_cast_while_merged_comes_back_cast() -> None:
    model = Net()
    base = copy.deepcopy(model).half()
    tuning = tuned(model, "t", LoRA(rank=2)).merge()
    model.half()
    tuning.unmerge()
    assert torch.equal(model.a.weight, base.a.weight)
    assert model.a.weight.dtype == torch.float16


def test_copies_of_a_merged_model_are_their_own() -> None:
    model = Net()
    base = model.a.weight.clone()
    tuning = tuned(model, "t", LoRA(rank=2)).merge()
    other = copy.deepcopy(model)
    peftlib.tunings(other)["t"].unmerge()
    assert torch.equal(other.a.weight, base)
    assert not torch.equal(model.a.weight, base)
    assert tuning.merged


def test_a_merge_on_meta_costs_nothing_and_can_be_undone() -> None:
    with torch.device("meta"):
        model = Net()
    tuning = peftlib.attach(model, LoRA(rank=2))
    tuning.merge().unmerge()
    assert all(v.is_meta for v in peftlib.merged_state_dict(model).values())


@pytest.mark.parametrize("keep, why", [("nowhere", "must be a device"), ("meta", "would lose the base")])
def test_a_place_that_keeps_nothing_is_refused(keep: str, why: str) -> None:
    model = Net()
    tuning = tuned(model, "t", LoRA(rank=1))
    with pytest.raises(PeftlibError, match=why):
        tuning.merge(keep=keep)
    assert not tuning.merged


# -- hosts whose weight is more than applied ---------------------------------------------------------------------------


def test_an_embedding_that_renormalizes_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(7, 4, max_norm=0.5))
    tuning = tuned(model, "t", LoRA(rank=2), targets=["0"])
    with pytest.raises(PeftlibError, match="does more with its weight than apply it"):
        tuning.merge()


def test_an_opaque_base_is_refused_where_it_is_and_the_rest_is_not_touched() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), Int8Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.relu(self.a(x)))

    model = Mixed()
    tuning = tuned(model, "t", LoRA(rank=2))
    before = snapshot(model)
    for refused in (tuning.merge, lambda: peftlib.merged_state_dict(model)):
        with pytest.raises(PeftlibError, match=r"'b'.*base is opaque"):
            refused()
    assert not differences(before, snapshot(model))


def test_channels_last_weights_keep_their_layout() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3)).to(memory_format=torch.channels_last)
    strides = model[0].weight.stride()
    tuning = tuned(model, "t", LoRA(rank=2), targets=["0"])
    x = torch.randn(2, 4, 5, 5)
    out = model(x)
    tuning.merge()
    assert model[0].weight.stride() == strides
    torch.testing.assert_close(model(x), out)
    tuning.unmerge()
    assert model[0].weight.stride() == strides


@pytest.fixture
def mesh() -> Iterator[Any]:
    """Of one process: what is distributed over it is sharded all the same."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_sharded_weights_are_refused(mesh: Any) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    model = Net()
    tuning = tuned(model, "t", LoRA(rank=2))
    model.b.weight = nn.Parameter(
        distribute_tensor(model.b.weight.data, mesh, [Shard(0)]), requires_grad=False
    )
    weight = model.a.weight.clone()
    for refused in (tuning.merge, lambda: peftlib.merged_state_dict(model)):
        with pytest.raises(PeftlibError, match="The weight of 'b' is sharded"):
            refused()
    assert torch.equal(model.a.weight, weight)
    delta = model.a._peft._modules["t:lora"]
    delta.a = nn.Parameter(distribute_tensor(delta.a.data, mesh, [Shard(0)]))
    with pytest.raises(PeftlibError, match=r"which is sharded\. Combine before fully_shard"):
        peftlib.combine(model, {"t": 1.0})


def test_an_export_looks_at_no_tuning_that_is_not_enabled(monkeypatch: pytest.MonkeyPatch) -> None:
    model, saved = Net(), []
    for i in range(5):
        peftlib.attach(model, LoRA(rank=1), name=str(i)).disable()
    monkeypatch.setattr(LowRank, "state_dict", lambda self, **kwargs: saved.append(self))
    assert list(peftlib.merged_state_dict(model)) == list(Net().state_dict())
    assert not saved
    model.state_dict()
    assert len(saved) == 10


@pytest.mark.parametrize("change", ["load", "train"])
def test_weights_that_came_while_merged_are_not_lost(change: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4))
    tuning = peftlib.attach(model, LoRA(rank=2), targets=["0"])
    randomize(tuning)
    before = model[0].weight.clone()
    tuning.merge()
    model.double().float()  # moved and cast is not changed
    new = torch.randn(4, 4)
    if change == "load":
        model.load_state_dict({"0.weight": new}, strict=False)
    else:
        with torch.no_grad():
            model[0].weight.copy_(new)
    for undo in (tuning.unmerge, tuning.detach):
        with pytest.raises(StateError, match=r"was changed while .*overwrite=True"):
            undo()
        assert torch.equal(model[0].weight, new)
        assert tuning.merged
    tuning.unmerge(overwrite=True)
    torch.testing.assert_close(model[0].weight, before)
