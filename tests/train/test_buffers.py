"""Buffers, wherever they are in a model: undone with a step, kept with a training, back with the best values."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import peftlib
from peftlib import FullFineTuning, LoRA
from peftlib.train import EarlyStopping, NonFiniteError, fit, regression
from peftlib.train.buffers import LARGE, Buffers, buffers_of


class Centred(nn.Module):
    """A mean in a module without parameters, a counter, and a cache that is made late and grows."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("cache", None, persistent=False)

    def forward(self, x):
        if self.training:
            self.mean.lerp_(x.mean(0).detach(), 0.3)
            self.seen += 1
            if self.seen > 2:
                self.cache = torch.arange(float(self.seen))
        return x - self.mean + (0 if self.cache is None else 0.01 * self.cache.sum())


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.centre, self.a, self.norm, self.b = (
            Centred(),
            nn.Linear(4, 4),
            nn.BatchNorm1d(4),
            nn.Linear(4, 1),
        )

    def forward(self, x):
        return self.b(self.norm(self.a(self.centre(x))))


METHODS = [LoRA(rank=2), FullFineTuning()]


def start(method):
    torch.manual_seed(0)
    model = Model()
    tuning = peftlib.attach(model, method, targets=["a"] if isinstance(method, LoRA) else None)
    return model, tuning, torch.optim.Adam(tuning.parameters(), lr=0.05)


def data(n=8, bad=None):
    generator = torch.Generator().manual_seed(1)
    batches = [
        {"inputs": torch.randn(6, 4, generator=generator) + i, "labels": torch.randn(6, generator=generator)}
        for i in range(n)
    ]
    if bad is not None:
        batches[bad]["inputs"][0, 0] = math.nan
    return batches


def same(model, other):
    for (name, mine), theirs in zip(model.named_buffers(), other.buffers(), strict=True):
        assert torch.equal(mine, theirs), name
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_step_left_out_leaves_no_trace(method):
    model, _, optimizer = start(method)
    fit(model, data(bad=5), regression, optimizer=optimizer, steps=8, nonfinite="skip")
    other, _, optimizer = start(method)
    fit(other, [b for i, b in enumerate(data()) if i != 5], regression, optimizer=optimizer, steps=7)
    assert model.centre.seen == 7
    same(model, other)


def test_where_it_stops_the_buffers_are_those_from_before():
    model, _, optimizer = start(FullFineTuning())
    with pytest.raises(NonFiniteError):
        fit(model, data(bad=5), regression, optimizer=optimizer, steps=8)
    other, _, optimizer = start(FullFineTuning())
    fit(other, data(), regression, optimizer=optimizer, steps=5)
    same(model, other)


class Stop(Exception):
    pass


def stopping(row):
    if row["step"] == 5:
        raise Stop


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_interrupted_training_goes_on_with_its_buffers(tmp_path, method):
    options = {"steps": 8, "checkpoint_every": 4}
    model, _, optimizer = start(method)
    whole = fit(model, data(), regression, optimizer=optimizer, checkpoint_dir=tmp_path / "whole", **options)
    other, _, optimizer = start(method)
    options |= {"checkpoint_dir": tmp_path / "parts", "resume": True}
    with pytest.raises(Stop):
        fit(other, data(), regression, optimizer=optimizer, callbacks=[stopping], **options)
    other, _, optimizer = start(method)
    assert fit(other, data(), regression, optimizer=optimizer, **options) == whole
    same(model, other)


@pytest.mark.parametrize("interrupted", [False, True])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_best_values_come_with_their_buffers(tmp_path, method, interrupted):
    model, _, optimizer = start(method)
    fit(model, data(), regression, optimizer=optimizer, steps=2)
    other, _, optimizer = start(method)
    scores = {0: 3.0, 1: 1.0}
    options = {
        "evaluate": lambda model: scores.get(int(model.centre.seen) - 1, 2.0),
        "evaluate_every": 1,
        "early_stopping": EarlyStopping(patience=6),
        "checkpoint_dir": tmp_path,
        "checkpoint_every": 4,
        "resume": True,
        "steps": 8,
    }
    if interrupted:
        with pytest.raises(Stop):
            fit(other, data(), regression, optimizer=optimizer, callbacks=[stopping], **options)
        other, _, optimizer = start(method)
    fit(other, data(), regression, optimizer=optimizer, **options)
    for name in ("mean", "seen"):
        assert torch.equal(getattr(other.centre, name), getattr(model.centre, name))
    assert torch.equal(other.norm.running_mean, model.norm.running_mean)


def test_tables_are_taken_as_fixed():
    model = nn.Module()
    model.register_buffer("packed", torch.zeros(LARGE, dtype=torch.int32))
    model.register_buffer("table", torch.zeros(LARGE))
    model.register_buffer("codes", torch.zeros(8, dtype=torch.int32))
    assert set(buffers_of(model)) == {"table", "codes"}
    kept = Buffers(model)
    assert kept.changed() == {}
    model.table[3] = 1
    assert set(kept.changed()) == {"table"}
