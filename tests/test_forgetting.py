"""The benchmark of forgetting runs, on a small model, and shows what it measured."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from benchmarks import forgetting
from benchmarks.gpt import GPTConfig
from benchmarks.text import Domain

ROOT = Path(__file__).parent.parent


@pytest.fixture
def small(monkeypatch):
    generator = torch.Generator().manual_seed(0)

    def domain(name, step):
        # each token follows from the one before: quickly learned, and in another way in each domain
        text = (torch.randint(64, (1,), generator=generator) + step * torch.arange(3000)) % 64
        return Domain(name=name, train=text[:2400], held_out=text[2400:])

    gpt = GPTConfig(vocabulary=64, width=16, layers=2, heads=2)
    budget = dataclasses.replace(forgetting.QUICK, gpt=gpt, pretrain_steps=30, steps=6, context=16, windows=4)
    monkeypatch.setattr(forgetting, "QUICK", budget)
    monkeypatch.setattr(forgetting, "standard_library", lambda: (domain("docstrings", 1), domain("code", 3)))


def test_every_remedy_on_every_method_is_in_table_file_and_figure(small, tmp_path, capsys):
    assert forgetting.main(["--quick", "--looks", "2", "--samples", "4", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert (tmp_path / "forgetting.txt").read_text(encoding="utf-8") in shown
    assert (tmp_path / "forgetting.png").stat().st_size > 10_000
    results = json.loads((tmp_path / "forgetting.json").read_text())
    rows = {(row["method"], row["remedy"]): row["points"] for row in results["rows"]}
    assert set(rows) == {(m, r) for m in forgetting.METHODS for r in forgetting.REMEDIES}
    for method in forgetting.METHODS:
        assert [point["step"] for point in rows[method, "nothing"]] == [3, 6]
        # every remedy does something
        last = [rows[method, remedy][-1]["losses"]["code"] for remedy in forgetting.REMEDIES]
        assert len(set(last)) == len(last)
    assert all(f"{method:<6}  {remedy}" in shown for method, remedy in rows)


def test_the_page_shows_the_committed_results():
    results = json.loads((ROOT / "benchmarks/results/forgetting.json").read_text())
    shown = (ROOT / "benchmarks/results/forgetting.txt").read_text(encoding="utf-8")
    assert str(forgetting.table(results)) + "\n" == shown
    assert shown in (ROOT / "docs/training.md").read_text(encoding="utf-8")
    assert results["remedies"] == {n: dataclasses.asdict(r) for n, r in forgetting.REMEDIES.items()}
