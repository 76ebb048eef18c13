"""Which rate and which decay a parameter has."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

import peftlib
from peftlib import Adapter, BitFit, FullFineTuning, LoRA, PeftlibError, PromptTuning
from peftlib.train import cosine, fit, groups, regression


class Block(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.norm, self.fc = nn.LayerNorm((2, width)), nn.Linear(width, width)
        self.experts = nn.ModuleList(
            nn.Linear(width, width) for _ in range(2)
        )  # side by side, not one upon the other

    def forward(self, x):
        return x + self.fc(x) + sum(expert(x) for expert in self.experts)


class Model(nn.Module):
    def __init__(self, depth=3):
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, 4))
        self.embed = nn.Embedding(7, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 7)

    def forward(self, ids):
        x = self.embed(ids) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def rates(trained, key="lr", **options):
    names = {id(p): name for name, p in trained.named_parameters()}
    found = groups(trained, **{"lr": 1.0, **options})
    assert sorted(id(p) for g in found for p in g["params"]) == sorted(
        id(p) for p in trained.parameters() if p.requires_grad
    )
    assert len({(g["lr"], g["weight_decay"]) for g in found}) == len(found)
    return {names[id(p)]: group[key] for group in found for p in group["params"]}


def by_depth(name):
    block = int(name.split(".")[1]) + 1 if name.startswith("blocks") else 0
    return 0.5 ** (0 if name.startswith(("norm", "head")) else 3 - block)


def test_rates_fall_from_block_to_block_downwards():
    found = rates(Model(), layer_decay=0.5)
    assert found == {name: by_depth(name) for name in found}
    assert found["position"] == found["embed.weight"] == 0.125
    assert found["blocks.2.experts.0.weight"] == found["head.bias"] == 1


@pytest.mark.parametrize("method", [LoRA(rank=2), FullFineTuning(), Adapter(dim=2), BitFit()])
def test_a_tuning_has_the_rates_of_the_modules_it_is_at(method):
    found = rates(peftlib.attach(Model(), method), layer_decay=0.5)
    assert found == {name: by_depth(name) for name in found}
    assert len(set(found.values())) >= 3


def test_a_prompt_stands_before_the_blocks():
    model = Model()
    tuning = peftlib.attach(model, {"embed": PromptTuning(length=2)}, example=torch.zeros(1, 2).long())
    assert set(rates(tuning, layer_decay=0.5).values()) == {0.125}


def test_stacks_of_any_kind_are_counted_through():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Linear(4, 4))
            self.encoder = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2)))
            self.decoder = nn.ModuleList([Block(), Block()])

    # a stage is a container of its own, and its one linear no repetition: the two blocks of the decoder are
    found = rates(Two(), layer_decay=0.1)
    assert found["stem.0.weight"] == found["encoder.1.0.weight"] == pytest.approx(0.01)
    assert found["decoder.0.fc.weight"] == pytest.approx(0.1)
    assert found["decoder.1.experts.1.bias"] == 1

    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    tuning = peftlib.attach(plain, LoRA(rank=1), targets=["2"])  # its class is then another
    assert rates(tuning, layer_decay=0.5) == {"2.lora.a": 0.5, "2.lora.b": 0.5}


def test_vectors_biases_and_norms_do_not_decay():
    found = rates(Model(), key="weight_decay", weight_decay=0.1)
    kept = {name for name, decay in found.items() if decay == 0}
    assert kept == {n for n in found if n.endswith("bias") or "norm" in n}
    assert "blocks.0.norm.weight" in kept  # of two axes
    assert found["position"] == 0.1


@pytest.mark.parametrize("method", [LoRA(rank=2), LoRA(rank=2, use_dora=True)])
def test_lora_plus_is_a_ratio_for_b_alone(method):
    model = Model()
    tuning = peftlib.attach(model, {"fc": method, "norm": FullFineTuning()})
    for name, rate in rates(tuning, lr=0.5, lora_plus=16.0).items():
        assert rate == (8.0 if name.endswith("lora.b") else 0.5)
    both = rates(tuning, lora_plus=16.0, layer_decay=0.5)
    assert both["blocks.0.fc.lora.b"] == 16 * 0.25
    assert both["blocks.0.fc.lora.a"] == 0.25


def test_it_is_the_loop_one_would_write_with_two_optimizers():
    x, y = torch.randn(6, 4).double(), torch.randn(6, 3).double()
    models = []
    for _ in range(2):
        torch.manual_seed(1)
        model = nn.Linear(4, 3).double()
        models.append((model, peftlib.attach(model, LoRA(rank=2))))
    (model, tuning), (naive, own) = models
    optimizer = torch.optim.AdamW(groups(tuning, lr=0.01, lora_plus=4, weight_decay=0.1))
    batch = {"inputs": x, "labels": y}
    fit(model, [batch], regression, optimizer=optimizer, steps=5, scheduler=partial(cosine, warmup=2))
    a, b = own.parameters()
    pair = [torch.optim.AdamW([p], lr=rate, weight_decay=0.1) for p, rate in ((a, 0.01), (b, 0.04))]
    for step in range(5):
        (naive(x) - y).square().mean().backward()
        for one, rate in zip(pair, (0.01, 0.04), strict=True):
            one.param_groups[0]["lr"] = rate * cosine(step, 5, warmup=2)
            one.step()
            one.zero_grad()
    for mine, theirs in zip(tuning.parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_what_it_cannot_do_is_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    for options, message in (
        ({"lr": 0.0}, "lr > 0 and weight_decay >= 0"),
        ({"lr": 1.0, "weight_decay": -1.0}, "lr > 0 and weight_decay >= 0"),
        ({"lr": 1.0, "layer_decay": 0.9}, "has no module list of like ones"),
        ({"lr": 1.0, "layer_decay": 1.5}, "above 0 and at most 1"),
        ({"lr": 1.0, "lora_plus": 16.0}, "there is none among what is trained"),
    ):
        with pytest.raises(PeftlibError, match=message):
            groups(model, **options)
    tuning = peftlib.attach(model, LoRA(rank=2))
    with pytest.raises(PeftlibError, match=r"lora_plus=0\.0: give a ratio above 0"):
        groups(tuning, lr=1.0, lora_plus=0.0)
    with pytest.raises(PeftlibError, match="nothing that is trained"):
        groups(model.requires_grad_(False), lr=1.0)
