"""The memory page's 70B model needs neither time nor memory; what the page prints is checked with the other pages."""

import types
from pathlib import Path

import pytest
import torch

import peftlib
from tests.test_docs import FENCE

PAGE = Path(__file__).parent.parent / "docs" / "memory.md"


@pytest.mark.slow
@pytest.mark.parametrize("method", [None, peftlib.LoRA(rank=16)], ids=["full", "lora"])
def test_70b_needs_neither_time_nor_memory(method):
    resource = pytest.importorskip("resource")
    namespace = types.ModuleType("page_memory").__dict__
    exec(
        next(m["body"] for m in FENCE.finditer(PAGE.read_text(encoding="utf-8")) if m["info"] == "python"),
        namespace,
    )
    model = namespace["make"](width=8192, layers=80, heads=64, kv_heads=8, inner=28672)
    if method is not None:
        peftlib.attach(model, method)
    ids = torch.empty(1, 4096, dtype=torch.long, device="meta")
    report = peftlib.estimate_memory(model, ids, checkpointing=True)
    base = sum(p.nbytes for name, p in model.named_parameters() if "_peft" not in name)
    assert base == 2 * 68_976_648_192
    assert report.frozen_bytes + report.trained_bytes - report.tuning_bytes == base
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 2 * 10**9 / 1024  # KiB
