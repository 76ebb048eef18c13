"""What fits a budget: the table, its arguments."""

import contextlib
import dataclasses
import functools
import json
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import peftlib
from peftlib import LoRA, PromptTuning
from peftlib.errors import PeftlibError, ProbeError
from peftlib.memory import MemoryReport, estimate_memory, plan_memory
from peftlib.memory import plan as plan_module
from peftlib.memory import ways as ways_module
from peftlib.memory.plan import Choice
from peftlib.memory.remedies import Remedy, largest_batch
from peftlib.memory.ways import Way
from tests.zoo import Decoder

METHODS = {"full": None, "prompt": PromptTuning(length=2)}
SGD = functools.partial(torch.optim.SGD, lr=0.1)


def deep():
    return Decoder(depth=2)


def batch(rows, length=6):
    return torch.zeros(rows, length, dtype=torch.long)


@pytest.fixture(scope="module")
def plan():
    return plan_memory(deep, batch(64), METHODS, "260KiB", device="cpu", optimizer=SGD)


# --- the table -----------------------------------------------------------------------------------------------------


def test_rows_are_estimates(plan):
    assert [(row["method"], row["checkpoint"]) for row in plan.rows] == [
        (method, again) for method in METHODS for again in ("no", "yes")
    ]
    for choice in plan.choices:
        model = deep()
        if METHODS[choice.way.method] is not None:
            peftlib.attach(model, METHODS[choice.way.method], example=batch(64))
        assert choice.report == estimate_memory(
            model, batch(64), checkpointing=choice.way.checkpointing, optimizer=SGD
        )
        assert choice.fits == (choice.report.peak_bytes <= plan.budget)
    assert {choice.fits for choice in plan.choices} == {True, False}


def test_the_largest_batch_fits_and_one_more_does_not(plan):
    for choice in plan.choices:
        model = deep()
        if METHODS[choice.way.method] is not None:
            peftlib.attach(model, METHODS[choice.way.method], example=batch(64))
        most = choice.largest_batch
        assert most > 0
        assert choice.fits == (most >= 64)
        for size, fits in ((most, True), (most + 1, False)):
            report = estimate_memory(
                model, batch(size), checkpointing=choice.way.checkpointing, optimizer=SGD
            )
            assert (report.peak_bytes <= plan.budget) == fits


def test_it_prints(plan):
    text = str(plan)
    assert text.startswith("One training step against 260.0 KiB (cpu)\nmethod  batch  checkpoint")
    assert "what does not fit" in text
    assert "micro-batches of" in text
    assert max(map(len, text.splitlines())) <= 120
    assert "│ 260.0 KiB" in plan.bars()
    assert plan._repr_html_().count("<table>") == 2
    assert json.loads(json.dumps(plan.to_dict()))["choices"][0]["method"] == "full"


def test_it_plots(plan, tmp_path):
    plan.plot(tmp_path / "plan.png")
    plan.choices[0].report.plot_timeline(tmp_path / "step.svg")
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("plan.png", "step.svg"))


def test_nothing_helps():
    plan = plan_memory(deep, batch(1), {"full": None}, "1KiB", device="cpu", optimizer=SGD, ranks=(2, 4))
    assert [choice.remedies for choice in plan.choices] == [[], []]
    assert "nothing in this plan" in str(plan)
    assert [row["max batch"] for row in plan.rows] == [None, None]


def test_batches_and_lengths_and_no_blocks():
    def factory():
        return nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 3))

    plan = plan_memory(
        factory, batch(2, 5), {"full": None}, "1MiB", batches=(2, 4), lengths=(5, 9), device="cpu"
    )
    assert [(row["batch"], row["length"]) for row in plan.rows] == [(2, 5), (4, 5), (2, 9), (4, 9)]
    (note,) = plan.notes
    assert note.startswith("without checkpointing: checkpointing=True takes the repeated blocks")
    assert not note.endswith(".")
    assert plan.rows[-1]["peak"] == estimate_memory(factory(), batch(4, 9)).peak_bytes


def test_a_list_of_methods_and_a_function_of_examples():
    plan = plan_memory(
        deep, lambda batch, length: {"ids": torch.zeros(batch, length, dtype=torch.long)},
        [LoRA(rank=2)], "40KiB", batches=[3], lengths=[7], checkpointing=(None,), ranks=(),
    )  # fmt: skip
    assert [(row["method"], row["batch"], row["length"]) for row in plan.rows] == [("LoRA", 3, 7)]
    assert any("not yet measured on a GPU" in note for note in plan.notes)


def test_a_model_that_refuses_sizes_is_planned():
    """Statistics need two rows, and a folded batch a multiple of three."""

    class Folding(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 2)

        def forward(self, x):
            x = self.norm(self.first(x))
            return self.last(x.view(3, -1, 16))

    def fits(size):
        return estimate_memory(Folding(), torch.ones(size, 8)).peak_bytes <= 5500

    plan = plan_memory(Folding, torch.ones(12, 8), {"full": None}, 5500, device="cpu", ranks=())
    (choice,) = plan.choices
    assert choice.largest_batch == 9
    assert not choice.fits
    assert fits(9)
    assert not fits(12)
    for refused in (1, 10, 11):
        with pytest.raises(ProbeError):
            fits(refused)
    (remedy,) = choice.remedies
    assert remedy.text == "micro-batches of 6, 2 accumulated"
    least = plan_memory(Normed, torch.ones(2, 8), {"full": None}, 1, device="cpu")
    assert least.rows[0]["max batch"] is None


class Normed(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(8, 16), nn.BatchNorm1d(16))


def test_progress_counts_estimates(monkeypatch):
    counted = []

    @contextlib.contextmanager
    def bar(unit, shown):
        assert (unit, shown) == ("estimate", True)
        yield SimpleNamespace(update=lambda: counted.append(1))

    estimates = []

    def estimate(*args, **kwargs):
        estimates.append(1)
        return estimate_memory(*args, **kwargs)

    monkeypatch.setattr(plan_module, "bar_on_stderr", bar)
    monkeypatch.setattr(ways_module, "estimate_memory", estimate)
    plan_memory(Normed, torch.ones(4, 8), {"full": None}, device="cpu", progress=True)
    assert len(counted) == len(estimates) > 2


def test_one_search_serves_every_batch_of_a_row(monkeypatch):
    searched = []

    def search(search, way):
        searched.append(way)
        return largest_batch(search, way)

    monkeypatch.setattr(plan_module, "largest_batch", search)
    plan = plan_memory(
        deep, batch(2), {"full": None}, "60KiB", batches=(2, 3, 2), checkpointing=(None, False), device="cpu"
    )
    assert len(searched) == 1
    assert [(row["batch"], row["checkpoint"]) for row in plan.rows] == [(2, "no"), (3, "no")]
    assert len({row["max batch"] for row in plan.rows}) == 1


def test_rows_of_several_checkpointings_are_told_apart():
    plan = plan_memory(
        deep, batch(2), {"full": None}, device="cpu", checkpointing=(True, "blocks.0", ["blocks.1", "norm"])
    )
    assert [row["checkpoint"] for row in plan.rows] == ["yes", "blocks.0", "('blocks.1', 'norm')"]
    assert len(set(plan._labels())) == 3


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batches": (0,)}, r"batches=\(0,\): 0 is no whole number of 1 or more"),
        ({"batches": (True,)}, "True is no whole number"),
        ({"batches": 8}, r"batches=8: give a list of one or more, as in batches=\[1\]"),
        ({"lengths": 8}, "lengths=8: give a list"),
        ({"lengths": (None,)}, "None is no whole number"),
        (
            {"checkpointing": True},
            r"checkpointing=True: give a list of one or more, as in checkpointing=\[True\]",
        ),
        ({"checkpointing": ()}, r"checkpointing=\(\): give a list"),
        ({"checkpointing": "blocks.*"}, r"checkpointing='blocks.\*': give a list"),
        ({"ranks": 4}, "ranks=4: give a list"),
        ({"ranks": (1,)}, "1 is no whole number of 2 or more"),
        ({"budget": "1e400GiB"}, "is no size"),
    ],
)
def test_wrong_lists_and_sizes(options, message):
    with pytest.raises(PeftlibError, match=message):
        plan_memory(deep, batch(2), METHODS, device="cpu", **options)


def test_a_budget_may_be_a_large_number():
    plan = plan_memory(Normed, torch.ones(4, 8), {"full": None}, 1e20, device="cpu")
    assert plan.budget == 10**20
    assert plan.rows[0]["max batch"] == 2**20 - 1


def test_only_checkpointing_was_asked_for_and_there_are_no_blocks():
    for model in (Normed, lambda: nn.Sequential(nn.ModuleList([nn.Linear(2, 2)] * 2))):
        with pytest.raises(
            PeftlibError, match=r"has none: no module list or sequence .* that have layers inside"
        ):
            estimate_memory(model(), torch.ones(2, 8), checkpointing=True)
    with pytest.raises(PeftlibError, match="takes the repeated blocks"):
        plan_memory(Normed, torch.ones(2, 8), {"full": None}, device="cpu", checkpointing=(True,))


def test_functions_of_examples_that_fail():
    with pytest.raises(
        PeftlibError, match=r"example\(2\) gave no example \(TypeError: .* where lengths= is given"
    ):
        plan_memory(deep, lambda rows, length: batch(rows, length), METHODS, batches=(2,), device="cpu")


def test_models_without_shapes_are_refused():
    def factory():
        return nn.Sequential(nn.Linear(2, 3), nn.LazyLinear(4))

    with pytest.raises(PeftlibError, match="parameters without a shape yet, in '1': call the model once"):
        plan_memory(factory, torch.ones(2, 2), {"full": None}, device="cpu")


def test_buffers_on_real_memory_are_warned_of():
    class Table(nn.Module):
        def __init__(self, rows):
            super().__init__()
            self.linear = nn.Linear(2, 2)
            self.register_buffer("table", torch.zeros(rows, device="cpu"))

        def forward(self, x):
            return self.linear(x)

    with pytest.warns(UserWarning, match="allocates 2.0 MiB of real tensors"):
        plan_memory(
            lambda: Table(2**19), torch.ones(2, 2), {"full": None}, device="cpu", checkpointing=(None,)
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan_memory(lambda: Table(8), torch.ones(2, 2), {"full": None}, device="cpu", checkpointing=(None,))


def test_wrong_arguments():
    with pytest.raises(PeftlibError, match="function without arguments"):
        plan_memory(deep(), batch(2), METHODS)
    with pytest.raises(PeftlibError, match=r"gave list, no nn\.Module"):
        plan_memory(list, batch(2), METHODS)
    with pytest.raises(PeftlibError, match=r"does not work on the meta device.*torch\.device\('cpu'\)"):
        plan_memory(lambda: nn.Linear(2, int(torch.linspace(0, 4, 2)[1].item())), batch(2), METHODS)
    with pytest.raises(PeftlibError, match="no size"):
        plan_memory(deep, batch(2), METHODS, "lots")
    with pytest.raises(PeftlibError, match="methods= is empty"):
        plan_memory(deep, batch(2), {})
    with pytest.raises(PeftlibError, match="methods= is LoRA"):
        plan_memory(deep, batch(2), LoRA())
    with pytest.raises(PeftlibError, match="one kind of method twice"):
        plan_memory(deep, batch(2), [LoRA(), LoRA(rank=4)])


class Keeps(nn.Linear):
    """A real tensor under any name."""

    def __init__(self, kind):
        super().__init__(2, 2)
        with torch.device("cpu"):
            table = torch.zeros(2**19)
        if kind == "parameter":
            self.table = nn.Parameter(table)
        elif kind == "buffer":
            self.register_buffer("table", table)
        else:
            self.table, self.kept = table[:5], {"rows": [table, table.view(2, -1)]}


@pytest.mark.parametrize("kind", ["parameter", "buffer", "attribute"])
def test_a_factory_that_allocates_is_warned_once(kind):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        methods = {"full": None, "again": None, "third": None}
        plan_memory(
            lambda: Keeps(kind), torch.ones(2, 2), methods, "9MiB", device="cpu", checkpointing=(None,)
        )
    (only,) = [str(warning.message) for warning in caught if "factory" in str(warning.message)]
    assert only.startswith("the factory allocates 2.0 MiB of real tensors")


def test_a_factorys_own_error_is_shown():
    def factory():
        raise KeyError("width")

    with pytest.raises(
        PeftlibError, match=r"the factory raised KeyError: 'width' \(test_memory_plan.py, line \d+\)"
    ):
        plan_memory(factory, batch(2), METHODS)


# --- models that ask a tensor for its value ------------------------------------------------------------------------


class Asks(nn.Module):
    def __init__(self):
        super().__init__()
        self.small, self.large = nn.Linear(8, 8), nn.Linear(8, 80)

    def forward(self, x):
        return self.large(x) if x.sum() > 0 else self.small(x)


def test_a_hint_answers_for_every_row():
    x, methods = torch.ones(2, 8), {"full": None, "lora": LoRA(rank=2)}
    with pytest.raises(ProbeError, match=r"in the root, a step of Asks asks a tensor.*hint="):
        plan_memory(Asks, x, {"full": None})
    with pytest.raises(
        ProbeError, match=r"could not be run through Asks: .*It asks a tensor for its value.*hint="
    ):
        plan_memory(Asks, x, {"lora": LoRA(rank=2)})
    yes, no = (
        plan_memory(Asks, x, methods, checkpointing=(None,), device="cpu", hint=h) for h in (True, False)
    )
    for large, small in zip(yes.rows, no.rows, strict=True):
        assert large["peak"] > small["peak"]
    model = Asks()
    peftlib.attach(model, LoRA(rank=2))
    assert yes.choices[1].report == estimate_memory(model, x, hint=True)


def test_whose_bytes_a_sharded_remedy_needs_is_noted():
    row = Choice(Way("m", 4), MemoryReport(peak_bytes=8, peak_at="forward"), False, 0)
    for ranks, notes in ((1, []), (2, ["with sharding, the peak is one rank's"])):
        remedy = Remedy("something", 4, Way("m", 4, ranks=ranks))
        plan = plan_module.MemoryPlan([dataclasses.replace(row, remedies=[remedy])], 4, "plan")
        assert plan.tables()[1].notes == notes
