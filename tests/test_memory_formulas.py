"""The classical accountings: their published totals, and what a measurement of the same thing gives."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from peftlib.errors import PeftlibError
from peftlib.memory import estimate_memory, measure_memory
from peftlib.memory.formulas import (
    kv_cache_bytes,
    mixed_precision_adam_bytes,
    quantized_bytes,
    transformer_activation_bytes,
)

GB = 1e9

# --- published totals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parameters, ranks, stage, published",
    [
        # ZeRO, section 3.1: 1.5 billion parameters "at least 24 GB"
        (1.5e9, 1, 0, 24.0),
        # figure 1 and table 1: 7.5 billion over 64 ranks; 128 billion over 1024 (table 1)
        (7.5e9, 64, 0, 120.0),
        (7.5e9, 64, 1, 31.4),
        (7.5e9, 64, 2, 16.6),
        (7.5e9, 64, 3, 1.88),
        (128e9, 1024, 1, 513.0),
        (128e9, 1024, 2, 257.0),
        (128e9, 1024, 3, 2.0),
        (1e12, 1024, 3, 15.6),
    ],
)
def test_zero(parameters, ranks, stage, published):
    assert mixed_precision_adam_bytes(int(parameters), ranks=ranks, stage=stage) / GB == pytest.approx(
        published, 0.01
    )


GPT3 = {"length": 2048, "batch": 1, "width": 12288, "heads": 96, "layers": 96}
MT_NLG = {"length": 2048, "batch": 1, "width": 20480, "heads": 128, "layers": 105}


def test_korthikanti():
    per_value = lambda model, **how: (  # noqa: E731
        transformer_activation_bytes(**model, **how) / (model["length"] * model["width"] * model["layers"])
    )
    # section 5: 5as/h is 80 for GPT-3 and 64 for MT-NLG, so that selective recomputation saves 70 % and 65 %
    assert per_value(GPT3) == 34 + 80
    assert per_value(MT_NLG) == 34 + 64
    for model, saved in ((GPT3, 0.70), (MT_NLG, 0.65)):
        assert 1 - per_value(model, recompute="selective") / per_value(model) == pytest.approx(
            saved, abs=0.005
        )
    # table 2, per layer: tensor parallelism, sequence parallelism, both with selective recomputation, full
    assert per_value(GPT3, tensor_parallel=8) == 10 + 24 / 8 + 80 / 8
    assert per_value(GPT3, tensor_parallel=8, sequence_parallel=True) == 34 / 8 + 80 / 8
    assert per_value(GPT3, tensor_parallel=8, sequence_parallel=True, recompute="selective") == 34 / 8
    assert per_value(GPT3, recompute="full") == 2


def test_kv_cache():
    # PagedAttention, section 3: OPT-13B needs 800 KB a token, and 1.6 GB for a sequence of 2048
    opt = {"layers": 40, "kv_heads": 40, "head_width": 128}
    assert kv_cache_bytes(1, **opt) == 800 * 1024
    assert kv_cache_bytes(2048, **opt) / GB == pytest.approx(1.6, rel=0.05)
    # grouped queries: the 70B of Llama 2 has 8 key/value heads for 64, an eighth of the cache
    assert (
        kv_cache_bytes(1, layers=80, kv_heads=8, head_width=128)
        == kv_cache_bytes(1, layers=80, kv_heads=64, head_width=128) / 8
    )


def test_quantized():
    # QLoRA, section 3: 32/64 = 0.5 bits a parameter for scales, 8/64 + 32/(64 * 256) = 0.127 with double quantization
    bits = lambda **how: 8 * quantized_bytes(10**9, **how) / 10**9  # noqa: E731
    assert bits(double=False) == 4.5
    assert bits() == pytest.approx(4.127, abs=0.0005)
    # table 6 and section 1: a 65B base in less than 48 GB where 16-bit full fine-tuning takes more than 780
    assert quantized_bytes(65 * 10**9) / GB < 48 < 780 < mixed_precision_adam_bytes(65 * 10**9) / GB
    # 8 bits, one scale of two bytes for each row of 4096
    assert bits(bits=8, block=4096, double=False, scale_bytes=2) == pytest.approx(8 + 16 / 4096)


def test_wrong_sizes():
    with pytest.raises(PeftlibError, match="stage=4"):
        mixed_precision_adam_bytes(10, stage=4)
    with pytest.raises(PeftlibError, match="parameters=0"):
        mixed_precision_adam_bytes(0)
    with pytest.raises(PeftlibError, match="recompute='some'"):
        transformer_activation_bytes(**GPT3, recompute="some")
    with pytest.raises(PeftlibError, match="heads=0"):
        transformer_activation_bytes(**{**GPT3, "heads": 0})
    with pytest.raises(PeftlibError, match="tokens=-1"):
        kv_cache_bytes(-1, layers=1, kv_heads=1, head_width=1)
    with pytest.raises(PeftlibError, match="block=0"):
        quantized_bytes(10, block=0)


# --- against measurements --------------------------------------------------------------------------------------------


class Korthikanti(nn.Module):
    """The paper's layer: scores and dropout written down, everything in 16 bits."""

    def __init__(self, width, heads, fused=False):
        super().__init__()
        self.heads, self.fused = heads, fused
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = F.dropout((q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1), 0.1) @ v
        x = x + F.dropout(self.o(y.transpose(1, 2).flatten(2)), 0.1)
        return x + F.dropout(self.down(F.gelu(self.up(self.norm2(x)))), 0.1)


class Layers(nn.Module):
    def __init__(self, depth, width, heads, fused=False):
        super().__init__()
        self.layers = nn.ModuleList(Korthikanti(width, heads, fused) for _ in range(depth))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x.sum()


WIDTH, BATCH = 64, 2


def per_layer(heads=4, length=128, batch=BATCH, fused=False, **how):
    """Activation bytes that one more layer keeps, over s b h: head and tail of the model cancel."""
    x = torch.empty(batch, length, WIDTH, dtype=torch.bfloat16, device="meta")
    with torch.device("meta"):
        models = [Layers(depth, WIDTH, heads, fused).bfloat16() for depth in (3, 2)]
    deep, shallow = (
        estimate_memory(model, x, loss=lambda y: y, optimizer=None, **how).activation_bytes
        for model in models
    )
    return (deep - shallow) / (length * batch * WIDTH)


def formula(**how):
    return transformer_activation_bytes(batch=1, width=WIDTH, **how) / (how["length"] * WIDTH)


@pytest.mark.parametrize("heads, length", [(4, 128), (8, 128), (4, 256)])
def test_a_layer_keeps_what_the_formula_says_and_two_statistics_a_norm(heads, length):
    # what the formula leaves out: mean and deviation of each token in each of two norms, float32
    statistics = 2 * 2 * 4 / WIDTH
    assert per_layer(heads, length, device="cuda") == formula(heads=heads, length=length) + statistics


@pytest.mark.parametrize("heads, length", [(4, 96), (8, 96)])
def test_on_a_cpu_a_mask_of_dropout_is_as_wide_as_its_input(heads, length):
    # one byte more for each of the two masks of width h, and for the scores'; statistics in half precision
    more = 2 + heads * length / WIDTH + 2 * 2 * 2 / WIDTH
    assert per_layer(heads, length) == formula(heads=heads, length=length) + more


def test_fused_attention_keeps_one_number_a_row_for_all_scores():
    for length in (128, 384):
        assert per_layer(length=length, fused=True, device="cuda") == 34 + 2 * 2 * 4 / WIDTH + 4 * 4 / WIDTH


def test_full_recomputation_keeps_the_layers_input():
    # a batch beside which the weights' gradients are small, so that the peak is in the last layer
    assert per_layer(batch=128, checkpointing=True, device="cuda") == formula(
        heads=4, length=128, recompute="full"
    )


def test_adam_in_full_precision_is_also_sixteen_bytes():
    # another split of the 16: weights, gradients and two moments of 4 bytes each
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(8)))
    report = estimate_memory(model, torch.ones(1, 64))
    parameters = sum(p.numel() for p in model.parameters())
    assert report.peak_at == "optimizer step"
    kept = report.trained_bytes + report.gradient_bytes + report.optimizer_bytes
    assert kept == mixed_precision_adam_bytes(parameters) + 8 * 4  # and a count of steps for each weight
    real = measure_memory(lambda: model(torch.ones(1, 64)).sum().backward(), model=model)
    assert real.trained_bytes == 4 * parameters
