"""A training killed at any moment and resumed is the training that was never interrupted, bit for bit."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import peftlib
from peftlib import FullFineTuning, LoRA, PeftlibError
from peftlib.train import (
    Balanced,
    Batches,
    EarlyStopping,
    Mining,
    Replay,
    cosine,
    fit,
    groups,
    l2_sp,
    with_penalty,
    with_weights,
)

STEPS = 9


def loss(model, batch):
    # a model with dropout, and a loss that draws from every generator there is
    x = batch["x"] + 0.01 * random.gauss(0, 1) + 0.01 * np.random.standard_normal() + 0.01 * torch.randn(())
    squares = (model(x) - batch["y"]).square()
    # one per sample where samples are told apart
    if "index" in batch:
        return squares.sum(1), torch.full((len(squares),), 3)
    return squares.sum(), squares.numel()


def noisy(example, generator):
    return {**example, "x": example["x"] + 0.1 * torch.randn(6, generator=generator)}


def examples():
    generator = torch.Generator().manual_seed(3)
    return [
        {"x": torch.randn(6, generator=generator), "y": torch.randn(3, generator=generator)} for _ in range(7)
    ]


def stacked(rows):
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def some_batches(kind):
    if kind == "Batches":
        return Batches(examples(), 2, stacked, seed=4)
    if kind in SAMPLERS:
        return Batches(examples(), 2, stacked, sampler=SAMPLERS[kind](), augment=noisy, seed=4, index=True)
    return DataLoader(examples(), batch_size=2, shuffle=True)  # draws its order from torch's global generator


SAMPLERS = {
    "Mining": lambda: Mining(7, cap=2, seed=4),
    "Replay": lambda: Replay(4, 3, 0.4, seed=4),
    "Balanced": lambda: Balanced([1, 2, 3, 1, 2, 3, 1], seed=4),
}


def train(folder, kind="Batches", method="lora", steps=STEPS, **options):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3))
    tuning = peftlib.attach(model, LoRA(rank=2, dropout=0.2) if method == "lora" else FullFineTuning())
    optimizer = torch.optim.AdamW(tuning.parameters(), lr=0.05)
    objective = loss
    batches = some_batches(kind)
    if kind in SAMPLERS:
        ratio = 4.0 if method == "lora" else None
        optimizer = torch.optim.AdamW(groups(tuning, lr=0.02, lora_plus=ratio, layer_decay=0.5))
        if kind == "Mining":
            objective = batches.sampler.watch(objective)
        objective = with_penalty(with_weights(objective, torch.arange(1, 8)), l2_sp(tuning, 0.1))
    options = {
        "accumulate": 2,
        "checkpoint_every": 3,  # within an epoch of two steps, and at its end
        "evaluate": [stacked(examples())],
        "evaluate_every": 2,
        "early_stopping": EarlyStopping(patience=50),
        **options,
    }
    schedule = partial(cosine, warmup=2)
    history = fit(
        model,
        batches,
        objective,
        optimizer=optimizer,
        steps=steps,
        scheduler=schedule,
        clip=1.0,
        resume=True,
        checkpoint_dir=folder,
        **options,
    )
    return tuning, history


def log(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def same(found, expected):
    (tuning, history), (other, whole) = found, expected
    assert history == whole
    for (name, mine), theirs in zip(tuning.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


class Stop(Exception):
    pass


def stopping(at, row):
    if row["step"] == at:
        raise Stop


@pytest.mark.parametrize("kind", ["Batches", "DataLoader", *SAMPLERS])
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("at", range(STEPS))
def test_interrupted_after_any_step(tmp_path, kind, method, at):
    whole = train(tmp_path / "whole", kind, method)
    with pytest.raises(Stop):
        train(tmp_path / "parts", kind, method, callbacks=[partial(stopping, at)])
    same(train(tmp_path / "parts", kind, method), whole)
    assert log(tmp_path / "parts") == log(tmp_path / "whole") == whole[1].rows


@pytest.mark.parametrize(
    "options",
    [{"autocast": torch.float16}, {"autocast": torch.bfloat16}, {"checkpoint_activations": "0"}],
)
def test_interrupted_with_scaled_losses_and_recomputed_blocks(tmp_path, options):
    whole = train(tmp_path / "whole", **options)
    with pytest.raises(Stop):
        train(tmp_path / "parts", callbacks=[partial(stopping, 4)], **options)
    same(train(tmp_path / "parts", **options), whole)


KILLED = """
import os, random, signal, sys
from pathlib import Path
import torch
from tests.train import test_train_resume as t

folder, choice = Path(sys.argv[1]), random.Random(int(sys.argv[2]))
whole = t.train(folder / "whole", "Mining")
WATCHED = {"open", "os.rename", "os.remove", "tempfile.mkstemp"}
deaths = 0

def attempt(limit, place="parts"):
    # trains in a process of its own that is killed before its limit-th operation on files; True if it got through
    pid = os.fork()
    if pid:
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
        return not os.WIFSIGNALED(status)
    left = [limit]
    def count(event, args):
        if event in WATCHED:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(count)
    t.train(folder / place, "Mining")
    os._exit(0)

MOST = 40
assert not attempt(MOST, "none can do it at one go")
while not attempt(choice.randrange(10, MOST)):
    deaths += 1
    assert deaths < 100
t.same(t.train(folder / "parts", "Mining"), whole)
assert t.log(folder / "parts") == t.log(folder / "whole")
assert sorted(p.name for p in (folder / "parts").glob("tuning-*")) == [f"tuning-{t.STEPS}.safetensors"]
print(deaths)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_killed_again_and_again(tmp_path):
    """SIGKILL before random operations on files, those of the checkpoints and of the log among them."""
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path), "7"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parents[2], env=environment
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) >= 2


def test_what_has_ended_stays_ended_and_may_go_on(tmp_path):
    whole = train(tmp_path / "a", steps=8)
    saved = (tmp_path / "a" / "state.safetensors").read_bytes()
    same(train(tmp_path / "a", steps=8), whole)
    assert (tmp_path / "a" / "state.safetensors").read_bytes() == saved
    assert len(train(tmp_path / "a", steps=10)[1].rows) == 10


def test_an_early_stop_is_remembered_with_its_best_values(tmp_path):
    options = {"early_stopping": EarlyStopping(patience=1, higher_is_better=True), "evaluate_every": 2}
    whole = train(tmp_path, steps=50, **options)
    assert len(whole[1].rows) < 50
    same(train(tmp_path, steps=50, **options), whole)


def test_another_sampler_is_not_gone_on_with(tmp_path):
    train(tmp_path, "Mining", steps=2)
    for kind in ("Batches", "Replay"):
        with pytest.raises(PeftlibError, match="was trained with sampler='Mining'"):
            train(tmp_path, kind, steps=4)
        state = some_batches("Mining").state_dict()
        with pytest.raises(PeftlibError, match="saved with a sampler that keeps"):
            some_batches(kind).load_state_dict(state)


def test_mining_without_its_state_would_be_seen(tmp_path):
    whole = train(tmp_path / "whole", "Mining")
    with pytest.raises(Stop):
        train(tmp_path / "parts", "Mining", callbacks=[partial(stopping, 7)])
    before = Mining.load_state_dict
    Mining.load_state_dict = lambda self, state: None
    try:
        found = train(tmp_path / "parts", "Mining")
    finally:
        Mining.load_state_dict = before
    assert found[1] != whole[1]


def test_another_training_is_not_written_over(tmp_path):
    train(tmp_path, steps=2)
    model = nn.Linear(6, 3)
    tuning = peftlib.attach(model, LoRA(rank=1))
    optimizer = torch.optim.SGD(tuning.parameters())
    with pytest.raises(PeftlibError, match="already holds a training"):
        fit(model, some_batches("Batches"), loss, optimizer=optimizer, steps=1, checkpoint_dir=tmp_path)
    for change in ({"seed": 5}, {"accumulate": 3}):
        with pytest.raises(PeftlibError, match=f"was trained with {next(iter(change))}="):
            train(tmp_path, steps=4, **change)


def test_the_tuning_is_untouched_where_the_optimizer_does_not_fit(tmp_path):
    train(tmp_path, steps=2)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3))
    tuning = peftlib.attach(model, LoRA(rank=2, dropout=0.2))
    before = {k: v.clone() for k, v in tuning.state_dict().items()}
    optimizer = torch.optim.SGD(tuning.parameters(), lr=0.05)
    with pytest.raises(PeftlibError, match="holds the state of AdamW"):
        fit(
            model, some_batches("Batches"), loss, optimizer=optimizer, steps=4, accumulate=2,
            checkpoint_dir=tmp_path, resume=True,
        )  # fmt: skip
    assert all(torch.equal(v, before[k]) for k, v in tuning.state_dict().items())


def test_a_checkpoint_needs_a_tuning(tmp_path):
    model = nn.Linear(6, 3)
    with pytest.raises(PeftlibError, match="checkpoint_dir= keeps a tuning"):
        fit(
            model, some_batches("Batches"), loss, optimizer=torch.optim.SGD(model.parameters()), steps=1,
            checkpoint_dir=tmp_path,
        )  # fmt: skip


def test_a_damaged_state_is_named(tmp_path):
    train(tmp_path, steps=2)
    state = tmp_path / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-3])
    with pytest.raises(PeftlibError, match=r"state\.safetensors"):
        train(tmp_path)
