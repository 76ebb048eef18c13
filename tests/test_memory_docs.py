"""The tables of the memory page are what its code prints."""

import contextlib
import io
import types
from pathlib import Path

import pytest
import torch

import peftlib
from tests.test_docs import FENCE

PAGE = Path(__file__).parent.parent / "docs" / "memory.md"


def test_what_the_page_shows_is_what_its_blocks_print(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text(encoding="utf-8")
    namespace, printed, shown = types.ModuleType("page_memory").__dict__, [], []
    for match in FENCE.finditer(text):
        if match["info"] == "python":
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                exec(compile(match["body"], PAGE, "exec"), namespace)
            printed += [output.getvalue()] if output.getvalue() else []
        elif match["info"] == "text":
            shown.append(match["body"])
    assert shown == printed


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
