"""The savings run: its texts, its model, what it refuses, and a small run from end to end."""

from __future__ import annotations

import email
import json
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import savings
from benchmarks.figure import draw
from benchmarks.gpt import GPT, GPTConfig
from benchmarks.inputs import InputError, check_language_model, load_factory
from benchmarks.progress import Progress
from benchmarks.text import Domain, batches, check_length, spread, standard_library, text_file, utf8

TINY = GPTConfig(width=32, layers=2, heads=2)

MODEL = textwrap.dedent("""
    from dataclasses import dataclass

    import torch
    import torch.nn.functional as F
    from torch import nn


    @dataclass
    class Output:
        logits: torch.Tensor


    class Own(nn.Module):
        def __init__(self, causal=True, vocabulary=256):
            super().__init__()
            self.causal = causal
            self.embedding = nn.Embedding(256, 32)
            self.qkv = nn.Linear(32, 96)
            self.out = nn.Linear(32, 32)
            self.decode = nn.Linear(32, vocabulary)

        def forward(self, ids):
            x = self.embedding(ids)
            q, k, v = self.qkv(x).unsqueeze(1).chunk(3, dim=-1)
            x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).squeeze(1))
            return Output(self.decode(x))


    def build():
        torch.manual_seed(0)
        return Own()


    def sees_ahead():
        return Own(causal=False)


    def too_small():
        return Own(vocabulary=100)


    class HandWritten(Own):
        def forward(self, ids):
            x = self.embedding(ids)
            q, k, v = self.qkv(x).chunk(3, dim=-1)
            later = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
            x = x + self.out((q @ k.mT).masked_fill(later, float("-inf")).softmax(-1) @ v)
            return self.decode(x)


    def hand_written():
        return HandWritten()


    def no_module():
        return 3


    def raises():
        raise RuntimeError("no weights here")
""")


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(MODEL)
    return path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog, again and again.\n" * 200)
    return path


def run(*args: object) -> int:
    return savings.main([str(arg) for arg in args])


def refusal(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """The message with which a command line is refused (exit status 2)."""
    with pytest.raises(SystemExit) as stopped:
        run(*args)
    assert stopped.value.code == 2
    return capsys.readouterr().err


# --- texts


def test_domains_are_split_by_file_and_do_not_share_text(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"m{number}.py").write_text(f'"""Words {number}."""\nvalue = {number}  # code {number}\n')
    prose, code = standard_library(tmp_path)
    assert prose.name == "docstrings"
    assert code.name == "code"
    seen = set()
    for part in (code.train, code.held_out):
        decoded = bytes(part.tolist()).decode()
        assert '"""' not in decoded
        assert "Words" not in decoded
        numbers = {line.split()[-1] for line in decoded.splitlines()}
        assert numbers
        assert not numbers & seen
        seen |= numbers
    assert len(seen) == 40
    assert "value" not in bytes(prose.train.tolist()).decode()


def test_split_does_not_move_when_files_come_and_go(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"m{number}.py").write_text(f'"""{number}"""\nx = {number}\n')
    before = standard_library(tmp_path)[1].held_out.tolist()
    (tmp_path / "new.py").write_text('"""new"""\ny = 1\n')
    (tmp_path / "template.py").write_text("class {{name}}:\n")
    (tmp_path / "bytes.py").write_bytes(b'x = "\xff"\n')
    after = bytes(standard_library(tmp_path)[1].held_out.tolist()).decode()
    assert bytes(before).decode() in after.replace("y = 1\n", "")


def test_no_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="too few Python modules"):
        standard_library(tmp_path)


def test_text_file_holds_out_its_last_tenth(tmp_path: Path) -> None:
    path = tmp_path / "digits.txt"
    path.write_text("0123456789" * 10)
    domain = text_file(path)
    assert domain.held_out.tolist() == utf8("0123456789")
    assert len(domain.train) == 90


def test_batches_repeat_with_their_seed_and_hold_neighbouring_tokens() -> None:
    train = torch.arange(1000)
    first, again, other = (
        torch.cat(list(batches(train, steps=3, batch=4, context=7, seed=seed))) for seed in (5, 5, 6)
    )
    assert first.shape == (12, 8)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert (first.diff(dim=1) == 1).all()


@pytest.mark.parametrize("length, expected", [(8, 1), (80, 5), (33, 4)])
def test_held_out_windows_do_not_overlap(length: int, expected: int) -> None:
    windows = spread(torch.arange(length), count=5, context=7)
    assert windows.shape == (expected, 8)
    assert windows.flatten().unique().numel() == windows.numel()


# --- the model


def test_gpt_is_causal_and_counts_what_it_says() -> None:
    model = GPT(TINY)
    check_language_model(model, torch.randint(256, (2, 12)), 255)
    block = 4 * (32 * 32 + 32) + 2 * 4 * 32 * 32 + 4 * 32 + 32 + 2 * 2 * 32
    assert sum(p.numel() for p in model.parameters()) == 2 * 256 * 32 + 256 + 2 * 32 + 2 * block


def test_gpt_hears_the_order_of_its_input() -> None:
    model = GPT(TINY).eval()
    ids = torch.randint(256, (1, 16))
    with torch.no_grad():
        logits = model(ids)
        swapped = model(torch.cat([ids[:, 1:2], ids[:, :1], ids[:, 2:]], dim=1))
    assert not torch.allclose(logits[:, -1], swapped[:, -1], atol=1e-6)


def test_gpt_refuses_odd_heads() -> None:
    with pytest.raises(ValueError, match="even width"):
        GPTConfig(width=30, heads=6)


# --- what is refused


def test_bad_paths_and_factories_are_named(
    model_file: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ("--out", tmp_path / "out")
    assert "expected a Python file and a function" in refusal(
        capsys, "--model", "own.py", "--data", text, *out
    )
    assert "there is no file" in refusal(capsys, "--model", tmp_path / "no.py:build", "--data", text, *out)
    err = refusal(capsys, "--model", f"{model_file}:biuld", "--data", text, *out)
    assert "no function biuld" in err
    assert "build" in err
    assert "returned int" in refusal(capsys, "--model", f"{model_file}:no_module", "--data", text, *out)
    assert "no weights here" in refusal(capsys, "--model", f"{model_file}:raises", "--data", text, *out)
    assert "--model needs --data" in refusal(capsys, "--model", f"{model_file}:build", *out)


def test_bad_texts_are_named(model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = ("--model", f"{model_file}:build", "--out", tmp_path / "out", "--data")
    assert "cannot read" in refusal(capsys, *own, tmp_path / "no.txt")
    for name, content, message in (
        ("empty.txt", b" \n", "is empty"),
        ("short.txt", b"too short to cut into windows", "training part has 27 tokens"),
        ("binary.txt", b"\xff\xfe\x00\x01" * 100, "is not UTF-8"),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        assert message in refusal(capsys, *own, path)


def test_models_that_cannot_be_scored_are_refused(
    model_file: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rest = ("--data", text, "--out", tmp_path / "out")
    assert "attention causal" in refusal(capsys, "--model", f"{model_file}:sees_ahead", *rest)
    assert "only 100 entries" in refusal(capsys, "--model", f"{model_file}:too_small", *rest)


def test_forward_of_another_shape_is_refused() -> None:
    with pytest.raises(InputError, match=r"\(B, T, V\) logits"):
        check_language_model(nn.Sequential(nn.Embedding(8, 4), nn.Flatten()), torch.zeros(2, 3).long(), 7)
    with pytest.raises(InputError, match=r"IndexError.*\[4\]"):
        check_language_model(nn.Embedding(4, 8), torch.full((1, 3), 7), 7)


@pytest.mark.parametrize(
    "args, message",
    [
        (["--methods", "lora,lore"], "unknown method lore"),
        (["--rate", "lora"], "expected METHOD=RATE"),
        (["--rate", "nothing=1"], "unknown method nothing"),
        (["--steps", "1"], "--steps 1: at least 3"),
        (["--batch", "0"], "--batch 0: at least 1"),
    ],
)
def test_bad_options_are_refused(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert message in refusal(capsys, *args, "--out", tmp_path / "out")


def test_a_text_needs_one_window_in_each_part() -> None:
    check_length([Domain(name="fits", train=torch.zeros(9), held_out=torch.zeros(9))], 8)
    with pytest.raises(InputError, match="its training part has 8 tokens"):
        check_length([Domain(name="short", train=torch.zeros(8), held_out=torch.zeros(9))], 8)


def test_the_factory_may_bring_its_own_encoding(model_file: Path) -> None:
    model_file.write_text(MODEL + "\n\ndef encode(text):\n    return [ord(c) % 7 for c in text]\n")
    _, encode = load_factory(f"{model_file}:build")
    assert encode("ab") == [97 % 7, 98 % 7]


# --- while it runs, and without the extras


def test_progress_is_plain_lines_without_tqdm(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with Progress(2, "training") as progress:
        progress.step("loss 2.0")
        progress.step("loss 1.0")
    assert capsys.readouterr().err.splitlines() == ["training: 0/2 in 0 s", "training: 2/2 in 0 s loss 1.0"]


def test_no_figure_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install 'peftlib[plot]'" in draw({}, tmp_path / "savings.png")
    assert not (tmp_path / "savings.png").exists()


# --- from end to end


def test_own_module_end_to_end(
    model_file: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    status = run(
        *("--model", f"{model_file}:build", "--data", text, "--general", model_file, "--out", out),
        *("--steps", 30, "--batch", 4, "--context", 32),
    )
    shown = capsys.readouterr()
    results = json.loads((out / "savings.json").read_text())
    assert status == 0, shown.err
    assert not results["refused"]
    assert [row["method"] for row in results["rows"]] == list(savings.CONTESTANTS)
    full = results["rows"][0]
    for row in results["rows"]:
        assert row["losses"]["text.txt"] < results["base"]["losses"]["text.txt"]
        assert set(row["losses"]) == {"text.txt", "own.py"}
        assert row["file_bytes"] == (out / f"{row['method']}.safetensors").stat().st_size
        assert row["peak_bytes"] > row["optimizer_bytes"] > 0
        assert row["method"] in shown.out
    assert full["share"] == 1
    # AdamW: two moments as large as what is trained, and a step count
    assert 2 * 4 * full["trained"] <= full["optimizer_bytes"] <= 2.1 * 4 * full["trained"]
    assert (out / "savings.png").stat().st_size > 0
    assert "1 threads" in (out / "savings.txt").read_text()


def test_pretraining_end_to_end_and_from_its_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        savings,
        "QUICK",
        savings.Budget(gpt=TINY, pretrain_steps=20, steps=20, batch=4, context=32, windows=16),
    )
    monkeypatch.setattr(savings, "standard_library", lambda: standard_library(Path(email.__file__).parent))
    args = ("--quick", "--methods", "full,lora", "--out", tmp_path)
    assert run(*args) == 0
    assert "pretraining on docstrings" in capsys.readouterr().err
    first = json.loads((tmp_path / "savings.json").read_text())
    assert run(*args) == 0
    assert "pretraining on docstrings" not in capsys.readouterr().err
    again = json.loads((tmp_path / "savings.json").read_text())
    assert first["base"] == again["base"]
    assert [row["losses"] for row in first["rows"]] == [row["losses"] for row in again["rows"]]
    (cached,) = tmp_path.glob("pretrained-*.safetensors")
    cached.write_bytes(b"damaged")
    assert run(*args) == 0
    assert "pretraining on docstrings" in capsys.readouterr().err


def test_methods_that_cannot_act_are_left_out_with_the_reason(
    model_file: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = (
        "--model",
        f"{model_file}:hand_written",
        "--data",
        text,
        "--out",
        tmp_path / "out",
        "--context",
        16,
    )
    # what was asked for by name and cannot be had is a failure; of all methods, those that can act take part
    assert run(*args, "--steps", 20, "--methods", "lora,prefix") == 1
    err = capsys.readouterr().err
    assert "prefix is left out: " in err
    results = json.loads((tmp_path / "out" / "savings.json").read_text())
    assert list(results["refused"]) == ["prefix"]
    assert [row["method"] for row in results["rows"]] == ["lora"]
    assert "did not fall" not in err
    assert run(*args, "--steps", 40, "--rate", "prompt=0.01", "--rate", "ptuning-v1=0.001") == 0
    assert set(json.loads((tmp_path / "out" / "savings.json").read_text())["refused"]) == {
        "prefix",
        "ptuning-v2",
    }
    assert "none of the methods can act on HandWritten" in refusal(capsys, *args, "--methods", "prefix")


def test_a_loss_that_does_not_fall_is_said_and_fails(
    model_file: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = run(
        *("--model", f"{model_file}:build", "--data", text, "--out", tmp_path / "out"),
        *("--steps", 3, "--batch", 1, "--context", 16, "--methods", "lora,bitfit", "--rate", "lora=0"),
    )
    assert status == 1
    assert "did not fall with: lora" in capsys.readouterr().err
