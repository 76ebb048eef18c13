"""``python -m peftlib.train sft``: from files to a tuning, alone or in several processes; mistakes in one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

import peftlib
from peftlib.container import read
from peftlib.train.cli import main
from tests.ranks import ROOT

MODEL = """
import os, signal, torch
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

def interrupted(times=1):
    model = build()
    steps = []
    def press(model, args):
        # of five rows are the steps alone, not what looks at the model before
        steps.extend([None] * (len(args[0]) == 5))
        if len(steps) == 3:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
    model.register_forward_pre_hook(press)
    return model

def impatient():
    return interrupted(2)

class Short(Model):
    def forward(self, ids):
        if ids.shape[1] > 20:
            raise ValueError("20 places")
        return super().forward(ids)

def short():
    return Short()

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


def test_ctrl_c_ends_after_the_step_with_a_checkpoint(folder, capsys):
    options = ["--steps", "6", "--batch", "5", "--checkpoint-every", "2"]
    before = signal.getsignal(signal.SIGINT)
    assert main([*BASIC, *options, "--out", "whole"]) == 0
    for function, done in (("interrupted", 3), ("impatient", 2)):
        there = ["--model", f"model.py:{function}", "--out", function]
        assert main([*BASIC, *options, *there]) == 130
        assert (
            f"Stopped with a checkpoint after step {done}. The same command with --resume"
            in capsys.readouterr().err
        )
        assert not (folder / function / "tuning.safetensors").exists()
        assert main([*BASIC, *options, "--out", function, "--resume"]) == 0
        for key, value in read("whole/tuning.safetensors")[1].items():
            assert torch.equal(value, read(f"{function}/tuning.safetensors")[1][key])
    assert signal.getsignal(signal.SIGINT) is before


def test_intervals_are_an_epochs_at_most_500_or_as_asked(folder, monkeypatch):
    def evaluated(*options):
        assert main([*BASIC, "--eval", "pairs.jsonl", "--batch", "1", "--steps", "10", *options]) == 0
        lines = (folder / options[-1] / "log.jsonl").read_text().splitlines()
        return [row["step"] for row in map(json.loads, lines) if "eval_loss" in row]

    assert evaluated("--out", "a") == [4, 9]
    assert evaluated("--evaluate-every", "4", "--out", "b") == [3, 7, 9]
    monkeypatch.setattr("peftlib.train.sft.MOST", 3)
    assert evaluated("--out", "c") == [2, 5, 8, 9]


def test_no_clipping_is_zero(folder):
    for clip in ("0", "1e9", "1e-9"):
        assert main([*BASIC, "--steps", "2", "--weight-decay", "0.1", "--clip", clip, "--out", clip]) == 0
    none, much, little = (read(f"{clip}/tuning.safetensors")[1] for clip in ("0", "1e9", "1e-9"))
    assert all(torch.equal(value, much[key]) for key, value in none.items())
    assert not all(torch.equal(value, little[key]) for key, value in none.items())


@pytest.mark.parametrize("where", ["--data", "--eval"])
def test_an_example_that_does_not_fit_is_known_before_training(folder, capsys, where):
    lines = (folder / "pairs.jsonl").read_text(encoding="utf-8")
    long = json.dumps({"prompt": "q", "completion": "y" * 60})
    (folder / "long.jsonl").write_text(f"{lines}\n{long}", encoding="utf-8")
    options = ["--model", "model.py:short", "--steps", "1", "--batch", "1", where, "long.jsonl"]
    assert main([*BASIC, *options]) == 2
    assert "cannot take the longest example, of 62 tokens" in capsys.readouterr().err
    assert not (folder / "tuned").exists()


def test_a_mistake_is_told_by_one_process_of_a_machine(folder, capsys, monkeypatch):
    for local, times in (("0", 1), ("1", 0)):
        monkeypatch.setenv("LOCAL_RANK", local)
        assert main([*BASIC, "--data", "none.jsonl"]) == 2
        assert capsys.readouterr().err.count("There is no file") == times
        with pytest.raises(SystemExit):
            main([*BASIC, "--rank", "0"])
        assert capsys.readouterr().err.count("0 is below 1") == times


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
    (["--model", "model.py:small", "--targets", "1"], "beside that of the largest id, 257 of 258"),
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
    (["--clip", "-1"], "--clip -1: give the largest norm of the gradients, or 0 for none"),
    (["--lr", "1e30", "--schedule", "constant", "--clip", "0"], "gradients inf. Lower --lr, give --warmup"),
    (["--warmup", "-1"], "--warmup -1: of 3 step(s) in all, give a number from 0 to 2"),
    (["--warmup", "3"], "--warmup 3: of 3 step(s)"),
    (["--out", "pairs.jsonl"], "cannot be a training's folder: File exists"),
    (["--checkpoint-every", "0"], "checkpoint_every=0"),
    (["--batch", "0"], "at least one of each"),
    (["--device", "nowhere"], "--device nowhere is not to be had here"),
    (["--parallel", "ddp"], "start the program with torchrun"),
    (["--plot", "loss.nothing"], "cannot be drawn"),
    (["--plot", "none/loss.svg"], "there is no folder none"),
]


@pytest.mark.parametrize("options, message", WRONG, ids=[" ".join(options) for options, _ in WRONG])
def test_mistakes_are_named_in_a_line(folder, capsys, options, message):
    if options[0] == "--tokenizer":
        pytest.importorskip("tokenizers")
    assert main([*BASIC, *options]) == 2
    assert message in capsys.readouterr().err
    # a number that is not finite is known when it comes, all else before anything is written
    assert "--lr" in options[0] or not (folder / "tuned").exists()


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
