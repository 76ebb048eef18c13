"""A fresh output layer in place of the model's own."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import peftlib
from peftlib import Adapter, LoRA, NewHead, PeftlibError
from tests.twin import assert_twins, assert_untouched, classes, randomize, snapshot


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).relu())


X = torch.randn(3, 6)


@pytest.mark.parametrize("bias", [True, False])
def test_it_computes_its_own_layer_and_never_the_old_one(bias: bool) -> None:
    model = Net().double()
    before, kinds = snapshot(model), classes(model)
    tuning = peftlib.attach(model, {"head": NewHead(5, bias=bias)})
    assert tuning.num_parameters == 5 * 8 + 5 * bias
    x = X.double().requires_grad_(True)
    leaves = {"x": x, **randomize(tuning)}
    hidden = lambda: F.linear(x, before["body.weight"], before["body.bias"]).relu()  # noqa: E731
    assert_twins(
        lambda: model(x),
        lambda: F.linear(hidden(), leaves["head.newhead.weight"], leaves.get("head.newhead.bias")),
        leaves,
    )
    nn.init.constant_(model.head.weight, math.nan)  # nobody reads it
    assert torch.isfinite(model(x)).all()
    model.head.weight.data.copy_(before["head.weight"])
    with tuning.disabled():
        assert model(x).shape == (3, 2)
    tuning.detach()
    assert_untouched(model, before, kinds)


def test_it_starts_as_a_linear_does() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 400), nn.Linear(400, 2))
    weight, bias = peftlib.attach(model, {"1": NewHead(300)}).parameters()
    assert weight.abs().max() <= 1 / 20 < 1.01 * weight.abs().max()  # kaiming-uniform with slope sqrt 5
    assert abs(weight.std() * 20 * math.sqrt(3) - 1) < 0.02
    assert not bias.any()


@pytest.mark.parametrize("head", [NewHead(5), {"head": NewHead(5)}])
@pytest.mark.parametrize("method", [LoRA, Adapter])
def test_every_method_takes_it_as_its_head(head: Any, method: Any, tmp_path: Path) -> None:
    model = Net()
    fresh = copy.deepcopy(model)
    one = LoRA(rank=2, head=head) if method is LoRA else Adapter(dim=2, head=head)
    tuning = peftlib.attach(model, one, targets=["body"], example=X)
    assert list(tuning.sites) == ["body", "head"]
    randomize(tuning)
    model(X).sum().backward()
    assert all(p.grad is not None for p in tuning.parameters())
    tuning.save(tmp_path / "t.safetensors")
    peftlib.load(fresh, tmp_path / "t.safetensors")
    assert torch.equal(fresh(X), model(X))


def test_two_heads_take_turns() -> None:
    model = Net()
    peftlib.attach(model, {"head": NewHead(5)}, name="five")
    peftlib.attach(model, {"head": NewHead(7)}, name="seven")
    shapes = {}
    for name in ("five", "seven"):
        peftlib.use(model, name)
        shapes[name] = tuple(model(X).shape)
    assert shapes == {"five": (3, 5), "seven": (3, 7)}


def test_the_head_of_a_model_that_ties_it_to_its_embedding() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
            self.mix = nn.Linear(4, 4)
            self.out.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.out(self.mix(self.embed(ids)))

    model = Tied()
    tuning = peftlib.attach(model, LoRA(rank=2, head=NewHead(3)))
    assert list(tuning.sites) == ["mix", "out"]
    assert model(torch.arange(4)).shape == (4, 3)


@pytest.mark.parametrize(
    "method, targets, message",
    [
        (lambda: NewHead(0), None, "out_features=0"),
        (lambda: NewHead(2.0), None, r"out_features=2\.0"),
        (lambda: NewHead(2, head=NewHead(2)), None, "takes none"),
        (lambda: NewHead(2), None, "needs one output layer"),
        (lambda: NewHead(2), [""], "replaces a linear layer"),
        (lambda: NewHead(2), ["head.weight"], "replaces a linear layer"),
        (lambda: LoRA(rank=2, head=NewHead(2)), ["body"], "needs one output layer.*0 were found"),
        (lambda: LoRA(rank=2, head="classifier"), ["body"], "'classifier' matches nothing"),
    ],
)
def test_refusals(method: Any, targets: Any, message: str) -> None:
    model = Net()
    before, kinds = snapshot(model), classes(model)
    with pytest.raises(PeftlibError, match=message):
        peftlib.attach(model, method(), targets=targets)
    assert_untouched(model, before, kinds)


def test_it_cannot_be_merged() -> None:
    tuning = peftlib.attach(Net(), {"head": NewHead(2)})
    with pytest.raises(PeftlibError, match="another shape"):
        tuning.merge()
    assert not tuning.merged
