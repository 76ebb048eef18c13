"""Directories of HF peft, both ways: what one computes after saving, the other computes after loading."""

from __future__ import annotations

import copy
import json
import warnings

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

pytestmark = [
    # what peft and transformers say of models without a folder, of embeddings and of positions
    pytest.mark.filterwarnings("ignore"),
]

P = 3
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])


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


def same(ours, other, call, base, skip=0, **bounds):
    """Equal outputs, and different from the base's."""
    with torch.no_grad():
        got, wanted, plain = tensor(ours(**call)), tensor(other(**call)), tensor(base(**call))
    wanted = wanted[:, skip:] if skip and wanted.dim() == 3 else wanted
    if "attention_mask" in call and got.dim() == 3 and "decoder_input_ids" not in call:
        # what stands at padding is nobody's
        seen = call["attention_mask"].bool()
        got, wanted, plain = got[seen], wanted[seen], plain[seen]
    torch.testing.assert_close(got, wanted, **bounds)
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
    same(ours, other, call, base, skip)
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


@pytest.mark.parametrize("which", LORA)
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
    "prefix-bert-tokens": (lambda: bert("BertForTokenClassification"), "PrefixTuningConfig", "TOKEN_CLS", {}),
    "prefix-bert-features": (lambda: bert("BertModel"), "PrefixTuningConfig", "FEATURE_EXTRACTION", {}),
}


@pytest.mark.parametrize("which", VIRTUAL)
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
