"""A call that would silently pass a tuning by is refused: the sequence under another name, attention without SDPA."""

import collections

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import peftlib
from peftlib import Adapter, BitFit, LoRA, NewHead, PeftlibError, PromptTuning, PTuningV2, TokenRows
from peftlib.errors import TargetError


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.tok, self.pos, self.head = nn.Embedding(11, 8), nn.Embedding(16, 8), nn.Linear(8, 11)

    def forward(this, ids=None, feats=None):
        x = feats if ids is None else this.tok(ids) + this.pos(torch.arange(ids.shape[1])[None])
        return this.head(torch.cumsum(x, 1))


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.lm = Decoder()

    def forward(self, *args, **kwargs):
        return self.lm(*args, **kwargs)


IDS = torch.arange(10).view(2, 5) % 7


def prompted(model, example):
    tuning = peftlib.attach(model, PromptTuning(length=3), example=example)
    with torch.no_grad():
        for p in tuning.parameters():
            p.normal_()
    return tuning


@pytest.mark.parametrize("build", [Decoder, Wrapped])
def test_the_sequence_under_another_name(build):
    for example, same, other in (
        (IDS, lambda m: m(IDS), lambda m: m(ids=IDS)),
        ({"ids": IDS}, lambda m: m(ids=IDS), lambda m: m(IDS)),
    ):
        model = build()
        base = model(IDS)
        tuning = prompted(model, example)
        changed = same(model)
        assert not torch.allclose(changed, base)
        if build is Decoder:
            # A signature that names its arguments knows them both ways.
            assert torch.equal(other(model), changed)
        else:
            with pytest.raises(PeftlibError, match="silently be lost"):
                other(model)
        tuning.detach()


def test_the_sequence_in_another_form():
    model = Decoder()
    prompted(model, {"ids": IDS})
    with pytest.raises(PeftlibError, match="silently be lost"):
        model(feats=torch.randn(2, 5, 8))


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x, weights=False):
        q, k, v = self.qkv(x).chunk(3, -1)
        if weights:
            return (q @ k.mT / 8**0.5).softmax(-1) @ v
        return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]


def test_a_branch_without_sdpa():
    model = nn.Sequential(Branching())
    x = torch.randn(2, 5, 8)
    tuning = peftlib.attach(model, PTuningV2(length=3), example=x)
    assert torch.isfinite(model(x)).all()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    with pytest.raises(PeftlibError, match="silently be lost"):
        model[0](x, weights=True)
    with tuning.disabled():
        torch.testing.assert_close(model[0](x, weights=True), model(x))


class Keyed(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.l, self.kind = nn.Linear(4, 4), kind

    def forward(self, x):
        out = self.kind()
        out[0] = self.l(x)
        return out


@pytest.mark.parametrize("kind", [dict, collections.OrderedDict, lambda: collections.defaultdict(list)])
def test_mappings_with_any_keys(kind):
    model = nn.Sequential(Keyed(kind))
    x = torch.randn(2, 4)
    expected = model(x)
    peftlib.attach(model, Adapter(dim=2), targets=["0"], example=x)
    out = model(x)
    assert type(out) is type(expected)
    assert torch.equal(out[0], expected[0])
    assert getattr(out, "default_factory", None) is getattr(expected, "default_factory", None)


def test_presets_take_the_size_either_way():
    for preset in (Adapter.houlsby, Adapter.pfeiffer, Adapter.parallel):
        assert preset(dim=48).reduction is None
        assert preset(reduction=4).dim is None
    assert (Adapter.houlsby().dim, Adapter.pfeiffer().reduction, Adapter.parallel().dim) == (64, 16, 512)


def test_heads_and_token_tables_are_found_by_the_example():
    model = Decoder()
    tuning = peftlib.attach(model, NewHead(4), example=IDS)
    assert list(tuning.sites) == ["head"]
    assert model(IDS).shape == (2, 5, 4)
    tuning.detach()
    assert list(peftlib.attach(model, TokenRows(ids=[3]), example=IDS).sites) == ["tok"]


class TiedByHand(nn.Module):
    """Its logits read the table itself, which no call of the embedding sees."""

    def __init__(self):
        super().__init__()
        self.tok, self.mix = nn.Embedding(11, 8), nn.Linear(8, 8)

    def forward(self, ids):
        x = self.mix(self.tok(ids)).to(self.tok.weight) + torch.zeros_like(self.mix.weight)[0]
        return F.linear(x * self.mix.weight.new_ones(8), self.tok.weight)


@pytest.mark.parametrize("method", [LoRA(rank=2), TokenRows(ids=[1, 3])], ids=str)
@pytest.mark.parametrize("build", [TiedByHand, lambda: nn.Sequential(TiedByHand())], ids=["root", "inside"])
def test_a_weight_that_is_read_outside_its_module(method, build):
    model = build()
    name = next(n for n, m in model.named_modules() if isinstance(m, nn.Embedding))
    before = dict(model.state_dict())
    with pytest.raises(
        TargetError, match=rf"'{name}' cannot carry .*reads '{name}.weight' itself.*Target the param"
    ):
        peftlib.attach(model, method, targets=[name], example=IDS)
    assert model.state_dict().keys() == before.keys()
    assert not peftlib.tunings(model)
    # A default passes it over and says so; asking for dtype, device or shape of a weight is no reading of it.
    tuning = peftlib.attach(model, LoRA(rank=2), example=IDS)
    assert all("tok" not in site for site in tuning.sites)


def test_the_parameter_is_followed_wherever_it_is_read():
    model = TiedByHand().double()
    tuning = peftlib.attach(model, LoRA(rank=2), targets=["tok.weight", "mix"], example=IDS)
    with torch.no_grad():
        for p in tuning.parameters():
            p.normal_()
    tuned = model(IDS)
    plain = TiedByHand().double()
    plain.load_state_dict(peftlib.merged_state_dict(model))
    torch.testing.assert_close(plain(IDS), tuned)
    tuning.detach()
    peftlib.attach(model, BitFit(), example=IDS)  # trains the bias itself, wherever it is read
