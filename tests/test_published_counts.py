"""Trained-parameter counts held against the tables and equations of the papers, on models of the real sizes on meta."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import peftlib
from peftlib import (
    Adapter,
    BitFit,
    FullFineTuning,
    LoRA,
    PartialFineTuning,
    PrefixTuning,
    PromptTuning,
    PTuningV2,
)


class Block(nn.Module):
    """One transformer block, normalization first. ``gate`` adds the third matrix of a gated feed-forward."""

    def __init__(self, width: int, inner: int, size: int, kv: int, fused: bool, gate: bool, bias: bool):
        super().__init__()
        self.size = size
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        if fused:
            self.qkv = nn.Linear(width, 3 * width, bias=bias)
        else:
            self.q_proj = nn.Linear(width, width, bias=bias)
            self.k_proj, self.v_proj = nn.Linear(width, kv, bias=bias), nn.Linear(width, kv, bias=bias)
        self.o_proj = nn.Linear(width, width, bias=bias)
        self.gate_proj = nn.Linear(width, inner, bias=bias) if gate else None
        self.up_proj, self.down_proj = nn.Linear(width, inner, bias=bias), nn.Linear(inner, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        parts = (
            self.qkv(h).chunk(3, -1)
            if hasattr(self, "qkv")
            else (self.q_proj(h), self.k_proj(h), self.v_proj(h))
        )
        q, k, v = (p.unflatten(-1, (-1, self.size)).transpose(1, 2) for p in parts)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o_proj(out.transpose(1, 2).flatten(-2))
        h = self.norm2(x)
        up = self.up_proj(h) if self.gate_proj is None else F.silu(self.gate_proj(h)) * self.up_proj(h)
        return x + self.down_proj(F.gelu(up))


class Transformer(nn.Module):
    def __init__(
        self,
        vocabulary: int,
        width: int,
        layers: int,
        *,
        positions: int = 0,
        inner: int | None = None,
        size: int = 64,
        kv: int | None = None,
        fused: bool = False,
        gate: bool = False,
        bias: bool = True,
        tied: bool = True,
    ):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(positions, width) if positions else None
        self.blocks = nn.ModuleList(
            Block(width, inner or 4 * width, size, kv or width, fused, gate, bias) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        if self.positions is not None:
            x = x + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


IDS = torch.zeros(1, 4, dtype=torch.long)

SHAPES: dict[str, dict[str, Any]] = {
    "GPT-2 M": {"vocabulary": 50257, "width": 1024, "layers": 24, "positions": 1024, "fused": True},
    "GPT-2 L": {"vocabulary": 50257, "width": 1280, "layers": 36, "positions": 1024, "fused": True},
    "GPT-3": {"vocabulary": 50257, "width": 12288, "layers": 96, "positions": 2048, "size": 128},
    "RoBERTa base": {"vocabulary": 50265, "width": 768, "layers": 12, "positions": 514},
    "RoBERTa large": {"vocabulary": 50265, "width": 1024, "layers": 24, "positions": 514},
    "DeBERTa XXL": {"vocabulary": 128100, "width": 1536, "layers": 48, "inner": 6144},
    "LLaMA-7B": {
        "vocabulary": 32000, "width": 4096, "layers": 32, "inner": 11008, "size": 128, "gate": True, "bias": False,
        "tied": False,
    },
    "LLaMA-13B": {
        "vocabulary": 32000, "width": 5120, "layers": 40, "inner": 13824, "size": 128, "gate": True, "bias": False,
        "tied": False,
    },
    "LLaMA3-8B": {
        "vocabulary": 128256, "width": 4096, "layers": 32, "inner": 14336, "size": 128, "kv": 1024, "gate": True,
        "bias": False, "tied": False,
    },
}  # fmt: skip


@functools.cache
def _built(name: str) -> nn.Module:
    with torch.device("meta"):
        return Transformer(**SHAPES[name])


def model_of(name: str) -> nn.Module:
    model = _built(name)
    assert not peftlib.tunings(model)
    return model


def count(model: nn.Module, method: Any, targets: Any = None, example: Any = None) -> int:
    tuning = peftlib.attach(model, method, targets=targets, example=example)
    try:
        return tuning.num_parameters
    finally:
        tuning.detach()


def rows(name: str) -> list[tuple[int, int]]:
    """Query and value in the fused projection of GPT-2."""
    width = SHAPES[name]["width"]
    return [(0, width), (2 * width, 3 * width)]


# LoRA, arXiv:2106.09685. Adapter^L there: one after each feed-forward, with a trained LayerNorm, so that
# Theta = L_adapter (2 d r + r + d) + 2 L_norm d (section 5.1); the r are those that its rounded numbers mean.
QV = ["q_proj", "v_proj"]
PER_FFN = {"where": "pfeiffer"}
LORA_PAPER: list[tuple[str, str, Any, Any, str]] = [
    ("table 2", "RoBERTa base", LoRA(rank=8), QV, "0.3M"),
    ("table 2", "RoBERTa large", LoRA(rank=8), QV, "0.8M"),
    ("table 2", "DeBERTa XXL", LoRA(rank=16), QV, "4.7M"),
    ("table 2, BitFit", "RoBERTa base", BitFit(), None, "0.1M"),
    ("table 2, Adapter^P", "RoBERTa large", Adapter(dim=16, **PER_FFN), None, "0.8M"),
    ("table 2, Adapter^H", "RoBERTa large", Adapter.houlsby(dim=8), None, "0.8M"),
    ("table 3, FT Top2", "GPT-2 M", PartialFineTuning(targets=["blocks.22", "blocks.23"]), None, "25.19M"),
    ("table 3, full", "GPT-2 L", FullFineTuning(), None, "774.03M"),
    ("table 3, Adapter^L", "GPT-2 M", Adapter(dim=6, layer_norm=True, **PER_FFN), None, "0.37M"),
    ("table 3, Adapter^L", "GPT-2 M", Adapter(dim=224, layer_norm=True, **PER_FFN), None, "11.09M"),
    ("table 3, Adapter^L", "GPT-2 L", Adapter(dim=8, layer_norm=True, **PER_FFN), None, "0.88M"),
    ("table 3, Adapter^L", "GPT-2 L", Adapter(dim=248, layer_norm=True, **PER_FFN), None, "23.00M"),
    ("table 4", "GPT-3", LoRA(rank=1), QV, "4.7M"),
    ("table 4", "GPT-3", LoRA(rank=8), QV, "37.7M"),
    ("table 4, Adapter^H", "GPT-3", Adapter.houlsby(dim=1), None, "7.1M"),
    ("table 4, Adapter^H", "GPT-3", Adapter.houlsby(dim=8), None, "40.1M"),
    ("table 5, one type", "GPT-3", LoRA(rank=8), ["q_proj"], "18.9M"),
    ("table 5, two types", "GPT-3", LoRA(rank=4), QV, "18.9M"),
    ("table 5, four types", "GPT-3", LoRA(rank=2), ["q_proj", "k_proj", "v_proj", "o_proj"], "18.9M"),
]


@pytest.mark.parametrize("table, name, method, targets, published", LORA_PAPER)
def test_the_tables_of_the_lora_paper(
    table: str, name: str, method: Any, targets: Any, published: str
) -> None:
    model = model_of(name)
    trained = count(model, method, targets, IDS if isinstance(method, Adapter) else None)
    digits = len(published.removesuffix("M").partition(".")[2])
    assert f"{trained / 1e6:.{digits}f}M" == published


@pytest.mark.parametrize("name, exact", [("GPT-2 M", 24 * 2 * 4 * 2048), ("GPT-2 L", 36 * 2 * 4 * 2560)])
def test_lora_on_the_fused_projection_of_gpt2(name: str, exact: int) -> None:
    """Table 3 gives 0.1 % of each model (0.35M and 0.77M); rank 4 on query and value is exactly this."""
    model = model_of(name)
    assert count(model, LoRA(rank=4, rows=rows(name)), ["qkv"]) == exact
    assert round(100 * exact / sum(p.numel() for p in model.parameters()), 1) == 0.1


# DoRA, arXiv:2402.09353, table 1: shares of all parameters, those trained included; the dagger is half the rank.
DORA_PAPER = [
    ("LLaMA-7B", False, 32, "0.83"),
    ("LLaMA-7B", True, 32, "0.84"),
    ("LLaMA-7B", True, 16, "0.43"),
    ("LLaMA-13B", False, 32, "0.67"),
    ("LLaMA-13B", True, 32, "0.68"),
    ("LLaMA-13B", True, 16, "0.35"),
    ("LLaMA3-8B", False, 32, "0.70"),
    ("LLaMA3-8B", True, 32, "0.71"),
]


@pytest.mark.parametrize("name, use_dora, rank, published", DORA_PAPER)
def test_the_table_of_the_dora_paper(name: str, use_dora: bool, rank: int, published: str) -> None:
    model = model_of(name)
    base = sum(p.numel() for p in model.parameters())
    targets = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    trained = count(model, LoRA(rank=rank, use_dora=use_dora), targets)
    assert f"{100 * trained / (base + trained):.2f}" == published


@pytest.mark.parametrize("kind, published", [("base", "0.09"), ("large", "0.08")])
def test_the_share_of_biases_in_bert(kind: str, published: str) -> None:
    """BitFit, arXiv:2106.10199, section 3: 0.09 % of BERT base, 0.08 % of BERT large."""
    from transformers import BertConfig, BertModel

    sizes: dict[str, Any] = {}
    if kind == "large":
        sizes = {
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
        }
    with torch.device("meta"):
        model = BertModel(BertConfig(**sizes))
    base = sum(p.numel() for p in model.parameters())
    assert f"{100 * count(model, BitFit()) / base:.2f}" == published


@pytest.mark.parametrize("m", [64])
def test_houlsby_adapters_on_bert_large(m: int) -> None:
    """Houlsby et al., arXiv:1902.00751, section 2.1: 2 m d + d + m each, two in every layer."""
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        model = BertModel(
            BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
        )
    example = {"input_ids": IDS}
    d = 1024
    assert count(model, Adapter.houlsby(dim=m), example=example) == 24 * 2 * (2 * m * d + d + m)
    # Pfeiffer et al., arXiv:2005.00247: one in every layer.
    assert count(model, Adapter.pfeiffer(reduction=d / m), example=example) == 24 * (2 * m * d + d + m)


@pytest.mark.parametrize("length", [5, 10])
def test_prefixes_on_gpt2_medium(length: int) -> None:
    """Li and Liang, arXiv:2101.00190: a prefix of 5 is 250K values, 0.1 % of GPT-2 medium; the MLP is dropped."""
    model = model_of("GPT-2 M")
    tuning = peftlib.attach(model, PrefixTuning(length=length, hidden=512), example=IDS)
    try:
        width, hidden, layers = 1024, 512, 24
        mlp = length * width + (width + 1) * hidden + layers * (hidden + 1) * 2 * width
        assert tuning.num_parameters == mlp
        kept = tuning.fold().num_parameters
    finally:
        tuning.detach()
    assert kept == 2 * layers * length * width
    assert count(model, PrefixTuning(length=length, hidden=None), example=IDS) == kept
    if length == 5:
        assert round(kept, -4) == 250_000
        assert round(100 * kept / sum(p.numel() for p in model.parameters()), 1) == 0.1


@pytest.mark.parametrize(
    "name, layers, width", [("RoBERTa large", 24, 1024), ("GPT-2 L", 36, 1280), ("LLaMA3-8B", 32, 1024)]
)
def test_deep_prompts(name: str, layers: int, width: int) -> None:
    """P-Tuning v2, arXiv:2110.07602: keys and values of every layer, 2 L P d; d is that of the key heads."""
    assert count(model_of(name), PTuningV2(length=20), example=IDS) == 2 * layers * 20 * width


def test_prompts_of_t5_xxl() -> None:
    """Lester et al., arXiv:2104.08691, figure 2: 20,480 parameters for a prompt of five tokens."""
    from transformers import T5Config, T5ForConditionalGeneration

    with torch.device("meta"):
        model = T5ForConditionalGeneration(
            T5Config(vocab_size=32128, d_model=4096, d_ff=10240, d_kv=64, num_heads=64, num_layers=2)
        )
    example = {"input_ids": IDS, "decoder_input_ids": IDS}
    for length, published in ((5, 20_480), (100, 409_600)):
        assert count(model, PromptTuning(length=length, init="normal"), example=example) == published
