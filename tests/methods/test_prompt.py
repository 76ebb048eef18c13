"""Prompt tuning: the same as embeddings, masks and positions lengthened by hand, in values and in every gradient.

Shapes: B batch, P prompt, T tokens, L = P + T, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import peftlib
from peftlib import PromptTuning, attach
from tests.methods.prompts import F64, Decoder, V, naive, prepended, rows_of, visible
from tests.twin import assert_twins

B, T, P = 3, 5, 3
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
