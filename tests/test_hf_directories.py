"""HF peft's rules against HF peft itself, and directories as people have them."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import peftlib
import peftlib.hf
from peftlib import LoRA, PeftlibError, PromptTuning, PTuningV1
from peftlib.hf import PositionOffset
from peftlib.hf.directory import Config
from peftlib.hf.lora_in import _by_pattern
from peftlib.hf.names import is_meant
from tests.test_hf import IDS, MASK, P, gpt2, llama, randomize, refused, same, theirs

peft = pytest.importorskip("peft")
tuners_utils = pytest.importorskip("peft.tuners.tuners_utils")

pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("UserWarning", "FutureWarning")]

# -- names -------------------------------------------------------------------------------------------------------------

words = st.sampled_from(["q_proj", "v_proj", "layers", "h", "mlp", "0", "1", "11", "down", "head"])
dotted = st.lists(words, min_size=1, max_size=5).map(".".join)
expressions = st.sampled_from(
    [r".*\.(q|v)_proj", r".*_proj", r"layers\.\d+\..*", "q_proj", "head|down", r".*\.[01]\..*", "", ".*"]
)
ends = st.lists(dotted, max_size=3)


@given(
    targets=ends | expressions,
    excluded=ends | expressions | st.none(),
    saved=st.lists(words, max_size=2) | st.none(),
    layers=st.lists(st.integers(0, 11), max_size=2) | st.integers(0, 1) | st.none(),
    pattern=st.sampled_from(["layers", "h", "", "layers|h"]) | st.lists(words, max_size=2) | st.none(),
    names=st.lists(dotted, min_size=1, max_size=8),
)
@settings(max_examples=500)
def test_a_configuration_means_the_modules_that_it_means_to_hf(
    targets, excluded, saved, layers, pattern, names
):
    fields = {
        "target_modules": targets,
        "exclude_modules": excluded,
        "modules_to_save": saved,
        "layers_to_transform": layers,
        "layers_pattern": pattern,
    }
    theirs_ = type("Fields", (), {**fields, "target_parameters": None})
    ours = Config(fields, Path("adapter_config.json"))
    for name in names:
        wanted = bool(tuners_utils.check_target_module_exists(theirs_, name))
        assert is_meant(ours, targets, name) == wanted, (fields, name)


@given(
    st.lists(
        st.tuples(
            dotted | st.sampled_from(["q|v_proj", "^layers", "^layers.0.q_proj", r"\d\.mlp", ".*_proj", "."]),
            st.integers(1, 9),
        ),
        max_size=4,
    ).map(dict),
    dotted,
)
@settings(max_examples=500)
def test_the_first_pattern_that_fits_says_rank_and_alpha_as_in_hf(patterns, name):
    key = peft.utils.other.get_pattern_key(patterns.keys(), name)
    assert _by_pattern(patterns, name, 0) == patterns.get(key, 0)


# -- directories as people have them -----------------------------------------------------------------------------------


def saved_lora(folder, base, **fields):
    other = theirs(base, peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "v_proj"], **fields))
    other.save_pretrained(folder)
    return other


@pytest.mark.parametrize("version", ["0.2", "0.4", "0.6", "0.9", "0.13"])
def test_configurations_of_older_versions_are_read(version, tmp_path):
    """The fields that each of them wrote, in its own words; what a later one added is absent."""
    base = llama().double().eval()
    other = saved_lora(tmp_path, base)
    first = {
        "base_model_name_or_path": "some/model",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": 3,
        "lora_dropout": 0.05,
        "modules_to_save": None,
        "r": 2,
        "peft_type": "LORA",
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
    }
    fields = {
        "0.2": {"enable_lora": None, "merge_weights": False},
        "0.4": {
            "init_lora_weights": True,
            "layers_pattern": None,
            "layers_to_transform": None,
            "revision": None,
        },
        "0.6": {"auto_mapping": None, "rank_pattern": {}, "alpha_pattern": {}},
        "0.9": {
            "loftq_config": {},
            "megatron_config": None,
            "megatron_core": "megatron.core",
            "use_rslora": False,
            "use_dora": False,
            "layer_replication": None,
        },
        "0.13": {
            "exclude_modules": None,
            "eva_config": None,
            "lora_bias": False,
            "target_modules": "all-linear",
        },
    }[version]
    if version == "0.13":
        fields["target_modules"] = r".*\.(q|v)_proj"
    (tmp_path / "adapter_config.json").write_text(json.dumps({**first, **fields}))
    ours = copy.deepcopy(base)
    peftlib.hf.load(ours, tmp_path)
    same(ours, other, {"input_ids": IDS, "attention_mask": MASK}, base)


def test_magnitudes_of_older_versions_have_a_shorter_name(tmp_path):
    base = llama().double().eval()
    other = saved_lora(tmp_path, base, use_dora=True)
    path = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    old = {k.replace("lora_magnitude_vector.weight", "lora_magnitude_vector"): t for k, t in tensors.items()}
    safetensors.torch.save_file(old, path)  # without any metadata, too
    ours = copy.deepcopy(base)
    peftlib.hf.load(ours, tmp_path)
    same(ours, other, {"input_ids": IDS, "attention_mask": MASK}, base)


def test_other_files_beside_do_not_matter(tmp_path):
    base = llama().double().eval()
    saved_lora(tmp_path, base)
    for name in ("README.md", "tokenizer.json", "optimizer.pt", "training_args.bin", "adapter_model.bin"):
        (tmp_path / name).write_bytes(b"\x80")
    peftlib.hf.load(base, tmp_path)


def test_an_adapter_with_a_name_lies_a_folder_deeper(tmp_path):
    base = llama().double().eval()
    other = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="chat"
    )
    randomize(p for p in other.parameters() if p.requires_grad)
    other.to(torch.float64).eval().save_pretrained(tmp_path)
    refused(base, tmp_path, "There is one in its folder(s) 'chat'")
    ours = copy.deepcopy(base)
    peftlib.hf.load(ours, tmp_path / "chat", name="chat")
    same(ours, other, {"input_ids": IDS, "attention_mask": MASK}, base)


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal"])
def test_starts_that_leave_the_base_alone_are_read(start, tmp_path):
    base = llama().double().eval()
    other = saved_lora(tmp_path, base, init_lora_weights=start)
    ours = copy.deepcopy(base)
    peftlib.hf.load(ours, tmp_path)
    same(ours, other, {"input_ids": IDS, "attention_mask": MASK}, base)


@pytest.mark.parametrize(
    "kind, fields",
    [
        ("IA3Config", {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
        ("LoHaConfig", {"target_modules": ["q_proj"]}),
        ("VeraConfig", {"target_modules": ["q_proj"]}),
        ("LNTuningConfig", {"target_modules": ["norm"]}),
        ("TrainableTokensConfig", {"token_indices": [1], "target_modules": ["embed_tokens"]}),
        ("LoraConfig", {"target_modules": ["q_proj"], "lora_bias": True}),
        ("LoraConfig", {"target_parameters": ["q_proj.weight"], "target_modules": []}),
        ("LoraConfig", {"target_modules": ["q_proj"], "alora_invocation_tokens": [3]}),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_the_field(kind, fields, tmp_path):
    base = llama().eval()
    theirs(base, getattr(peft, kind)(task_type="CAUSAL_LM", **fields)).save_pretrained(tmp_path)
    refused(
        base, tmp_path, "peft_type" if kind != "LoraConfig" else sorted(set(fields) - {"target_modules"})[0]
    )


# -- placing prompts ---------------------------------------------------------------------------------------------------


class Own(nn.Module):
    """Nobody's architecture: no config, no dummy_inputs."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.out = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9)

    def forward(self, ids):
        x = self.embed(ids)
        return self.out(x + self.mix(x.mean(1, keepdim=True)))


@pytest.mark.parametrize(
    "method", [PromptTuning(length=3), PTuningV1(length=3, encoder="mlp")], ids=["prompt", "ptuning"]
)
def test_a_module_of_ones_own_takes_an_example_where_it_has_no_dummy_inputs(method, tmp_path):
    model, ids = Own(), torch.tensor([[1, 2, 3]])
    fresh = copy.deepcopy(model)
    tuning = peftlib.attach(model, method, example=ids)
    randomize(tuning.parameters())
    peftlib.hf.save(tuning, tmp_path)
    refused(fresh, tmp_path, "Own has no dummy_inputs", "example=")
    peftlib.hf.load(fresh, tmp_path, example=ids)
    torch.testing.assert_close(fresh(ids), model(ids))


# -- memory and devices ------------------------------------------------------------------------------------------------


def test_what_is_read_is_not_kept_beside_what_is_used(tmp_path):
    """Rows, keys and values are parts of HF's tensors; nothing of the rest stays."""
    base = llama().eval()
    for config in (
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P),
        peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]),
    ):
        theirs(base, config).save_pretrained(tmp_path)
        tuning = peftlib.hf.load(base, tmp_path)
        for parameter in tuning.parameters():
            assert parameter.is_contiguous()
            assert parameter.untyped_storage().nbytes() == parameter.nbytes
        tuning.detach()


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], use_rslora=True),
        peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P),
        peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=P, encoder_hidden_size=8),
    ],
    ids=["lora", "dora", "prompt", "ptuning"],
)
def test_a_base_on_meta_gets_its_values_later(config, tmp_path):
    base = llama().eval()
    theirs(base, config).save_pretrained(tmp_path)
    ours = copy.deepcopy(base)
    peftlib.hf.load(ours, tmp_path)
    with torch.device("meta"):
        empty = llama().eval()
    rotary = empty.model.rotary_emb
    tuning = peftlib.hf.load(empty, tmp_path)
    assert all(not t.is_meta for t in tuning.state_dict().values())
    empty.load_state_dict(base.state_dict(), assign=True, strict=False)
    rotary.inv_freq = base.model.rotary_emb.inv_freq
    torch.testing.assert_close(empty(IDS).logits, ours(IDS).logits, rtol=0, atol=0)


@pytest.mark.parametrize(
    "config, words",
    [
        (
            peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P),
            "how the model counts positions",
        ),
        (peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), "no values to exchange"),
        (peft.LoraConfig(target_modules=["embed_tokens"], task_type="CAUSAL_LM"), "repeats the base's"),
    ],
    ids=["prefix", "whole", "repeated"],
)
def test_what_needs_the_values_of_the_base_is_refused_on_meta(config, words, tmp_path):
    base = llama().eval()
    theirs(base, config).save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = llama().eval()
    with pytest.raises(PeftlibError, match=re.escape(words)):
        peftlib.hf.load(empty, tmp_path)
    assert not peftlib.tunings(empty)
    assert not [n for n, _ in empty.named_modules() if "_peft" in n]


# -- the position offset -----------------------------------------------------------------------------------------------


def test_a_file_with_a_position_offset_needs_nothing_of_hf(tmp_path):
    """It is a method like any other, which a file of this library finds by its name."""
    base = gpt2().eval()
    method = {"transformer": peftlib.PrefixTuning(length=P, hidden=4), "": PositionOffset(P)}
    tuning = peftlib.attach(base, method, example={"input_ids": IDS})
    tuning.save(tmp_path / "own.safetensors")
    assert PositionOffset.__module__ == "peftlib.methods.position_offset"
    code = f"""
import sys, torch, peftlib
from torch import nn
from peftlib.methods.position_offset import PositionOffset
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 2)
    def forward(self, input_ids, position_ids=None):
        return position_ids
tuning = peftlib.attach(Model(), {{"": PositionOffset(4), "table": peftlib.LoRA(rank=1)}})
tuning.save({str(tmp_path / "t.safetensors")!r})
"""
    check = f"""
model = Model()
peftlib.load(model, {str(tmp_path / "t.safetensors")!r})
assert model(torch.tensor([[7, 8]])).tolist() == [[4, 5]]
assert not [m for m in sys.modules if m.startswith("peftlib.hf")]
"""
    definition = code.split("tuning =")[0].replace(
        "from peftlib.methods.position_offset import PositionOffset\n", ""
    )
    for script in (code, definition + check):
        subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(peftlib.__file__).parents[1])
    again = gpt2().eval()
    again.load_state_dict({k: v for k, v in base.state_dict().items() if "_peft" not in k})
    peftlib.load(again, tmp_path / "own.safetensors")
    assert torch.equal(again(IDS).logits, base(IDS).logits)


def test_lora_is_written_with_patterns_that_hf_reads_as_they_are_meant(tmp_path):
    """Names that are parts of one another, and characters that mean something in an expression."""

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.upper, self.a = nn.Linear(4, 4), nn.Linear(4, 4), nn.ModuleDict()
            self.a["up"], self.a["b-c"] = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.a["b-c"](self.a["up"](self.upper(self.up(x))))

    base, x = Named().double(), torch.randn(3, 4).double()
    ours = copy.deepcopy(base)
    sizes = {"up": (1, 2), "upper": (2, 2), "a.up": (3, 5)}
    plan = {(lambda n, m, w=w: n == w): LoRA(rank=r, alpha=a) for w, (r, a) in sizes.items()}
    tuning = peftlib.attach(ours, plan)
    randomize(tuning.parameters())
    peftlib.hf.save(tuning, tmp_path)
    other = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(other(x), ours(x))
    again = copy.deepcopy(base)
    loaded = peftlib.hf.load(again, tmp_path)
    assert {n: (m.rank, m.alpha) for n, m in loaded.sites.items()} == sizes
