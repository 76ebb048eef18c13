"""Two processes train what one trains, killed and resumed too, by as many processes or by others."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import peftlib
from peftlib import FullFineTuning, LoRA, PeftlibError
from peftlib.container import read
from peftlib.train import Batches, EarlyStopping, Encoded, causal_lm, cosine, fit, pad
from peftlib.train.parallel import Idle, Ranks, shard
from tests.ranks import launch, start

KINDS = ("ddp", "fsdp")
DEATH = 5


class Block(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.up, self.down, self.dropout = nn.Linear(6, 9), nn.Linear(9, 6), nn.Dropout(dropout)

    def forward(self, x):
        return x + self.dropout(self.down(self.up(x).tanh()))


class Model(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(3))
        self.head = nn.Linear(6, 11)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def data():
    """Seven texts of different lengths: the last of the batches of three leaves one of two processes without a row."""
    generator = torch.Generator().manual_seed(3)
    texts = [torch.randint(1, 11, (n,), generator=generator).tolist() for n in (3, 9, 4, 12, 2, 7, 5)]
    return [Encoded(ids, [-100, *ids[1:]]) for ids in texts]


def jittered(examples):
    """A collate that draws, from torch's own generator."""
    batch = pad(examples, 0)
    labels = batch["labels"]
    labels[(labels != -100) & (torch.rand(labels.shape) < 0.2)] = 1
    return batch


def poisoned(model, batch):
    """Not finite for one row of the seven, which one of the processes has."""
    total, count = causal_lm(model, batch)
    return total * (math.nan if batch["inputs"].shape[1] == 12 else 1.0), count


PADDED = partial(pad, pad_id=0)
LORA = {"up": LoRA(rank=2), "embed": LoRA(rank=2), "head": LoRA(rank=2)}
CASES = {
    "lora": {"clip": 0.5},
    "chunked": {"loss": partial(causal_lm, head="head", chunk=5), "checkpoint_activations": True},
    "full": {"method": FullFineTuning(), "accumulate": 1, "clip": 0.1},
    "whole batches": {"batches": [PADDED([e]) for e in data()], "accumulate": 3},
    "skipped and stopped": {
        "loss": poisoned,
        "accumulate": 1,
        "nonfinite": "skip",
        "early_stopping": EarlyStopping(patience=1, higher_is_better=True),
        "evaluate": lambda model: model(torch.ones(1, 3).long()).square().sum(),
    },
    "drawn": {"method": {"up": LoRA(rank=2, dropout=0.3)}, "dropout": 0.2, "collate": jittered},
}


def train(case, rank=0, **more):
    """A training of some steps; other processes begin with other values, which must not matter."""
    options = {
        "loss": causal_lm,
        "method": LORA,
        "steps": 7,
        "accumulate": 2,
        "collate": PADDED,
        "dropout": 0.0,
        "evaluate": Batches(data(), 5, PADDED),
        "evaluate_every": 2,
        "early_stopping": EarlyStopping(patience=9),
        **CASES[case],
        **more,
    }
    torch.manual_seed(1 + rank)
    model = Model(options.pop("dropout")).double()
    tuning = peftlib.attach(model, options.pop("method"))
    batches = Batches(data(), 3, options.pop("collate"), seed=2)
    history = fit(
        model,
        options.pop("batches", batches),
        options.pop("loss"),
        optimizer=torch.optim.AdamW(tuning.parameters(), lr=0.03),
        scheduler=partial(cosine, warmup=2),
        **options,
    )
    return tuning, history


def kept(tuning, history, path):
    # all processes come here: what is sharded is gathered by all
    tuning.save(path.with_suffix(".safetensors"))
    path.with_suffix(".json").write_text(json.dumps(history.rows))


def close(path, other, exact=False):
    rows, others = (json.loads(p.with_suffix(".json").read_text()) for p in (path, other))
    files = [read(p.with_suffix(".safetensors"))[1] for p in (path, other)]
    if exact:
        assert rows == others
        assert all(torch.equal(value, files[1][key]) for key, value in files[0].items())
    for row, expected in zip(rows, others, strict=True):
        assert row == pytest.approx(expected, rel=1e-9, nan_ok=True)
    torch.testing.assert_close(files[0], files[1], rtol=1e-8, atol=1e-10)


def dying(row):
    if row["step"] == DEATH:
        os.kill(os.getpid(), signal.SIGKILL)


HEAD = """
import sys
from pathlib import Path
import torch.distributed as dist
from tests.train import test_train_parallel as t
rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{folder}/{sys.argv[4]}", rank=rank, world_size=world)
"""
WHOLE = """
for kind in t.KINDS:
    for case in t.CASES:
        t.kept(*t.train(case, rank, parallel=kind), folder / f"{case}, {kind}")
"""
KILLED = """
kept = {"checkpoint_dir": folder / sys.argv[5], "checkpoint_every": 2, "parallel": sys.argv[5]}
t.train("drawn", rank, callbacks=[t.dying], **kept)
"""
RESUMED = """
kind = sys.argv[5]
kept = {"checkpoint_every": 2, "parallel": kind, "resume": True}
for case, place in (("drawn", kind), ("lora", f"{kind} from one")):
    t.kept(*t.train(case, rank, checkpoint_dir=folder / place, **kept), folder / f"{place}, resumed")
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    for case in CASES:
        kept(*train(case), folder / case)
    launch(HEAD + WHOLE, 2, folder, "whole")
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", [case for case in CASES if case != "drawn"])
def test_two_processes_make_the_steps_of_one(results, kind, case):
    close(results / f"{case}, {kind}", results / case)


def test_processes_draw_numbers_of_their_own_and_leave_no_trace():
    state = torch.get_rng_state()
    drawn = []
    for rank, where in ((0, (3,)), (1, (3,)), (0, (4,)), (0, (3,))):
        with Ranks(rank, 2, seed=7).drawing(*where):
            drawn.append((torch.rand(1).item(), random.random(), np.random.rand()))
    assert drawn[0] == drawn[3]
    assert len({*drawn[0], *drawn[1], *drawn[2]}) == 9
    assert torch.equal(torch.get_rng_state(), state)


BAD = [
    ({"parallel": "dp"}, {}, "parallel='dp' is unknown"),
    ({"parallel": "ddp"}, {}, "needs processes: start the program with torchrun"),
    ({}, {"RANK": "1", "WORLD_SIZE": "2"}, "2 processes were started.*Give parallel="),
]


@pytest.mark.parametrize("options, environment, message", BAD, ids=[message for *_, message in BAD])
def test_what_is_no_training_in_several_processes_is_refused(monkeypatch, options, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(PeftlibError, match=message):
        train("lora", **options)


class Learning:
    """A sampler whose draws depend on what it has seen."""

    def __len__(self):
        return 4

    def __call__(self, epoch):
        return torch.arange(4)

    def state_dict(self):
        return {"seen": torch.zeros(1)}


def test_what_leaves_some_without_work_or_in_another_order_is_refused():
    two = Ranks(0, 2, torch.device("cpu"), 0)
    two.check(Batches(data(), 3), 1)
    two.check([1, 2], 2)
    with pytest.raises(PeftlibError, match=r"accumulate=1 batch.*those of list are not cut.*accumulate=2"):
        two.check([1, 2], 1)
    with pytest.raises(PeftlibError, match="Learning draws by what it has seen"):
        two.check(Batches(data(), 3, sampler=Learning()), 1)


def test_an_optimizer_that_has_stepped_is_not_sharded():
    model = Model()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2).long()).sum().backward()
    optimizer.step()
    with pytest.raises(PeftlibError, match="has made steps on whole parameters"):
        shard(model, optimizer)


@given(window=st.lists(st.integers(), min_size=1, max_size=9), world=st.integers(1, 4))
def test_every_batch_of_a_window_is_somebodys_and_all_have_as_many(window, world):
    dealt = [Ranks(rank, world).own(window) for rank in range(world)]
    assert len({len(own) for own in dealt}) == 1
    busy = [batch for own in dealt for batch in own if not isinstance(batch, Idle)]
    assert sorted(busy) == sorted(window)


class Stop(Exception):
    pass


def stopping(row):
    if row["step"] == DEATH:
        raise Stop


@pytest.mark.parametrize("kind", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_killed_and_resumed_by_as_many_and_by_others(results, tmp_path, kind):
    first, second = start(HEAD + KILLED, 2, tmp_path, f"killed {kind}", kind)
    _, errors = first.communicate(timeout=300)
    assert first.returncode == -signal.SIGKILL, errors
    second.kill()  # as torchrun does
    second.communicate()
    shutil.copytree(tmp_path / kind, tmp_path / f"{kind} for one")
    # begun by one process
    with pytest.raises(Stop):
        train("lora", callbacks=[stopping], checkpoint_dir=tmp_path / f"{kind} from one", checkpoint_every=2)
    launch(HEAD + RESUMED, 2, tmp_path, "resumed", kind)
    close(tmp_path / f"{kind}, resumed", results / f"drawn, {kind}", exact=True)
    close(tmp_path / f"{kind} from one, resumed", results / "lora")
    log = (tmp_path / kind / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == list(range(7))
    # and by one process what two began: the same rows until then, the same data after it
    kept_for_one = {"checkpoint_dir": tmp_path / f"{kind} for one", "checkpoint_every": 2}
    _, history = train("drawn", resume=True, **kept_for_one)
    rows = history.rows
    expected = json.loads((results / f"drawn, {kind}.json").read_text())
    assert rows[:4] == expected[:4]
    assert [row["targets"] for row in rows] == [row["targets"] for row in expected]


PLAIN = """
batches = t.Batches(t.data(), 3, t.PADDED)
model = t.Model()
t.fit(model, batches, t.causal_lm, optimizer=t.torch.optim.SGD(model.parameters()), steps=2, parallel="ddp")
assert all(p.grad is None for p in model.parameters())
"""


def test_ddp_does_not_warn_of_a_model_that_uses_all_it_has(tmp_path):
    for process in start(HEAD + PLAIN, 2, tmp_path, "plain"):
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        assert "find_unused_parameters" not in errors
