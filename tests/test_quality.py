"""The quality run: its data, and that it judges fairly."""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path

import pytest
import torch

import peftlib
from benchmarks import quality
from benchmarks.entries import HEAD_RATE, METHODS, adamw, start
from benchmarks.inputs import InputError
from benchmarks.ledger import Ledger
from benchmarks.pretrained import Classifier
from benchmarks.quality_report import draw, table
from benchmarks.reviews import chinese_reviews, distinct, rotten_tomatoes, split
from benchmarks.tasks import TASKS, ByLength, Size, Task, accuracy, classifier_batches, collate
from benchmarks.trainings import search
from peftlib import train
from peftlib.methods.base import METHODS as PEFTLIB_METHODS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def rows(count: int) -> list[tuple[list[int], int]]:
    """Texts that are told apart by which half of the vocabulary they draw from."""
    labels = [i % 2 for i in range(count)]
    return [
        (torch.randint(1 + 20 * y, 21 + 20 * y, (int(torch.randint(2, 8, ())),)).tolist(), y) for y in labels
    ]


@pytest.fixture
def task() -> Task:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=41,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        initializer_range=0.3,
    )
    learned = rows(40)
    return Task(
        title="a tiny encoder on made-up words",
        base=Classifier(transformers.BertModel(config, add_pooling_layer=False), width=16),
        renew=lambda model: model.head.reset_parameters(),
        example=collate(learned[:2])["inputs"],
        head="head",
        body=["encoder"],
        query_value=["query", "value"],
        batches=lambda seed: classifier_batches(learned, 8, seed),
        loss=train.classification,
        validation=accuracy([collate(rows(10))]),
        test=accuracy([collate(rows(20))]),
        metric="accuracy",
        higher_is_better=True,
        size=Size(train=40, validation=10, test=20, steps=5, batch=8, length=8),
    )


@pytest.fixture
def contest(tmp_path):
    def run(task, names, equal=("steps", "time"), seeds=2, rates=None, saved=None, ledger="ledger.jsonl"):
        keep = (lambda results: None) if saved is None else saved.append
        kept = Ledger(tmp_path / ledger, {})
        return quality.contest(
            task, names, seeds=seeds, equal=equal, rates=rates or {}, ledger=kept, save=keep
        )

    return run


def known(task, names):
    relative = {"full": 1.0, "lora-qv": 0.5, "prompt": 2.0}
    return {name: {"seconds": relative[name] / 10, "relative": relative[name]} for name in names}


def without_time(row):
    return {k: row[k] for k in ("method", "rate", "trained", "equal_steps")}


def test_every_method_of_the_library_takes_part(task):
    there = set()
    for name in METHODS:
        tuning = start(name, task, 0)[1]
        there |= {type(method).__name__ for method in tuning.sites.values()}
    public = {name for name in peftlib.__all__ if name in PEFTLIB_METHODS}
    assert there == public - {"NewHead", "TokenRows"}  # these two are parts of a tuning


def test_all_begin_with_the_same_head_and_train_it(task):
    heads = {}
    for name in METHODS:
        model, tuning = start(name, task, 3)
        heads[name] = model.head.weight
        assert any(parameter is model.head.weight for parameter in tuning.parameters()), name
    assert all(torch.equal(head, heads["head"]) for head in heads.values())
    assert not torch.equal(heads["head"], start("head", task, 4)[0].head.weight)


def test_results_at_equal_steps_do_not_depend_on_how_much_longer_it_goes_on(contest, task, monkeypatch):
    names = ["full", "lora-qv", "prompt"]
    monkeypatch.setattr(quality, "pace", known)
    rates = {"full": 1e-3, "lora-qv": 1e-2, "prompt": 1e-1}
    both = contest(task, names, rates=rates)
    alone = contest(task, names, equal=["steps"], rates=rates, ledger="other.jsonl")
    assert list(map(without_time, both["rows"])) == list(map(without_time, alone["rows"]))
    for row, end in zip(both["rows"], (5, 10, 2), strict=True):
        assert row["equal_time_steps"] == end
        for value, curve in zip(row["equal_time"], row["curves"], strict=True):
            assert dict(curve)[end] == value
        assert {len(losses) for losses in row["losses"]} == {max(5, end)}
    # the seeds are trainings of their own
    assert all(len({tuple(losses) for losses in row["losses"]}) == 2 for row in both["rows"])


def test_rates_are_chosen_on_the_validation_part_and_never_on_the_test(contest, task):
    def forbidden(model):
        raise AssertionError("the test part is looked at")

    assert search("head", dataclasses.replace(task, test=forbidden), 1e-2) > 0
    results = contest(task, ["head", "lora"], rates={"lora": 0.25}, seeds=1)
    head, lora = results["rows"]
    assert lora["rate"] == 0.25
    assert lora["validation_loss"] == {}
    losses = head["validation_loss"]
    assert list(map(float, losses)) == list(METHODS["head"].encoder)
    assert head["rate"] == float(min(losses, key=losses.get))


def test_what_is_finished_is_not_computed_again(contest, task, monkeypatch):
    rates = {"head": 1e-2, "full": 1e-3}
    first = contest(task, ["head", "full"], rates=rates)

    def forbidden(*_):
        raise AssertionError("it is computed again")

    for name in ("pace", "search", "trained"):
        monkeypatch.setattr(quality, name, forbidden)
    # another process may go through the methods the other way round
    again = contest(task, ["full", "head"], rates=rates)
    assert again["rows"] == first["rows"][::-1]
    with pytest.raises(AssertionError, match="computed again"):
        contest(task, ["head", "full"], rates=rates, seeds=3)


def test_the_head_has_a_rate_of_its_own(task):
    for name in METHODS:
        model, tuning = start(name, task, 0)
        optimizer = adamw(name, task, model, tuning, 0.5)
        found = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        assert len(found) == len(list(tuning.parameters()))
        assert found[id(model.head.weight)] == (0.5 if name == "head" else HEAD_RATE)
        assert {rate for p, rate in found.items() if p not in {id(q) for q in model.head.parameters()}} <= {
            0.5
        }


def test_the_report_and_the_figure(contest, task, tmp_path):
    saved = []
    results = contest(task, ["head", "full", "bitfit"], saved=saved, rates={"full": 1e-3, "bitfit": 1e-2})
    assert len(saved) == 2
    again = json.loads(json.dumps(results))
    shown = str(table(again))
    for name in ("head", "full", "bitfit", "equal steps (5 steps)", "2 seeds", "float32"):
        assert name in shown
    assert draw(again, tmp_path / "curves.png") == "curves.png"
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    quality.write(results, tmp_path, "tiny")
    assert (tmp_path / "quality-tiny.txt").read_text() == shown + "\n"
    assert quality.chosen(tmp_path / "quality-tiny.json") == {r["method"]: r["rate"] for r in results["rows"]}
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(InputError, match=r"expected a quality-….json"):
        quality.chosen(tmp_path / "other.json")


def test_the_command_runs_its_tasks(task, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quality, "TASKS", {"tiny": lambda quick: task})
    options = ["--seeds", "1", "--methods", "head,full", "--out", str(tmp_path), "--equal", "steps"]
    assert quality.main(["tiny", *options]) == 0
    assert "a tiny encoder on made-up words: test accuracy" in capsys.readouterr().out
    files = ["ledger.jsonl", "quality-tiny.json", "quality-tiny.png", "quality-tiny.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    for wrong, said in (
        (["huge"], "unknown task huge; choose among tiny"),
        (["--methods", "magic"], "unknown method magic"),
        (["--seeds", "0"], "--seeds 0: at least 1"),
    ):
        with pytest.raises(SystemExit):
            quality.main(wrong)
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", TASKS)
def test_the_page_shows_the_committed_results(name):
    results = json.loads((RESULTS / f"quality-{name}.json").read_text(encoding="utf-8"))
    shown = (RESULTS / f"quality-{name}.txt").read_text(encoding="utf-8")
    assert shown == f"{table(results)}\n"
    assert shown in (ROOT / "docs" / "quality.md").read_text(encoding="utf-8")
    assert (RESULTS / f"quality-{name}.png").stat().st_size > 10_000
    # a run of everything: all methods, but those that the model has no place for
    assert {row["method"] for row in results["rows"]} | results["refused"].keys() == METHODS.keys()


def test_the_encoder_lands_where_hf_peft_did():
    """What was seen with HF peft under this setup, within 0.02."""
    results = json.loads((RESULTS / "quality-rotten-tomatoes.json").read_text(encoding="utf-8"))
    found = {row["method"]: statistics.fmean(row["equal_steps"]) for row in results["rows"]}
    for name, seen in {"head": 0.732, "lora-qv": 0.772, "full": 0.780}.items():
        assert found[name] == pytest.approx(seen, abs=0.02), name


def test_a_method_that_cannot_act_is_named(contest, task):
    headless = dataclasses.replace(task, head=None, renew=lambda model: None)
    results = contest(headless, ["head", "full"], seeds=1, equal=["steps"], rates={"full": 1e-3})
    assert list(results["refused"]) == ["head"]
    assert "head is left out: there is no new layer" in str(table(results))
    with pytest.raises(InputError, match="no method can act"):
        contest(headless, ["head"])


def test_rows_of_like_length_and_each_of_them_once_an_epoch():
    examples = [([1] * (1 + i % 37), i) for i in range(100)]
    sampler = ByLength([len(ids) for ids, _ in examples], 8, seed=1)
    batches = train.Batches(examples, 8, sampler=sampler)
    epoch = list(batches.epoch(0))
    assert [len(batch) for batch in epoch] == [8] * 12 + [4]
    assert sorted(i for batch in epoch for _, i in batch) == list(range(100))
    assert epoch != list(batches.epoch(1))
    assert epoch == list(batches.epoch(0))

    def padding(batches):
        return sum(max(len(ids) for ids, _ in b) - len(ids) for b in batches for ids, _ in b)

    assert padding(epoch) < padding(train.Batches(examples, 8, seed=1).epoch(0)) / 3


def test_a_text_is_in_one_part_alone():
    repeated = [(f"text {i % 30}", i % 2) for i in range(300)]
    parts = split(distinct(repeated), train=20, validation=4, test=6)
    texts = [text for part in (parts.train, parts.validation, parts.test) for text, _ in part]
    assert len(texts) == len(set(texts)) == 30
    with pytest.raises(InputError, match="30 reviews are too few"):
        split(distinct(repeated), train=20, validation=4, test=7)


@pytest.mark.slow
@pytest.mark.parametrize(("corpus", "count"), [(rotten_tomatoes, 8530), (chinese_reviews, 17363)])
def test_the_corpora_hold_what_was_counted(corpus, count):
    try:
        reviews = corpus()
    except InputError as missing:
        pytest.skip(str(missing))
    assert len(reviews) == len({text for text, _ in reviews}) == count
    assert 0.4 < statistics.fmean(label for _, label in reviews) < 0.6
