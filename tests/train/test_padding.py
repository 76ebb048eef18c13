"""A padded row's loss and gradients are those of the row alone, on either side and in either direction, or refused."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from peftlib import PeftlibError
from peftlib.train import Encoded, causal_lm, classification, generate, masked_lm, pad, score
from tests.test_hf import bert, gpt2, llama, roberta

transformers = pytest.importorskip("transformers")

ROWS = [
    Encoded([5, 6, 7], [-100, 6, 7]),
    Encoded(list(range(5, 17)), [-100] * 6 + list(range(11, 17))),
    Encoded([9, 8], [-100, 8]),
]


class Both(nn.Module):
    """Attention in both directions, by keyword or, with ``Blind``, without a word for the mask."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)

    def forward(self, ids, attention_mask=None):
        x = self.embed(ids)[:, None]
        mask = None if attention_mask is None else attention_mask.bool()[:, None, None]
        return self.head(F.scaled_dot_product_attention(x, x, x, attn_mask=mask)[:, 0])


class Blind(Both):
    def forward(self, ids):
        return super().forward(ids)


def found(model, loss, batch):
    """Sums of the rows, and the gradients of a mean that weighs each row differently."""
    sums, _ = loss(model, batch, each=True)
    weights = [p for p in model.parameters() if p.requires_grad]
    given = torch.autograd.grad(
        (sums * torch.arange(1.0, len(sums) + 1)).sum(), weights, allow_unused=True, materialize_grads=True
    )
    return sums, given


@pytest.mark.parametrize(
    "make, loss, side",
    [
        (llama, causal_lm, "right"),
        (llama, causal_lm, "left"),
        (gpt2, causal_lm, "right"),
        (gpt2, causal_lm, "left"),
        (gpt2, partial(causal_lm, head="lm_head"), "left"),
        (partial(bert, "BertForMaskedLM"), masked_lm, "right"),
        (lambda: transformers.RobertaForMaskedLM(roberta().config), masked_lm, "right"),
        (Both, masked_lm, "right"),
        (lambda: torch.compile(Both(), backend="eager"), masked_lm, "right"),
    ],
)
def test_rows_have_the_loss_and_the_gradients_that_each_has_alone(make, loss, side):
    torch.manual_seed(0)
    model = make().double().eval()
    sums, given = found(model, loss, pad(ROWS, pad_id=0, side=side))
    wanted = 0
    for number, row in enumerate(ROWS, 1):
        alone, gradients = found(model, loss, pad([row], pad_id=0))
        # Llama's norm and rotations are float32, whatever the model is
        torch.testing.assert_close(sums[number - 1], alone[0], rtol=1e-5, atol=1e-6)
        wanted = [a + number * g for a, g in zip(wanted or [0.0] * len(gradients), gradients, strict=True)]
    torch.testing.assert_close(given, tuple(wanted), rtol=1e-4, atol=1e-5)


def test_what_a_model_cannot_be_told_is_refused_and_what_it_need_not_be_is_not():
    full, right, left = pad(ROWS[:1], 0), pad(ROWS, 0), pad(ROWS, 0, side="left")
    plain = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 20))
    for loss in (causal_lm, masked_lm):
        loss(Blind(), full)
    causal_lm(plain, right)
    masked_lm(Blind(), {key: value for key, value in right.items() if key != "attention_mask"})
    for model, loss, batch, message in (
        (Blind(), masked_lm, right, "names no attention_mask, so other tokens"),
        (Blind(), classification, right, "names no attention_mask"),
        (plain, causal_lm, left, "padded on the left"),
        (Both(), causal_lm, left, "padded on the left"),  # it is told of padding and not of positions
        (bert("BertForMaskedLM"), masked_lm, left, "padded on the left"),
        (plain, score, {**left, "inputs": left["inputs"]}, "padded on the left"),
        (Both(), masked_lm, {**full, "attention_mask": torch.ones(1, 1, 3, 3)}, "inputs={...}"),
    ):
        with pytest.raises(PeftlibError, match=message):
            loss(model, batch)


def test_inputs_by_name_are_all_that_a_model_is_given():
    batch = pad(ROWS, 0)
    named = {"ids": batch["inputs"], "attention_mask": batch["attention_mask"]}
    expected = masked_lm(Both(), batch)[0]
    torch.testing.assert_close(masked_lm(Both(), {**batch, "inputs": named})[0], expected)
    assert not torch.allclose(masked_lm(Both(), {**batch, "inputs": {"ids": batch["inputs"]}})[0], expected)


def test_prompts_of_several_lengths_are_generated_from_as_each_alone():
    model = gpt2().eval()  # learned positions: it would notice
    prompts = [[5, 6, 7], [8], [9, 10]]
    together = generate(model, prompts, max_new_tokens=4, temperature=0)
    assert together.cached
    for prompt, completion in zip(prompts, together.lists(), strict=True):
        assert generate(model, [prompt], max_new_tokens=4, temperature=0).lists() == [completion]
