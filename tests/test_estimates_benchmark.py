"""The table of estimates beside a GPU's allocator: exact on a CPU, its verdict, and what it says without a GPU."""

import json

import pytest
import torch

from benchmarks import estimates
from benchmarks.estimates import METHODS, QUICK, WAYS, main, row
from peftlib.memory import MemoryReport


@pytest.mark.parametrize("way", WAYS)
def test_on_a_cpu_estimates_are_exact(way):
    found = row(QUICK, "lora", way, (2, 16), "cpu")
    assert found["estimate"] == found["tracker"] > 0
    assert found["within 5 %"] is None  # there is no allocator to compare with


def test_the_verdict(monkeypatch):
    def found(allocator):
        real = MemoryReport(peak_bytes=estimate, peak_at="forward", cuda_peak_bytes=round(allocator))
        monkeypatch.setattr(estimates, "measured", lambda *_: real)
        return row(QUICK, "full", "float32", (2, 16), "cpu")

    estimate = row(QUICK, "full", "float32", (2, 16), "cpu")["estimate"]
    assert found(estimate)["estimate / allocator"] == 1
    assert [found(estimate / by)["within 5 %"] for by in (0.94, 0.96, 1.04, 1.06)] == [
        False,
        True,
        True,
        False,
    ]


def test_without_a_gpu_the_estimates_stand_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(estimates, "METHODS", {"full": None, "lora": METHODS["lora"]})
    monkeypatch.setattr(estimates, "WAYS", {"float32": WAYS["float32"]})
    assert main(["--quick", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "estimates.txt").read_text()
    assert capsys.readouterr().out == text
    assert "not yet measured on a GPU" in text
    rows = json.loads((tmp_path / "estimates.json").read_text())["rows"]
    assert [one["method"] for one in rows] == ["full", "lora"]
    assert all(one["estimate"] > 0 and one["tracker"] is one["allocator"] is None for one in rows)
