"""Keys and values that are kept, for models that say how much they can be told; what goes wrong inside them."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import peftlib
from peftlib import LoRA, PeftlibError
from peftlib.train import completion_logps, generate
from tests.train.rl import Chain
from tests.train.test_generate import fixed
from tests.train.test_online import run_grpo

PROMPTS = [[1, 2, 3, 4, 5, 6], [7], [8, 9]]


class Cached(nn.Module):
    """Learned positions and means over what came before; keeps what it has embedded, and takes no mask."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.position, self.head = nn.Embedding(12, 16), nn.Embedding(64, 16), nn.Linear(16, 12)

    def forward(self, ids, past_key_values=None, use_cache=False):
        return self.run(ids, past_key_values)

    def run(self, ids, past, mask=None, positions=None):
        start = 0 if past is None else past.shape[1]
        here = torch.arange(start, start + ids.shape[1]) if positions is None else positions
        x = self.embed(ids) + self.position(here)
        x = x if past is None else torch.cat((past, x), 1)
        weights = torch.ones(x.shape[:2]) if mask is None else mask
        means = (x * weights[..., None]).cumsum(1) / weights.cumsum(1).clamp(min=1)[..., None]
        return SimpleNamespace(logits=self.head(4 * means[:, -ids.shape[1] :]), past_key_values=x)


class Swallows(Cached):
    def forward(self, ids, past_key_values=None, use_cache=False, **kwargs):
        return self.run(ids, past_key_values)


class Heeds(Cached):
    def forward(self, ids, past_key_values=None, use_cache=False, **kwargs):
        return self.run(ids, past_key_values, kwargs.get("attention_mask"), kwargs.get("position_ids"))


class OwnPositions(Cached):
    """Takes the mask, and counts positions from the padding on."""

    def forward(self, ids, past_key_values=None, use_cache=False, attention_mask=None):
        return self.run(ids, past_key_values, attention_mask)


class LaterPositions(Cached):
    """Right at the prompts, and wrong from the second token on."""

    def forward(self, ids, past_key_values=None, use_cache=False, attention_mask=None):
        first = past_key_values is None and attention_mask is not None
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0) if first else None
        return self.run(ids, past_key_values, attention_mask, positions)


class Named(Cached):
    def forward(self, ids, past_key_values=None, use_cache=False, attention_mask=None, position_ids=None):
        return self.run(ids, past_key_values, attention_mask, position_ids)


@pytest.mark.parametrize(
    "kind, cached",
    [
        (Cached, False), (Swallows, False), (OwnPositions, False), (LaterPositions, False), (Heeds, True),
        (Named, True),
    ],
)  # fmt: skip
def test_prompts_of_several_lengths_are_completed_as_alone(kind, cached):
    model = kind().eval()
    done = generate(model, PROMPTS, max_new_tokens=6, temperature=0)
    assert done.cached == cached
    for prompt, found in zip(PROMPTS, done.lists(), strict=True):
        alone = generate(model, [prompt], max_new_tokens=6, temperature=0)
        assert alone.cached
        assert alone.lists() == [found]
    torch.testing.assert_close(done.logps, completion_logps(model, done)[0], rtol=1e-4, atol=1e-5)
    if cached:
        assert generate(model, PROMPTS, max_new_tokens=1, cache=True).cached
    else:
        with pytest.raises(
            PeftlibError, match=r"padded on the left, and \w+ (takes no attention_mask|gives other)"
        ):
            generate(model, PROMPTS, max_new_tokens=1, cache=True)


@pytest.mark.parametrize("kind", ["bloom", "opt"])
def test_models_that_take_the_mask_alone_keep_their_cache(kind):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "bloom":
        config = transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=2, vocab_size=50)
        model = transformers.BloomForCausalLM(config)
    else:
        config = transformers.OPTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, ffn_dim=32, vocab_size=50,
            max_position_embeddings=64, word_embed_proj_dim=32,
        )  # fmt: skip
        model = transformers.OPTForCausalLM(config)
    done = generate(model, PROMPTS, max_new_tokens=4)
    assert done.cached
    torch.testing.assert_close(done.logps, completion_logps(model.eval(), done)[0], rtol=1e-4, atol=1e-5)


# -- what goes wrong ---------------------------------------------------------------------------------------------------


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.position, self.head = nn.Embedding(8, 8), nn.Embedding(6, 8), nn.Linear(8, 8)

    def forward(self, ids):
        return self.head(self.embed(ids) + self.position(torch.arange(ids.shape[1])))


class TwoArguments(Chain):
    def forward(self, ids, mask):
        return super().forward(ids)


@pytest.mark.parametrize(
    "model, prompts, settings, says",
    [
        (Positions, [[1] * 5], {}, r"Positions fails on ids of shape \(1, 7\).*more positions than it has"),
        (Chain, [[99]], {}, r"Chain fails on ids of shape \(1, 1\), the largest of them 99"),
        (TwoArguments, [[1]], {}, "missing 1 required positional argument: 'mask'"),
        (Chain, ["ab"], {}, "Prompt 0 is 'ab', and not a row of ids"),
        (Chain, [[1], [0.5]], {}, r"Prompt 1 is '\[0.5\]'"),
        (Chain, [3], {}, r"Prompt 0 is '3', and not a row of ids.*batches of them"),
        (Chain, [[1]], {"pad_id": -1}, "pad_id=-1"),
        (Chain, [[1]], {"temperature": None}, "temperature=None"),
        (Chain, [[1]], {"max_new_tokens": None}, "max_new_tokens=None"),
        (Chain, [[1]], {"stop_ids": None}, "stop_ids=None: give a collection of ids"),
    ],
)
def test_what_cannot_be_completed_is_named(model, prompts, settings, says):
    with pytest.raises(PeftlibError, match=says):
        generate(model(), prompts, **{"max_new_tokens": 4, **settings})


@pytest.mark.parametrize("logits", [(math.inf, 1.0), (-math.inf, -math.inf), (math.nan, 1.0)])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_logits_that_are_no_distribution(logits, temperature):
    with pytest.raises(PeftlibError, match="logits for prompt 0 are no distribution"):
        generate(fixed(*logits), [[0]], max_new_tokens=1, temperature=temperature)


def test_some_ids_may_be_impossible():
    assert generate(fixed(-math.inf, 1.0), [[0]], max_new_tokens=3).lists() == [[1, 1, 1]]


@pytest.mark.parametrize("prompts", [[[0], [1]], [0, 1]])
def test_rows_where_batches_of_rows_are_wanted(prompts):
    model = Chain()
    policy = peftlib.attach(model, {"1": LoRA(rank=2)}, name="policy")
    with pytest.raises(PeftlibError, match=r"Batches\(rows, 2\)"):
        run_grpo((model, policy, None), prompts=prompts)


def test_an_encoder_with_a_decoder_is_told_what_it_has_to_take():
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=50)
    with pytest.raises(PeftlibError, match=r"T5ForConditionalGeneration fails on ids of shape .*take ids"):
        generate(transformers.T5ForConditionalGeneration(config), [[1, 2]], max_new_tokens=2)


def test_virtual_tokens_take_positions_too():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_embd=16, n_layer=1, n_head=2, vocab_size=50, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config)
    peftlib.attach(model, peftlib.PromptTuning(length=8), example=torch.ones(1, 4, dtype=torch.long))
    assert generate(model, [[1] * 20], max_new_tokens=5).completions.shape == (1, 5)
    with pytest.raises(PeftlibError, match="those of virtual tokens count too"):
        generate(model, [[1] * 20], max_new_tokens=10)


def test_a_tuple_that_begins_with_the_loss():
    class LossFirst(Chain):
        def forward(self, ids):
            logits = super().forward(ids)
            return logits.mean(), logits

    with pytest.raises(PeftlibError, match=r"logits of shape \(\).*the first of a tuple"):
        generate(LossFirst(), [[1]], max_new_tokens=1)
