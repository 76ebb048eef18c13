"""The history as table, curves and lines."""

from __future__ import annotations

import json
import math
import sys

import pytest

from peftlib import PeftlibError
from peftlib.train import History, JsonlLog, TensorBoardLog


def history(steps=50):
    rows = [
        {"step": i, "epoch": 0, "rate": 0.1, "loss": 1 / (i + 1), "norm": 1.0, "targets": 4.0, "made": i != 3}
        for i in range(steps)
    ]
    rows[7]["eval_loss"] = 0.5
    return History(rows=rows, seconds=[0.1] * steps)


def test_the_table_has_few_rows_and_every_evaluation():
    lines = str(history()).splitlines()
    assert lines[0].split() == ["step", "epoch", "rate", "loss", "norm", "targets", "eval_loss"]
    steps = [int(line.split()[0]) for line in lines[2:-1]]
    assert {0, 7, 49} <= set(steps)
    assert len(steps) <= 22
    assert lines[-1] == "not finite and left out: steps [3]"
    assert str(History()) == "(no steps)"


def test_curves(tmp_path):
    pytest.importorskip("matplotlib")
    history().plot(tmp_path / "loss.svg", title="a run")
    text = (tmp_path / "loss.svg").read_text()
    assert text.startswith("<?xml")
    with pytest.raises(PeftlibError, match=r"No row has eval_f1; there are: step, .*eval_loss"):
        history().plot(tmp_path / "no.svg", ["eval_f1"])


def test_columns():
    assert history().column("eval_loss") == [(7, 0.5)]
    assert history().last("loss") == 1 / 50
    with pytest.raises(PeftlibError, match="No row has 'accuracy'"):
        history().last("accuracy")
    assert history() == History(rows=history().rows, seconds=[9.9])
    assert history() != history(49)
    assert history() != history().rows
    nan = [History(rows=[{"loss": math.nan, "made": False}]) for _ in range(2)]
    assert nan[0] == nan[1]
    assert nan[0] != History(rows=[{"loss": 1.0, "made": False}])
    assert json.loads(json.dumps(history().to_dict()))["seconds"] == [0.1] * 50


def test_the_log_takes_away_what_is_made_again_and_half_a_line(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n{"ste')
    log = JsonlLog(path)
    log({"step": 1, "loss": 2.0})
    log({"step": 2, "loss": 1.0})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 0},
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": 1.0},
    ]


def test_tensorboard_gets_every_number(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = TensorBoardLog(tmp_path)
    for row in history(9).rows:
        log(row)
    found = EventAccumulator(str(tmp_path)).Reload()
    assert set(found.Tags()["scalars"]) == {"epoch", "rate", "loss", "norm", "targets", "made", "eval_loss"}
    losses = found.Scalars("loss")
    assert [e.step for e in losses] == list(range(9))
    assert [e.value for e in losses] == pytest.approx([1 / (i + 1) for i in range(9)])


def test_tensorboard_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(PeftlibError, match="pip install tensorboard"):
        TensorBoardLog(tmp_path)({"step": 0})
