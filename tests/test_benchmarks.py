"""Every case of the benchmarks runs, tiny; what is timed agrees first; the page shows the committed results."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
import warnings
from pathlib import Path

import pytest
import torch

from benchmarks import plots, run
from benchmarks.cases import methods
from benchmarks.contest import Contest, Disagreement, agree
from benchmarks.registry import CASES, FAMILIES, Target, UnknownCase, select
from benchmarks.results import table
from benchmarks.run import NOT_ON_GPU, main, measure
from benchmarks.timing import in_turns

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results"


@pytest.mark.parametrize("name", CASES)
def test_a_case_runs_and_gives_a_row_for_each_contestant(name):
    case = CASES[name].changed(threads=None, dtype=None, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = json.loads(json.dumps(measure(case, quick=True)))
    assert result["checked"]
    assert result["quick"]
    names = [row["contestant"] for row in result["rows"]]
    assert "peftlib" in names
    assert len(names) == len(set(names))
    for package, peer in (("peft", "HF peft"), ("loralib", "loralib")):
        if peer in result["missing"]:
            why = result["missing"][peer]
            assert why == "has no such method" or importlib.util.find_spec(package) is None
    for row in result["rows"]:
        assert row["run"] > 0
        assert row["low"] <= row["median"] <= row["high"]
    if case.metric == "ratio":
        assert result["rows"][0]["median"] == 1
    about = result["about"]
    assert about["threads"] == case.threads
    assert about["processor"]
    assert about["versions"]["torch"] == torch.__version__
    assert result["case"] in str(table([result]))


def test_a_gpu_case_says_that_it_was_not_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["gpu/linear", "--out", str(tmp_path)]) == 0
    assert NOT_ON_GPU in (tmp_path / "gpu.txt").read_text()
    assert not (tmp_path / "gpu.png").exists()


def fake(name, values, check=lambda: "nothing to check", **more):
    """A case whose contestants "measure" given numbers, one a round."""
    left = {contestant: list(numbers) for contestant, numbers in values.items()}

    def make():
        runs = {contestant: lambda c=contestant: left[c].pop(0) for contestant in left}
        return Contest(runs=runs, check=check, missing={"loralib": "not installed"})

    case = dataclasses.replace(CASES["memory/saved-fp32"], name=name, make=make, parameters={}, quick={})
    return dataclasses.replace(case, **more)


def test_ratios_are_of_the_same_round_and_judged_by_the_target(monkeypatch):
    numbers = {"base": [1, 2, 4, 8, 16], "peftlib": [1.5, 2.2, 4.4, 8.8, 32], "HF peft": [3, 6, 12, 24, 48]}
    # bytes need one round; here each round has a number of its own
    monkeypatch.setattr(run, "in_turns", lambda runs, **_: in_turns(runs, rounds=5, clock="value", warm_up=0))
    result = measure(fake("memory/x", numbers, target=Target(at_most=1.1)))
    base, ours, theirs = result["rows"]
    assert ours["median"] == pytest.approx(1.1)
    assert (ours["low"], ours["high"]) == (pytest.approx(1.1), 1.5)
    assert ours["run"] == 4.4
    assert theirs["median"] == 3
    assert [row.get("verdict") for row in (base, ours, theirs)] == [None, "unclear", None]
    assert run.verdict(ours, 1.5) == "reached"
    assert run.verdict(ours, 1.05) == "missed"
    shown = str(table([result]))
    assert "not installed" in shown
    assert "prototype" in str(table([{**result, "target": {"at_most": 2, "seen": "1.9", "hf": "3"}}]))


def test_nothing_is_timed_that_does_not_agree(tmp_path, monkeypatch, capsys):
    def disagree():
        raise Disagreement("HF peft is off by 0.5")

    case = fake("memory/x", {"base": [], "peftlib": []}, check=disagree)
    monkeypatch.setattr(run, "select", lambda patterns: [case])
    assert main(["x", "--out", str(tmp_path)]) == 1
    assert "memory/x is not timed: HF peft is off by 0.5" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [torch.tensor([1.2]), torch.tensor([float("nan")])])
def test_disagreement_is_measured_by_what_the_tuning_changes(value):
    agree({"ours": torch.tensor([1.2001])}, torch.tensor([1.2]), torch.tensor([1.0]), 1e-3)
    with pytest.raises(Disagreement, match="ours is off by"):
        agree({"ours": value}, torch.tensor([1.1]), torch.tensor([1.0]), 1e-3)


@pytest.mark.parametrize("name", ["step/768-fp32", "linear/no-grad", "routed/single-8"])
def test_a_contestant_that_is_wrong_is_found(name, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        case = CASES[name]
        contest = case.make(**{**case.parameters, **case.quick})
        contest.check()
    model = next(
        part
        for part in (
            *contest.runs["peftlib"].args,
            getattr(contest.runs["peftlib"].args[0], "__self__", None),
        )
        if isinstance(part, torch.nn.Module)
    )
    with torch.no_grad():
        parameter = next(p for n, p in model.named_parameters() if n.endswith(".b"))
        parameter.mul_(1.5)
    with pytest.raises(Disagreement):
        contest.check()


def test_results_stay_beside_those_of_other_cases(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for pattern in ("layer/gate-up", "layer/fp32"):
            assert main([pattern, "--quick", "--out", str(tmp_path)]) == 0
    cases = json.loads((tmp_path / "layer.json").read_text())["cases"]
    assert [case["case"] for case in cases] == ["layer/fp32", "layer/gate-up"]
    assert (tmp_path / "layer.txt").read_text() == f"{table(cases)}\n"
    assert (tmp_path / "layer.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["layer.json", "layer.png", "layer.txt"]


def test_a_kill_while_writing_leaves_the_old_results(tmp_path, monkeypatch):
    result = {"case": "gpu/linear", "metric": "ratio", "unit": "ms", "rows": [], "unavailable": NOT_ON_GPU}
    run.save(result, tmp_path)
    before = (tmp_path / "gpu.json").read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        run.save({**result, "case": "gpu/qkv"}, tmp_path)
    assert (tmp_path / "gpu.json").read_bytes() == before


def test_an_unknown_case_is_refused_with_near_ones(capsys):
    with pytest.raises(UnknownCase, match="near it: step/768-fp32"):
        select(["step/768-fp23"])
    with pytest.raises(SystemExit):
        main(["rooted"])
    assert "no case 'rooted'; near it: routed" in capsys.readouterr().err


def test_selection_by_family_glob_and_all():
    assert [case.name for case in select(["method"])] == [f"method/{kind}" for kind in methods.METHODS]
    assert [case.name for case in select(["*/merge", "setup/import"])] == ["setup/import", "setup/merge"]
    assert len(select(["all"])) == len(CASES)


def test_without_a_case_all_are_listed(capsys):
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in CASES)


def test_other_conditions_make_another_case_without_the_target():
    case = CASES["step/768-fp32"]
    assert case.changed(threads=1, dtype="float32", device="cpu") is case
    other = case.changed(threads=2, dtype="bfloat16", device=None)
    assert other.name == "step/768-fp32 threads=2 dtype=bfloat16"
    assert (other.threads, other.parameters["dtype"], other.target) == (2, "bfloat16", None)
    with pytest.raises(UnknownCase, match="routed/single-8 has no dtype"):
        CASES["routed/single-8"].changed(threads=None, dtype="bfloat16", device=None)


@pytest.mark.parametrize(
    "wrong", [["step", "--rounds", "0"], ["step", "--threads", "0"], ["routed", "--dtype", "float16"]]
)
def test_arguments_that_cannot_be_are_refused(wrong, capsys):
    with pytest.raises(SystemExit):
        main(wrong)
    assert wrong[1] in capsys.readouterr().err


def test_without_peers_the_case_says_who_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "loralib", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = measure(CASES["layer/fp32"], quick=True)
    assert result["missing"] == {"loralib": "not installed"}
    assert "loralib" not in [row["contestant"] for row in result["rows"]]


def test_without_matplotlib_there_is_no_figure(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not plots.draw("x", [], tmp_path / "x.png")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_page_shows_the_committed_results(family):
    page, path = PAGE.read_text(), RESULTS / f"{family}.json"
    cases = json.loads(path.read_text())["cases"]
    shown = path.with_suffix(".txt").read_text()
    assert f"{table(cases)}\n" == shown
    assert shown in page
    assert not any(case.get("quick") for case in cases)
    for case in cases:
        target = CASES[case["case"]].target
        assert case.get("target") == (target and dataclasses.asdict(target))


@pytest.mark.parametrize("name", CASES)
def test_a_case_without_a_result_is_said_to_have_none(name):
    results = json.loads((RESULTS / f"{CASES[name].family}.json").read_text())["cases"]
    measured = name in [case["case"] for case in results]
    assert measured != (f"`{name}`: not yet measured" in PAGE.read_text())
