"""The planner from a shell: what it prints, what it leaves out, what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import peftlib
from peftlib.memory.cli import main

FILE = """
import torch
from torch import nn

def build():
    return nn.Sequential(nn.Embedding(50, 16), nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), nn.Linear(16, 50))

def broken():
    raise KeyError("weights")

def asks():
    return nn.Linear(2, int(torch.ones(3).sum().item()))

def lazy():
    return nn.Sequential(nn.Embedding(50, 16), nn.LazyLinear(3))

def images():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2))

number = 3
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my_model.py"
    path.write_text(FILE)
    return path


def test_the_command(file, tmp_path):
    command = [
        *(sys.executable, "-W", "error", "-m", "peftlib.memory", f"{file}:build"),
        *("--method", "lora", "--method", "full", "--rank", "2", "--batch", "4", "64", "--length", "8"),
        *("--budget", "100KiB", "--plot", str(tmp_path / "plan.png")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(peftlib.__file__).parent.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("One training step against 100.0 KiB (cuda)")
    assert "what helps" in done.stdout
    assert "█ weights" in done.stdout
    for name in ("plan.png", "plan-lora.png", "plan-full.png"):
        assert (tmp_path / name).stat().st_size > 1000
        assert name in done.stderr


def test_json_and_an_example_of_the_files_own(file, capsys):
    file.write_text(FILE + "def example(batch): return torch.zeros(batch, 3, dtype=torch.long)\n")
    arguments = [f"{file}:build", "--method", "lora", "--targets", "2", "--dtype", "bfloat16", "--json"]
    assert main([*arguments, "--checkpointing", "no", "--optimizer", "sgd", "--autocast", "bfloat16"]) == 0
    (choice,) = json.loads(capsys.readouterr().out)["choices"]
    assert (choice["method"], choice["length"], choice["optimizer"]) == ("lora", None, 0)


@pytest.mark.parametrize(
    "model, message",
    [
        ("nowhere.py:build", "give an existing file"),
        ("build", "give an existing file"),
        ("FILE:missing", "no function 'missing'"),
        ("FILE:number", "no function 'number'"),
        ("FILE:broken", "the factory raised KeyError: 'weights' (my_model.py, line 9)"),
        ("FILE:asks", "does not work on the meta device"),
        ("FILE:lazy", "without a shape yet, in '1'"),
        ("FILE:images", "define example(batch) in"),
    ],
)
def test_wrong_models(file, model, message, capsys):
    assert main([model.replace("FILE", str(file))]) == 2
    assert message in capsys.readouterr().err


def test_a_file_that_does_not_import(tmp_path, capsys):
    (tmp_path / "bad.py").write_text("import nothing_of_that_name")
    assert main([f"{tmp_path / 'bad.py'}:build"]) == 2
    assert "cannot be imported (ModuleNotFoundError" in capsys.readouterr().err


# --- what a new user gets wrong --------------------------------------------------------------------------------------


def run(file, text, capsys, *arguments):
    file.write_text(FILE + text)
    status = main([f"{file}:build", "--budget", "1MiB", "--checkpointing", "no", *arguments])
    return status, *capsys.readouterr()


def test_a_default_method_without_a_place_is_left_out(file, capsys):
    status, out, _ = run(file, "", capsys, "--length", "4")
    assert status == 0
    assert "without prefix: Sequential has no place for PrefixTuning" in out
    assert [line.split()[0] for line in out.splitlines()[3:5]] == ["full", "lora"]
    status, _, error = run(file, "", capsys, "--length", "4", "--method", "prefix")
    assert (status, "Sequential has no place for PrefixTuning" in error) == (2, True)
    status, _, error = run(file, "", capsys, "--length", "4", "--targets", "nowhere")
    assert (status, "'nowhere' matches nothing" in error) == (2, True)


@pytest.mark.parametrize("option", ["--batch", "--length", "--rank", "--dim", "--virtual"])
@pytest.mark.parametrize("size", ["0", "-3", "many"])
def test_sizes_are_positive(file, option, size, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([f"{file}:build", option, size])
    assert f"argument {option}: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "example, arguments, message",
    [
        (
            "def example(batch): return torch.zeros(batch, 3).long()",
            ["--length", "4"],
            "or leave out --length",
        ),
        (
            "def example(batch, length): return torch.zeros(batch, length).long()",
            [],
            "batch alone: give --length",
        ),
        ("def example(): return torch.zeros(2, 3).long()", [], "example() in the file cannot be called with"),
        ("example = torch.zeros(2, 3).long()", [], "example in the file is Tensor: make it a function"),
        ("def example(batch): return 1 / 0", [], "example(1) in the file raised ZeroDivisionError: division"),
    ],
)
def test_examples_that_do_not_fit_the_options(file, example, arguments, message, capsys):
    status, _, error = run(file, example, capsys, *arguments)
    assert (status, message in error) == (2, True), error


@pytest.mark.parametrize("length", [[], ["--length", "4"]])
def test_examples_may_have_a_length_of_their_own(file, length, capsys):
    example = "def example(batch, length=3): return torch.zeros(batch, length).long()"
    assert run(file, example, capsys, "--method", "full", *length)[0] == 0


@pytest.mark.parametrize(
    "name, message",
    [("no/such/x.png", "there is no folder"), ("x.foo", "ends in .png"), ("x", "ends in .png")],
)
def test_a_plot_is_refused_before_the_work(file, tmp_path, name, message, capsys, monkeypatch):
    monkeypatch.setattr("peftlib.memory.cli.plan_memory", None)
    status, _, error = run(file, "", capsys, "--plot", str(tmp_path / name))
    assert (status, message in error) == (2, True)


def test_a_file_that_is_no_python(tmp_path, capsys):
    (tmp_path / "model.txt").write_text(FILE)
    assert main([f"{tmp_path / 'model.txt'}:build"]) == 2
    assert "is no Python file" in capsys.readouterr().err


def test_a_hint_from_the_shell(file, capsys):
    text = """
class Asks(nn.Sequential):
    def forward(self, x):
        return super().forward(x) if x.any() else None
def asks(): return Asks(nn.Embedding(50, 16), nn.Linear(16, 16), nn.Linear(16, 4))
"""
    file.write_text(FILE.replace("def asks", "def other") + text)
    arguments = [f"{file}:asks", "--checkpointing", "no", "--method", "full", "--method", "lora"]
    assert main(arguments) == 2
    assert "hint=" in capsys.readouterr().err
    assert main([*arguments, "--hint", "true"]) == 0
    assert "got the hint's: True" in capsys.readouterr().out
    for wrong in ("maybe", "[1]"):
        with pytest.raises(SystemExit):
            main([*arguments, "--hint", wrong])
        assert "argument --hint: " in capsys.readouterr().err
