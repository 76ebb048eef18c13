"""What fits a budget: the table, the search, the remedies, the shell."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import peftlib
from peftlib import LoRA, PromptTuning
from peftlib.errors import PeftlibError
from peftlib.memory import MemoryReport, ShardedOver, estimate_memory, plan_memory
from peftlib.memory.cli import main
from peftlib.memory.examples import Examples
from peftlib.memory.remedies import Cost, Way, largest_batch
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


def test_every_remedy_is_one(plan):
    helped = [choice for choice in plan.choices if not choice.fits]
    kinds = set()
    for choice in helped:
        assert choice.remedies
        for remedy in choice.remedies:
            assert remedy.peak_bytes <= plan.budget
            kinds.add(remedy.text.split()[0])
    assert {"micro-batches", "checkpointing:"} <= kinds
    full = next(choice for choice in helped if choice.way == Way("full", 64, None, None))
    text = full.remedies[0].text
    size, times = int(text.split()[2].rstrip(",")), int(text.split()[3])
    assert size * times >= 64 > size * (times - 1)
    report = estimate_memory(deep(), batch(size), accumulate=times, optimizer=SGD)
    assert report.peak_bytes == full.remedies[0].peak_bytes


def test_sharding_is_a_remedy():
    def factory():
        return nn.Sequential(*(nn.Sequential(nn.Linear(64, 64)) for _ in range(8)))

    plan = plan_memory(
        factory, torch.ones(2, 64), {"full": None}, "300KiB", device="cpu", checkpointing=(None,)
    )
    (choice,) = plan.choices
    (remedy,) = choice.remedies
    model = factory()
    per_rank = {n: ShardedOver(n)(model, choice.report).peak_bytes for n in (2, 4, 8)}
    assert remedy.text == "sharding over 4 ranks, per rank"
    assert remedy.peak_bytes == per_rank[4] <= plan.budget < per_rank[2]


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
    assert any("no module list of like blocks" in note for note in plan.notes)
    assert plan.rows[-1]["peak"] == estimate_memory(factory(), batch(4, 9)).peak_bytes


def test_a_list_of_methods_and_a_function_of_examples():
    plan = plan_memory(
        deep, lambda batch, length: {"ids": torch.zeros(batch, length, dtype=torch.long)},
        [LoRA(rank=2)], "40KiB", batches=[3], lengths=[7], checkpointing=(None,), ranks=(),
    )  # fmt: skip
    assert [(row["method"], row["batch"], row["length"]) for row in plan.rows] == [("LoRA", 3, 7)]
    assert any("not yet measured on a GPU" in note for note in plan.notes)


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


def test_a_factory_that_allocates_is_warned():
    def factory():
        with torch.device("cpu"):
            return nn.Linear(256, 1024)

    with pytest.warns(UserWarning, match="allocates 1.0 MiB of real parameters"):
        plan_memory(factory, torch.ones(2, 256), {"full": None}, device="cpu", checkpointing=(None,))


# --- the search ----------------------------------------------------------------------------------------------------


@given(
    fixed=st.integers(0, 10**6),
    slopes=st.lists(st.tuples(st.integers(0, 10**5), st.integers(0, 500)), min_size=1, max_size=4),
    budget=st.integers(1, 10**7),
    start=st.integers(1, 3000),
)
def test_the_search_on_any_sum_of_lines(fixed, slopes, budget, start):
    # a peak is the largest of several places, each a line in the batch
    def peak(size):
        return fixed + max(a + b * size for a, b in slopes)

    def of(way):
        tried.append(way.batch)
        return MemoryReport(peak_bytes=peak(way.batch), peak_at="forward")

    tried = []
    most = largest_batch(Cost(of, None, budget), Way("m", start))
    if peak(1) > budget:
        assert most == 0
    elif most < 2**20 - 1:
        assert peak(most) <= budget < peak(most + 1)
    else:
        assert peak(2**20 - 1) <= budget
    assert len(tried) < 40


# --- examples of other sizes ---------------------------------------------------------------------------------------


def test_resized_examples():
    example = {
        "ids": torch.zeros(2, 7, dtype=torch.long),
        "mask": torch.ones(2, 1, 7, 7),
        "positions": torch.arange(7)[None],
        "scale": torch.tensor(1.0),
        "use_cache": False,
    }
    resized = Examples(example)(5, 9)
    assert {k: tuple(v.shape) for k, v in resized.items() if isinstance(v, torch.Tensor)} == {
        "ids": (5, 9),
        "mask": (5, 1, 9, 9),
        "positions": (1, 9),
        "scale": (),
    }
    assert resized["use_cache"] is False
    assert Examples(example)(2, 7) == example
    image = Examples(torch.zeros(4, 3, 8, 8))
    assert (image.batch, image.length) == (4, None)
    assert image(6, None)[0].shape == (6, 3, 8, 8)


def test_examples_that_cannot_be_resized():
    with pytest.raises(PeftlibError, match="shows no sequence"):
        Examples(torch.zeros(4, 3, 8, 8))(4, 16)
    with pytest.raises(PeftlibError, match=r"two axes of the example's first tensor \(4, 4\)"):
        Examples(torch.zeros(4, 4, dtype=torch.long))(4, 16)
    with pytest.raises(PeftlibError, match="without a tensor"):
        Examples({"text": "hello"})


# --- sharding ------------------------------------------------------------------------------------------------------


def blocks(width=64, depth=4, dtype=torch.float32):
    layers = (nn.Sequential(nn.Linear(width, width, bias=False, dtype=dtype)) for _ in range(depth))
    return nn.Sequential(nn.Linear(width, width, bias=False, dtype=dtype), nn.Sequential(*layers))


def test_shards_are_what_zero_counts():
    model = blocks()
    report = estimate_memory(model, torch.ones(1, 64))
    one = 64 * 64 * 4
    rank = ShardedOver(4, groups="1.*")(model, report)
    assert rank.trained_bytes == 5 * one / 4
    assert rank.optimizer_bytes == 2 * 5 * one / 4 + 5 * 4  # and a count of steps per weight
    assert rank.frozen_bytes == 0
    # in the backward, what is whole: the root's, three groups, the gradients of one of them twice and of the root's
    whole = one + 3 * one + 2 * one + one
    assert rank.peak_at == "backward"
    assert whole <= rank.temporary_bytes <= whole + 3 * 64 * 4
    assert sum(rank.parts().values()) == rank.peak_bytes
    assert "one of 4 ranks" in str(rank)
    assert ShardedOver(1)(model, report) is report


def test_rows_that_do_not_divide_are_padded_and_frozen_ones_have_no_state():
    model = nn.Sequential(
        nn.Linear(3, 5, bias=False), nn.Linear(5, 7, bias=False), nn.BatchNorm1d(7, affine=False)
    )
    model[0].requires_grad_(False)
    rank = ShardedOver(4, groups=None)(model, estimate_memory(model, torch.ones(2, 3)))
    assert rank.trained_bytes == 2 * 5 * 4  # 7 rows over 4
    assert rank.frozen_bytes == 2 * 3 * 4 + (7 + 7) * 4 + 8  # 5 rows over 4, and the statistics, whole
    assert rank.optimizer_bytes == 2 * 2 * 5 * 4 + 4


def test_sharding_refuses():
    report = estimate_memory(blocks(), torch.ones(1, 64))
    with pytest.raises(PeftlibError, match="number of ranks"):
        ShardedOver(0)
    with pytest.raises(PeftlibError, match="without a timeline"):
        ShardedOver(2)(blocks(), MemoryReport(peak_bytes=0, peak_at="forward"))
    with pytest.raises(PeftlibError, match="'nope' matches nothing"):
        ShardedOver(2, groups="nope")(blocks(), report)


# --- the shell -----------------------------------------------------------------------------------------------------

FILE = """
import torch
from torch import nn

def build():
    return nn.Sequential(nn.Embedding(50, 16), nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), nn.Linear(16, 50))

def broken():
    raise KeyError("weights")

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
        ("FILE:broken", "KeyError: 'weights'"),
    ],
)
def test_wrong_models(file, model, message, capsys):
    assert main([model.replace("FILE", str(file))]) == 2
    assert message in capsys.readouterr().err


def test_a_file_that_does_not_import(tmp_path, capsys):
    (tmp_path / "bad.py").write_text("import nothing_of_that_name")
    assert main([f"{tmp_path / 'bad.py'}:build"]) == 2
    assert "cannot be imported (ModuleNotFoundError" in capsys.readouterr().err
