"""The RLHF run: its prompts and its scorer, the whole command on a small model, and the results that are shown."""

from __future__ import annotations

import dataclasses
import email
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import python_lines, rlhf, rlhf_report, rlhf_stages
from benchmarks.gpt import GPT, GPTConfig
from benchmarks.inputs import InputError
from benchmarks.python_lines import AFTER, BEFORE, LONGEST, NEWLINE, SHORTEST, cut, lines, parses, truth
from benchmarks.rlhf_memory import memory
from benchmarks.text import standard_library
from peftlib.train import Pair

ROOT = Path(__file__).parent.parent
EMAIL = Path(email.__file__).parent


@pytest.fixture(scope="module")
def parts():
    return lines(EMAIL)


# -- the task ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt, completion, score",
    [
        (b"print(", b"1)\n", 1.0),
        (b"print(", b"1)", 0.0),  # did not say that it ends
        (b"print(", b"1\n", 0.0),
        (b"print(", b"", 0.0),
        (b"print(", b"\n", 0.0),
        (b"print(", b"# 1)\n", 0.0),
        (b"print('", b"# 1')\n", 1.0),  # there it is no comment
        (b"return [x for x ", b"in y]\n", 1.0),
        (b"x = ", b"\x00\n", 0.0),
        (b"x = '", b"\xff'\n", 0.0),  # no UTF-8
        (b"x = '", "é'\n".encode(), 1.0),
        (b"x = ", b"(" * 500 + b")" * 500 + b"\n", 0.0),  # deeper than the parser goes
    ],
)
def test_the_scorer(prompt, completion, score):
    assert truth([list(prompt)], [list(completion)]) == [score]


def test_a_warning_of_the_parser_is_no_error(recwarn):
    assert truth([list(b"x = '")], [list(b"\\d'\n")]) == [1.0]
    assert not recwarn.list


@given(st.lists(st.binary(max_size=6), min_size=1, max_size=8))
def test_the_scorer_takes_any_bytes(completions):
    found = truth([list(b"f(")] * len(completions), [list(done) for done in completions])
    assert set(found) <= {0.0, 1.0}
    assert all(done.endswith(b"\n") for done, score in zip(completions, found, strict=True) if score)


def test_prompts_cannot_be_ended_cheaply_and_their_own_lines_parse(parts):
    for line in (line for part in parts for line in part):
        prompt, rest = (list(text.encode()) for text in (line.prompt, line.rest))
        assert truth([prompt] * 4, [[*rest, NEWLINE], rest, [NEWLINE], [*b"# no", NEWLINE]]) == [1, 0, 0, 0]
        assert SHORTEST <= len(prompt) + len(rest) <= LONGEST
        assert len(prompt) >= BEFORE
        assert len(rest) >= AFTER


def test_held_out_lines_are_of_other_files_and_never_trained_on(parts):
    train, apart = ({line.prompt + line.rest for line in part} for part in parts)
    assert len(train) == len(parts[0])
    assert len(apart) == len(parts[1])
    assert not train & apart
    assert len(train) > len(apart) > 10
    assert lines(EMAIL) == parts  # the same ones again
    assert lines(EMAIL, seed=1)[0] != parts[0]


def test_lines_come_from_code_and_not_from_docstrings(parts):
    text = "".join(path.read_text() for path in EMAIL.glob("**/*.py"))
    assert all(line.prompt + line.rest in text for line in parts[0])
    with pytest.raises(InputError, match="too few lines"):
        lines(ROOT / "docs")


def test_what_parses_everywhere_is_no_prompt():
    assert cut("a", python_lines.random.Random(0)) is None
    assert cut("continue # it all", python_lines.random.Random(0)) is None
    assert parses("continue # it all")


# -- the command -------------------------------------------------------------------------------------------------------

TINY = rlhf.Budget(
    gpt=GPTConfig(width=32, layers=1, heads=2), pretrain_steps=150, batch=4, context=32, sft_steps=60, sft_batch=16,
    drawn=48, tries=8, pairs=4, reward_steps=3, dpo_steps=2, ppo_steps=2, grpo_steps=2, completions=8, held_out=8,
    seeds=1,
)  # fmt: skip


@pytest.fixture
def small(monkeypatch, parts):
    monkeypatch.setattr(rlhf, "QUICK", TINY)
    monkeypatch.setattr(rlhf, "standard_library", lambda: standard_library(EMAIL))
    monkeypatch.setattr(rlhf, "lines", lambda: parts)


def test_the_whole_command(small, tmp_path, capsys):
    status = rlhf.main(["--quick", "--seeds", "2", "--out", str(tmp_path)])
    shown = capsys.readouterr()
    assert (tmp_path / "rlhf.txt").read_text(encoding="utf-8") in shown.out
    assert (tmp_path / "rlhf.png").stat().st_size > 10_000
    results = json.loads((tmp_path / "rlhf.json").read_text())
    assert [one["seed"] for one in results["seeds"]] == [0, 1]
    assert results["seeds"][0]["rows"] != results["seeds"][1]["rows"]
    for one in results["seeds"]:
        assert one["rows"]["sft"]["kl"] == 0
        for name in rlhf.ALGORITHMS:
            row = one["rows"][name]
            assert len(row["true"]) == 8
            # it moved; GRPO may find groups in which all are equal
            assert row["kl"] != 0 or name == "grpo"
            assert all(math.isfinite(row[key]) for key in ("learned", "kl", "bytes"))
        for name in ("ppo", "grpo"):
            curve = one["curves"][name]
            assert len(curve) == 2
            # each begins as the SFT model, of which the first ratio is 1
            assert curve[0]["kl"] == pytest.approx(0, abs=1e-5)
            assert all(point["ratio"] == pytest.approx(1, abs=1e-4) for point in curve)
            assert all(0 <= point["true"] <= 1 for point in curve)
        # GRPO is given the scorer itself; what PPO is given is another number
        assert [p["scores"] for p in one["curves"]["grpo"]] == pytest.approx(
            [p["true"] for p in one["curves"]["grpo"]]
        )
    failed = [
        f"{name} with seed {one['seed']}"
        for one in results["seeds"]
        for name in rlhf.ALGORITHMS
        if not rlhf_report.rose(one["rows"]["sft"]["true"], one["rows"][name]["true"])
    ]
    assert status == bool(failed)
    assert all(name in shown.err.splitlines()[-1] for name in failed)


def test_weights_are_held_once(small, tmp_path):
    model = GPT(TINY.gpt)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = memory(model, [[65, 66], [67]], rlhf.SAMPLING)
    base = sum(4 * p.numel() for p in model.parameters())
    full, loras, one = found.values()
    # value and reward have a head of one number instead of 256
    assert full["weights"] == 4 * base - 2 * 4 * 255 * 33
    assert loras["weights"] - one["weights"] == 3 * base
    assert loras["optimizer"] == one["optimizer"] < full["optimizer"]
    assert loras["gradients"] == one["gradients"]
    assert one["peak"] < loras["peak"] < full["peak"]
    assert all((model.state_dict()[key] == value).all() for key, value in before.items())


def test_without_both_kinds_of_completions_there_is_no_preference(small, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(rlhf_stages, "truth", lambda prompts, completions: [1.0] * len(prompts))
    with pytest.raises(SystemExit):
        rlhf.main(["--quick", "--out", str(tmp_path)])
    assert "gave 0 pairs" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        rlhf.main(["--seeds", "0"])
    assert "--seeds 0: at least 1" in capsys.readouterr().err


def test_pairs_hold_one_of_each_kind(small, parts):

    torch.manual_seed(0)
    model = GPT(TINY.gpt)
    with torch.no_grad():
        # a model that mostly ends what it says with ")"
        model.head.bias[[ord(")"), NEWLINE, ord("1")]] = 8.0
    prompts = [list(line.prompt.encode()) for line in parts[0][:64]]
    found = rlhf_stages.preferences(model, prompts, 8)
    assert found
    assert all(isinstance(pair, Pair) for pair in found)
    for pair in found:
        sides = [
            (e.ids[: e.labels.count(-100)], e.ids[e.labels.count(-100) :])
            for e in (pair.chosen, pair.rejected)
        ]
        assert sides[0][0] == sides[1][0]
        assert truth(*map(list, zip(*sides, strict=True))) == [1.0, 0.0]


def test_the_page_shows_the_committed_results():
    results = json.loads((ROOT / "benchmarks/results/rlhf.json").read_text())
    shown = (ROOT / "benchmarks/results/rlhf.txt").read_text(encoding="utf-8")
    assert rlhf_report.report(results) + "\n" == shown
    assert shown in (ROOT / "docs/rlhf.md").read_text(encoding="utf-8")
    assert results["budget"] == dataclasses.asdict(rlhf.Budget())
    # what the page says of them
    for one in results["seeds"]:
        rows = one["rows"]
        assert rows["ppo"]["learned"] > rows["sft"]["learned"] + 0.5
        assert all(row["kl"] < 5 for row in rows.values())
        assert all(rlhf_report.rose(rows["sft"]["true"], rows[name]["true"]) for name in rlhf.ALGORITHMS)
    assert results["machine"]["seconds"] < 8 * 60


def test_without_matplotlib_there_is_no_figure(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install 'peftlib[plot]'" in rlhf_report.draw({}, tmp_path / "rlhf.png")
