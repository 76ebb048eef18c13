"""Prompts on models of transformers and x-transformers, none of which the library knows by name.

Twins get embeddings, masks and positions with the prompt written out, while the prompt itself is disabled.
Shapes: B batch, P prompt, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import peftlib
from peftlib import LoRA, PromptTuning, PTuningV1, attach
from tests.methods.prompts import rows_of
from tests.twin import assert_twins, randomize

transformers = pytest.importorskip("transformers")

B, T, P, V, D = 3, 6, 3, 60, 16
IDS = torch.randint(5, V, (B, T), generator=torch.Generator().manual_seed(11))
LEFT = (torch.arange(T) >= torch.tensor([0, 2, 4])[:, None]).long()
RIGHT = LEFT.flip(1)
SMALL: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": 2 * D,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2: dict[str, Any] = {"vocab_size": V, "n_embd": D, "n_layer": 2, "n_head": 2, "n_positions": 64} | {
    k: v for k, v in SMALL.items() if k.endswith("token_id")
}


def tiny(name: str, config: str, **settings: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = getattr(transformers, name)(getattr(transformers, config)(**settings))
    return made.double().eval()


def gpt2(name: str = "GPT2LMHeadModel", **more: Any) -> Any:
    return tiny(name, "GPT2Config", **GPT2, **more)


def llama(**more: Any) -> Any:
    return tiny("LlamaForCausalLM", "LlamaConfig", **SMALL, num_key_value_heads=1, **more)


def gemma() -> Any:
    """Scales its embeddings after the lookup."""
    return tiny("GemmaForCausalLM", "GemmaConfig", **SMALL, num_key_value_heads=1, head_dim=8)


def bert(name: str, **more: Any) -> Any:
    return tiny(name, "BertConfig", **SMALL, **more)


def t5() -> Any:
    return tiny(
        "T5ForConditionalGeneration",
        "T5Config",
        vocab_size=V,
        d_model=D,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
    )


def bart() -> Any:
    return tiny(
        "BartForConditionalGeneration",
        "BartConfig",
        vocab_size=V,
        d_model=D,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
        init_std=1.0,
    )


def longer(mask: Tensor) -> Tensor:
    return F.pad(mask, (P, 0), value=1)


def embedded(model: Any, rows: Tensor, ids: Tensor = IDS) -> Tensor:
    with tuning_of(model).disabled():
        return torch.cat([rows.expand(len(ids), P, D), model.get_input_embeddings()(ids)], 1)


def tuning_of(model: nn.Module) -> peftlib.Tuning:
    return peftlib.tunings(model)["default"]


CAUSAL: dict[str, Callable[[], Any]] = {"gpt2": gpt2, "llama": llama, "gemma": gemma}


# -- decoders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", CAUSAL)
@pytest.mark.parametrize("mask", [None, LEFT, RIGHT], ids=["no mask", "left", "right"])
def test_a_causal_model(make, mask):
    model = CAUSAL[make]()
    rows = rows_of(attach(model, PromptTuning(length=P), example=IDS))
    labels = IDS.masked_fill((torch.ones_like(IDS) if mask is None else mask) == 0, -100)
    call: dict[str, Any] = {"labels": labels}
    long: dict[str, Any] = {"labels": F.pad(labels, (P, 0), value=-100)}
    if mask is not None:
        # As transformers' generation counts positions where there is padding.
        where = (mask.cumsum(-1) - 1).clamp(0)
        call |= {"attention_mask": mask, "position_ids": where}
        before = torch.arange(P).expand(B, P)
        long |= {"attention_mask": longer(mask), "position_ids": torch.cat([before, where + P], 1)}

    def twin() -> Any:
        embeds = embedded(model, rows)
        with tuning_of(model).disabled():
            return model(inputs_embeds=embeds, **long)

    assert_twins(lambda: model(IDS, **call).logits, lambda: twin().logits[:, P:], {"rows": rows})
    assert_twins(lambda: model(IDS, **call).loss, lambda: twin().loss, {"rows": rows})


@pytest.mark.parametrize("make", CAUSAL)
def test_generation_with_a_cache_is_that_without(make):
    model = CAUSAL[make]()
    rows_of(attach(model, PromptTuning(length=P), example=IDS), 2.0)
    made = model.generate(IDS, attention_mask=LEFT, max_new_tokens=5, do_sample=False, eos_token_id=None)
    ids, mask = IDS, LEFT
    with torch.no_grad():
        for _ in range(5):
            where = (mask.cumsum(-1) - 1).clamp(0)
            logits = model(ids, attention_mask=mask, position_ids=where, use_cache=False).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
            mask = F.pad(mask, (0, 1), value=1)
    assert torch.equal(made, ids)
    # Each sequence alone, without padding, gives the same continuation.
    for i in range(B):
        alone = model.generate(
            IDS[i : i + 1, LEFT[i].bool()], max_new_tokens=5, do_sample=False, eos_token_id=None
        )
        assert torch.equal(alone[0, -5:], made[i, -5:])


@pytest.mark.parametrize("search", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_beam_search_with_a_cache_is_that_without(search):
    model = llama()
    rows_of(attach(model, PromptTuning(length=P), example=IDS), 2.0)
    search |= {"attention_mask": LEFT, "max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    cached = model.generate(IDS, **search)
    assert torch.equal(cached, model.generate(IDS, use_cache=False, **search))
    with tuning_of(model).disabled():
        assert not torch.equal(cached, model.generate(IDS, **search))


def test_generation_from_embeddings():
    model = llama()
    tuning = attach(model, PromptTuning(length=P), example=IDS)
    rows_of(tuning, 2.0)
    with tuning.disabled():
        embeds = model.get_input_embeddings()(IDS)
    options = {"attention_mask": LEFT, "max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(inputs_embeds=embeds, **options), model.generate(IDS, **options)[:, T:])


@pytest.mark.parametrize("kind", ["DynamicCache", "StaticCache"])
def test_a_cache_object_is_filled_step_by_step(kind):
    model = llama()
    rows_of(attach(model, PromptTuning(length=P), example=IDS))
    expected = model(IDS).logits
    room = {} if kind == "DynamicCache" else {"max_cache_len": P + T}
    cache = getattr(transformers, kind)(config=model.config, **room)
    with torch.no_grad():
        steps = [model(IDS[:, :2], past_key_values=cache).logits]
        steps += [model(IDS[:, i : i + 1], past_key_values=cache).logits for i in range(2, T)]
    assert int(cache.get_seq_length()) == P + T
    torch.testing.assert_close(torch.cat(steps, 1), expected)


def test_outputs_asked_for_later_come_without_the_prompt():
    model = gpt2(attn_implementation="eager")
    rows = rows_of(attach(model, PromptTuning(length=P), example=IDS))
    asked = {"output_hidden_states": True, "output_attentions": True}
    found = model(IDS, **asked)
    embeds = embedded(model, rows)
    with tuning_of(model).disabled():
        expected = model(inputs_embeds=embeds, **asked)
    assert len(found.hidden_states) == 3
    assert len(found.attentions) == 2
    for a, b in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(a, b[:, P:])
    for a, b in zip(found.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(a, b[..., P:, P:])
    assert int(found.past_key_values.get_seq_length()) == P + T
    plain = model(IDS, return_dict=False)
    torch.testing.assert_close(plain[0], found.logits)


def test_a_classifier_that_looks_for_the_last_token():
    model = gpt2("GPT2ForSequenceClassification", num_labels=T + P)
    rows = rows_of(attach(model, PromptTuning(length=P), example={"input_ids": IDS, "attention_mask": RIGHT}))
    ids = IDS.masked_fill(RIGHT == 0, 0)
    labels = torch.tensor([1, 0, 4])

    def twin() -> Tensor:
        embeds, last = embedded(model, rows, ids), P + RIGHT.sum(1) - 1
        with tuning_of(model).disabled():
            hidden = model.transformer(inputs_embeds=embeds, attention_mask=longer(RIGHT)).last_hidden_state
            return model.score(hidden)[range(B), last]

    found = model(ids, attention_mask=RIGHT, labels=labels)
    assert_twins(lambda: model(ids, attention_mask=RIGHT).logits, twin, {"rows": rows})
    torch.testing.assert_close(found.loss, F.cross_entropy(twin(), labels))


def test_prompts_compile_on_a_real_decoder():
    model = llama()
    leaves = randomize(attach(model, PromptTuning(length=P), example=IDS))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)

    def run(model: Any) -> Tensor:
        return model(IDS, attention_mask=LEFT, use_cache=False).logits * LEFT[..., None]

    assert_twins(lambda: run(compiled), lambda: run(model), leaves)


# -- encoders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "task", ["BertForMaskedLM", "BertForSequenceClassification", "BertForTokenClassification"]
)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_bert(task, implementation):
    more = {"num_labels": 4} if "Classification" in task else {}
    model = bert(task, attn_implementation=implementation, **more)
    types = torch.randint(0, 2, (B, T))
    labels = torch.tensor([1, 0, 3]) if "Sequence" in task else IDS % 4
    rows = rows_of(attach(model, PromptTuning(length=P), example=IDS))
    call = {"attention_mask": RIGHT, "token_type_ids": types}
    asks = 1 if "Sequence" in task else RIGHT[..., None]

    def twin(**labelled: Any) -> Any:
        embeds = embedded(model, rows)
        with tuning_of(model).disabled():
            return model(
                inputs_embeds=embeds,
                attention_mask=longer(RIGHT),
                token_type_ids=F.pad(types, (P, 0)),
                **labelled,
            )

    def theirs() -> Tensor:
        logits = twin().logits
        return logits * asks if "Sequence" in task else logits[:, P:] * asks

    assert_twins(lambda: model(IDS, **call).logits * asks, theirs, {"rows": rows})
    long_labels = labels if "Sequence" in task else F.pad(labels, (P, 0), value=-100)
    torch.testing.assert_close(model(IDS, labels=labels, **call).loss, twin(labels=long_labels).loss)


def test_multiple_choice_has_ids_of_three_axes():
    model = bert("BertForMultipleChoice")
    ids, mask = IDS.view(1, B, T).repeat(2, 1, 1), RIGHT.view(1, B, T).repeat(2, 1, 1)
    rows = rows_of(attach(model, PromptTuning(length=P), example={"input_ids": ids, "attention_mask": mask}))
    embeds = embedded(model, rows, ids.view(-1, T)).view(2, B, P + T, D)
    with tuning_of(model).disabled():
        expected = model(inputs_embeds=embeds, attention_mask=longer(mask)).logits
    torch.testing.assert_close(model(ids, attention_mask=mask).logits, expected)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_encoder_of_bert_as_a_module_of_hidden_states(implementation):
    model = bert("BertModel", attn_implementation=implementation)
    tuning = attach(model, {"encoder": PromptTuning(length=P)}, example=IDS)
    rows = rows_of(tuning)

    def twin() -> Tensor:
        with tuning.disabled():
            x = model.embeddings(IDS)
            visible = longer(RIGHT)[:, None, None].expand(B, 1, P + T, P + T)
            mask = torch.zeros(visible.shape, dtype=x.dtype).masked_fill(
                visible == 0, torch.finfo(x.dtype).min
            )
            h = model.encoder(torch.cat([rows.expand(B, P, D), x], 1), attention_mask=mask).last_hidden_state[
                :, P:
            ]
            return torch.cat([(h * RIGHT[..., None]).flatten(1), model.pooler(h)], 1)

    def ours() -> Tensor:
        out = model(IDS, attention_mask=RIGHT)
        return torch.cat([(out.last_hidden_state * RIGHT[..., None]).flatten(1), out.pooler_output], 1)

    assert_twins(ours, twin, {"rows": rows})
    # The first token is the user's own, not the prompt's.
    assert model(IDS, attention_mask=RIGHT).last_hidden_state.shape == (B, T, D)


def test_positions_counted_from_the_ids():
    # RoBERTa counts the ids that are no padding: the prompt's placeholders must count.
    model = (
        tiny("RobertaModel", "RobertaConfig", **SMALL | {"pad_token_id": 1}, add_pooling_layer=False)
        if 0
        else None
    )
    model = tiny("RobertaForMaskedLM", "RobertaConfig", **SMALL | {"pad_token_id": 1, "bos_token_id": 0})
    rows = rows_of(attach(model, PromptTuning(length=P), example=IDS))
    embeds = embedded(model, rows)
    with tuning_of(model).disabled():
        expected = model(inputs_embeds=embeds, position_ids=torch.arange(2, 2 + P + T)[None]).logits[:, P:]
    torch.testing.assert_close(model(IDS).logits, expected)


# -- encoder-decoders --------------------------------------------------------------------------------------------------

PAIRED: dict[str, Callable[[], Any]] = {"t5": t5, "bart": bart}


@pytest.mark.parametrize("make", PAIRED)
@pytest.mark.parametrize("tokens", [4, T, P + T], ids=lambda n: f"decoder of {n}")
def test_an_encoder_decoder(make, tokens):
    model = PAIRED[make]()
    labels = torch.randint(5, V, (B, tokens))
    rows = rows_of(attach(model, PromptTuning(length=P), example={"input_ids": IDS, "labels": labels}))

    def twin() -> Any:
        embeds = embedded(model, rows)
        with tuning_of(model).disabled():
            return model(inputs_embeds=embeds, attention_mask=longer(RIGHT), labels=labels)

    def ours() -> Any:
        return model(input_ids=IDS, attention_mask=RIGHT, labels=labels)

    assert_twins(lambda: ours().logits, lambda: twin().logits, {"rows": rows})
    torch.testing.assert_close(ours().loss, twin().loss)
    asked = {
        "output_hidden_states": True,
        "output_attentions": True,
        "attention_mask": RIGHT,
        "labels": labels,
    }
    model.set_attn_implementation("eager")
    found = model(input_ids=IDS, **asked)
    assert found.encoder_last_hidden_state.shape == (B, T, D)
    assert found.encoder_hidden_states[0].shape == (B, T, D)
    assert found.encoder_attentions[0].shape == (B, 2, T, T)
    assert found.decoder_hidden_states[0].shape == (B, tokens, D)
    assert found.decoder_attentions[0].shape == (B, 2, tokens, tokens)
    assert found.cross_attentions[0].shape == (B, 2, tokens, T)
    assert found.logits.shape == (B, tokens, V)


@pytest.mark.parametrize("make", PAIRED)
@pytest.mark.parametrize("method", [PromptTuning(length=P), PTuningV1(length=P, encoder="mlp")], ids=str)
@pytest.mark.parametrize("loaded", [False, True], ids=["attached", "loaded"])
def test_generation_runs_the_encoder_once_and_with_the_prompt(make, method, loaded, tmp_path):
    model = PAIRED[make]()
    tuning = attach(model, method, example={"input_ids": IDS, "decoder_input_ids": IDS[:, :2]})
    randomize(tuning, 2.0)
    if loaded:
        tuning.save(tmp_path / "prompt.safetensors")
        tuning.detach()
        tuning = peftlib.load(model, tmp_path / "prompt.safetensors")
    encoded: list[tuple[int, ...]] = []
    model.get_encoder().register_forward_hook(
        lambda m, a, out: encoded.append(tuple(out.last_hidden_state.shape))
    )
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    made = model.generate(IDS, attention_mask=RIGHT, **options)
    assert encoded == [(B, P + T, D)]
    start = torch.full((B, 1), model.config.decoder_start_token_id)
    with torch.no_grad():
        ids = start
        for _ in range(5):
            out = model(input_ids=IDS, attention_mask=RIGHT, decoder_input_ids=ids, use_cache=False)
            ids = torch.cat([ids, out.logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(made, ids)
    beams = {"attention_mask": RIGHT, "num_beams": 3, **options}
    assert torch.equal(model.generate(IDS, **beams), model.generate(IDS, use_cache=False, **beams))
    with tuning.disabled():
        assert not torch.equal(model.generate(IDS, attention_mask=RIGHT, **options), made)
    # Without a mask there is nothing to lengthen.
    assert model.generate(IDS, **options).shape == (B, 6)


@pytest.mark.parametrize("make", PAIRED)
def test_encoder_outputs_computed_beforehand(make):
    model = PAIRED[make]()
    rows_of(
        attach(model, PromptTuning(length=P), example={"input_ids": IDS, "decoder_input_ids": IDS[:, :2]})
    )
    expected = model(input_ids=IDS, attention_mask=RIGHT, decoder_input_ids=IDS[:, :4]).logits
    for keyword in (True, False):
        encoder = model.get_encoder()
        encoded = encoder(input_ids=IDS, attention_mask=RIGHT) if keyword else encoder(IDS, RIGHT)
        out = model(encoder_outputs=encoded, attention_mask=RIGHT, decoder_input_ids=IDS[:, :4])
        torch.testing.assert_close(out.logits, expected)


@pytest.mark.parametrize("make", PAIRED)
def test_two_prompts_on_an_encoder_decoder(make):
    model = PAIRED[make]()
    example = {"input_ids": IDS, "decoder_input_ids": IDS[:, :2]}
    one = attach(model, PromptTuning(length=2), example=example, name="one")
    two = attach(model, PromptTuning(length=1), example=example, name="two")
    rows = torch.cat([rows_of(one, 2.0), rows_of(two, 2.0)]).detach()
    with peftlib.use(model):
        embeds = torch.cat([rows.expand(B, 3, D), model.get_input_embeddings()(IDS)], 1)
        expected = model(
            inputs_embeds=embeds, attention_mask=longer(RIGHT), decoder_input_ids=IDS[:, :4]
        ).logits
    torch.testing.assert_close(
        model(input_ids=IDS, attention_mask=RIGHT, decoder_input_ids=IDS[:, :4]).logits, expected
    )
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    made = model.generate(IDS, attention_mask=RIGHT, **options)
    ids = made[:, :1]
    with torch.no_grad():
        for _ in range(4):
            out = model(input_ids=IDS, attention_mask=RIGHT, decoder_input_ids=ids)
            ids = torch.cat([ids, out.logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(made, ids)


def test_the_encoder_alone_with_a_prompt_of_its_own():
    model = t5()
    tuning = attach(model, {"encoder": PromptTuning(length=P)}, example={"input_ids": IDS, "labels": IDS})
    rows_of(tuning, 2.0)
    out = model.encoder(IDS, attention_mask=RIGHT).last_hidden_state
    assert out.shape == (B, T, D)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    made = model.generate(IDS, attention_mask=RIGHT, **options)
    ids = made[:, :1]
    with torch.no_grad():
        for _ in range(4):
            logits = model(input_ids=IDS, attention_mask=RIGHT, decoder_input_ids=ids).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(made, ids)


# -- others ------------------------------------------------------------------------------------------------------------


def test_a_model_of_images_is_refused_in_words():
    sizes = {
        "hidden_size": D,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
    vit = tiny("ViTModel", "ViTConfig", **sizes)
    image = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    with pytest.raises(
        peftlib.PeftlibError, match="ViTModel shows no sequence that a prompt could go before"
    ):
        attach(vit, PromptTuning(length=P), example=image)
    # Its blocks stand in a list, so there is no module that takes the first's input and gives the last's output.
    with pytest.raises(peftlib.PeftlibError, match="it has no forward"):
        attach(vit, {"layers": PromptTuning(length=P)}, example=image)
    rows = rows_of(attach(vit, {"layers.0": PromptTuning(length=P)}, example=image))
    vit(image).last_hidden_state[:, 1:].square().sum().backward()
    assert rows.grad is not None
    assert rows.grad.abs().sum() > 0


def test_where_the_encoder_has_no_ids_the_decoder_gets_the_prompt():
    model = tiny(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        vocab_size=V,
        d_model=D,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        num_mel_bins=8,
        max_source_positions=10,
        max_target_positions=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    sound = torch.randn(B, 8, 20, dtype=torch.float64)
    example = {"input_features": sound, "decoder_input_ids": IDS}
    rows = rows_of(attach(model, PromptTuning(length=P), example=example))
    labels = IDS.masked_fill(RIGHT == 0, -100)

    def twin() -> Any:
        with tuning_of(model).disabled():
            embeds = torch.cat([rows.expand(B, P, D), model.get_input_embeddings()(IDS)], 1)
            return model(
                input_features=sound, decoder_inputs_embeds=embeds, labels=F.pad(labels, (P, 0), value=-100)
            )

    assert_twins(lambda: model(**example, labels=labels).logits, lambda: twin().logits[:, P:], {"rows": rows})
    torch.testing.assert_close(model(**example, labels=labels).loss, twin().loss)


def test_templates_on_a_real_model():
    model = llama()
    hole = V + 1
    tuning = attach(model, PTuningV1(length=2, placeholder_id=hole, encoder="none"))
    assert list(tuning.sites) == ["model.embed_tokens"]
    rows = rows_of(tuning, 2.0)
    ids = torch.cat(
        [IDS[:, :2], torch.full((B, 1), hole), IDS[:, 2:3], torch.full((B, 1), hole), IDS[:, 3:]], 1
    )
    mask = F.pad(LEFT, (2, 0), value=1)
    with tuning.disabled():
        embeds = model.get_input_embeddings()(ids.masked_fill(ids == hole, 0)).clone()
    embeds[:, [2, 4]] = rows.detach()
    options: dict[str, Any] = {
        "attention_mask": mask,
        "max_new_tokens": 4,
        "do_sample": False,
        "eos_token_id": None,
    }
    made = model.generate(ids, **options)[:, ids.shape[1] :]
    assert torch.equal(made, model.generate(inputs_embeds=embeds, **options))
    assert torch.equal(made, model.generate(ids, use_cache=False, **options)[:, ids.shape[1] :])


def test_beside_lora_on_a_real_model():
    model = llama()
    tuning = attach(
        model, {"": PromptTuning(length=P), "q_proj": LoRA(rank=2), "v_proj": LoRA(rank=2)}, example=IDS
    )
    leaves = randomize(tuning, 0.5)
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in leaves.values())


@pytest.mark.parametrize("length, published", [(5, 20_480), (20, 81_920), (100, 409_600)])
def test_published_sizes_on_t5_xxl(length, published):
    """Lester et al. 2021: P x 4096 parameters on the XXL model (here with two of its layers)."""
    with torch.device("meta"):
        config = transformers.T5Config(
            vocab_size=32128,
            d_model=4096,
            d_kv=64,
            d_ff=10240,
            num_heads=64,
            num_layers=2,
            decoder_start_token_id=0,
        )
        model = transformers.T5ForConditionalGeneration(config)
    tuning = attach(model, PromptTuning(length=length), example={"input_ids": IDS, "labels": IDS})
    assert tuning.num_parameters == published


class TestXTransformers:
    """Attention of another make: rotary, ALiBi and absolute positions, flash or not, its own masks and wrappers."""

    @pytest.fixture(autouse=True)
    def library(self) -> Any:
        return pytest.importorskip("x_transformers")

    def make(self, library: Any, **layers: Any) -> Any:
        return library.TransformerWrapper(
            num_tokens=V,
            max_seq_len=32,
            use_abs_pos_emb=not layers,
            attn_layers=library.Decoder(dim=D, depth=2, heads=2, attn_dim_head=8, **layers),
        ).eval()

    @pytest.mark.parametrize(
        "layers",
        [{"rotary_pos_emb": True}, {"alibi_pos_bias": True}, {"attn_flash": True, "rotary_pos_emb": True}],
        ids=str,
    )
    def test_prompts_are_its_own_prepended_embeddings(self, library, layers):
        model = self.make(library, **layers)
        rows = rows_of(attach(model, PromptTuning(length=P), example=IDS))

        def twin() -> Tensor:
            with tuning_of(model).disabled():
                return model(IDS, prepend_embeds=rows.expand(B, P, D))[:, P:]

        assert_twins(lambda: model(IDS), twin, {"rows": rows}, rtol=1e-3, atol=1e-4)

    def test_absolute_positions_and_masks(self, library):
        model = self.make(library)
        rows_of(attach(model, PromptTuning(length=P), example=IDS))
        whole = model(IDS, mask=RIGHT.bool())
        for i in range(B):
            n = int(RIGHT[i].sum())
            torch.testing.assert_close(whole[i, :n], model(IDS[i : i + 1, :n])[0], rtol=1e-4, atol=1e-5)

    def test_its_training_wrapper(self, library):
        model = library.AutoregressiveWrapper(self.make(library, rotary_pos_emb=True))
        tuning = attach(model.net, PromptTuning(length=P), example=IDS)
        loss = model(IDS)
        with torch.no_grad():
            logits = model.net(IDS[:, :-1])
        torch.testing.assert_close(loss.detach(), F.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten()))
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in tuning.parameters())

    def test_its_generation_without_a_cache(self, library):
        model = library.AutoregressiveWrapper(self.make(library, rotary_pos_emb=True))
        rows_of(attach(model.net, PromptTuning(length=P), example=IDS), 2.0)
        made = model.generate(IDS, 4, temperature=0.0, cache_kv=False)
        ids = IDS
        with torch.no_grad():
            for _ in range(4):
                ids = torch.cat([ids, model.net(ids)[:, -1:].argmax(-1)], 1)
        assert torch.equal(made, ids[:, T:])

    def test_its_generation_with_a_cache_beside_the_whole_text(self, library):
        model = library.AutoregressiveWrapper(self.make(library, rotary_pos_emb=True))
        # It hands over all ids in each step, and the cache; so the prompt goes in front every time.
        whole = PromptTuning(length=P, sequence_args={"cache": "skip"})
        rows_of(attach(model.net, whole, example=IDS), 2.0)
        made = model.generate(IDS, 4, temperature=0.0, cache_kv=True)
        assert torch.equal(made, model.generate(IDS, 4, temperature=0.0, cache_kv=False))
