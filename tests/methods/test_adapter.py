"""Bottleneck adapters against naive twins, and the published placements on blocks of several kinds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import peftlib
from peftlib import Adapter, LoRA, PeftlibError
from peftlib.methods.bottleneck import ACTIVATIONS
from tests.twin import assert_twins, assert_untouched, classes, randomize, snapshot

D = torch.float64
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: x.clamp_min(0),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
    "silu": lambda x: x * torch.sigmoid(x),
    "tanh": torch.tanh,
    "identity": lambda x: x,
}


def bottleneck(h: Tensor, p: dict[str, Tensor], activation: str, scale: float, axis: int = -1) -> Tensor:
    """``s (U act(D norm(h) + d) + u)``, written out."""
    p = {k.rpartition("adapter.")[2]: v for k, v in p.items()}
    h = h.movedim(axis, -1)
    if "norm.weight" in p:
        mean = h.mean(-1, keepdim=True)
        var = (h - mean).square().mean(-1, keepdim=True)
        h = (h - mean) / (var + 1e-5).sqrt() * p["norm.weight"] + p["norm.bias"]
    z = FUNCTIONS[activation](h @ p["down"].T + p["down_bias"])
    return (scale * (z @ p["up"].T + p["up_bias"])).movedim(-1, axis)


def test_the_twin_knows_every_activation() -> None:
    assert FUNCTIONS.keys() == ACTIVATIONS.keys()


@given(
    inside=st.sampled_from([1, 3, 8]),
    outside=st.sampled_from([1, 4, 7]),
    dim=st.sampled_from([1, 2, 9]),
    lead=st.lists(st.sampled_from([0, 1, 2, 5]), max_size=3),
    placement=st.sampled_from(["sequential", "parallel"]),
    activation=st.sampled_from(list(ACTIVATIONS)),
    scale=st.sampled_from([1.0, 4.0, -0.5]),
    layer_norm=st.booleans(),
)
@settings(max_examples=60)
def test_linear_equals_the_equation(
    inside: int,
    outside: int,
    dim: int,
    lead: list[int],
    placement: str,
    activation: str,
    scale: float,
    layer_norm: bool,
) -> None:
    torch.manual_seed(inside + outside)
    host = nn.Linear(inside, outside, dtype=D)
    twin = copy.deepcopy(host)
    x = torch.randn(*lead, inside, dtype=D, requires_grad=True)
    method = Adapter(dim=dim, placement=placement, activation=activation, scale=scale, layer_norm=layer_norm)
    tuning = peftlib.attach(host, method)
    assert torch.equal(host(x), twin(x))
    into = inside if placement == "parallel" else outside
    assert tuning.num_parameters == dim * into + dim + outside * dim + outside + 2 * into * layer_norm
    p = randomize(tuning)

    def naive() -> Tensor:
        f = twin(x)
        return f + bottleneck(x if placement == "parallel" else f, p, activation, scale)

    assert_twins(lambda: host(x), naive, {"x": x, **p}, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("placement", ["sequential", "parallel"])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_channel_first_modules_get_one_by_one_convolutions(
    dims: int, placement: str, layer_norm: bool
) -> None:
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    host = conv(3, 6, 3, padding=1, dtype=D)
    twin = copy.deepcopy(host)
    x = torch.randn(2, 3, *range(4, 4 + dims), dtype=D, requires_grad=True)
    tuning = peftlib.attach(
        host, Adapter(dim=2, placement=placement, layer_norm=layer_norm, scale=2.0), targets=[""]
    )
    p = randomize(tuning)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    ones = (1,) * dims

    def naive() -> Tensor:
        f = twin(x)
        h = x if placement == "parallel" else f
        if layer_norm:
            h = F.layer_norm(h.movedim(1, -1), h.shape[1:2], p["adapter.norm.weight"], p["adapter.norm.bias"])
            h = h.movedim(-1, 1)
        z = convolve(
            h, p["adapter.down"].view(*p["adapter.down"].shape, *ones), p["adapter.down_bias"]
        ).relu()
        return f + 2.0 * convolve(
            z, p["adapter.up"].view(*p["adapter.up"].shape, *ones), p["adapter.up_bias"]
        )

    assert_twins(lambda: host(x), naive, {"x": x, **p}, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    "host, x, width",
    [
        (nn.BatchNorm2d(5), (3, 5, 4, 4), 5),
        (nn.GroupNorm(2, 6), (3, 6, 4), 6),
        (nn.ConvTranspose2d(3, 5, 2), (2, 3, 4, 4), 5),
        (nn.LayerNorm(7), (2, 3, 7), 7),
        (nn.RMSNorm(7), (2, 3, 7), 7),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), (2, 3, 6, 6), 4),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else None,
)
@pytest.mark.parametrize("with_example", [False, True])
def test_the_feature_axis_of_other_modules(
    host: nn.Module, x: tuple[int, ...], width: int, with_example: bool
) -> None:
    host = copy.deepcopy(host).double().eval()
    twin = copy.deepcopy(host)
    inputs = torch.randn(*x, dtype=D)
    tuning = peftlib.attach(host, Adapter(dim=2), targets=[""], example=inputs if with_example else None)
    assert tuning.num_parameters == 2 * 2 * width + 2 + width
    p = randomize(tuning)
    f = twin(inputs)
    axis = -1 if f.shape[-1] == width and f.dim() == len(x) and f.shape[1] != width else 1
    torch.testing.assert_close(host(inputs), f + bottleneck(f, p, "relu", 1.0, axis), rtol=1e-9, atol=1e-9)


def test_an_explicit_axis_wins() -> None:
    class Swap(nn.Module):  # features in the middle, nothing in its attributes says so
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    model = Swap()
    x = torch.randn(2, 5, 7, dtype=D)
    tuning = peftlib.attach(model, Adapter(dim=3, axis=1, dtype=D), targets=[""], example=x)
    assert tuning.num_parameters == 2 * 3 * 5 + 3 + 5
    p = randomize(tuning)
    torch.testing.assert_close(model(x), 2 * x + bottleneck(2 * x, p, "relu", 1.0, 1))


class Pair(NamedTuple):
    hidden: Tensor
    extra: Tensor


@dataclass
class Result:
    count: int
    hidden: Tensor


class Returns(nn.Module):
    def __init__(self, wrap: Callable[[Tensor], Any]):
        super().__init__()
        self.fc = nn.Linear(4, 4, dtype=D)
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.fc(x))


@pytest.mark.parametrize(
    "wrap, get",
    [
        (lambda h: (h, "other"), lambda o: o[0]),
        (lambda h: [None, h], lambda o: o[1]),
        (lambda h: Pair(h, h.detach()), lambda o: o.hidden),
        (lambda h: {"n": 3, "hidden": h}, lambda o: o["hidden"]),
        (lambda h: Result(3, h), lambda o: o.hidden),
        (lambda h: ((h, 1), 2), lambda o: o[0][0]),
    ],
    ids=["tuple", "list", "named tuple", "dict", "dataclass", "nested"],
)
def test_the_first_tensor_of_an_output_is_adapted(wrap: Any, get: Any) -> None:
    model = Returns(wrap)
    twin = copy.deepcopy(model)
    x = torch.randn(3, 4, dtype=D)
    p = randomize(peftlib.attach(model, Adapter(dim=2), targets=[""]))
    out, plain = model(x), twin(x)
    assert type(out) is type(plain)
    torch.testing.assert_close(get(out), get(plain) + bottleneck(get(plain), p, "relu", 1.0))
    if isinstance(out, Pair):
        assert torch.equal(out.extra, plain.extra)


def test_recurrent_layers_and_packed_sequences() -> None:
    host = nn.LSTM(3, 4, bidirectional=True, batch_first=True, dtype=D)
    twin = copy.deepcopy(host)
    tuning = peftlib.attach(host, Adapter(dim=2), targets=[""])
    assert tuning.num_parameters == 2 * 2 * 8 + 2 + 8
    p = randomize(tuning)
    x = torch.randn(2, 5, 3, dtype=D)
    out, (h, c) = host(x)
    plain, (h0, c0) = twin(x)
    torch.testing.assert_close(out, plain + bottleneck(plain, p, "relu", 1.0))
    torch.testing.assert_close((h, c), (h0, c0))
    packed = nn.utils.rnn.pack_padded_sequence(x, [5, 3], batch_first=True)
    ours, theirs = host(packed)[0], twin(packed)[0]
    torch.testing.assert_close(ours.data, theirs.data + bottleneck(theirs.data, p, "relu", 1.0))


def test_attention_is_adapted_after_and_beside() -> None:
    for placement in ("sequential", "parallel"):
        host = nn.MultiheadAttention(6, 2, batch_first=True, dtype=D)
        twin = copy.deepcopy(host)
        q, k = torch.randn(2, 4, 6, dtype=D), torch.randn(2, 5, 6, dtype=D)
        p = randomize(peftlib.attach(host, Adapter(dim=3, placement=placement), targets=[""]))
        (ours, weights), (f, plain_weights) = host(q, k, k), twin(q, k, k)
        torch.testing.assert_close(ours, f + bottleneck(q if placement == "parallel" else f, p, "relu", 1.0))
        torch.testing.assert_close(weights, plain_weights)


def test_reduction_divides_the_width() -> None:
    model = nn.Sequential(nn.Linear(4, 48), nn.Linear(48, 10), nn.Linear(10, 2))
    tuning = peftlib.attach(model, Adapter(reduction=16), targets=["0", "1"])
    assert {n: tuple(p.shape) for n, p in tuning.named_parameters() if n.endswith("down")} == {
        "0.adapter.down": (3, 48),
        "1.adapter.down": (1, 10),  # never less than one
    }


# -- defaults and presets ----------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, width: int, fused: bool):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width) if fused else None
        self.q, self.k, self.v = (None if fused else nn.Linear(width, width) for _ in range(3))
        self.o = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1) if self.qkv else (self.q(x), self.k(x), self.v(x))
        heads = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (q, k, v))
        return self.o(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class GPTBlock(nn.Module):
    """Normalization first, feed-forward in a module; the feed-forward is registered before the attention."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = FeedForward(width)
        self.attn = Attention(width, fused=True)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class BERTBlock(nn.Module):
    """Normalization last, the feed-forward's layers directly in the block."""

    def __init__(self, width: int):
        super().__init__()
        self.attention = Attention(width, fused=False)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)
        self.n1, self.n2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.n1(x + self.attention(x))
        return self.n2(x + self.down(F.gelu(self.up(x))))


class FlatBlock(nn.Module):
    """Calls SDPA itself: neither attention nor feed-forward is a module of its own."""

    def __init__(self, width: int):
        super().__init__()
        self.qkv, self.o = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))
        return x + self.down(self.up(x).relu())


class MixerBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.mlp = FeedForward(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


class Model(nn.Module):
    def __init__(self, block: type[nn.Module], width: int = 8, layers: int = 2):
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.blocks = nn.ModuleList(block(width) for _ in range(layers))
        self.head = nn.Linear(width, 11)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


IDS = torch.tensor([[1, 2, 3, 4, 5]])


@pytest.mark.parametrize("attached_before", [False, True])
def test_the_default_is_after_each_repeated_block(attached_before: bool) -> None:
    model = Model(GPTBlock)
    if attached_before:
        peftlib.attach(model, LoRA(rank=1), targets=["blocks.0.mlp.up"], name="other")
        peftlib.attach(model, Adapter(dim=2), targets=["blocks.0"], name="at one of them")
    tuning = peftlib.attach(model, Adapter(dim=3))
    assert list(tuning.sites) == ["blocks.0", "blocks.1"]


def test_without_blocks_the_default_is_after_each_linear_but_the_head() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    tuning = peftlib.attach(model, Adapter(dim=2), example=torch.zeros(1, 4))
    assert list(tuning.sites) == ["0", "2"]


@pytest.mark.parametrize(
    "block, method, places",
    [
        (GPTBlock, Adapter.houlsby(dim=4), ["attn.o", "mlp.down"]),
        (GPTBlock, Adapter.pfeiffer(reduction=2), ["mlp.down"]),
        (GPTBlock, Adapter.parallel(dim=4), ["mlp"]),
        (BERTBlock, Adapter.houlsby(dim=4), ["attention.o", "down"]),
        (BERTBlock, Adapter.pfeiffer(reduction=2), ["down"]),
        (FlatBlock, Adapter.houlsby(dim=4), ["o", "down"]),
        (FlatBlock, Adapter.pfeiffer(reduction=2), ["down"]),
        (MixerBlock, Adapter.pfeiffer(reduction=2), ["mlp.down"]),
        (MixerBlock, Adapter.parallel(dim=4), ["mlp"]),
    ],
)
def test_presets_find_the_published_places(
    block: type[nn.Module], method: Adapter, places: list[str]
) -> None:
    model = Model(block)
    tuning = peftlib.attach(model, method, example=IDS)
    assert set(tuning.sites) == {f"blocks.{i}.{p}" for i in range(2) for p in places}
    assert tuning.num_parameters == 2 * len(places) * (2 * 8 * 4 + 4 + 8)


def test_presets_on_the_layers_of_torch() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    tuning = peftlib.attach(model, Adapter.houlsby(dim=4), example=torch.zeros(1, 5, 8))
    assert set(tuning.sites) == {
        f"layers.{i}.{p}" for i in range(2) for p in ("self_attn.out_proj", "linear2")
    }


def test_presets_on_bert() -> None:
    from transformers import BertConfig, BertModel

    model = BertModel(
        BertConfig(
            vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
        )
    )
    ids = {"input_ids": IDS}
    houlsby = peftlib.attach(model, Adapter.houlsby(dim=4), example=ids, name="houlsby")
    layers = [f"encoder.layer.{i}" for i in range(2)]
    assert set(houlsby.sites) == {
        f"{layer}.{p}" for layer in layers for p in ("attention.output.dense", "output.dense")
    }
    pfeiffer = peftlib.attach(model, Adapter.pfeiffer(reduction=4), example=ids, name="pfeiffer")
    assert set(pfeiffer.sites) == {f"{layer}.output.dense" for layer in layers}
    before, kinds = snapshot(model), classes(model)
    with pytest.raises(
        PeftlibError, match="no block with the 'parallel' places"
    ):  # no module is its feed-forward
        peftlib.attach(model, Adapter.parallel(dim=4), example=ids, name="parallel")
    assert_untouched(model, before, kinds)


def test_presets_have_the_published_settings() -> None:
    assert (Adapter.houlsby().activation, Adapter.houlsby().dim) == ("gelu", 64)
    assert (Adapter.pfeiffer().activation, Adapter.pfeiffer().reduction) == ("relu", 16)
    parallel = Adapter.parallel()
    assert (parallel.placement, parallel.scale, parallel.dim, parallel.activation) == (
        "parallel",
        4.0,
        512,
        "relu",
    )
    assert Adapter.houlsby(dim=8, layer_norm=True).layer_norm


def test_a_parallel_adapter_stands_beside_the_whole_feed_forward() -> None:
    model = Model(GPTBlock).double()
    twin = copy.deepcopy(model)
    tuning = peftlib.attach(model, Adapter.parallel(dim=3), targets=["blocks.0.mlp"])
    p = randomize(tuning)
    x = torch.randn(2, 5, 8, dtype=D, requires_grad=True)
    block = twin.blocks[0]

    def naive() -> Tensor:
        y = x + block.attn(block.ln_1(x))
        h = block.ln_2(y)
        return y + block.mlp(h) + bottleneck(h, p, "relu", 4.0)

    assert_twins(lambda: model.blocks[0](x), naive, {"x": x, **p})


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, message",
    [
        ({}, "exactly one of dim="),
        ({"dim": 4, "reduction": 2}, "exactly one of dim="),
        ({"dim": 0}, "dim=0"),
        ({"dim": 2.5}, r"dim=2\.5"),
        ({"reduction": 0}, "reduction=0"),
        ({"reduction": float("nan")}, "reduction=nan"),
        ({"dim": 4, "activation": "swish"}, "'relu', 'gelu'"),
        ({"dim": 4, "placement": "before"}, "'sequential', 'parallel'"),
        ({"dim": 4, "where": "everywhere"}, "'blocks', 'houlsby'"),
        ({"dim": 4, "scale": float("inf")}, "scale=inf"),
        ({"dim": 4, "scale": 0}, "scale=0"),
        ({"dim": 4, "axis": "last"}, "axis='last'"),
    ],
)
def test_fields_out_of_range_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PeftlibError, match=message):
        Adapter(**fields)


class Opaque(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    "model, method, target, example, message",
    [
        (nn.Linear(4, 4), Adapter(dim=2), "weight", None, "not on a parameter"),
        (nn.ModuleDict({"m": nn.ModuleList([nn.Linear(4, 4)])}), Adapter(dim=2), "m", None, "has no forward"),
        (Opaque(), Adapter(dim=2), "", None, "cannot be told from its attributes. Pass example="),
        (
            nn.Conv1d(4, 4, 3),
            Adapter(dim=2, placement="parallel"),
            "",
            torch.zeros(1, 4, 9),
            "feature axis alone",
        ),
        (
            nn.Conv1d(4, 4, 1, stride=2),
            Adapter(dim=2, placement="parallel"),
            "",
            None,
            "keeps the spatial size",
        ),
        (nn.Embedding(5, 4), Adapter(dim=2, placement="parallel"), "", None, "integer ids"),
        (nn.Linear(4, 4), Adapter(dim=2, axis=3), "", torch.zeros(2, 4), "axis=3"),
        (Model(GPTBlock), Adapter.houlsby(), None, None, "watching a block work: pass example="),
        (
            nn.Sequential(nn.Linear(4, 4)),
            Adapter.houlsby(),
            None,
            torch.zeros(1, 4),
            "no block with the 'houlsby'",
        ),
    ],
)
def test_places_that_cannot_carry_it_are_refused(
    model: nn.Module, method: Adapter, target: str | None, example: Any, message: str
) -> None:
    before, kinds = snapshot(model), classes(model)
    with pytest.raises(PeftlibError, match=message):
        peftlib.attach(model, method, targets=None if target is None else [target], example=example)
    assert_untouched(model, before, kinds)


class Upsized(nn.Module):
    """Its last registered layer does not make its output."""

    def __init__(self) -> None:
        super().__init__()
        self.out, self.inside = nn.Linear(6, 9), nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.inside(x))


def test_a_guessed_width_that_is_wrong_says_how_to_see_it() -> None:
    model = nn.Sequential(Upsized())
    tuning = peftlib.attach(model, Adapter(dim=2), targets=["0"])
    with pytest.raises(PeftlibError, match=r"An adapter for 6 features .* shape \(3, 9\).*example="):
        model(torch.zeros(3, 4))
    tuning.detach()
    tuning = peftlib.attach(model, Adapter(dim=2), targets=["0"], example=torch.zeros(3, 4))
    assert tuning.num_parameters == 2 * 2 * 9 + 2 + 9
    assert model(torch.zeros(3, 4)).shape == (3, 9)


def test_a_parallel_adapter_never_broadcasts_into_the_output() -> None:
    class Pool(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x).mean(0)

    model = nn.Sequential(Pool())
    peftlib.attach(model, Adapter(dim=2, placement="parallel"), targets=["0"])
    with pytest.raises(PeftlibError, match="parallel adapter"):
        model(torch.zeros(3, 4))


def test_an_adapter_refuses_to_merge() -> None:
    model = nn.Linear(4, 4)
    tuning = peftlib.attach(model, Adapter(dim=2))
    with pytest.raises(PeftlibError, match="nonlinearity"):
        tuning.merge()
    assert not tuning.merged
    assert tuning.enabled


# -- what is kept ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("placement", ["sequential", "parallel"])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_what_the_backward_keeps_is_small(
    layer_norm: bool, activation: str, placement: str, scale: float
) -> None:
    """Besides what the adapter acts on, at most two tensors of the bottleneck's width: no full-width copies."""
    hosts = {"linear": nn.Linear(64, 64), "conv": nn.Conv2d(64, 64, 3, padding=1)}
    inputs = {"linear": torch.randn(2, 35, 64), "conv": torch.randn(2, 64, 5, 7)}
    for kind, host in hosts.items():
        x = inputs[kind].requires_grad_()
        method = Adapter(
            dim=4, layer_norm=layer_norm, activation=activation, placement=placement, scale=scale
        )
        tuning = peftlib.attach(host, method, targets=[""])
        randomize(tuning)
        own = {id(p) for p in host.parameters()} | {id(x)}
        kept: dict[int, int] = {}

        def pack(t: Tensor, own: Any = own, kept: Any = kept) -> Tensor:
            # Views, too, stand for all that they keep alive.
            if not {id(t), id(t._base)} & own:
                kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // t.element_size()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            host(x)
        narrow, wide = 2 * 35 * 4, 2 * 35 * 64
        # Tensors of the weights' size (a transposed or scaled view of them) are not of the batch.
        of_batch = sorted(n for n in kept.values() if n >= narrow)
        expected = [wide] if placement == "sequential" else []
        assert [n for n in of_batch if n > narrow] == expected, (kind, of_batch)
        assert len(of_batch) - len(expected) <= 2
        tuning.detach()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("placement", ["sequential", "parallel"])
def test_derivatives_of_derivatives_and_transforms(placement: str, channels_last: bool) -> None:
    host = nn.Conv2d(3, 3, 1, dtype=D)
    method = Adapter(dim=2, activation="gelu", layer_norm=True, placement=placement)
    tuning = peftlib.attach(host, method, targets=[""])
    p = randomize(tuning)
    x = torch.randn(2, 3, 2, 2, dtype=D)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    names = list(p)

    def run(x: Tensor, *values: Tensor) -> Tensor:
        own = {
            f"_peft.default:adapter.{n.rpartition('adapter.')[2]}": v
            for n, v in zip(names, values, strict=True)
        }
        return torch.func.functional_call(host, own, (x,))

    values = tuple(p.values())
    assert torch.autograd.gradgradcheck(run, (x.requires_grad_(), *values))
    torch.testing.assert_close(torch.vmap(lambda one: host(one[None])[0])(x), host(x))
    compiled = torch.compile(host, backend="aot_eager", fullgraph=True)
    assert_twins(lambda: compiled(x), lambda: host(x), {"x": x, **p})
