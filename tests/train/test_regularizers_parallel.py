"""Two processes with penalty, weights and replay make the steps of one; sharded weights are refused."""

from __future__ import annotations

from functools import partial

import torch

import peftlib
from peftlib.train import Batches, Fisher, Replay, causal_lm, ewc, fit, groups, with_penalty, with_weights
from peftlib.train.fisher import base_weights
from tests.ranks import launch
from tests.train.test_train_parallel import HEAD, LORA, PADDED, Model, close, data, kept


def train(rank=0, **options):
    torch.manual_seed(1 + rank)
    model = Model().double()
    generator = torch.Generator().manual_seed(5)
    values = {n: torch.rand(w.shape, generator=generator).double() for n, w in base_weights(model).items()}
    tuning = peftlib.attach(model, LORA)
    loss = with_weights(partial(causal_lm, each=True), torch.arange(1, 8))
    loss = with_penalty(loss, ewc(tuning, Fisher(values, 1.0, "data"), 0.5))
    batches = Batches(data(), 3, PADDED, sampler=Replay(5, 2, 0.4), index=True)
    optimizer = torch.optim.AdamW(groups(tuning, lr=0.03, lora_plus=2.0, layer_decay=0.5))
    return tuning, fit(model, batches, loss, optimizer=optimizer, steps=6, accumulate=2, clip=1.0, **options)


SCRIPT = """
from tests.train import test_regularizers_parallel as r
r.kept(*r.train(rank, parallel="ddp"), folder / "two")
try:
    r.train(rank, parallel="fsdp")
except r.peftlib.PeftlibError as error:
    print(error)
"""


def test_two_processes_make_the_steps_of_one(tmp_path):
    kept(*train(), tmp_path / "one")
    for said in launch(HEAD + SCRIPT, 2, tmp_path, "regularized"):
        assert "the model was sharded since" in said
    close(tmp_path / "two", tmp_path / "one")
