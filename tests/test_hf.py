"""Directories of HF peft, both ways: what one computes after saving, the other computes after loading."""

from __future__ import annotations

import copy
import json

import pytest
import safetensors.torch
import torch
from torch import nn

import peftlib
import peftlib.hf
from peftlib import BitFit, FullFineTuning, LoRA, NewHead, PeftlibError, TokenRows
from peftlib.hf import PositionOffset

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

# What peft and transformers say of models without a folder, of layouts and of their own older names.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("UserWarning", "FutureWarning")]

P = 3
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])


def cases(table, slow):
    """The names of a table's rows, some of them only for a slow run."""
    return [pytest.param(name, marks=[pytest.mark.slow] if name in slow else []) for name in table]


def small(**more):
    return {
        "vocab_size": 40,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "initializer_range": 0.3,
        **more,
    }


def gpt2(cls="GPT2LMHeadModel", **more):
    config = transformers.GPT2Config(
        n_embd=16, n_head=2, n_layer=2, n_positions=32, num_labels=3, **small(**more)
    )
    return getattr(transformers, cls)(config)


def llama(cls="LlamaForCausalLM", **more):
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        num_labels=3,
        **small(**more),
    )
    return getattr(transformers, cls)(config)


def bert(cls="BertForSequenceClassification", **more):
    config = transformers.BertConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        num_labels=3,
        **small(**more),
    )
    return getattr(transformers, cls)(config)


def roberta(**more):
    config = transformers.RobertaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=40,
        num_labels=3,
        **small(**more),
    )
    return transformers.RobertaForSequenceClassification(config)


def bart():
    config = transformers.BartConfig(
        d_model=16,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        max_position_embeddings=32,
        vocab_size=40,
        init_std=0.3,
    )
    return transformers.BartForConditionalGeneration(config)


def t5(**more):
    config = transformers.T5Config(
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        vocab_size=40,
        eos_token_id=2,
        pad_token_id=0,
        **more,
    )
    return transformers.T5ForConditionalGeneration(config)


def vit():
    config = transformers.ViTConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        num_labels=3,
        initializer_range=0.3,
    )
    return transformers.ViTForImageClassification(config)


def inputs(model):
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 8, 8, dtype=next(model.parameters()).dtype)}
    call = {"input_ids": IDS, "attention_mask": MASK}
    if model.config.is_encoder_decoder:
        call["decoder_input_ids"] = IDS[:, :4] + 3
    return call


def tensor(output):
    if hasattr(output, "logits"):
        return output.logits
    pooled = getattr(output, "pooler_output", None)
    hidden = output.last_hidden_state
    return hidden if pooled is None else hidden + pooled.unsqueeze(1)


def randomize(parameters, spread=0.3):
    """Every adapter weight far from its start, so that a missing one shows."""
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn_like(parameter) * spread)


def theirs(base, config):
    """HF's model on a copy of the base, with random adapter weights."""
    model = peft.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False)
    randomize(p for p in model.parameters() if p.requires_grad)
    return model.to(next(base.parameters()).dtype).eval()


def same(ours, other, call, base, skip=0, **close):
    """Equal outputs, and different from the base's."""
    with torch.no_grad():
        got, wanted, plain = tensor(ours(**call)), tensor(other(**call)), tensor(base(**call))
    wanted = wanted[:, skip:] if skip and wanted.dim() == 3 else wanted
    if "attention_mask" in call and got.dim() == 3 and "decoder_input_ids" not in call:
        # what stands at padding is nobody's
        seen = call["attention_mask"].bool()
        got, wanted, plain = got[seen], wanted[seen], plain[seen]
    torch.testing.assert_close(got, wanted, **close)
    assert not torch.allclose(got, plain, atol=1e-3)


def bounds(config):
    """HF loads prompts and prefixes in float32 whatever the base has, which is their rounding."""
    return {"rtol": 1e-4, "atol": 1e-5} if config.is_prompt_learning else {}


def check_in(base, config, tmp_path, call=None, skip=0):
    """HF saves, this library loads; then it saves, and HF loads."""
    other = theirs(base, config)
    other.save_pretrained(tmp_path / "theirs")
    call = inputs(base) if call is None else call
    ours = copy.deepcopy(base).eval()
    tuning = peftlib.hf.load(ours, tmp_path / "theirs")
    same(ours, other, call, base, skip)
    peftlib.hf.save(tuning, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    same(ours, back, call, base, skip, **bounds(config))
    tuning.save(tmp_path / "own.safetensors")
    third = copy.deepcopy(base).eval()
    peftlib.load(third, tmp_path / "own.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(tensor(third(**call)), tensor(ours(**call)))
    tuning.detach()
    with torch.no_grad():
        assert torch.equal(tensor(ours(**call)), tensor(base(**call)))
    return tuning


def check_out(base, method, tmp_path, call=None, targets=None, skip=0, example=None):
    """This library trains and saves, HF loads; then this library loads."""
    ours = copy.deepcopy(base).eval()
    tuning = peftlib.attach(ours, method, targets=targets, example=example)
    randomize(tuning.parameters())
    peftlib.hf.save(tuning, tmp_path / "ours")
    call = inputs(base) if call is None else call
    other = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    same(ours, other, call, base, skip, rtol=1e-4, atol=1e-5)
    again = copy.deepcopy(base).eval()
    peftlib.hf.load(again, tmp_path / "ours")
    with torch.no_grad():
        torch.testing.assert_close(tensor(again(**call)), tensor(ours(**call)))
    return json.loads((tmp_path / "ours" / "adapter_config.json").read_text())


LORA = {
    "gpt2": (
        gpt2,
        {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"},
    ),
    "gpt2-all-linear": (gpt2, {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
    "gpt2-wte": (gpt2, {"target_modules": ["wte", "c_fc"], "task_type": "CAUSAL_LM"}),
    "llama-patterns": (
        llama,
        {
            "target_modules": ["q_proj", "k_proj", "down_proj"],
            "rank_pattern": {r"layers\.0\.self_attn\.[qk]_proj": 3, "^model.layers.1.mlp.down_proj": 5},
            "alpha_pattern": {r".*\.1\..*q_proj": 7, "k_proj": 11},
            "task_type": "CAUSAL_LM",
        },
    ),
    "llama-regex": (llama, {"target_modules": r".*\.layers\.\d\.self_attn\.(q|v)_proj", "use_rslora": True}),
    "llama-layers": (
        llama,
        {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    ),
    "llama-exclude": (llama, {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.0\..*v_proj"}),
    "llama-dora": (llama, {"target_modules": ["q_proj", "up_proj"], "use_dora": True}),
    "llama-embedding": (llama, {"target_modules": ["embed_tokens", "lm_head"], "task_type": "CAUSAL_LM"}),
    "llama-tokens": (llama, {"target_modules": ["q_proj"], "trainable_token_indices": [9, 5, 13]}),
    "llama-tokens-tied": (
        lambda: llama(tie_word_embeddings=True),
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [9, 5, 13]}},
    ),
    "llama-head-saved": (
        llama,
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    ),
    "llama-head-saved-tied": (
        lambda: llama(tie_word_embeddings=True),
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ),
    "llama-both-saved-tied": (
        lambda: llama(tie_word_embeddings=True),
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    ),
    "roberta-cls": (roberta, {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    "mlm-bias-all": (lambda: bert("BertForMaskedLM"), {"target_modules": ["query"], "bias": "all"}),
    "llama-cls": (
        lambda: llama("LlamaForSequenceClassification"),
        {"target_modules": ["q_proj"], "task_type": "SEQ_CLS"},
    ),
    "bert-cls": (bert, {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "bert-bias-all": (bert, {"target_modules": ["query", "value"], "task_type": "SEQ_CLS", "bias": "all"}),
    "bert-bias-lora": (bert, {"target_modules": ["query", "dense"], "bias": "lora_only"}),
    "bert-tokens-cls": (
        lambda: bert("BertForTokenClassification"),
        {"target_modules": ["query", "dense"], "task_type": "TOKEN_CLS"},
    ),
    "bert-features": (
        lambda: bert("BertModel"),
        {"target_modules": ["query"], "task_type": "FEATURE_EXTRACTION", "modules_to_save": ["pooler"]},
    ),
    "t5": (t5, {"target_modules": ["q", "v", "wo"], "task_type": "SEQ_2_SEQ_LM"}),
    "t5-shared": (t5, {"target_modules": ["q", "shared"], "task_type": "SEQ_2_SEQ_LM"}),
    "vit": (
        vit,
        {"target_modules": ["q_proj", "v_proj", "query", "value"], "modules_to_save": ["classifier"]},
    ),
    "vit-conv": (vit, {"target_modules": ["projection"], "use_dora": True}),
}


@pytest.mark.parametrize(
    "which",
    cases(
        LORA,
        [
            "llama-layers",
            "llama-tokens",
            "bert-bias-lora",
            "bert-tokens-cls",
            "t5-shared",
            "llama-head-saved",
        ],
    ),
)
def test_lora_there_and_back(which, tmp_path):
    make, fields = LORA[which]
    torch.manual_seed(1)
    check_in(make().double().eval(), peft.LoraConfig(r=4, lora_alpha=6, **fields), tmp_path)


class Convolutions(nn.Module):
    """Every kind of convolution, one of them with groups."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv1d(4, 6, 3, padding=1)
        self.two = nn.Conv2d(6, 4, 3, stride=2, padding=1)
        self.three = nn.Conv3d(4, 4, (1, 3, 3), padding=(0, 1, 1))
        self.grouped = nn.Conv1d(4, 8, 3, groups=2, padding=1)

    def forward(self, x):
        y = self.two(self.one(x).unsqueeze(-1).expand(-1, -1, -1, x.shape[-1]))
        y = self.three(y.unsqueeze(2)).squeeze(2)
        return self.grouped(y.flatten(2))


@pytest.mark.parametrize("dora", [False, True])
def test_convolutions(dora, tmp_path):
    base = Convolutions().double()
    x = torch.randn(2, 4, 8, dtype=torch.float64)
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["one", "two", "three"], use_dora=dora)
    other = theirs(base, config)
    other.save_pretrained(tmp_path / "theirs")
    ours = copy.deepcopy(base)
    tuning = peftlib.hf.load(ours, tmp_path / "theirs")
    torch.testing.assert_close(ours(x), other(x))
    assert not torch.allclose(ours(x), base(x), atol=1e-3)
    peftlib.hf.save(tuning, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    torch.testing.assert_close(back(x), ours(x))


def test_a_convolution_with_groups_goes_out_and_comes_back(tmp_path):
    base = Convolutions().double()
    x = torch.randn(2, 4, 8, dtype=torch.float64)
    ours = copy.deepcopy(base)
    tuning = peftlib.attach(ours, {"grouped": LoRA(rank=2, alpha=3), "one": LoRA(rank=2)})
    randomize(tuning.parameters())
    peftlib.hf.save(tuning, tmp_path)
    other = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(other(x), ours(x))
    again = copy.deepcopy(base)
    assert peftlib.hf.load(again, tmp_path).num_parameters == tuning.num_parameters
    torch.testing.assert_close(again(x), ours(x))


def test_a_convolution_whose_groups_read_each_other_is_refused(tmp_path):
    base = Convolutions().double()
    theirs(base, peft.LoraConfig(r=2, target_modules=["grouped"])).save_pretrained(tmp_path)
    refused(base, tmp_path, "channels of all")


def refused(base, folder, *words):
    """Loading raises with these words and leaves the model as it was."""
    before = {k: v.clone() for k, v in base.state_dict().items()}
    flags = [p.requires_grad for p in base.parameters()]
    classes = [type(m) for m in base.modules()]
    with pytest.raises(PeftlibError) as caught:
        peftlib.hf.load(base, folder)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert classes == [type(m) for m in base.modules()]
    assert flags == [p.requires_grad for p in base.parameters()]
    assert peftlib.tunings(base) == {}
    after = base.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


VIRTUAL = {
    "prompt-gpt2": (gpt2, "PromptTuningConfig", "CAUSAL_LM", {}),
    "prompt-llama-cls": (
        lambda: llama("LlamaForSequenceClassification"),
        "PromptTuningConfig",
        "SEQ_CLS",
        {},
    ),
    "prompt-bert-tokens": (lambda: bert("BertForTokenClassification"), "PromptTuningConfig", "TOKEN_CLS", {}),
    "prompt-bert-features": (lambda: bert("BertModel"), "PromptTuningConfig", "FEATURE_EXTRACTION", {}),
    "prompt-t5": (t5, "PromptTuningConfig", "SEQ_2_SEQ_LM", {}),
    "ptuning-llama": (llama, "PromptEncoderConfig", "CAUSAL_LM", {"encoder_hidden_size": 12}),
    "ptuning-lstm-bert-cls": (
        bert,
        "PromptEncoderConfig",
        "SEQ_CLS",
        {"encoder_hidden_size": 12, "encoder_reparameterization_type": "LSTM"},
    ),
    "ptuning-t5": (t5, "PromptEncoderConfig", "SEQ_2_SEQ_LM", {"encoder_hidden_size": 12}),
    "prefix-gpt2": (gpt2, "PrefixTuningConfig", "CAUSAL_LM", {}),
    "prefix-llama": (llama, "PrefixTuningConfig", "CAUSAL_LM", {}),
    "prefix-mlp-llama": (
        llama,
        "PrefixTuningConfig",
        "CAUSAL_LM",
        {"prefix_projection": True, "encoder_hidden_size": 12},
    ),
    "prefix-llama-cls": (
        lambda: llama("LlamaForSequenceClassification"),
        "PrefixTuningConfig",
        "SEQ_CLS",
        {},
    ),
    "prefix-bert-cls": (bert, "PrefixTuningConfig", "SEQ_CLS", {}),
    "prompt-bart": (bart, "PromptTuningConfig", "SEQ_2_SEQ_LM", {}),
    "prompt-roberta": (roberta, "PromptTuningConfig", "SEQ_CLS", {}),
    "prefix-roberta": (roberta, "PrefixTuningConfig", "SEQ_CLS", {}),
    "prefix-bert-tokens": (lambda: bert("BertForTokenClassification"), "PrefixTuningConfig", "TOKEN_CLS", {}),
    "prefix-bert-features": (lambda: bert("BertModel"), "PrefixTuningConfig", "FEATURE_EXTRACTION", {}),
}


@pytest.mark.parametrize(
    "which",
    cases(
        VIRTUAL,
        [
            "prompt-bart",
            "ptuning-t5",
            "prompt-bert-tokens",
            "prefix-bert-tokens",
            "prefix-llama",
            "prompt-roberta",
        ],
    ),
)
def test_prompts_and_prefixes_there_and_back(which, tmp_path):
    make, kind, task, fields = VIRTUAL[which]
    torch.manual_seed(1)
    config = getattr(peft, kind)(task_type=task, num_virtual_tokens=P, **fields)
    base = make().double().eval()
    # HF leaves the prompt's positions on the outputs.
    skip = (
        P
        if task in ("CAUSAL_LM", "TOKEN_CLS", "FEATURE_EXTRACTION") and not which.startswith("prefix")
        else 0
    )
    call = inputs(base)
    if which == "prompt-llama-cls":
        # Without ids HF takes the last position for the classifier, padding or not; so do these.
        call = {"input_ids": IDS}
    check_in(base, config, tmp_path, call, skip)


OUT = {
    "plain": (gpt2, {"c_attn": LoRA(rank=4), "mlp.c_proj": LoRA(rank=4)}, {"r": 4, "lora_alpha": 4}),
    "mixed": (
        llama,
        {
            "q_proj": LoRA(rank=4, alpha=8, use_rslora=True),
            "layers.1.self_attn.v_proj": LoRA(rank=2, alpha=3),
            "embed_tokens": LoRA(rank=2),
        },
        {"use_rslora": False},
    ),
    "dora": (llama, {"q_proj": LoRA(rank=4, use_dora=True)}, {"use_dora": True}),
    "some-biases": (bert, {"query": LoRA(rank=2), "LayerNorm": BitFit()}, {"bias": "all"}),
    "its-biases": (bert, {"query": LoRA(rank=2), "attention.self.query": BitFit()}, {"bias": "lora_only"}),
    "head": (
        bert,
        {"query": LoRA(rank=2), "classifier": FullFineTuning()},
        {"task_type": "SEQ_CLS", "modules_to_save": ["classifier"]},
    ),
    "part-of-a-head": (
        bert,
        {"query": LoRA(rank=2), "classifier.bias": FullFineTuning(), "pooler": FullFineTuning()},
        {"modules_to_save": ["bert.pooler.dense", "classifier"]},
    ),
    "new-head": (
        bert,
        {"query": LoRA(rank=2), "classifier": NewHead(3)},
        {"modules_to_save": ["classifier"]},
    ),
    "tokens": (
        lambda: llama(tie_word_embeddings=True),
        {"q_proj": LoRA(rank=2), "embed_tokens": TokenRows(ids=[12, 5])},
        {"trainable_token_indices": {"model.embed_tokens": [12, 5]}},
    ),
    "part-of-a-deep-head": (
        roberta,
        {"query": LoRA(rank=2), "classifier.dense": FullFineTuning()},
        {"modules_to_save": ["classifier"], "task_type": "SEQ_CLS"},
    ),
    "lora-in-a-head": (
        roberta,
        {"classifier.dense": LoRA(rank=2), "classifier.out_proj": FullFineTuning()},
        {"modules_to_save": ["classifier.out_proj"], "task_type": None},
    ),
    "one-of-many": (t5, {"encoder.block.0.layer.0.SelfAttention.q": LoRA(rank=2)}, {"r": 2}),
    "vit": (vit, {"q_proj": LoRA(rank=2), "projection": LoRA(rank=2, alpha=5)}, {"alpha_pattern": {}}),
}


@pytest.mark.parametrize("which", cases(OUT, ["dora", "one-of-many", "part-of-a-head", "lora-in-a-head"]))
def test_lora_that_was_trained_here(which, tmp_path):
    make, method, fields = OUT[which]
    torch.manual_seed(1)
    written = check_out(make().double().eval(), method, tmp_path)
    for name, value in fields.items():
        if name == "alpha_pattern":
            assert len(written[name]) == 1
        else:
            assert written[name] == value


PREFIXED = {
    "gpt2": (gpt2, "transformer"),
    "llama-cls": (lambda: llama("LlamaForSequenceClassification"), "model"),
    "bert": (lambda: bert("BertForTokenClassification"), "bert"),
}


@pytest.mark.parametrize("which", PREFIXED)
def test_a_prefix_that_was_trained_here(which, tmp_path):
    make, inside = PREFIXED[which]
    torch.manual_seed(1)
    base = make().double().eval()
    method = {inside: peftlib.PrefixTuning(length=P, hidden=8), "": PositionOffset(P)}
    check_out(base, method, tmp_path, example={"input_ids": IDS[:1]})


@pytest.mark.parametrize(
    "make", [gpt2, bert, pytest.param(t5, marks=pytest.mark.slow)], ids=["gpt2", "bert", "t5"]
)
@pytest.mark.parametrize(
    "method",
    [peftlib.PromptTuning(length=P), peftlib.PTuningV1(length=P, encoder="mlp")],
    ids=["prompt", "ptuning"],
)
def test_prompts_that_were_trained_here(make, method, tmp_path):
    torch.manual_seed(1)
    base = make().double().eval()
    example = {k: v[:1] for k, v in inputs(base).items()}
    written = check_out(base, method, tmp_path, skip=P if make is gpt2 else 0, example=example)
    assert written["peft_type"] == (
        "PROMPT_TUNING" if type(method).__name__ == "PromptTuning" else "P_TUNING"
    )


def test_a_prefix_generates_the_same_tokens(tmp_path):
    torch.manual_seed(3)
    base = llama().double().eval()
    other = theirs(base, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P))
    other.save_pretrained(tmp_path)
    ours = copy.deepcopy(base)
    peftlib.hf.load(ours, tmp_path)
    call = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(ours.generate(**call), other.generate(**call))
    assert not torch.equal(ours.generate(**call), base.generate(**call))
    # Positions that are given are moved as well, by position or keyword.
    order = torch.arange(IDS.shape[1]).expand_as(IDS)
    wanted = ours(IDS).logits
    torch.testing.assert_close(ours(IDS, position_ids=order).logits, wanted)
    torch.testing.assert_close(ours(IDS, None, order).logits, wanted)
    torch.testing.assert_close(ours(inputs_embeds=ours.get_input_embeddings()(IDS)).logits, wanted)


def test_training_goes_on_with_the_same_gradients(tmp_path):
    torch.manual_seed(1)
    base = llama().double()
    other = theirs(base, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    other.save_pretrained(tmp_path)
    ours = copy.deepcopy(base)
    tuning = peftlib.hf.load(ours, tmp_path, name="chat")
    assert list(peftlib.tunings(ours)) == ["chat"]
    assert [n for n, p in ours.named_parameters() if p.requires_grad] == [
        n for n, p in ours.named_parameters() if "lora" in n
    ]
    for model in (ours, other):
        model(input_ids=IDS, labels=IDS).loss.backward()
    mine = {n: p.grad for n, p in tuning.named_parameters()}
    yours = {n: p.grad for n, p in other.named_parameters() if p.requires_grad}
    assert len(mine) == len(yours) == 4
    for name, grad in mine.items():
        site, _, which = name.rpartition(".lora.")
        torch.testing.assert_close(
            grad, yours[f"base_model.model.{site}.lora_{which.upper()}.default.weight"]
        )
    frozen = copy.deepcopy(base)
    assert not any(p.requires_grad for p in peftlib.hf.load(frozen, tmp_path, trainable=False).parameters())


def test_half_precision_bases_keep_float32_adapters(tmp_path):
    base = llama().bfloat16()
    peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    ).save_pretrained(tmp_path)
    tuning = peftlib.hf.load(base, tmp_path)
    stored = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    assert stored[key].dtype == torch.float32
    assert torch.equal(tuning.state_dict()["model.layers.0.self_attn.q_proj.lora.b"], stored[key])


@pytest.fixture
def saved(tmp_path):
    """A small base and a good directory for it."""
    base = llama()
    theirs(base, peft.LoraConfig(r=2, target_modules=["q_proj"], bias="none")).save_pretrained(tmp_path)
    return base, tmp_path


def edit(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"peft_type": "IA3"}, ["peft_type='IA3'", "LORA"]),
        ({"peft_type": 3}, ["peft_type=3", "str"]),
        ({"alora_invocation_tokens": [3, 4]}, ["alora_invocation_tokens=[3, 4]"]),
        ({"layer_replication": [[0, 2]]}, ["layer_replication"]),
        ({"lora_bias": True}, ["lora_bias=True"]),
        ({"target_parameters": ["x"]}, ["target_parameters"]),
        ({"field_of_tomorrow": {"a": 1}}, ["field_of_tomorrow"]),
        ({"init_lora_weights": "pissa"}, ["init_lora_weights='pissa'", "base"]),
        (
            {"target_modules": ["q_proj", "v_proj"]},
            ["target_modules", "no weights for 'model.layers.0.self_attn.v"],
        ),
        (
            {"target_modules": ["layers.0.self_attn.q_proj"]},
            ["target_modules", "model.layers.1.self_attn.q_proj"],
        ),
        ({"target_modules": "("}, ["target_modules", "regular expression"]),
        ({"rank_pattern": {"(": 3}}, ["rank_pattern", "regular expression"]),
        (
            {"rank_pattern": {"q_proj": 3}},
            ["shape of model.layers.0.self_attn.q_proj.lora.a: (2, 16)", "(3, 16)"],
        ),
        ({"r": 10**12}, ["(2, 16)"]),
        ({"r": 10**30}, ["does not fit"]),
        ({"trainable_token_indices": [3]}, ["trainable_token_indices", "no weights"]),
        ({"r": "8"}, ["r='8'", "integer"]),
        ({"lora_alpha": float("nan")}, ["lora_alpha"]),
        ({"use_dora": True}, ["lora_magnitude_vector"]),
        ({"modules_to_save": ["lm_head"]}, ["modules_to_save", "no weights for 'lm_head'"]),
        ({"bias": "some"}, ["bias='some'"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_configurations_that_are_refused(saved, fields, words):
    base, folder = saved
    edit(folder, **fields)
    refused(base, folder, *words)


def test_damaged_and_missing_files_are_refused(saved):
    base, folder = saved
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    good = {path: path.read_bytes() for path in (config, weights)}
    for path, data, word in [
        (config, b"{", "JSON"),
        (config, b"\xff\xfe", "JSON"),
        (config, b"[" * 100_000, "JSON"),
        (config, b"[1]", "list"),
        (config, b"{}", "peft_type"),
        (weights, good[weights][:-8], "safetensors"),
        (weights, b"\xff" * 64, "safetensors"),
        (weights, b"", "safetensors"),
    ]:
        path.write_bytes(data)
        refused(base, folder, word)
        path.write_bytes(good[path])
    tensors = safetensors.torch.load_file(weights)
    key = next(iter(tensors))
    for changed, word in [
        ({key.replace("layers.0", "layers.7"): tensors[key]}, "layers.7"),
        ({"other." + key: tensors[key]}, "other."),
        ({key: tensors[key][:1]}, "(1, 16)"),
        ({key: tensors[key].int()}, "int32"),
        ({"base_model.model.model.norm.weight": torch.zeros(16)}, "base's 'model.norm.weight'"),
        ({"base_model.model.model.norm.bias": torch.zeros(16)}, "model.norm.bias"),
    ]:
        safetensors.torch.save_file({k: t.clone() for k, t in {**tensors, **changed}.items()}, weights)
        refused(base, folder, word)
    del tensors[key]
    safetensors.torch.save_file(tensors, weights)
    refused(base, folder, "lora_A")
    weights.rename(folder / "adapter_model.bin")
    refused(base, folder, "adapter_model.bin", "Convert")
    config.unlink()
    refused(base, folder, "adapter_config.json")
    config.write_bytes(good[config])
    (folder / "adapter_model.bin").rename(weights)
    weights.write_bytes(good[weights])
    peftlib.hf.load(base, folder)
    with pytest.raises(PeftlibError, match="default"):
        peftlib.hf.load(base, folder)


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)

    def forward(self, x):
        return self.b(self.norm(self.a(x)))


def test_running_statistics_of_a_saved_norm_come_along(tmp_path):
    base, x = Normed().double().eval(), torch.randn(6, 4, dtype=torch.float64)
    other = theirs(base, peft.LoraConfig(r=2, target_modules=["a"], modules_to_save=["norm"]))
    other.train()(x + 3)
    other.eval().save_pretrained(tmp_path / "theirs")
    ours = copy.deepcopy(base)
    tuning = peftlib.hf.load(ours, tmp_path / "theirs")
    torch.testing.assert_close(ours(x), other(x))
    peftlib.hf.save(tuning, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    torch.testing.assert_close(back(x), ours(x))
    tuning.detach()
    assert torch.equal(ours(x), base(x))


def test_all_linear_and_ranks_above_the_width(saved):
    base, folder = saved
    other = theirs(base, peft.LoraConfig(r=40, target_modules="all-linear"))
    other.save_pretrained(folder)
    edit(folder, target_modules="all-linear")
    ours = copy.deepcopy(base)
    peftlib.hf.load(ours, folder)
    same(ours, other, inputs(base), base, rtol=1e-3, atol=1e-4)


def test_modules_that_are_refused(tmp_path):
    base = Attention()
    theirs(base, peft.LoraConfig(r=2, target_modules=["mix"])).save_pretrained(tmp_path)
    refused(base, tmp_path, "'mix'", "nn.MultiheadAttention")
    base = llama(tie_word_embeddings=True)
    theirs(base, peft.LoraConfig(r=2, target_modules=["embed_tokens"], use_dora=True)).save_pretrained(
        tmp_path
    )
    refused(base, tmp_path, "model.embed_tokens", "DoRA")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    theirs(base, config).save_pretrained(tmp_path)
    refused(base, tmp_path, "modules_to_save", "shares a weight")


@pytest.mark.parametrize(
    "make, kind, task, word",
    [
        (t5, "PrefixTuningConfig", "SEQ_2_SEQ_LM", "num_transformer_submodules"),
        (lambda: llama(), "PrefixTuningConfig", "CAUSAL_LM", "num_layers"),
    ],
    ids=["t5", "layers"],
)
def test_prefixes_that_are_refused(make, kind, task, word, tmp_path):
    base = make().eval()
    theirs(base, getattr(peft, kind)(task_type=task, num_virtual_tokens=P)).save_pretrained(tmp_path)
    if word == "num_layers":
        base.model.layers.append(copy.deepcopy(base.model.layers[0]))
        base.model.layers[2].self_attn.layer_idx = 2
        base.config.num_hidden_layers = 3
    refused(base, tmp_path, word)


def test_models_that_count_positions_from_the_mask_get_no_prefix(tmp_path):
    config = transformers.OPTConfig(
        hidden_size=16,
        ffn_dim=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        word_embed_proj_dim=16,
        vocab_size=40,
    )
    base = transformers.OPTForCausalLM(config).eval()
    theirs(base, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)).save_pretrained(
        tmp_path
    )
    refused(base, tmp_path, "padded")


def test_prompts_need_a_task_and_a_forward(tmp_path):
    base = llama()
    theirs(base, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)).save_pretrained(
        tmp_path
    )
    edit(tmp_path, task_type=None)
    refused(base, tmp_path, "task_type")
    edit(tmp_path, task_type="CAUSAL_LM", num_virtual_tokens=5)
    refused(base, tmp_path, "num_virtual_tokens")
    edit(tmp_path, num_virtual_tokens=P)
    refused(nn.Sequential(nn.Embedding(40, 16)), tmp_path, "example")


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, 8)
        self.wide = nn.Conv1d(8, 8, 3, dilation=2, padding=2)

    def forward(self, x):
        return self.wide(self.out(self.mix(x, x, x)[0]).mT).mT


@pytest.mark.parametrize(
    "method, word",
    [
        ({"out": peftlib.Adapter(dim=2)}, "Adapter"),
        ({"out": LoRA(rank=2), "mix.out_proj": peftlib.Adapter(dim=2)}, "mix.out_proj"),
        ({"mix": LoRA(rank=2)}, "MultiheadAttention"),
        ({"wide": LoRA(rank=2)}, "dilation"),
        ({"out.weight": LoRA(rank=2)}, "target_parameters"),
        ({"out": LoRA(rank=2, rows=[(0, 4)])}, "rows"),
        ({"out": LoRA(rank=2), "mix": FullFineTuning(), "": BitFit()}, "in_proj_bias"),
        ({"out": LoRA(rank=2), "wide": LoRA(rank=2, dropout=0.5)}, "dilation"),
        ({"out": LoRA(rank=2), "mix.out_proj": NewHead(5)}, "shape"),
        ({"mix": peftlib.PrefixTuning(length=2)}, "PositionOffset(2)"),
    ],
    ids=[
        "adapter",
        "beside",
        "attention",
        "dilated",
        "parameter",
        "rows",
        "biases",
        "conv",
        "shape",
        "prefix",
    ],
)
def test_tunings_that_are_not_written(method, word, tmp_path):
    model = Attention()
    tuning = peftlib.attach(model, method, example=torch.randn(1, 4, 8))
    with pytest.raises(PeftlibError) as caught:
        peftlib.hf.save(tuning, tmp_path / "new")
    assert word in str(caught.value), str(caught.value)
    assert not (tmp_path / "new").exists()


def test_mixed_settings_that_hf_has_once_are_not_written(tmp_path):
    for one, other, word in [
        (LoRA(rank=2, dropout=0.1), LoRA(rank=2), "lora_dropout"),
        (LoRA(rank=2, use_dora=True), LoRA(rank=2), "use_dora"),
    ]:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        with pytest.raises(PeftlibError, match=word):
            peftlib.hf.save(peftlib.attach(model, {"0": one, "1": other}), tmp_path / "new")


def test_saving_makes_and_replaces_a_directory(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4))
    tuning = peftlib.attach(model, LoRA(rank=2), targets="0")
    folder = tmp_path / "a" / "b"
    for _ in range(2):
        randomize(tuning.parameters())
        peftlib.hf.save(tuning, folder)
        assert sorted(p.name for p in folder.iterdir()) == [
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
        assert [p.name for p in folder.parent.iterdir()] == ["b"]
        again = nn.Sequential(nn.Linear(4, 4))
        loaded = peftlib.hf.load(again, folder)
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), tuning.parameters(), strict=True))
    (tmp_path / "file").write_text("x")
    with pytest.raises(PeftlibError, match="is a file"):
        peftlib.hf.save(tuning, tmp_path / "file")
    tuning.detach()
    with pytest.raises(PeftlibError, match="detached"):
        peftlib.hf.save(tuning, folder)
