"""Prefix tuning and P-Tuning v2 against explicit softmaxes over [prefix; keys], alone and inside whole models."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import einops
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import peftlib
from peftlib import FullFineTuning, NewHead, PeftlibError, PrefixTuning, PTuningV2
from tests.twin import assert_twins, assert_untouched, classes, randomize, snapshot

D = torch.float64


def attend(
    q_BHTE: Tensor,
    k_BHSE: Tensor,
    v_BHSE: Tensor,
    key_PHE: Tensor | None = None,
    value_PHE: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """``softmax([q Kp, q K + mask] / sqrt(E)) [Vp; V]``, one head and one query at a time."""
    B, H, T, E = q_BHTE.shape
    S, repeat = k_BHSE.shape[2], H // k_BHSE.shape[1]
    rows = []
    for b in range(B):
        for h in range(H):
            for t in range(T):
                keys, values = [k_BHSE[b, h // repeat]], [v_BHSE[b, h // repeat]]
                bias = torch.zeros(S, dtype=q_BHTE.dtype)
                if mask is not None:
                    m = mask.expand(B, H, T, S)[b, h, t]
                    bias = torch.where(m, 0.0, -math.inf).to(bias) if m.dtype == torch.bool else m
                if causal:
                    bias = bias.masked_fill(torch.arange(S) > t, -math.inf)
                if key_PHE is not None:
                    own = h // (H // key_PHE.shape[1])
                    keys.insert(0, key_PHE[:, own])
                    values.insert(0, value_PHE[:, own])
                    bias = torch.cat([torch.zeros(len(key_PHE), dtype=bias.dtype), bias])
                scores = torch.cat(keys) @ q_BHTE[b, h, t] / math.sqrt(E) + bias
                rows.append(scores.softmax(0) @ torch.cat(values))
    return torch.stack(rows).view(B, H, T, -1)


class Attention(nn.Module):
    """Self- or cross-attention with its own way to hand over grouped heads."""

    def __init__(self, width: int = 8, heads: int = 4, kv_heads: int = 2, share: str = "gqa"):
        super().__init__()
        self.heads, self.kv_heads, self.share = heads, kv_heads, share
        size = width // heads
        self.q, self.o = nn.Linear(width, width), nn.Linear(width, width)
        self.k, self.v = nn.Linear(width, kv_heads * size), nn.Linear(width, kv_heads * size)

    def project(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(
            layer(z).unflatten(-1, (heads, -1)).transpose(1, 2)
            for layer, z, heads in (
                (self.q, x, self.heads), (self.k, y, self.kv_heads), (self.v, y, self.kv_heads)
            )
        )  # fmt: skip

    def forward(
        self, x: Tensor, y: Tensor | None = None, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        q, k, v = self.project(x, x if y is None else y)
        options: dict[str, Any] = {}
        if self.share == "gqa":
            options["enable_gqa"] = True
        else:
            k, v = (t.repeat_interleave(self.heads // self.kv_heads, 1) for t in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, **options)
        return self.o(out.transpose(1, 2).flatten(-2))


def key_value(tuning: peftlib.Tuning, site: str = "") -> tuple[Tensor, Tensor]:
    """Keys and values that a tuning's parameters stand for, by the equation of the paper."""
    p = dict(tuning.named_parameters())
    part = next(x for x in tuning.parts if x.name == site and x.built)
    heads, key_size, value_size = part.delta.shape
    at = part.prefix
    if f"{at}.key" in p:
        return p[f"{at}.key"], p[f"{at}.value"]
    shared = next(k.removesuffix(".table") for k in p if k.endswith(".table"))
    h_PM = torch.tanh(p[f"{shared}.table"] @ p[f"{shared}.down.weight"].T + p[f"{shared}.down.bias"])
    both = h_PM @ p[f"{at}.project.weight"].T + p[f"{at}.project.bias"]
    key, value = both[:, : heads * key_size], both[:, heads * key_size :]
    return key.view(-1, heads, key_size), value.view(-1, heads, value_size)


METHODS: dict[str, Callable[[int], Any]] = {
    "prefix": lambda n: PrefixTuning(length=n, hidden=5),
    "direct prefix": lambda n: PrefixTuning(length=n, hidden=None),
    "v2": lambda n: PTuningV2(length=n),
    "v2 with an MLP": lambda n: PTuningV2(length=n, reparametrize=True, hidden=5),
}


@given(
    method=st.sampled_from(list(METHODS)),
    length=st.sampled_from([1, 2, 5]),
    lengths=st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([1, 3, 6])),
    batch=st.sampled_from([1, 2]),
    kv_heads=st.sampled_from([1, 2, 4]),
    share=st.sampled_from(["gqa", "repeat"]),
    cross=st.booleans(),
    mask=st.sampled_from(["none", "causal", "bool", "float", "float per head", "bool broadcast over keys"]),
)
@settings(max_examples=60)
def test_an_attention_equals_the_explicit_softmax(
    method: str,
    length: int,
    lengths: tuple[int, int],
    batch: int,
    kv_heads: int,
    share: str,
    cross: bool,
    mask: str,
) -> None:
    torch.manual_seed(length)
    T, S = lengths if cross else (lengths[0], lengths[0])
    model = Attention(kv_heads=kv_heads, share=share).to(D)
    twin = copy.deepcopy(model)
    x = torch.randn(batch, T, 8, dtype=D, requires_grad=True)
    y = torch.randn(batch, S, 8, dtype=D, requires_grad=True) if cross else None
    visible = torch.rand(batch, 1, T, S) > 0.4
    masks = {
        "none": None,
        "causal": None,
        "bool": visible,
        "float": torch.randn(T, S, dtype=D),
        "float per head": torch.randn(batch, 4, T, S, dtype=D),
        "bool broadcast over keys": torch.rand(batch, 1, T, 1) > 0.4,
    }
    call = {"mask": masks[mask], "causal": mask == "causal"}
    tuning = peftlib.attach(model, METHODS[method](length), example=(x, y))
    leaves = {"x": x, **({"y": y} if cross else {}), **randomize(tuning)}

    def naive() -> Tensor:
        q, k, v = twin.project(x, y if cross else x)
        out = attend(q, k, v, *key_value(tuning), call["mask"], call["causal"])
        return twin.o(out.transpose(1, 2).flatten(-2))

    assert_twins(lambda: model(x, y, **call), naive, leaves, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("kdim", [None, 5])
@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_attention_equals_the_explicit_softmax(kdim: int | None, need_weights: bool) -> None:
    host = nn.MultiheadAttention(8, 2, kdim=kdim, vdim=kdim, batch_first=True, dtype=D)
    q, k = torch.randn(2, 3, 8, dtype=D), torch.randn(2, 4, kdim or 8, dtype=D)
    q.requires_grad_(True)
    padding = torch.tensor([[False, False, False, True], [False] * 4])
    twin = copy.deepcopy(host)
    tuning = peftlib.attach(host, PrefixTuning(length=3, hidden=6), example=(q, k, k))
    leaves = {"q": q, **randomize(tuning)}

    def naive() -> Tensor:
        if kdim is None:
            weights = twin.in_proj_weight.chunk(3)
        else:
            weights = (twin.q_proj_weight, twin.k_proj_weight, twin.v_proj_weight)
        biases = twin.in_proj_bias.chunk(3)
        heads = (
            F.linear(t, w, b).unflatten(-1, (2, -1)).transpose(1, 2)
            for t, w, b in zip((q, k, k), weights, biases, strict=True)
        )
        out = attend(*heads, *key_value(tuning), mask=~padding[:, None, None, :])
        return twin.out_proj(out.transpose(1, 2).flatten(-2))

    assert_twins(
        lambda: host(q, k, k, key_padding_mask=padding, need_weights=need_weights)[0],
        naive,
        leaves,
        rtol=1e-8,
        atol=1e-9,
    )


# -- whole models ------------------------------------------------------------------------------------------------------


class Decoder(nn.Module):
    """Two causal layers without positions, so that what stands in front is seen through its keys and values alone."""

    def __init__(self, width: int = 8, kv_heads: int = 2):
        super().__init__()
        self.embed = nn.Embedding(13, width)
        self.layers = nn.ModuleList(Attention(width, 4, kv_heads) for _ in range(3))
        self.head = nn.Linear(width, 13)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(F.layer_norm(x, x.shape[-1:]), causal=True)
        return self.head(x)


IDS = torch.tensor([[4, 9, 2, 7, 1], [3, 3, 12, 0, 5]])


@pytest.mark.parametrize("hidden", [None, 6])
def test_counts_and_shared_parts(hidden: int | None) -> None:
    model = Decoder()
    tuning = peftlib.attach(model, PrefixTuning(length=5, hidden=hidden), example=IDS)
    kv = 2 * 2  # heads times their size
    if hidden is None:
        assert tuning.num_parameters == 3 * 2 * 5 * kv
        return
    assert tuning.num_parameters == 5 * 8 + (8 + 1) * 6 + 3 * (6 + 1) * 2 * kv
    assert [n for n, _ in tuning.named_parameters() if "table" in n or "down" in n] == [
        "prefixtuning.mlp.table",
        "prefixtuning.mlp.down.weight",
        "prefixtuning.mlp.down.bias",
    ]
    assert tuning.fold().num_parameters == 3 * 2 * 5 * kv


def test_the_whole_model_equals_its_twin() -> None:
    model = Decoder().to(D)
    twin = copy.deepcopy(model)
    tuning = peftlib.attach(model, PrefixTuning(length=3, hidden=6), example=IDS)
    leaves = randomize(tuning)

    def naive() -> Tensor:
        x = twin.embed(IDS)
        for i, layer in enumerate(twin.layers):
            q, k, v = layer.project(*[F.layer_norm(x, x.shape[-1:])] * 2)
            out = attend(q, k, v, *key_value(tuning, f"layers.{i}"), causal=True)
            x = x + layer.o(out.transpose(1, 2).flatten(-2))
        return twin.head(x)

    assert_twins(lambda: model(IDS), naive, leaves, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", ["prefix", "v2 with an MLP"])
def test_folding_changes_no_output_and_leaves_plain_keys(name: str, tmp_path: Path) -> None:
    model = Decoder()
    base = copy.deepcopy(model)
    tuning = peftlib.attach(model, METHODS[name](4), example=IDS)
    randomize(tuning)
    before = model(IDS)
    assert tuning.fold() is tuning
    assert torch.equal(model(IDS), before)
    assert {k.rpartition(".")[2] for k in tuning.state_dict()} == {"key", "value"}
    assert all(p.requires_grad for p in tuning.parameters())
    tuning.save(tmp_path / "folded.safetensors")
    loaded = peftlib.load(copy.deepcopy(base), tmp_path / "folded.safetensors")
    assert torch.equal(loaded.model(IDS), before)
    with pytest.raises(PeftlibError, match="no reparametrization"):
        tuning.fold()
    tuning.detach()
    assert torch.equal(model(IDS), base(IDS))


def test_an_unfolded_file_keeps_the_mlp(tmp_path: Path) -> None:
    model = Decoder()
    fresh = copy.deepcopy(model)
    tuning = peftlib.attach(model, PrefixTuning(length=4, hidden=5, init=[1, 2, 3, 4]), example=IDS)
    randomize(tuning)
    tuning.save(tmp_path / "mlp.safetensors")
    loaded = peftlib.load(fresh, tmp_path / "mlp.safetensors")
    assert torch.equal(fresh(IDS), model(IDS))
    assert loaded.num_parameters == tuning.num_parameters
    assert torch.equal(loaded.fold().model(IDS), tuning.fold().model(IDS))


def test_dropout_falls_on_the_prefix_in_training() -> None:
    model = Decoder().to(D)
    twin = copy.deepcopy(model)
    tuning = peftlib.attach(model, PTuningV2(length=3, dropout=0.5), targets=["layers.1"], example=IDS)
    randomize(tuning)
    key, value = key_value(tuning, "layers.1")
    model.train()
    torch.manual_seed(3)
    ours = model(IDS)
    torch.manual_seed(3)
    dropped = F.dropout(key, 0.5), F.dropout(value, 0.5)
    x = twin.embed(IDS)
    for i, layer in enumerate(twin.layers):
        q, k, v = layer.project(*[F.layer_norm(x, x.shape[-1:])] * 2)
        out = attend(q, k, v, *(dropped if i == 1 else ()), causal=True)
        x = x + layer.o(out.transpose(1, 2).flatten(-2))
    torch.testing.assert_close(ours, twin.head(x), rtol=1e-9, atol=1e-9)
    model.eval()
    assert torch.equal(model(IDS), model(IDS))


# -- a start at real keys and values -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", [PTuningV2(length=3, init=[5, 8, 1]), PrefixTuning(length=3, hidden=4, init=[5, 8, 1])]
)
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_a_prefix_started_from_tokens_is_those_tokens_in_front(method: Any, kv_heads: int) -> None:
    model = Decoder(kv_heads=kv_heads).to(D).eval()
    front = torch.tensor([[5, 8, 1]]).expand(2, -1)
    expected = model(torch.cat([front, IDS], 1))[:, 3:]
    seen: dict[str, Tensor] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, Attention):
            layer.k.register_forward_hook(lambda m, a, out, name=name: seen.__setitem__(name, out[0]))
    model(front)
    real = dict(seen)
    tuning = peftlib.attach(model, method, example=IDS)
    torch.testing.assert_close(model(IDS), expected, rtol=1e-9, atol=1e-9)
    for i in range(3):  # layer by layer, the keys are those that the tokens have
        delta = next(p.delta for p in tuning.parts if p.name == f"layers.{i}")
        torch.testing.assert_close(delta.key_value()[0].flatten(1), real[f"layers.{i}"])
    loss = model(IDS).square().mean()
    loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in tuning.parameters())


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_started_prefix_on_models_with_positions(kind: str) -> None:
    model = tiny(kind)
    front = torch.tensor([[5, 8, 1]]).expand(2, -1)
    at = torch.arange(8)[None]
    expected = model(torch.cat([front, IDS], 1), position_ids=at).logits[:, 3:]
    example = {"input_ids": IDS, "use_cache": False}
    tuning = peftlib.attach(model, PTuningV2(length=3, init=[5, 8, 1]), example=example)
    torch.testing.assert_close(model(IDS, position_ids=at[:, 3:]).logits, expected, rtol=1e-4, atol=1e-5)
    tuning.detach()


def test_a_start_can_be_the_inputs_of_a_forward() -> None:
    model = Decoder().to(D)
    longer = torch.tensor([[5, 8, 1, 9, 9]])
    a = peftlib.attach(model, PTuningV2(length=3, init=longer), example=IDS)
    ours = model(IDS)
    a.detach()
    peftlib.attach(model, PTuningV2(length=3, init=[5, 8, 1]), example=IDS)
    torch.testing.assert_close(ours, model(IDS))


@pytest.mark.parametrize(
    "init, message",
    [([1, 2], "2 token ids; a prefix of length 3"), (torch.tensor([[1, 2]]), "2 keys at 'layers.0'")],
)
def test_a_start_that_is_too_short_is_refused(init: Any, message: str) -> None:
    model = Decoder()
    before, kinds = snapshot(model), classes(model)
    with pytest.raises(PeftlibError, match=message):
        peftlib.attach(model, PTuningV2(length=3, init=init), example=IDS)
    assert_untouched(model, before, kinds)


def test_a_start_at_ids_needs_an_integer_input_and_values() -> None:
    host = nn.MultiheadAttention(8, 2)
    x = torch.randn(3, 1, 8)
    with pytest.raises(PeftlibError, match="no integer tensor"):
        peftlib.attach(host, PTuningV2(length=2, init=[1, 2]), example=(x, x, x))
    with torch.device("meta"):
        empty = Decoder()
    with pytest.raises(PeftlibError, match="meta device"):
        peftlib.attach(empty, PTuningV2(length=2, init=[1, 2]), example=IDS)


# -- caches ------------------------------------------------------------------------------------------------------------


def tiny(kind: str) -> Any:
    if kind == "gpt2":
        from transformers import GPT2Config, GPT2LMHeadModel

        config: Any = GPT2Config(
            vocab_size=13, n_positions=32, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=None
        )
        model: Any = GPT2LMHeadModel(config)
    else:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=13, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=32, bos_token_id=0, eos_token_id=None,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
    return model.eval()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("name", ["prefix", "v2"])
def test_generation_with_a_cache_equals_a_loop_without(kind: str, name: str) -> None:
    model = tiny(kind)
    for parameter in model.parameters():  # so that the prefix decides between tokens
        nn.init.normal_(parameter, std=0.5)
    plain = model.generate(IDS, attention_mask=torch.ones_like(IDS), do_sample=False, max_new_tokens=8)
    tuning = peftlib.attach(model, METHODS[name](4), example={"input_ids": IDS})
    randomize(tuning, 2.0)
    ids = IDS
    with torch.no_grad():
        for _ in range(8):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    cached = model.generate(IDS, attention_mask=torch.ones_like(IDS), do_sample=False, max_new_tokens=8)
    assert torch.equal(cached, ids)
    assert not torch.equal(cached, plain)


def test_left_padding_does_not_hide_the_prefix() -> None:
    model = tiny("gpt2").double()
    tuning = peftlib.attach(model, PTuningV2(length=3), example={"input_ids": IDS})
    randomize(tuning)
    padded = torch.cat([torch.zeros(2, 2, dtype=torch.long), IDS], 1)
    mask = torch.ones_like(padded)
    mask[:, :2] = 0
    at = (mask.cumsum(1) - 1).clamp_min(0)
    out = model(padded, attention_mask=mask, position_ids=at).logits[:, 2:]
    torch.testing.assert_close(out, model(IDS).logits, rtol=1e-6, atol=1e-7)


def test_values_computed_without_gradients_are_kept_until_a_parameter_changes() -> None:
    model = Decoder()
    tuning = peftlib.attach(model, PrefixTuning(length=3, hidden=4), example=IDS)
    calls = []
    shared = next(p.delta.mlp for p in tuning.parts if not p.built)
    shared.down.register_forward_hook(lambda *a: calls.append(1))
    with torch.no_grad():
        first = model(IDS)
        assert torch.equal(model(IDS), first)
        assert len(calls) == 1
        with torch.inference_mode():
            assert torch.equal(model(IDS), first)
        calls.clear()
        next(p for n, p in tuning.named_parameters() if n.endswith("table")).add_(1.0)
        assert not torch.equal(model(IDS), first)
        assert len(calls) == 1
    model(IDS).sum().backward()
    assert all(p.grad is not None for p in tuning.parameters())


# -- grouped heads -----------------------------------------------------------------------------------------------------

REPEATS: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "not at all": (2, lambda k: k),
    "repeat_interleave": (2, lambda k: k.repeat_interleave(2, 1)),
    "torch.repeat_interleave": (2, lambda k: torch.repeat_interleave(k, repeats=2, dim=-3)),
    "expand and reshape": (
        2,
        lambda k: k[:, :, None].expand(-1, -1, 2, -1, -1).reshape(k.shape[0], 4, -1, 2),
    ),
    "expand and flatten": (2, lambda k: k[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2)),
    "einops": (2, lambda k: einops.repeat(k, "b h s e -> b (h r) s e", r=2)),
    "one head, expanded": (1, lambda k: k[:, :1].expand(-1, 4, -1, -1)),
    # Here query head h does not use key head h // 2, so the prefix cannot be shared the way it is repeated.
    "in turns": (4, lambda k: k.repeat(1, 2, 1, 1)),
    "einops, in turns": (4, lambda k: einops.repeat(k, "b h s e -> b (r h) s e", r=2)),
}


class Repeating(Attention):
    def __init__(self, repeat: Callable[[Tensor], Tensor]):
        super().__init__()
        self.repeat = repeat

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x, x)
        k, v = self.repeat(k), self.repeat(v)
        out = F.scaled_dot_product_attention(q, k, v, enable_gqa=k.shape[1] < 4)
        return self.o(out.transpose(1, 2).flatten(-2))


@pytest.mark.parametrize("how", list(REPEATS))
def test_a_prefix_has_the_heads_that_differ_however_a_model_repeats_them(how: str) -> None:
    heads, repeat = REPEATS[how]
    model = Repeating(repeat).to(D)
    twin = copy.deepcopy(model)
    x = torch.randn(2, 5, 8, dtype=D)
    tuning = peftlib.attach(model, PTuningV2(length=3), example=x)
    assert tuning.num_parameters == 2 * 3 * heads * 2
    randomize(tuning)
    q, k, v = twin.project(x, x)
    k, v = repeat(k), repeat(v)
    out = attend(q, k, v, *key_value(tuning))
    torch.testing.assert_close(model(x), twin.o(out.transpose(1, 2).flatten(-2)))


@pytest.mark.parametrize("how", ["not at all", "repeat_interleave", "in turns"])
def test_a_start_takes_each_head_from_where_it_is(how: str) -> None:
    _, repeat = REPEATS[how]
    model = Repeating(repeat).to(D)
    front, x = torch.randn(1, 3, 8, dtype=D), torch.randn(2, 5, 8, dtype=D)
    both = torch.cat([front.expand(2, -1, -1), x], 1)
    q, k, v = model.project(both, both)
    out = attend(q, repeat(k), repeat(v))[:, :, 3:]
    expected = model.o(out.transpose(1, 2).flatten(-2))
    peftlib.attach(model, PTuningV2(length=3, init=front), example=x)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("use_cache", [False, True])
def test_grouped_heads_of_llama_do_not_depend_on_the_example(masked: bool, use_cache: bool) -> None:
    model = tiny("llama")
    example = {"input_ids": IDS, "use_cache": use_cache}
    if masked:
        example["attention_mask"] = torch.ones_like(IDS)
    tuning = peftlib.attach(model, PTuningV2(length=3), example=example)
    assert (
        tuning.num_parameters == 2 * 2 * 3 * 2 * 2
    )  # two layers, keys and values, length, key heads, their size


# -- heads and refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["head", NewHead(3), {"head": FullFineTuning()}])
def test_a_head_is_trained_along(head: Any) -> None:
    model = Decoder()
    tuning = peftlib.attach(model, PTuningV2(length=2, head=head), example=IDS)
    assert "head" in tuning.sites
    assert model(IDS).shape[-1] == (3 if isinstance(head, NewHead) else 13)
    model(IDS).sum().backward()
    assert all(p.grad is not None for p in tuning.parameters())
    assert tuning.num_parameters == 3 * 2 * 2 * 4 + (8 + 1) * (3 if isinstance(head, NewHead) else 13)


class ByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        return (q @ x.mT).softmax(-1) @ x


class Functional(nn.Module):
    """Calls the function behind ``nn.MultiheadAttention`` with another's weights."""

    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        m = self.mha
        return F.multi_head_attention_forward(
            x, x, x, 8, 2, m.in_proj_weight, m.in_proj_bias, None, None, False, 0.0,
            m.out_proj.weight, m.out_proj.bias, need_weights=False,
        )[0]  # fmt: skip


@pytest.mark.parametrize(
    "model, example, targets, message",
    [
        (ByHand(), torch.zeros(1, 3, 8), None, "no place.*hand-written softmax"),
        (nn.Sequential(ByHand(), nn.Linear(8, 8)), torch.zeros(1, 3, 8), ["0"], "hand-written softmax"),
        (Functional(), torch.zeros(3, 1, 8), None, "calls F.multi_head_attention_forward itself"),
        (Decoder(), None, None, "pass example="),
        (Decoder(), torch.zeros(2, 3), None, "could not be run through Decoder"),
        (Decoder(), IDS, ["embed"], "no call of F.scaled_dot_product_attention"),
        (Decoder(), IDS, ["layers.7"], "matches nothing"),
    ],
)
def test_models_without_visible_attention_are_refused(
    model: nn.Module, example: Any, targets: Any, message: str
) -> None:
    before, kinds = snapshot(model), classes(model)
    for method in (PrefixTuning(length=2), PTuningV2(length=2)):
        with pytest.raises(PeftlibError, match=message):
            peftlib.attach(model, method, targets=targets, example=example)
    assert_untouched(model, before, kinds)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: PrefixTuning(length=0), "length=0"),
        (lambda: PrefixTuning(length=2, hidden=0), "hidden=0"),
        (lambda: PrefixTuning(length=2, dropout=1), "dropout=1"),
        (lambda: PTuningV2(length=-1), "length=-1"),
        (lambda: PTuningV2(length=2, hidden=1.5), r"hidden=1\.5"),
    ],
)
def test_fields_out_of_range_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(PeftlibError, match=message):
        make()


def test_a_prefix_refuses_to_merge() -> None:
    model = Decoder()
    tuning = peftlib.attach(model, PTuningV2(length=2), example=IDS)
    with pytest.raises(PeftlibError, match="keys and values"):
        tuning.merge()
    assert not tuning.merged
