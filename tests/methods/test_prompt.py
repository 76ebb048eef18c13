"""Prompt tuning: the same as embeddings, masks and positions lengthened by hand, in values and in every gradient.

Shapes: B batch, P prompt, T tokens, L = P + T, D width, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import peftlib
from peftlib import PromptTuning, attach
from peftlib.methods.calls import is_filled, named_tensors
from tests.methods.prompts import F64, Decoder, V, naive, prepended, rows_of, visible
from tests.twin import assert_twins, assert_untouched, classes, snapshot

B, T, P = 3, 5, 3
PROMPT = PromptTuning(length=P)
IDX = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(7))
POSITIONS = ["absolute", "rotary", "alibi"]
WHOLE = torch.ones(B, T, dtype=torch.bool)
RIGHT = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]]).bool()
LEFT = RIGHT.flip(1)
CAUSAL = torch.ones(T, T, dtype=torch.bool).tril()
PREFIX = CAUSAL | (torch.arange(T) < 2)


def check(
    positions: str,
    call: dict[str, Any],
    real: Tensor,
    *,
    keys: Tensor = WHOLE,
    causal: bool = True,
    both_ways: bool = False,
    where: Tensor | None = None,
    types: Tensor | None = None,
    example: Any = None,
    idx: Tensor = IDX,
) -> None:
    """A decoder under prompt tuning against its twin: logits, and the gradients of the rows and of the whole base."""
    model = Decoder(positions, causal)
    example = {"idx": idx} | call if example is None else example
    tuning = attach(model, PromptTuning(length=P), example=example, freeze=False)
    rows = rows_of(tuning)
    base = {k: p for k, p in model.named_parameters() if "_peft" not in k}
    where = torch.arange(T).expand(B, T) if where is None else where.expand(B, T)
    where_BL = torch.cat([torch.arange(P).expand(B, P), where + P], 1)
    types_BL = None if types is None else F.pad(types, (P, 0))
    seen = visible(real.expand(B, T, T), P, both_ways, keys)
    # Rows of padding see nothing of their own kind but the prompt; what they compute is nobody's business.
    asks = keys[..., None]

    def ours() -> Tensor:
        return model(idx, **call) * asks

    def twin() -> Tensor:
        return naive(model, prepended(model, rows, idx), seen, where_BL, types_BL)[:, P:] * asks

    assert_twins(ours, twin, {"rows": rows} | base)


def test_the_decoder_is_its_twin():
    for positions in POSITIONS:
        model = Decoder(positions)
        real = CAUSAL.expand(B, T, T)
        where = torch.arange(T).expand(B, T)
        torch.testing.assert_close(model(IDX), naive(model, model.tok.weight[IDX], real, where))


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("causal", [True, False])
def test_ids_alone(positions, causal):
    check(positions, {}, CAUSAL if causal else ~CAUSAL | True, causal=causal, both_ways=not causal)


SQUARES = {
    "causal": (CAUSAL.expand(B, T, T), WHOLE, False),
    "bidirectional": (torch.ones(B, T, T, dtype=torch.bool), WHOLE, True),
    "causal, right padding": (CAUSAL & RIGHT[:, None], RIGHT, False),
    "causal, left padding": (CAUSAL & LEFT[:, None], LEFT, False),
    "bidirectional, right padding": (RIGHT[:, None].expand(B, T, T), RIGHT, True),
    "bidirectional, left padding": (LEFT[:, None].expand(B, T, T), LEFT, True),
}


@pytest.mark.parametrize("kind", SQUARES)
@pytest.mark.parametrize("form", ["bool", "float", "heads"])
@pytest.mark.parametrize("positions", ["absolute", "alibi"])
def test_square_masks(kind, form, positions):
    real, keys, both_ways = SQUARES[kind]
    shared = keys is WHOLE  # one mask for all sequences: (T, T)
    mask = real[0] if shared else real[:, None]
    if form != "bool":
        mask = torch.zeros(mask.shape, dtype=F64).masked_fill(~mask, -1e9)
    if form == "heads":
        mask = mask.expand(B, 2, T, T) if shared else mask.expand(B, 2, T, T).clone()
    check(positions, {"attn_mask": mask}, real, keys=keys, both_ways=both_ways)


@given(
    batch=st.integers(1, 4),
    tokens=st.integers(1, 6),
    length=st.integers(1, 5),
    positions=st.sampled_from(POSITIONS),
    kind=st.sampled_from(["none", "square", "real", "padding"]),
    bits=st.integers(0),
)
@settings(max_examples=40)
def test_any_sizes_and_masks(batch, tokens, length, positions, kind, bits):
    model = Decoder(positions)
    idx = torch.arange(batch * tokens).view(batch, tokens) % V
    keep = torch.tensor([[bool(bits >> (b * tokens + t) & 1) for t in range(tokens)] for b in range(batch)])
    real = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    calls = {
        "none": {},
        "square": {"attn_mask": (real & keep[:, None])[:, None]},
        "real": {"attention_mask": keep.long()},
        "padding": {"key_padding_mask": ~keep},
    }
    # The example may have any other sizes and no mask.
    rows = rows_of(attach(model, PromptTuning(length=length), example=IDX))
    keep = torch.ones_like(keep) if kind == "none" else keep
    seen, where = (
        visible(real & keep[:, None], length, False),
        torch.arange(length + tokens).expand(batch, -1),
    )
    expected = naive(model, prepended(model, rows, idx), seen, where)[:, length:]
    torch.testing.assert_close(model(idx, **calls[kind]), expected)


def test_a_mask_of_a_prefix_model():
    keys = (torch.arange(T) < 2).expand(B, T)
    model = Decoder()
    tuning = attach(model, PromptTuning(length=P), example={"idx": IDX, "attn_mask": PREFIX})
    rows = rows_of(tuning)
    seen = visible(PREFIX.expand(B, T, T), P, True, keys)
    expected = naive(model, prepended(model, rows, IDX), seen, torch.arange(P + T).expand(B, P + T))
    torch.testing.assert_close(model(IDX, attn_mask=PREFIX), expected[:, P:])


@pytest.mark.parametrize("keys", [RIGHT, LEFT], ids=["right", "left"])
@pytest.mark.parametrize("form", [torch.bool, torch.long, F64])
@pytest.mark.parametrize("causal", [True, False])
def test_masks_of_real_tokens(keys, form, causal):
    real = CAUSAL & keys[:, None] if causal else keys[:, None].expand(B, T, T)
    check("rotary", {"attention_mask": keys.to(form)}, real, keys=keys, causal=causal, both_ways=not causal)


@pytest.mark.parametrize("keys", [RIGHT, LEFT], ids=["right", "left"])
@pytest.mark.parametrize("causal", [True, False])
def test_masks_of_padding(keys, causal):
    real = CAUSAL & keys[:, None] if causal else keys[:, None].expand(B, T, T)
    check("absolute", {"key_padding_mask": ~keys}, real, keys=keys, causal=causal, both_ways=not causal)


@pytest.mark.parametrize("shape", [(T,), (1, T), (B, T)], ids=str)
@pytest.mark.parametrize("positions", ["absolute", "rotary"])
def test_positions_go_on_after_the_prompt(shape, positions):
    where = torch.arange(T) if len(shape) == 1 else torch.arange(T).expand(shape).clone()
    if shape == (B, T):
        where[1] = torch.tensor([0, 0, 1, 2, 3])  # as left padding has it
    check(positions, {"position_ids": where}, CAUSAL, where=where)


def test_token_types_of_the_prompt_are_the_first():
    types = torch.randint(1, 3, (B, T))
    check("absolute", {"token_type_ids": types}, CAUSAL, types=types)


def test_embeddings_in_place_of_ids():
    model = Decoder()
    tuning = attach(model, PromptTuning(length=P), example=IDX, freeze=False)
    rows = rows_of(tuning)
    embeds = torch.randn(B, T, 8, dtype=F64, requires_grad=True)
    leaves = {"rows": rows, "embeds": embeds}
    seen = visible(CAUSAL.expand(B, T, T), P, False)

    def twin() -> Tensor:
        x = torch.cat([rows.expand(B, P, -1), embeds], 1)
        return naive(model, x, seen, torch.arange(P + T).expand(B, P + T))[:, P:]

    assert_twins(lambda: model(inputs_embeds=embeds), twin, leaves)


@pytest.mark.parametrize("example", ["without labels", "with labels"])
def test_labels_of_the_prompt_are_ignored(example):
    model = Decoder()
    labels = IDX.clone()
    labels[0, :2] = -100
    tuning = attach(
        model,
        PromptTuning(length=P),
        example={"idx": IDX} | ({"targets": labels} if example == "with labels" else {}),
    )
    rows = rows_of(tuning)
    seen, where = visible(CAUSAL.expand(B, T, T), P, False), torch.arange(P + T).expand(B, P + T)

    def twin() -> tuple[Tensor, Tensor]:
        logits = naive(model, prepended(model, rows, IDX), seen, where)[:, P:]
        return logits, F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    for call in (
        lambda: model(IDX, labels),
        lambda: model(IDX, targets=labels),
        lambda: model(targets=labels, idx=IDX),
    ):
        torch.testing.assert_close(call()[0], twin()[0])
        assert_twins(lambda call=call: call()[1], lambda: twin()[1], {"rows": rows})


def test_calls_of_every_style_are_the_same():
    model = Decoder()
    where, keys = torch.arange(T).expand(B, T), RIGHT.long()
    tuning = attach(model, PromptTuning(length=P), example=IDX)
    rows_of(tuning)
    expected = model(IDX, None, None, keys, None, None, where)
    assert torch.equal(model(IDX, attention_mask=keys, position_ids=where), expected)
    assert torch.equal(model(position_ids=where, attention_mask=keys, idx=IDX), expected)
    assert torch.equal(model(IDX, None, attention_mask=keys), model(IDX, attention_mask=keys))


@pytest.mark.parametrize(
    "example", [IDX, (IDX,), [IDX], {"idx": IDX}, (IDX[:1, :1],), {"idx": IDX, "attention_mask": RIGHT}]
)
def test_any_example_tells_the_same(example):
    model, reference = Decoder(), Decoder()
    reference.load_state_dict(model.state_dict())
    ours = rows_of(attach(model, PromptTuning(length=P), example=example))
    with torch.no_grad():
        rows_of(attach(reference, PromptTuning(length=P), example=IDX)).copy_(ours)
    assert torch.equal(model(IDX, attention_mask=RIGHT), reference(IDX, attention_mask=RIGHT))


def test_ids_without_a_batch():
    model = Decoder()
    rows_of(attach(model, PromptTuning(length=P), example=IDX))
    labels = IDX[0]
    torch.testing.assert_close(model(IDX[0]), model(IDX[:1])[0])
    torch.testing.assert_close(model(IDX[0], labels)[1], model(IDX[:1], labels[None])[1])
    alone = Decoder()
    alone.load_state_dict({k: v for k, v in model.state_dict().items() if "_peft" not in k})
    tuning = attach(alone, PromptTuning(length=P), example=IDX[0])
    tuning.load_state_dict(peftlib.tunings(model)["default"].state_dict())
    torch.testing.assert_close(alone(IDX[0]), model(IDX[:1])[0])
    torch.testing.assert_close(alone(IDX), model(IDX))


@pytest.mark.parametrize("length, tokens", [(1, 1), (1, 5), (4, 1)])
def test_the_shortest_prompts_and_texts(length, tokens):
    model = Decoder()
    idx = IDX[:, :tokens]
    rows = rows_of(attach(model, PromptTuning(length=length), example=idx))
    seen = visible(CAUSAL[:tokens, :tokens].expand(B, tokens, tokens), length, False)
    where = torch.arange(length + tokens).expand(B, -1)
    expected = naive(model, prepended(model, rows, idx), seen, where)[:, length:]
    torch.testing.assert_close(model(idx), expected)
    assert model(idx[:0]).shape == (0, tokens, V)


# -- outputs -----------------------------------------------------------------------------------------------------------


@dataclass
class Output:
    logits: Tensor
    hidden: list[Tensor]
    pooled: Tensor
    loss: Tensor | None = None


class Wrapped(nn.Module):
    """A decoder whose outputs come in another container."""

    def __init__(self, wrap: Callable[[Tensor, Tensor], Any]):
        super().__init__()
        self.decoder, self.wrap = Decoder(), wrap
        self.pool = nn.Linear(V, P + T).double()

    def forward(self, ids: Tensor) -> Any:
        logits = self.decoder(ids)
        return self.wrap(logits, self.pool(logits.mean(1)))


WRAPS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "dict": lambda x, p: {"logits": x, "pooled": p},
    "tuple": lambda x, p: (x, p),
    "dataclass": lambda x, p: Output(x, [x, x + 1], p),
    "nested": lambda x, p: [{"deep": (x, None)}, p, "text"],
}


@pytest.mark.parametrize("wrap", WRAPS)
def test_outputs_of_every_container(wrap):
    model = Wrapped(WRAPS[wrap])
    rows_of(attach(model, PromptTuning(length=P), example=IDX))
    long = named_tensors(model.wrap(*_long(model)))
    found = dict(named_tensors(model(IDX)))
    for path, expected in long:
        # The pooled output is as wide as the longer sequence by chance.
        torch.testing.assert_close(found[path], expected if expected.dim() == 2 else expected[:, P:])


def _long(model: Wrapped) -> tuple[Tensor, Tensor]:
    """Logits with the prompt's positions, and what is pooled from them."""
    (rows,) = peftlib.tunings(model)["default"].parameters()
    with peftlib.tunings(model)["default"].disabled():
        logits = model.decoder(inputs_embeds=prepended(model.decoder, rows, IDX))
    return logits, model.pool(logits.mean(1))


class ChannelsFirst(nn.Module):
    """A convolutional language model: (B, V, T), and a tuple with targets, as cross-entropy likes it."""

    def __init__(self) -> None:
        super().__init__()
        self.tok, self.conv = nn.Embedding(V, 8), nn.Conv1d(8, V, 3, padding=1)

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Any:
        y = self.conv(self.tok(ids).mT)
        return y if targets is None else (y, F.cross_entropy(y, targets))


def test_channels_before_positions():
    model = ChannelsFirst()
    rows = rows_of(attach(model, PromptTuning(length=P), example=IDX))
    with peftlib.tunings(model)["default"].disabled():
        expected = model.conv(torch.cat([rows.expand(B, P, 8), model.tok(IDX)], 1).mT)[..., P:]
    torch.testing.assert_close(model(IDX), expected)
    logits, loss = model(IDX, IDX)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(loss, F.cross_entropy(expected, IDX))


class Packed(nn.Module):
    """A recurrent tagger of packed sequences: as many outputs as the longest sequence has tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.tok, self.rnn = nn.Embedding(V, 8), nn.GRU(8, 8, batch_first=True, bidirectional=True)

    def run(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0]

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        return self.run(self.tok(ids), lengths)


@pytest.mark.parametrize("lengths", [[5, 3, 2], [2, 4, 1]], ids=str)
def test_packed_sequences(lengths):
    model = Packed().double()
    rows = rows_of(attach(model, PromptTuning(length=P), example=(IDX, torch.tensor([5, 4, 1]))))

    def twin() -> Tensor:
        x = torch.cat([rows.expand(B, P, 8), model.tok.weight[IDX]], 1)
        return model.run(x, torch.tensor(lengths) + P)[:, P:]

    assert model(IDX, torch.tensor(lengths)).shape == (B, max(lengths), 16)
    assert_twins(lambda: model(IDX, torch.tensor(lengths)), twin, {"rows": rows})


class LastOnly(Decoder):
    """Without targets it computes the last position alone, and its loss ignores -1: nanoGPT's way."""

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Any:
        assert ids.shape[1] <= 24, "longer than the context"
        if targets is None:
            return super().forward(ids)[:, [-1]], None
        logits = super().forward(ids)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


@pytest.mark.parametrize("example", [(IDX,), (IDX, IDX), {"ids": IDX}])
def test_the_last_position_alone_and_another_ignored_label(example):
    model = LastOnly()
    rows = rows_of(attach(model, PromptTuning(length=P), example=example))
    seen, where = visible(CAUSAL.expand(B, T, T), P, False), torch.arange(P + T).expand(B, P + T)
    expected = naive(model, prepended(model, rows, IDX), seen, where)[:, P:]
    torch.testing.assert_close(model(IDX)[0], expected[:, -1:])
    logits, loss = model(IDX, IDX)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(loss, F.cross_entropy(expected.flatten(0, 1), IDX.flatten()))
    with pytest.raises(
        peftlib.PeftlibError, match=r"does not take 20 more positions .* longer than the context"
    ):
        attach(model, PromptTuning(length=20), example=example, name="long")


# -- the sequence first ------------------------------------------------------------------------------------------------


class WordModel(nn.Module):
    """The word language model of PyTorch's examples: ids (T, B), a recurrent state, logits of (T B, V)."""

    def __init__(self, cell: type[nn.RNNBase] = nn.LSTM):
        super().__init__()
        self.tok, self.rnn, self.head = nn.Embedding(V, 8), cell(8, 6), nn.Linear(6, V)

    def forward(self, ids: Tensor, state: Any = None) -> Any:
        h, state = self.rnn(self.tok(ids), state)
        return self.head(h).view(-1, V).log_softmax(1), state


class TimeFirst(nn.Module):
    """Ids (T, B) through nn.TransformerEncoder."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)
        self.tok, self.enc = nn.Embedding(V, 8), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, ids: Tensor, pad: Tensor | None = None, embeds: Tensor | None = None) -> Tensor:
        return self.enc(self.tok(ids) if embeds is None else embeds, src_key_padding_mask=pad)


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU])
def test_a_recurrent_state_carries_the_prompt(cell):
    model = WordModel(cell).double()
    ids = IDX.T
    tuning = attach(model, PROMPT, example=ids)
    with pytest.raises(
        peftlib.PeftlibError, match=r"'state' .* holds tensors. If they are of earlier positions"
    ):
        model(ids[1:], model(ids[:1])[1])
    tuning.detach()
    rows_of(attach(model, PromptTuning(length=P, sequence_args={"state": "cache"}), example=ids))
    zeros = torch.zeros(1, B, 6, dtype=F64)
    state: Any = (zeros, zeros) if cell is nn.LSTM else zeros
    steps = []
    for i in range(T):
        out, state = model(ids[i : i + 1], state)
        steps.append(out)
    torch.testing.assert_close(torch.cat(steps), model(ids)[0])


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU])
def test_ids_with_the_sequence_first(cell):
    model = WordModel(cell).double()
    ids = IDX.T
    state = model(ids)[1]
    method = PromptTuning(length=P, sequence_args={"state": "skip"})
    rows = rows_of(attach(model, method, example=ids))

    def twin() -> Tensor:
        x = torch.cat([rows[:, None].expand(P, B, 8), model.tok.weight[ids]])
        return model.head(model.rnn(x, state)[0])[P:].view(-1, V).log_softmax(1)

    assert_twins(lambda: model(ids, state)[0], twin, {"rows": rows})
    # Also where there are as many sequences as words, and of the batch's other sizes.
    assert torch.allclose(model(ids[:, :1])[0], model(ids)[0].view(T, B, V)[:, 0])


def test_the_sequence_first_with_padding():
    model = TimeFirst().double()
    pad = ~RIGHT
    rows = rows_of(attach(model, PromptTuning(length=P), example=(IDX.T, pad)))

    def twin() -> Tensor:
        x = torch.cat([rows[:, None].expand(P, B, 8), model.tok.weight[IDX.T]])
        with peftlib.tunings(model)["default"].disabled():
            return model.enc(x, src_key_padding_mask=F.pad(pad, (P, 0)))[P:]

    assert_twins(lambda: model(IDX.T, pad), twin, {"rows": rows})
    embeds = model.tok.weight[IDX.T]
    torch.testing.assert_close(model(None, pad, embeds=embeds), model(IDX.T, pad))


def test_which_axis_is_time_is_seen_whatever_the_sizes():
    square = IDX[:, :B]
    for model, batch_first in ((WordModel(), False), (TimeFirst(), False), (Decoder(), True)):
        attach(model, PromptTuning(length=P), example=square)
        assert next(
            p.delta for p in peftlib.tunings(model)["default"].parts if p.built
        ).entry.layout.axis == (-1 if batch_first else 0)


def test_a_model_that_transposes_takes_the_batch_first():
    class Transposing(TimeFirst):
        def forward(self, ids: Tensor, pad: Tensor | None = None) -> Tensor:
            return super().forward(ids.T, pad).transpose(0, 1)

    model = Transposing().double()
    rows = rows_of(attach(model, PromptTuning(length=P), example=(IDX, ~RIGHT)))
    with peftlib.tunings(model)["default"].disabled():
        x = torch.cat([rows.expand(B, P, 8), model.tok.weight[IDX]], 1).transpose(0, 1)
        expected = model.enc(x, src_key_padding_mask=F.pad(~RIGHT, (P, 0)))[P:].transpose(0, 1)
    torch.testing.assert_close(model(IDX, ~RIGHT), expected)


# -- caches ------------------------------------------------------------------------------------------------------------


class Growing:
    """A cache of one's own: lists of tensors that grow by concatenation."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []


class Allocated:
    """A cache allocated in full, which says how much of it is used."""

    def __init__(self, layers: int = 2):
        self.length = 0
        self.kv = torch.zeros(layers, 2, B, 2, 24, 4, dtype=F64)


class Cached(Decoder):
    """The decoder with a cache of some style under some name; the cache, or its next state, comes out."""

    def forward(  # type: ignore[override]
        self, ids: Tensor, kv_cache: Any = None, start_pos: int = 0, position_ids: Tensor | None = None
    ) -> Any:
        if kv_cache is None:
            return super().forward(ids, position_ids=position_ids)
        if isinstance(kv_cache, Growing):
            past = list(zip(kv_cache.keys, kv_cache.values, strict=True))
            logits, new = super().forward(ids, past=past)
            kv_cache.keys, kv_cache.values = [k for k, _ in new], [v for _, v in new]
            return logits
        if isinstance(kv_cache, Allocated):
            n = kv_cache.length
            past = [(k[:, :, :n], v[:, :, :n]) for k, v in kv_cache.kv] if n else []
            logits, new = super().forward(ids, past=past)
            kv_cache.length += ids.shape[1]
            for kept, (k, v) in zip(kv_cache.kv, new, strict=True):
                kept[0][:, :, : k.shape[2]], kept[1][:, :, : v.shape[2]] = k, v
            return logits
        if isinstance(kv_cache, Tensor):  # allocated in full, counted by start_pos
            past = [(k[:, :, :start_pos], v[:, :, :start_pos]) for k, v in kv_cache] if start_pos else []
            logits, new = super().forward(ids, past=past)
            for kept, (k, v) in zip(kv_cache, new, strict=True):
                kept[0][:, :, : k.shape[2]], kept[1][:, :, : v.shape[2]] = k, v
            return logits
        if isinstance(kv_cache, dict):
            past = [kv_cache[i] for i in sorted(kv_cache)]
            logits, new = super().forward(ids, past=past)
            return {"logits": logits, "kv": dict(enumerate(new))}
        past = [(k.transpose(1, 2), v.transpose(1, 2)) for k, v in kv_cache]
        logits, new = super().forward(ids, past=past)
        return logits, tuple((k.transpose(1, 2), v.transpose(1, 2)) for k, v in new)  # (B, T, H, E)


def stepwise(model: Cached, style: str, ids: Tensor, first: int) -> Tensor:
    """The logits of a text read ``first`` tokens at once, then one by one, with a cache."""
    out = []
    cache: Any = {
        "tuple, positions second": (),
        "dict": {},
        "growing object": Growing(),
        "allocated object": Allocated(),
        "allocated, counted": torch.zeros(2, 2, B, 2, 24, 4, dtype=F64),
    }[style]
    for i in [0, *range(first, ids.shape[1])]:
        some = ids[:, i : first if i == 0 else i + 1]
        more = {"start_pos": i} if style == "allocated, counted" else {}
        found = model(some, kv_cache=cache, **more)
        if isinstance(found, tuple):
            found, cache = found
        elif isinstance(found, dict):
            found, cache = found["logits"], found["kv"]
        out.append(found)
    return torch.cat(out, 1)


STYLES = ["tuple, positions second", "dict", "growing object", "allocated object", "allocated, counted"]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("positions", ["absolute", "rotary"])
@pytest.mark.parametrize("first", [1, 3])
def test_a_cache_keeps_the_prompt(style, positions, first):
    model = Cached(positions)
    rows_of(attach(model, PromptTuning(length=P), example=IDX))
    expected = model(IDX)
    with torch.no_grad():
        torch.testing.assert_close(stepwise(model, style, IDX, first), expected)


@pytest.mark.parametrize("style", ["tuple, positions second", "dict", "growing object"])
def test_an_example_with_an_empty_cache_tells_the_same(style):
    model = Cached()
    cache = {"tuple, positions second": (), "dict": {}, "growing object": Growing()}[style]
    rows_of(attach(model, PromptTuning(length=P), example={"ids": IDX, "kv_cache": cache}))
    assert not is_filled(cache)  # the probe fills copies
    with torch.no_grad():
        torch.testing.assert_close(stepwise(model, style, IDX, 2), model(IDX))


def test_greedy_generation_with_a_cache_is_that_without():
    model = Cached()
    rows_of(attach(model, PromptTuning(length=P), example=IDX))
    plain = ids = IDX[:, :2]
    cache: Any = ()
    with torch.no_grad():
        for i in range(8):
            logits, cache = model(ids if i == 0 else ids[:, -1:], kv_cache=cache)
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
            plain = torch.cat([plain, model(plain)[:, -1:].argmax(-1)], 1)
    assert torch.equal(ids, plain)
    assert cache[0][0].shape[1] == P + 2 + 7


# -- embeddings --------------------------------------------------------------------------------------------------------


class Pair(nn.Module):
    """One encoder for two texts, by two lookups of one embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.tok, self.rnn = nn.Embedding(V, 8), nn.GRU(8, 8, batch_first=True)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        a, b = (self.rnn(self.tok(ids))[0][:, -1] for ids in (left, right))
        return (a * b).sum(-1)


@pytest.mark.parametrize("kind", ["ids", "skip"])
def test_two_texts_through_one_embedding(kind):
    model = Pair().double()
    left, right = IDX, IDX[:, :4].flip(0)
    with pytest.raises(peftlib.PeftlibError, match=r"'right' of shape \(3, 5\) looks aligned"):
        attach(model, PromptTuning(length=P), example=(left, left.flip(0)))
    method = PromptTuning(length=P, sequence_args={"right": kind})
    rows = rows_of(attach(model, method, example=(left, right)))

    def twin() -> Tensor:
        a = torch.cat([rows.expand(B, P, 8), model.tok.weight[left]], 1)
        b = model.tok.weight[right]
        b = torch.cat([rows.expand(B, P, 8), b], 1) if kind == "ids" else b
        return (model.rnn(a)[0][:, -1] * model.rnn(b)[0][:, -1]).sum(-1)

    assert_twins(lambda: model(left, right), twin, {"rows": rows})


class Twice(nn.Module):
    """Ids looked up twice: at the input, and as values added at the output (modified in place before)."""

    def __init__(self) -> None:
        super().__init__()
        self.tok, self.rnn = nn.Embedding(V, 8), nn.GRU(8, 8, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.rnn(self.tok(ids).mul_(2.0))[0]
        return x.cumsum(1) + self.tok(ids).cumsum(1)


def test_an_embedding_used_twice():
    model = Twice().double()
    rows = rows_of(attach(model, PromptTuning(length=P), example=IDX))

    def twin() -> Tensor:
        e = torch.cat([rows.expand(B, P, 8), model.tok.weight[IDX]], 1)
        return (model.rnn(2 * e)[0].cumsum(1) + e.cumsum(1))[:, P:]

    assert_twins(lambda: model(IDX), twin, {"rows": rows})


class Tables(nn.Module):
    """Tables that could be taken for that of the tokens: positions (larger, first) and types, all of shape (B, T)."""

    def __init__(self) -> None:
        super().__init__()
        self.pos, self.seg, self.words = nn.Embedding(99, 8), nn.Embedding(V, 8), nn.Embedding(V, 8)
        self.rnn = nn.GRU(8, 8, batch_first=True)

    def forward(self, position_ids: Tensor, segment_ids: Tensor, x: Tensor) -> Tensor:
        return self.rnn(self.pos(position_ids) + self.seg(segment_ids) + self.words(x.clamp(0, V - 1)))[0]


def test_the_embedding_of_the_tokens_is_found_among_others():
    model = Tables().double()
    where, kinds = torch.arange(T).repeat(B, 1), torch.ones(B, T, dtype=torch.long)
    tuning = attach(model, PromptTuning(length=P), example=(where, kinds, IDX))
    rows = rows_of(tuning)

    def twin() -> Tensor:
        words = torch.cat([rows.expand(B, P, 8), model.words.weight[IDX]], 1)
        return model.rnn(model.pos.weight[: P + T] + model.seg.weight[F.pad(kinds, (P, 0))] + words)[0][:, P:]

    assert_twins(lambda: model(where, kinds, IDX), twin, {"rows": rows})


def test_a_named_embedding():
    model = Tables().double()
    where, kinds = torch.arange(T).repeat(B, 1), torch.ones(B, T, dtype=torch.long)
    method = PromptTuning(length=P, sequence_args={"x": "types"})
    tuning = attach(model, method, targets=["seg"], example=(where, kinds, IDX))
    assert [p.name for p in tuning.parts] == ["", "seg"]
    rows = rows_of(tuning)
    seg = torch.cat([rows.expand(B, P, 8), model.seg.weight[kinds]], 1)
    with tuning.disabled():
        expected = model.rnn(model.pos.weight[: P + T] + seg + model.words.weight[F.pad(IDX, (P, 0))])[0][
            :, P:
        ]
    torch.testing.assert_close(model(where, kinds, IDX), expected)


def test_no_special_id_stands_at_the_prompt():
    class Config:
        pad_token_id, eos_token_id, image_token_id, mask_token_index = 11, [12, 13], 14, 15

    model = Decoder()
    config: Any = Config()
    config.__dict__.update(
        {k: v for k, v in vars(Config).items() if k.startswith(("pad", "eos", "image", "mask"))}
    )
    model.config = config  # type: ignore[assignment]
    seen: list[Tensor] = []
    attach(model, PromptTuning(length=P), example=IDX)
    model.tok.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(IDX)
    assert seen[0][:, :P].unique().tolist() == [16]
    assert torch.equal(seen[0][:, P:], IDX)


# -- modules of hidden states ------------------------------------------------------------------------------------------


class Patches(nn.Module):
    """A vision transformer in small: the sequence exists inside only."""

    def __init__(self, batch_first: bool = True, nested: bool = False):
        super().__init__()
        self.batch_first = batch_first
        self.cut = nn.Conv2d(3, 8, 2, stride=2)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)
        self.head = nn.Linear(8, 5)

    def tokens(self, image: Tensor) -> Tensor:
        x = self.cut(image).flatten(2).mT
        return x if self.batch_first else x.transpose(0, 1)

    def forward(self, image: Tensor, mask: Tensor | None = None, pad: Tensor | None = None) -> Tensor:
        h = self.encoder(self.tokens(image), mask, src_key_padding_mask=pad)
        if pad is not None and self.batch_first:
            h = h.masked_fill(pad[..., None], 0)
        return self.head(h.mean(1 if self.batch_first else 0))


N = 6  # patches of a (4, 6) image
IMAGE = torch.randn(B, 3, 4, 6, dtype=F64, generator=torch.Generator().manual_seed(3))
PATCH_PAD = torch.arange(N) >= torch.tensor([6, 4, 2])[:, None]
FUTURE = torch.ones(N, N, dtype=torch.bool).triu(1)
LONG_FUTURE = torch.ones(P + N, P + N, dtype=torch.bool).triu(1)
MINUS = torch.zeros(N, N, dtype=F64).masked_fill(FUTURE, -torch.inf)
LONG_MINUS = torch.zeros(P + N, P + N, dtype=F64).masked_fill(LONG_FUTURE, -torch.inf)
HIDDEN_CALLS: dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]] = {
    "alone": ({}, {}),
    "padding": ({"pad": PATCH_PAD}, {"src_key_padding_mask": F.pad(PATCH_PAD, (P, 0))}),
    "boolean": ({"mask": FUTURE}, {"mask": LONG_FUTURE}),
    "additive": ({"mask": MINUS}, {"mask": LONG_MINUS}),
    "both": (
        {"mask": FUTURE, "pad": PATCH_PAD},
        {"mask": LONG_FUTURE, "src_key_padding_mask": F.pad(PATCH_PAD, (P, 0))},
    ),
    "open": ({"mask": FUTURE & False}, {"mask": LONG_FUTURE & False}),
}


@pytest.mark.parametrize("call", HIDDEN_CALLS)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_call", [True, False], ids=["as in the example", "unlike the example"])
def test_a_module_of_hidden_states(call, batch_first, training, with_call):
    model = Patches(batch_first).double().train(training)
    given, long = HIDDEN_CALLS[call]
    example = {"image": IMAGE} | (given if with_call else {})
    rows = rows_of(attach(model, {"encoder": PromptTuning(length=P)}, example=example))

    def twin() -> Tensor:
        x = model.tokens(IMAGE)
        axis = 1 if batch_first else 0
        p = rows.expand(B, P, 8) if batch_first else rows[:, None].expand(P, B, 8)
        with peftlib.tunings(model)["default"].disabled():
            h = model.encoder(torch.cat([p, x], axis), **long).narrow(axis, P, N)
        if "pad" in given and batch_first:
            h = h.masked_fill(PATCH_PAD[..., None], 0)
        return model.head(h.mean(axis))

    assert_twins(lambda: model(IMAGE, **given), twin, {"rows": rows})


@pytest.mark.parametrize("call", ["alone", "padding"])
def test_the_fused_path_of_evaluation_sees_the_prompt(call):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype, torch says
        model = Patches(nested=True).double().eval()
        given, _ = HIDDEN_CALLS[call]
        rows_of(attach(model, {"encoder": PromptTuning(length=P)}, example={"image": IMAGE} | given))
        with torch.no_grad():
            fused = model(IMAGE, **given)
        torch.testing.assert_close(fused, model.train()(IMAGE, **given).detach())


def test_a_recurrent_module_and_its_state():
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h, (last, _) = self.rnn(x)
            return self.head(h), last

    model, x = Tagger().double(), torch.randn(B, T, 4, dtype=F64)
    for target in ("", "rnn"):
        tuning = attach(model, {target: PromptTuning(length=P)}, example=x)
        rows = rows_of(tuning)

        def twin(rows: Tensor = rows, tuning: peftlib.Tuning = tuning) -> Tensor:
            with tuning.disabled():
                h, last = model(torch.cat([rows.expand(B, P, 4), x], 1))
            return torch.cat([h[:, P:].flatten(), last.flatten()])

        assert_twins(lambda: torch.cat([y.flatten() for y in model(x)]), twin, {"rows": rows})
        tuning.detach()


class Seq2Seq(nn.Module):
    """An encoder-decoder with embeddings of its own for both sides, the decoder's vocabulary larger."""

    def __init__(self) -> None:
        super().__init__()
        self.src_tok, self.tgt_tok = nn.Embedding(V, 8), nn.Embedding(2 * V, 8)
        self.net = nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 2 * V)

    def forward(
        self,
        src: Tensor,
        tgt: Tensor,
        src_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Any:
        h = self.net(
            self.src_tok(src),
            self.tgt_tok(tgt),
            tgt_mask=tgt_mask,
            src_key_padding_mask=src_key_padding_mask,
            memory_key_padding_mask=memory_key_padding_mask,
        )
        logits = self.head(h)
        return logits if labels is None else (logits, F.cross_entropy(logits.flatten(0, 1), labels.flatten()))


@pytest.mark.parametrize("tokens", [4, T, P + T], ids=lambda n: f"decoder of {n}")
def test_an_encoder_decoder_gets_the_prompt_at_its_encoder(tokens):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: nested tensors are a prototype
        model = Seq2Seq().double()
    tgt = torch.randint(0, 2 * V, (B, tokens))
    call = {
        "src_key_padding_mask": ~RIGHT,
        "memory_key_padding_mask": ~RIGHT,
        "tgt_mask": torch.ones(tokens, tokens, dtype=torch.bool).triu(1),
        "labels": tgt,
    }
    rows = rows_of(attach(model, PromptTuning(length=P), example=(IDX, tgt)))
    assert [p.name for p in peftlib.tunings(model)["default"].parts] == ["", "src_tok"]

    def twin() -> tuple[Tensor, Tensor]:
        pad = F.pad(~RIGHT, (P, 0))
        with peftlib.tunings(model)["default"].disabled():
            h = model.net(
                torch.cat([rows.expand(B, P, 8), model.src_tok.weight[IDX]], 1),
                model.tgt_tok.weight[tgt],
                tgt_mask=call["tgt_mask"],
                src_key_padding_mask=pad,
                memory_key_padding_mask=pad,
            )
        logits = model.head(h)
        return logits, F.cross_entropy(logits.flatten(0, 1), tgt.flatten())

    assert_twins(lambda: model(IDX, tgt, **call)[0], lambda: twin()[0], {"rows": rows})
    torch.testing.assert_close(model(IDX, tgt, **call)[1], twin()[1])


def test_a_decoder_alone():
    layer = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerDecoder(layer, 2).double()
    tgt, memory = torch.randn(B, T, 8, dtype=F64), torch.randn(B, 4, 8, dtype=F64)
    call = {"tgt_mask": ~CAUSAL, "tgt_key_padding_mask": ~RIGHT}
    rows = rows_of(attach(model, PromptTuning(length=P), example={"tgt": tgt, "memory": memory, **call}))

    def twin() -> Tensor:
        future, pad = torch.ones(P + T, P + T).triu(1).bool(), F.pad(~RIGHT, (P, 0))
        x = torch.cat([rows.expand(B, P, 8), tgt], 1)
        with peftlib.tunings(model)["default"].disabled():
            return model(x, memory, tgt_mask=future, tgt_key_padding_mask=pad)[:, P:]

    assert_twins(lambda: model(tgt, memory, **call), twin, {"rows": rows})


# -- starts and sizes --------------------------------------------------------------------------------------------------


def start(model: nn.Module, init: Any, length: int = P) -> Tensor:
    tuning = attach(model, PromptTuning(length=length, init=init), example=IDX)
    (rows,) = (p.detach().clone() for p in tuning.parameters())
    tuning.detach()
    return rows


def test_a_start_at_vocabulary_rows():
    model = Decoder("rotary")
    found = (start(model, "vocab", 40)[:, None] == model.tok.weight).all(-1)
    assert found.any(1).all()  # rows of the vocabulary, each of them
    assert found.any(0).sum() > 10  # and not one row alone


@pytest.mark.parametrize("make", [list, tuple, torch.tensor])
def test_a_start_at_given_tokens(make):
    model = Decoder()
    ids = [4, 4, 22]
    assert torch.equal(start(model, make(ids)), model.tok.weight[ids])


def test_a_start_at_noise():
    model = Decoder("rotary")
    with torch.no_grad():
        model.tok.weight.mul_(5)
    spread = start(model, "normal", 500).std() / model.tok.weight.std()
    assert 0.9 < spread < 1.1
    vision = Patches().double()
    tuning = attach(vision, {"encoder": PromptTuning(length=500)}, example=IMAGE)
    (rows,) = tuning.parameters()
    assert 0.018 < rows.std() < 0.022


def test_rows_have_the_tables_dtype_and_device():
    with torch.device("meta"):
        far = nn.Sequential(nn.Embedding(V, 8, dtype=torch.bfloat16), nn.Linear(8, V))
    tuning = attach(far, PromptTuning(length=P), example=IDX)
    assert [(p.device.type, p.dtype) for p in tuning.parameters()] == [("meta", torch.bfloat16)]
    wide = attach(far, PromptTuning(length=P, dtype=torch.float32), example=IDX, name="wide")
    assert [p.dtype for p in wide.parameters()] == [torch.float32]


@pytest.mark.parametrize("length, published", [(5, 20_480), (20, 81_920), (100, 409_600)])
def test_published_sizes(length, published):
    """Lester et al. 2021, section 3 and table 4: P x 4096 parameters on T5 XXL."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Embedding(32128, 4096), nn.Linear(4096, 32128, bias=False))
    tuning = attach(model, PromptTuning(length=length), example=IDX)
    assert tuning.num_parameters == published
    assert tuning.num_parameters == length * 4096


# -- what is wrong -----------------------------------------------------------------------------------------------------


def refused(model: nn.Module, method: Any, words: str, example: Any = IDX, **options: Any) -> None:
    """Attaching is an error with these words, and the model is what it was, in everything."""
    before, kinds, flags = snapshot(model), classes(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(peftlib.PeftlibError, match=words):
        attach(model, method, example=example, **options)
    assert_untouched(model, before, kinds)
    assert flags == [p.requires_grad for p in model.parameters()]
    assert not peftlib.tunings(model)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"length": 0}, "length must be an integer of at least 1"),
        ({"length": 2.0}, "length must be an integer of at least 1"),
        ({"length": 2, "init": "zeros"}, "init must be 'vocab', 'normal' or a list of token ids"),
        ({"length": 2, "init": [1]}, "was given 1 token ids; give as many as the prompt is long"),
        ({"length": 2, "init": None}, "must be a name or a list of token ids"),
        ({"length": 2, "sequence_args": {"x": "tokens"}}, "the kind must be one of 'ids', 'embeds', 'mask'"),
    ],
)
def test_fields_out_of_range(fields, words):
    with pytest.raises(peftlib.PeftlibError, match=words):
        PromptTuning(**fields)


def test_no_example():
    refused(Decoder(), PROMPT, "has to see one forward to know its sites: pass example=", example=None)


@pytest.mark.parametrize("ids", [[1, 2, V], [1, -2, 3]])
def test_start_tokens_outside_the_vocabulary(ids):
    unknown = next(i for i in ids if not 0 <= i < V)
    refused(Decoder(), PromptTuning(length=P, init=ids), f"token id {unknown}; the vocabulary has {V}")
    with torch.device("meta"):
        model = nn.Sequential(nn.Embedding(V, 8), nn.Linear(8, V))
    with pytest.raises(peftlib.PeftlibError, match=f"token id {unknown}; the vocabulary has {V}"):
        attach(model, PromptTuning(length=P, init=ids), example=IDX)


def test_start_tokens_where_there_is_no_vocabulary():
    method = {"encoder": PromptTuning(length=P, init=[1, 2, 3])}
    refused(Patches().double(), method, "has no vocabulary. Use init='normal'", example=IMAGE)


class Weighted(Decoder):
    def forward(self, ids: Tensor, importance: Tensor | None = None) -> Tensor:  # type: ignore[override]
        logits = super().forward(ids)
        return logits if importance is None else logits * importance[..., None]


def test_an_unknown_argument_in_the_example():
    words = r"'importance' of shape \(3, 5\) looks aligned .*sequence_args=\{'importance': kind\}"
    refused(Weighted(), PROMPT, words, example=(IDX, torch.ones(B, T, dtype=F64)))


def test_an_unknown_argument_in_a_later_call():
    model = Weighted()
    attach(model, PROMPT, example=IDX)
    with pytest.raises(peftlib.PeftlibError, match="'importance' of shape"):
        model(IDX, torch.ones(B, T, dtype=F64))
    expected = model(IDX)
    peftlib.tunings(model)["default"].detach()
    method = PromptTuning(length=P, sequence_args={"importance": "mask"})
    attach(model, method, example=IDX)
    assert expected.shape == model(IDX, torch.ones(B, T, dtype=F64)).shape


def test_a_wrong_name_among_the_arguments():
    method = PromptTuning(length=P, sequence_args={"wieghts": "mask"})
    refused(
        Weighted(),
        method,
        "sequence_args names 'wieghts', which Weighted.forward does not have; it takes 'ids'",
    )


def test_a_prompt_longer_than_a_table_of_positions():
    words = (
        "longer than the context: 'pos' has 24 positions, the example takes 5 of them, and the prompt 20 more"
    )
    refused(Decoder(), PromptTuning(length=20), words)
    attach(Decoder(), PromptTuning(length=19), example=IDX)
    attach(Decoder("rotary"), PromptTuning(length=20), example=IDX)


def test_a_text_that_leaves_the_prompt_no_room():
    model = Decoder()
    attach(model, PROMPT, example=IDX)
    assert model(IDX.repeat(1, 5)[:, :21]).shape == (B, 21, V)
    with pytest.raises(IndexError):
        model(IDX.repeat(1, 5)[:, :22])


def test_a_prompt_longer_than_a_slice_of_positions():
    class Sliced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tok, self.pos = nn.Embedding(V, 8), nn.Parameter(torch.zeros(10, 8))

        def forward(self, ids: Tensor) -> Tensor:
            return self.tok(ids) + self.pos[: ids.shape[1]]

    refused(Sliced(), PromptTuning(length=6), "Sliced does not take 6 more positions than the example has")
    attach(Sliced(), PromptTuning(length=5), example=IDX)


def test_token_types_are_no_table_of_positions():
    # Two types, two tokens, one sequence: nothing is refused for looking like a table of two positions.
    model = Decoder()
    attach(model, PROMPT, example={"idx": IDX[:1, :3], "token_type_ids": torch.zeros(1, 3, dtype=torch.long)})


class Outside(nn.Module):
    """Looks its ids up in one module and reads them in another."""

    def __init__(self) -> None:
        super().__init__()
        self.tok, self.rnn = nn.Embedding(V, 8), nn.GRU(8, 8, batch_first=True)

    def embed(self, ids: Tensor) -> Tensor:
        return self.tok(ids)

    def forward(self, ids: Tensor | None = None, x: Tensor | None = None) -> Tensor:
        return self.rnn(self.tok(ids) if x is None else x)[0]


def test_the_embedding_outside_the_models_forward():
    model = Outside()
    tuning = attach(model, PROMPT, example=IDX)
    with pytest.raises(
        peftlib.PeftlibError, match="The embedding ran while the module that holds the prompt was not"
    ):
        model.embed(IDX)
    with tuning.disabled():
        x = model.embed(IDX)
    model(IDX)
    # An error on the way leaves nothing behind.
    with pytest.raises(IndexError):
        model(IDX + V)
    with pytest.raises(peftlib.PeftlibError, match="The embedding ran while"):
        model.embed(IDX)
    assert model(IDX).shape == (*x.shape[:2], 8)


def test_a_call_that_never_reaches_the_embedding():
    model = Outside()
    attach(model, PromptTuning(length=P, sequence_args={"x": "skip"}), example=IDX)
    with pytest.raises(peftlib.PeftlibError, match=r"without looking up its ids .* would silently be lost"):
        model(IDX, torch.randn(B, T, 8))


@pytest.mark.parametrize(
    "change, shape",
    [
        (lambda ids: torch.cat([ids[:, :1], ids], 1), r"\(3, 9\)"),
        (lambda ids: ids[:, 1:], r"\(3, 7\)"),
        (lambda ids: ids.flatten(), r"\(24,\)"),
    ],
)
def test_ids_of_another_length_at_the_embedding(change, shape):
    class Changing(Outside):
        def forward(self, ids: Tensor) -> Tensor:  # type: ignore[override]
            return self.rnn(self.tok(change(ids)))[0]

    words = (
        f"The embedding 'tok' sees ids of shape {shape} where the model takes 8 positions|shows no sequence"
    )
    refused(Changing(), PROMPT, words)


def test_ids_looked_up_one_by_one():
    class Loop(Outside):
        def forward(self, ids: Tensor) -> Tensor:  # type: ignore[override]
            return torch.stack([self.tok(ids[:, i]) for i in range(ids.shape[1])], 1)

    refused(Loop(), PROMPT, r"'tok' does not look up 'ids' as one sequence \(it sees ids of shape \(3,\)\)")


def test_an_embedding_alone():
    refused(nn.Embedding(V, 8), PROMPT, "An embedding alone lets no position see another")


def test_outputs_that_cannot_be_shortened():
    class Halved(Outside):
        def forward(self, ids: Tensor) -> Tensor:  # type: ignore[override]
            return self.rnn(self.tok(ids))[0][:, ::2]

    refused(Halved(), PromptTuning(length=4), r"the output 'tensor' goes from \(3, 3, 8\) to \(3, 5, 8\)")

    class Opaque(Outside):
        def forward(self, ids: Tensor) -> Any:  # type: ignore[override]
            return SimpleNamespace(hidden=super().forward(ids))

    refused(Opaque(), PROMPT, "SimpleNamespace shows no tensors: return a tensor, or a tuple")


def test_images_and_containers():
    model = Patches().double()
    refused(model, PROMPT, "Patches shows no sequence that a prompt could go before", example=IMAGE)
    refused(
        model,
        {"cut": PROMPT},
        r"a sequence of vectors \(B, T, D\); 'cut' takes 'input' of shape",
        example=IMAGE,
    )
    refused(model, {"encoder.layers": PROMPT}, "it has no forward", example=IMAGE)
    refused(model, {"head.weight": PROMPT}, "acts on a module's input, not on a parameter", example=IMAGE)


def test_a_filled_cache_in_the_example():
    past = [(torch.randn(B, 2, 4, 4, dtype=F64),) * 2] * 2
    refused(Decoder(), PROMPT, "The example's cache is filled", example={"idx": IDX, "past": past})


def test_a_prompt_cannot_be_merged_or_folded():
    model = Decoder()
    tuning = attach(model, PROMPT, example=IDX)
    expected = model(IDX)
    with pytest.raises(peftlib.PeftlibError, match="A prompt cannot be merged"):
        tuning.merge()
    with pytest.raises(peftlib.PeftlibError, match="no reparametrization to fold"):
        tuning.fold()
    assert torch.equal(model(IDX), expected)
