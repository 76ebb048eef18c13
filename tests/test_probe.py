"""One fake forward: what it learns, that it costs and changes nothing, and how it says what it cannot follow."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from peftlib import LoRA, PTuningV2, attach
from peftlib.errors import ProbeError
from peftlib.methods.base import Site
from peftlib.methods.calls import named_tensors
from peftlib.observe import Attention
from peftlib.probe import Probe, as_call
from tests.twin import assert_untouched, classes, snapshot


class SelfAttention(nn.Module):
    def __init__(self, heads: int = 4, kv_heads: int = 2):
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads
        self.q, self.kv, self.o = nn.Linear(8, 8), nn.Linear(8, 4 * kv_heads), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, self.kv_heads, -1)).transpose(1, 3).unbind(2)
        out = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.o(out.transpose(1, 2).flatten(-2))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.attn = SelfAttention()
        self.twice = nn.Linear(8, 8)
        self.idle = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11)

    def forward(self, ids: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        x = self.attn(self.embed(ids)) * scale
        x = self.twice(self.twice(x))
        return {"logits": self.head(x), "hidden": x}


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def test_it_sees_shapes_calls_attention_and_heads() -> None:
    model = Net()
    probe = Probe(model, IDS)
    assert probe.fake
    traces = probe.record.traces
    assert {n: t.calls for n, t in traces.items()} == {
        "": 1, "embed": 1, "attn": 1, "attn.q": 1, "attn.kv": 1, "attn.o": 1, "twice": 2, "head": 1,
    }  # fmt: skip
    assert (traces["embed"].input, traces["embed"].output, traces["embed"].is_floating) == (
        (2, 3),
        (2, 3, 8),
        False,
    )
    assert traces["head"].output == (2, 3, 11)
    assert probe.record.attention == {"attn": Attention(heads=2, key_size=2, value_size=2, width=8)}
    assert set(probe.heads) == {"head", "twice"}  # both outputs come straight out of a linear
    assert probe.record.order == ["embed", "attn.q", "attn.kv", "attn!", "attn.o", "twice", "twice", "head"]
    assert not probe.executed(Site("idle", model.idle))
    assert probe.executed(Site("idle.weight", model.idle, "weight"))
    assert {k: tuple(t.shape) for k, t in named_tensors(probe.record.output)} == {
        "logits": (2, 3, 11), "hidden": (2, 3, 8),
    }  # fmt: skip


class WithCache(nn.Module):
    """Returns its keys and values with the logits, as views of what one projection made."""

    def __init__(self, squeeze: bool) -> None:
        super().__init__()
        self.qkv, self.head, self.squeeze = nn.Linear(8, 24), nn.Linear(8, 1 if squeeze else 5), squeeze

    def forward(self, x: Tensor) -> Any:
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
        logits = self.head(out)
        return (logits.squeeze(-1) if self.squeeze else logits[:, -1]), ((k, v),)


@pytest.mark.parametrize("squeeze", [True, False])
def test_a_returned_cache_makes_no_head(squeeze: bool) -> None:
    assert Probe(WithCache(squeeze), torch.zeros(2, 3, 8)).heads == ["head"]


@pytest.mark.parametrize(
    "example, expected",
    [
        (IDS, ((IDS,), {})),
        ((IDS, 2.0), ((IDS, 2.0), {})),
        ([IDS], ((IDS,), {})),
        ({"ids": IDS, "scale": 3.0}, ((), {"ids": IDS, "scale": 3.0})),
    ],
)
def test_examples_are_calls(example: Any, expected: Any) -> None:
    assert as_call(example) == expected
    assert Probe(Net(), example).record.traces["head"].output == (2, 3, 11)


def test_it_needs_no_memory_for_values() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(10**6, 10**6), nn.ReLU(), nn.Linear(10**6, 10**6))
    probe = Probe(model, torch.empty(10**5, 10**6, device="meta"))
    assert probe.record.traces["2"].output == (10**5, 10**6)
    assert {t.device.type for t in tree_leaves(probe.record.output)} == {"cpu"}


class Remembers(nn.Module):
    """Keeps something of its first forward everywhere it can."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.register_buffer("seen", torch.zeros(()))
        self.cache: dict[str, Tensor] = {}
        self.table = torch.randn(9, 4)
        self.table_of = [torch.randn(9, 4)]
        self.lock = threading.Lock()
        self.generator = torch.Generator().manual_seed(3)
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        with self.lock:
            self.seen += 1
            self.count += 1
            if "angles" not in self.cache:
                self.cache["angles"] = torch.arange(x.shape[0])
            self.fc.weight.data.mul_(1.0)
            x = x + self.table[: x.shape[0]] + self.table_of[0][: x.shape[0]]
            return F.dropout(self.norm(self.fc(x)), 0.5)


def test_it_leaves_no_trace_in_the_model_or_the_random_numbers() -> None:
    model = Remembers()
    before, kinds, state = snapshot(model), classes(model), torch.get_rng_state()
    table, lock, generator = model.table, model.lock, model.generator
    Probe(model, torch.ones(3, 4))
    assert_untouched(model, before, kinds)
    assert torch.equal(torch.get_rng_state(), state)
    assert (model.cache, model.count) == ({}, 0)
    assert model.table is table
    assert model.lock is lock
    assert model.generator is generator
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    model(torch.ones(3, 4))
    assert type(model.cache["angles"]) is Tensor


def test_hooks_and_tunings_on_the_model_stay() -> None:
    model = Net()
    seen: list[str] = []
    model.twice.register_forward_hook(lambda m, a, o: seen.append("hook"))
    attach(model, LoRA(rank=2), targets=["twice", "attn.q"])
    attach(model, PTuningV2(length=2), example=IDS, name="prompts")
    out = model(IDS)["logits"]
    seen.clear()
    probe = Probe(model, IDS)
    assert list(probe.record.attention) == ["attn"]
    assert set(probe.record.traces) == {"", "embed", "attn", "attn.q", "attn.kv", "attn.o", "twice", "head"}
    assert torch.equal(model(IDS)["logits"], out)


class Asks(nn.Module):
    """Looks at a value, which a fake tensor has not."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.fc(x))
        return x if x.sum().item() > 1e9 else 2 * self.fc(x)


def test_where_a_value_is_needed_it_runs_for_real_and_still_changes_nothing() -> None:
    model = Asks()
    before, kinds, state = snapshot(model), classes(model), torch.get_rng_state()
    probe = Probe(model, torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    assert not probe.fake
    assert probe.record.traces["fc"].calls == 2
    assert_untouched(model, before, kinds)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_on_meta_a_needed_value_is_an_error_that_says_where() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), Asks())
    with pytest.raises(ProbeError, match=r"could not be run through Sequential, in '1'.*leave example= out"):
        Probe(model, torch.empty(3, 4, device="meta"))


@pytest.mark.parametrize(
    "example, message",
    [
        (torch.zeros(2, 3), "in 'embed'"),
        ((IDS, 1.0, 2.0), "takes from 2 to 3 positional arguments"),
        ({"idz": IDS}, "unexpected keyword argument 'idz'"),
        ((), "missing 1 required positional argument"),
    ],
)
def test_an_example_that_the_model_refuses_is_explained_once(example: Any, message: str) -> None:
    with pytest.raises(ProbeError, match="could not be run through Net") as caught:
        Probe(Net(), example)
    text = str(caught.value)
    assert message in text
    assert "a tuple of positional arguments, or a dict of keyword arguments" in text
    assert text.count("could not be run") == 1


def test_a_model_that_cannot_be_copied_is_explained() -> None:
    class NoCopy(nn.Module):
        def __deepcopy__(self, memo: Any) -> Any:
            raise RuntimeError("no copies of me")

        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(
        ProbeError, match=r"Sequential cannot be copied .*no copies of me.*leave example= out"
    ):
        Probe(nn.Sequential(NoCopy()), torch.zeros(1))


def test_attention_geometry() -> None:
    for heads, kv_heads in ((4, 1), (4, 2), (4, 4), (2, 2)):
        model = nn.Sequential(SelfAttention(heads, kv_heads))
        if 8 // heads * kv_heads * 2 != model[0].kv.out_features:
            model[0].kv = nn.Linear(8, 2 * kv_heads * (8 // heads))
        seen = Probe(model, torch.zeros(1, 3, 8)).record.attention["0"]
        assert (seen.heads, seen.key_size, seen.value_size, seen.width) == (
            kv_heads,
            8 // heads,
            8 // heads,
            8,
        )


def test_keys_and_values_of_a_real_forward() -> None:
    model = nn.Sequential(SelfAttention(), SelfAttention())
    x = torch.randn(1, 3, 8)
    probe = Probe(model, torch.zeros(2, 7, 8))
    values = probe.activations(model, x)
    assert list(values) == ["0", "1"]
    at = x
    for i in range(2):
        k, v = model[i].kv(at).unflatten(-1, (2, 2, -1)).transpose(1, 3).unbind(2)
        torch.testing.assert_close(values[str(i)], (k, v))
        at = model[i](at)
    assert not any(t.requires_grad for pair in values.values() for t in pair)


def test_shared_modules_and_tied_weights_stay_shared_in_the_copy() -> None:
    model = Net()
    model.head = nn.Linear(8, 11, bias=False)
    model.head.weight = model.embed.weight
    model.again = model.twice
    probe = Probe(model, IDS)
    assert "again" not in probe.record.traces
    assert probe._copy.again is probe._copy.twice
    assert probe._copy.head.weight is probe._copy.embed.weight
    assert copy.deepcopy(model).head.weight.shape == (11, 8)
