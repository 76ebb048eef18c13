"""An estimate for a GPU without one: the allocator's blocks, and the kernels that a CPU does not have."""

import contextlib
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import peftlib
from peftlib.memory import estimate_memory
from peftlib.memory.gpu_kernels import FLOAT_ON_CUDA, FLOAT_RESULT_ON_CUDA, WIDEST_ON_CUDA, GPUKernels
from tests.test_memory_estimate import tower

HALF = torch.bfloat16


def test_blocks_of_512_bytes():
    report = estimate_memory(nn.Linear(3, 3), torch.ones(1, 3), device="cuda")
    assert (report.device, report.trained_bytes, report.input_bytes) == ("cuda", 1024, 512)
    assert any("not yet measured on a GPU" in note for note in report.notes)


class Attends(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.q, self.dropout = nn.Linear(8, 8), dropout

    def forward(self, x):
        q = self.q(x).unflatten(-1, (2, 4)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q, dropout_p=self.dropout, is_causal=True)


@pytest.mark.parametrize("again", [False, True])
def test_attention_with_dropout_keeps_no_scores_on_a_gpu(again):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Attends(0.1)

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False) if again else self.inner(x)

    x = torch.randn(1, 512, 8)
    scores = 2 * 512 * 512 * 4
    assert estimate_memory(Outer(), x).peak_bytes > scores
    assert estimate_memory(Outer(), x, device="cuda").peak_bytes < scores


def test_the_fused_norm_keeps_its_input_and_one_number_a_row():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm = (
                nn.Linear(128, 128, dtype=torch.bfloat16),
                nn.RMSNorm(128, dtype=torch.bfloat16),
            )

        def forward(self, x):
            return self.norm(self.first(x)).sum()

    x = torch.randn(4096, 128).bfloat16()
    fused, plain = (estimate_memory(Normed(), x, device=d, loss=lambda y: y) for d in ("cuda", "cpu"))
    assert fused.modules["first"] == 4096 * 128 * 2
    assert fused.modules["norm"] == 4096 * 4
    assert plain.peak_bytes > fused.peak_bytes + 4096 * 128 * 2


def test_the_optimizer_of_a_gpu_works_on_all_weights_at_once():
    model, x = tower(64, 6), torch.randn(1, 64)
    cpu, cuda = estimate_memory(model, x), estimate_memory(model, x, device="cuda")
    assert cpu.peak_at == cuda.peak_at == "optimizer step"
    assert cuda.temporary_bytes >= cuda.trained_bytes > cpu.temporary_bytes


# --- attention out of sight ----------------------------------------------------------------------------------------

LENGTH = 256
SCORES = 2 * LENGTH * LENGTH * 4  # of two heads


@pytest.mark.parametrize("seen", [True, False], ids=["attached", "closed"])
def test_a_closed_encoder_keeps_no_scores_on_a_gpu(seen):
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
    if seen:
        peftlib.attach(layer, peftlib.LoRA(rank=2))
    x = torch.randn(1, LENGTH, 16)
    assert estimate_memory(layer, x).peak_bytes > SCORES
    assert estimate_memory(layer, x, device="cuda").peak_bytes < SCORES


class Weights(nn.Module):
    def __init__(self, need_weights):
        super().__init__()
        self.attn, self.need_weights = (
            nn.MultiheadAttention(16, 2, dropout=0.1, batch_first=True),
            need_weights,
        )

    def forward(self, x):
        return self.attn(x, x, x, need_weights=self.need_weights)[0]


def test_closed_attention_keeps_scores_only_where_its_weights_are_asked_for():
    x = torch.randn(1, LENGTH, 16)
    fused, weights = (estimate_memory(Weights(need), x, device="cuda") for need in (False, True))
    assert fused.peak_bytes < SCORES < weights.peak_bytes
    # softmax's result, dropout's, and its mask: of one byte, where a CPU's has four
    kept = weights.modules["attn"]
    assert 2.25 * SCORES <= kept < 2.5 * SCORES
    assert estimate_memory(Weights(True), x).modules["attn"] >= kept + 0.75 * SCORES


# --- CUDA's autocast -----------------------------------------------------------------------------------------------


def test_the_lists_are_torchs():
    header = Path(torch.__file__).parent / "include" / "ATen" / "autocast_mode.h"
    if not header.exists():
        pytest.skip("torch without headers")
    text = header.read_text()

    def listed(macro):
        body = re.search(rf"#define {macro}\(_\)(.*?)\n\n", text, re.DOTALL)[1]
        rows = re.findall(r"_\((?:ADD_NS\()?(\w+)\)?(?:,\s*\"?([\w.]+)\"?)?", body)
        names = {(name, (more or "").removeprefix(f"{name}.")) for name, more in rows}
        return {
            name
            for name, overload in names
            if not on_cpu(f"aten::{name}" + (f".{overload}" if overload else ""))
        }

    def on_cpu(operator):
        return torch._C._dispatch_has_kernel_for_dispatch_key(operator, "AutocastCPU")

    assert listed("AT_FORALL_FP32") | {"norm"} == set(FLOAT_ON_CUDA)
    assert listed("AT_FORALL_FP32_SET_OPT_DTYPE") | {"prod"} == set(FLOAT_RESULT_ON_CUDA)
    assert listed("AT_FORALL_PROMOTE") | {"grid_sampler"} == set(WIDEST_ON_CUDA)


X = torch.randn(4, 4, dtype=HALF)
CALLS = {
    "softmax": lambda: X.softmax(-1),
    "F.softmax": lambda: F.softmax(X, -1),
    "log_softmax": lambda: F.log_softmax(X, -1),
    "layer_norm": lambda: nn.LayerNorm(4)(X),
    "group_norm": lambda: nn.GroupNorm(2, 4)(X),
    "rms_norm": lambda: nn.RMSNorm(4)(X),
    "power": lambda: X**2,
    "inverse": lambda: 1 / X,
    "norm": lambda: X.norm(dim=-1),
    "sum": lambda: X.sum(-1),
    "logsumexp": lambda: torch.logsumexp(X, -1),
    "interpolate": lambda: F.interpolate(X[None, None], scale_factor=2, mode="bilinear"),
    "promoted": lambda: torch.addcmul(X, X, X.float()),
}
SAME = {
    "matmul": lambda: X.float() @ X,
    "asked for": lambda: X.softmax(-1, torch.bfloat16),
    "gelu": lambda: F.gelu(X),
    "mean": lambda: X.mean(),
}


@pytest.mark.parametrize("name", [*CALLS, *SAME])
def test_results_have_cudas_types(name):
    with torch.autocast("cpu", HALF), GPUKernels():
        assert (CALLS | SAME)[name]().dtype == (torch.float32 if name in CALLS else HALF)
    with GPUKernels(), contextlib.suppress(RuntimeError):  # without autocast types do not change
        assert name == "promoted" or (CALLS | SAME)[name]().dtype == HALF


def test_softmax_under_autocast_keeps_floats_on_a_gpu():
    class Scores(nn.Linear):
        def forward(self, x):
            return super().forward(x).softmax(-1)

    model, x = Scores(64, 1024), torch.randn(64, 64)
    cpu, cuda = (
        estimate_memory(model, x, autocast=HALF, device=device, optimizer=None).activation_bytes
        for device in ("cpu", "cuda")
    )
    assert cuda - cpu >= 64 * 1024 * 2


def test_what_cudnn_keeps_is_not_known():
    report = estimate_memory(nn.GRU(4, 4), torch.randn(3, 2, 4), device="cuda")
    assert any("cuDNN" in note for note in report.notes)
    assert not estimate_memory(nn.GRU(4, 4), torch.randn(3, 2, 4)).notes
