"""The benchmark of many tunings runs, on small models, and shows what it measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import tunings


@pytest.fixture(autouse=True)
def small(monkeypatch):
    make = tunings.make_model
    monkeypatch.setattr(tunings, "make_model", lambda blocks=2, width=16: make(blocks=1, width=16))


def test_it_prints_and_saves_a_row_for_each_number_of_tunings(tmp_path, capsys):
    assert tunings.main(["--counts", "1,3", "--rounds", "1", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert (tmp_path / "tunings.txt").read_text() == shown
    results = json.loads((tmp_path / "tunings.json").read_text())
    assert [row["tunings"] for row in results["rows"]] == [1, 3]
    for row in results["rows"]:
        assert all(
            row[name] > 0 for name in ("load", "switch", "disabled", "route", "save", "forward", "read")
        )


def test_it_measures_hf_peft_as_well(tmp_path):
    pytest.importorskip("peft")
    (row,) = tunings.theirs([2], tmp_path, 1)
    assert row["tunings"] == 2
    assert min(row["load"], row["switch"], row["disabled"], row["save"]) > 0


def test_the_page_shows_the_committed_results():
    root = Path(__file__).parent.parent
    assert (root / "benchmarks/results/tunings.txt").read_text() in (root / "docs/serving.md").read_text()
