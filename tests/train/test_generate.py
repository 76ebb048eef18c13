"""Generation: with and without a cache, prompts of any length, what is drawn and its log-probability."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import peftlib
from peftlib import LoRA, PeftlibError, PrefixTuning, PromptTuning
from peftlib.train import completion_logps, generate
from tests.train.rl import Chain, V

transformers = pytest.importorskip("transformers")
PROMPTS = [[1, 2, 3, 4, 5], [7], [9, 9, 3]]


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=50,
        max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize(
    "method", [None, LoRA(rank=2), PromptTuning(length=3), PrefixTuning(length=3)], ids=str
)
def test_a_cache_changes_nothing(make, method):
    """Left padding with a cache, right padding without: the same ids, alone or in company, whatever is attached."""
    model = make()
    if method is not None:
        for p in peftlib.attach(model, method, example=torch.ones(1, 4, dtype=torch.long)).parameters():
            nn.init.normal_(p, std=0.3)
    drawn = {}
    for cache in (None, False):
        torch.manual_seed(1)
        drawn[cache] = generate(model, PROMPTS, max_new_tokens=6, top_k=10, top_p=0.9, cache=cache)
    assert (drawn[None].cached, drawn[False].cached) == (True, False)
    assert torch.equal(drawn[None].ids, drawn[False].ids)
    torch.testing.assert_close(drawn[None].logps, drawn[False].logps, rtol=1e-4, atol=1e-5)
    together = generate(model, PROMPTS, max_new_tokens=6, temperature=0)
    for i, prompt in enumerate(PROMPTS):
        assert generate(model, [prompt], max_new_tokens=6, temperature=0).lists()[0] == together.lists()[i]
    again, entropy = completion_logps(model.eval(), together)
    torch.testing.assert_close(again, together.logps, rtol=1e-4, atol=1e-5)
    assert (entropy[together.mask] > 0).all()


def test_greedy_is_what_transformers_generates():
    model = llama().eval()
    theirs = model.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert generate(model, PROMPTS[:1], max_new_tokens=8, temperature=0).ids.tolist() == theirs.tolist()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_what_is_drawn_is_distributed_as_it_says(temperature):
    model, n = Chain(), 20_000
    with torch.no_grad():
        logps = (model(torch.tensor([[0]]))[0, 0] / temperature).log_softmax(-1)
    torch.manual_seed(0)
    done = generate(model, [[0]] * n, max_new_tokens=1, temperature=temperature)
    shares = torch.bincount(done.completions[:, 0], minlength=V) / n
    assert (shares - logps.exp()).abs().max() < 4 * math.sqrt(0.25 / n)
    torch.testing.assert_close(done.logps[:, 0], logps[done.completions[:, 0]])
    assert completion_logps(model, done, temperature)[1].mean().item() == pytest.approx(
        -(logps.exp() * logps).sum().item(), rel=1e-5
    )


def fixed(*logits):
    class Fixed(nn.Module):
        def forward(self, ids):
            return torch.tensor(logits).expand(*ids.shape, -1)

    return Fixed()


def seen(model, **settings):
    torch.manual_seed(0)
    return set(generate(model, [[0]] * 500, max_new_tokens=1, **settings).completions[:, 0].tolist())


def test_top_k_and_top_p_narrow_what_can_come():
    model = fixed(*torch.tensor([0.5, 0.3, 0.15, 0.05]).log().tolist())
    assert seen(model) == {0, 1, 2, 3}
    assert seen(model, top_k=2) == {0, 1}
    assert seen(model, top_k=9) == {0, 1, 2, 3}
    assert seen(model, top_p=0.4) == {0}  # the likeliest always stays
    assert seen(model, top_p=0.7) == {0, 1}
    assert seen(model, top_p=0.81) == {0, 1, 2}
    assert seen(model, top_k=3, top_p=0.99) == {0, 1, 2}
    # narrowing does not change what is said of an id
    done = generate(model, [[0]], max_new_tokens=1, top_k=1)
    assert done.logps.item() == pytest.approx(math.log(0.5))


def test_rows_stop_one_by_one():
    class Count(nn.Module):
        def forward(self, ids):
            return 9.0 * nn.functional.one_hot((ids + 1) % 10, 10)

    done = generate(Count(), [[1], [6, 7], [8]], max_new_tokens=4, temperature=0, stop_ids=[0], pad_id=5)
    assert done.lists() == [[2, 3, 4, 5], [8, 9, 0], [9, 0]]
    assert done.completions.tolist() == [[2, 3, 4, 5], [8, 9, 0, 5], [9, 0, 5, 5]]
    assert done.mask.sum(1).tolist() == [4, 3, 2]
    assert done.stopped.tolist() == [False, True, True]
    assert done.ids.tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 0], [8, 9, 0, 5, 5]]
    assert not done.logps[~done.mask].any()
    early = generate(Count(), [[8]], max_new_tokens=100, temperature=0, stop_ids=[0])
    assert early.completions.shape == (1, 2)  # it does not run on when all have stopped


def test_rows_that_have_ended_are_run_or_not_and_what_is_drawn_is_the_same():
    class Counted(Chain):
        def forward(self, ids):
            self.rows = [*getattr(self, "rows", []), len(ids)]
            return super().forward(ids)

    found = {}
    for drop in (False, True):
        model = Counted()
        torch.manual_seed(3)
        found[drop] = generate(
            model, [[1], [2, 3], [0]] * 9, max_new_tokens=12, stop_ids=[2], drop_ended=drop
        )
        if drop:
            alive = found[drop].mask.sum(0).tolist()
            assert model.rows == alive
            assert alive[-1] < 27
        else:
            assert set(model.rows) == {27}
    for name in ("ids", "logps", "mask", "stopped"):
        assert torch.equal(getattr(found[False], name), getattr(found[True], name))


def test_each_row_may_have_its_own_tuning():
    model = Chain()
    for name in ("a", "b"):
        for p in peftlib.attach(model, LoRA(rank=2), targets=["1"], name=name).parameters():
            nn.init.normal_(p, std=2)
    drawn = {}
    for names in (["a", "b"], ["a"], ["b"]):
        with peftlib.route(model, names):
            done = generate(model, [[0]] * len(names), max_new_tokens=4, temperature=0, stop_ids=[2])
            drawn["".join(names)] = done.lists()
    assert drawn["ab"] == [*drawn["a"], *drawn["b"]]
    assert drawn["a"] != drawn["b"]


def test_dropout_is_off_and_modes_come_back():
    model = nn.Sequential(nn.Embedding(5, 8), nn.Dropout(0.5), nn.Linear(8, 5))
    model[1].train()
    model[0].eval()
    runs = [generate(model, [[1, 2]], max_new_tokens=8, temperature=0).lists() for _ in range(3)]
    assert runs[0] == runs[1] == runs[2]
    assert model[1].training
    assert not model[0].training


def test_a_generator_of_ones_own():
    state = torch.get_rng_state()
    a, b = (
        generate(Chain(), [[0]] * 9, max_new_tokens=5, generator=torch.Generator().manual_seed(3)).lists()
        for _ in range(2)
    )
    assert a == b
    torch.set_rng_state(state)


@pytest.mark.parametrize(
    "prompts, settings, says",
    [
        ([], {}, "there are no prompts"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0"),
        ([[1]], {"temperature": -1.0}, "temperature=-1.0"),
        ([[1]], {"temperature": math.nan}, "temperature=nan"),
        ([[1]], {"top_k": 0}, "top_k=0"),
        ([[1]], {"top_p": 0.0}, "top_p=0.0"),
        ([[1], [1, 2, 3]], {"context": 4}, "Prompt 1 has 3 ids.*max_new_tokens=2.*4 positions"),
        ([[1]], {"cache": True}, "takes no past_key_values"),
    ],
)
def test_what_is_refused(prompts, settings, says):
    with pytest.raises(PeftlibError, match=says):
        generate(Chain(), prompts, **{"max_new_tokens": 2, **settings})


def test_a_prompt_longer_than_the_models_context_is_named():
    with pytest.raises(PeftlibError, match=r"Prompt 0 has 60 ids.*64 positions"):
        generate(llama(), [[1] * 60], max_new_tokens=5)


def test_logits_of_another_shape_or_without_a_number_are_refused():
    with pytest.raises(PeftlibError, match=r"logits of shape \(1, 4\) for ids of \(1, 2\)"):
        generate(nn.Sequential(Chain(), _Mean()), [[1, 2]], max_new_tokens=1)
    with pytest.raises(PeftlibError, match="prompt 0 are no distribution"):
        generate(fixed(math.nan, 1.0), [[0]], max_new_tokens=1)


class _Mean(nn.Module):
    def forward(self, x):
        return x.mean(1)
