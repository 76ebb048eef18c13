"""``python -m peftlib.train sft``: from files to a tuning, alone or in several processes; mistakes in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

import peftlib
from peftlib.container import read
from peftlib.train.cli import main
from tests.ranks import ROOT

MODEL = """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(258, 16), nn.GRU(16, 16, batch_first=True), nn.Linear(16, 258)
        self.up = nn.Linear(16, 16)

    def forward(self, ids):
        return self.head(self.up(self.mix(self.embed(ids))[0]).tanh())

def build():
    torch.manual_seed(5)
    return Model()

def small():
    return nn.Sequential(nn.Embedding(100, 8), nn.Linear(8, 100))

def nothing():
    return None

def breaks():
    raise KeyError("weights")
"""
PAIRS = {"天": "地", "上": "下", "大": "小", "up": "down", "in": "out"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.py").write_text(MODEL)
    rows = [json.dumps({"prompt": q, "completion": a}, ensure_ascii=False) for q, a in PAIRS.items()]
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows), encoding="utf-8")
    preference = {"prompt": "a", "chosen": "b", "rejected": "c"}
    (tmp_path / "preferences.jsonl").write_text(json.dumps(preference))
    (tmp_path / "junk.json").write_text("{")
    return tmp_path


BASIC = ["sft", "--model", "model.py:build", "--data", "pairs.jsonl", "--targets", "up", "head"]


def test_a_file_of_pairs_becomes_a_tuning(folder, capsys):
    options = ["--eval-share", "0.2", "--epochs", "4", "--batch", "2", "--accumulate", "2", "--lr", "0.02"]
    assert main([*BASIC, *options, "--schedule", "linear", "--patience", "9", "--plot", "loss.svg"]) == 0
    said = capsys.readouterr().out
    assert "4 examples to train on" in said
    assert "1 to evaluate on" in said
    assert "eval_loss" in said
    assert "LoRA" in said
    assert (folder / "loss.svg").exists()
    sys.path.insert(0, str(folder))
    sys.modules.pop("model", None)
    import model

    fresh = model.build()
    tuning = peftlib.load(fresh, "tuned/tuning.safetensors")
    assert set(tuning.sites) == {"up", "head"}
    assert any(p.any() for name, p in tuning.named_parameters() if name.endswith("lora.b"))
    assert len((folder / "tuned" / "log.jsonl").read_text().splitlines()) == 4


def test_it_goes_on_where_it_stopped(folder, capsys):
    assert main([*BASIC, "--steps", "6", "--out", "whole", "--schedule", "constant"]) == 0
    assert main([*BASIC, "--steps", "3", "--out", "parts", "--schedule", "constant"]) == 0
    assert main([*BASIC, "--steps", "6", "--out", "parts", "--schedule", "constant", "--resume"]) == 0
    for key, value in read("whole/tuning.safetensors")[1].items():
        assert torch.equal(value, read("parts/tuning.safetensors")[1][key])
    assert main([*BASIC, "--out", "parts"]) == 2
    assert "--resume goes on with it" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["full", "dora", "bitfit", "prompt"])
def test_methods_by_name(folder, method):
    (folder / "model.py").write_text(
        MODEL.replace("nn.GRU(16, 16, batch_first=True)", "nn.Identity()").replace("))[0])", ")))")
    )
    basic = ["sft", "--model", "model.py:build", "--data", "pairs.jsonl", "--rank", "2"]
    assert main([*basic, "--method", method, "--steps", "1", "--virtual", "2"]) == 0


WRONG = [
    (["--model", "none.py:build"], "give an existing file and a function"),
    (["--model", "model.py:none"], "has no function 'none'"),
    (["--model", "junk.json:build"], "junk.json is no Python file"),
    (["--model", "model.py:nothing"], "gave NoneType, not an nn.Module"),
    (["--model", "model.py:breaks"], "failed (KeyError: 'weights')"),
    (["--model", "model.py:small", "--targets", "1"], "cannot take token ids of shape"),
    (["--data", "none.jsonl"], "There is no file 'none.jsonl'"),
    (["--data", "."], "cannot be read"),
    (["--data", "junk.json"], "junk.json, line 1: this is not JSON"),
    (["--data", "preferences.jsonl"], "preferences are not for sft"),
    (["--targets", "q_proj"], "'q_proj' matches nothing"),
    (["--tokenizer", "none"], "there is no such file or folder"),
    (["--tokenizer", "junk.json"], "--tokenizer junk.json cannot be read"),
    (["--length", "2"], "no example is left"),
    (["--eval-share", "2"], "--eval-share 2.0: give a share"),
    (["--eval-share", "0.99"], "leaves nothing to train on"),
    (["--patience", "2"], "--patience counts evaluations"),
    (["--steps", "2", "--epochs", "2"], "not both"),
    (["--epochs", "0"], "nothing to do"),
    (["--lr", "-1"], "--lr or --weight-decay: Invalid learning rate"),
    (["--clip", "-1"], "clip=-1.0"),
    (["--batch", "0"], "at least one of each"),
    (["--device", "nowhere"], "--device nowhere is not to be had here"),
    (["--parallel", "ddp"], "start the program with torchrun"),
    (["--plot", "loss.nothing", "--steps", "1"], "cannot be drawn"),
]


@pytest.mark.parametrize("options, message", WRONG, ids=[" ".join(options) for options, _ in WRONG])
def test_mistakes_are_named_in_a_line(folder, capsys, options, message):
    if options[0] == "--tokenizer":
        pytest.importorskip("tokenizers")
    assert main([*BASIC, *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--rank", "--dim", "--virtual"])
def test_sizes_are_positive(folder, capsys, option):
    with pytest.raises(SystemExit, match="2"):
        main([*BASIC, option, "0"])
    assert f"argument {option}: 0 is below 1" in capsys.readouterr().err


def test_a_tokenizers_file(folder, capsys):
    tokenizers = pytest.importorskip("tokenizers")
    letters = {c: i for i, c in enumerate(dict.fromkeys("".join([*PAIRS, *PAIRS.values()])))}
    own = tokenizers.Tokenizer(tokenizers.models.WordLevel({**letters, "</s>": len(letters)}))
    own.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    own.save("tokenizer.json")
    assert main([*BASIC, "--tokenizer", "tokenizer.json", "--steps", "1"]) == 2
    assert "has no end token" in capsys.readouterr().err
    assert main([*BASIC, "--tokenizer", "tokenizer.json", "--eos", "</s>", "--steps", "1"]) == 0


def test_under_torchrun_it_is_one_training(folder):
    options = ["--steps", "3", "--batch", "4", "--schedule", "constant"]
    assert main([*BASIC, *options, "--out", "one"]) == 0
    launcher = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    command = [*launcher, "-m", "peftlib.train", *BASIC, *options, "--out", "two", "--parallel", "fsdp"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("examples to train on") == 1
    one, two = (read(f"{place}/tuning.safetensors")[1] for place in ("one", "two"))
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-6)
