"""The traps that injection falls into on real modules, each with a test that a naive implementation fails."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftlib
from peftlib import BitFit, FullFineTuning, LoRA, PartialFineTuning

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def state(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def changed(model: nn.Module, before: dict[str, Tensor]) -> list[str]:
    now = model.state_dict()
    return [k for k, v in before.items() if not torch.equal(v, now[k])]


# -- running statistics ------------------------------------------------------------------------------------------------


class Normed(nn.Module):
    """A convolution under a normalization that tracks statistics."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = norm
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).mean((2, 3)))


NORMS = {
    "batch": lambda: nn.BatchNorm2d(4),
    "batch, averaging": lambda: nn.BatchNorm2d(4, momentum=None),
    "batch, no affine": lambda: nn.BatchNorm2d(4, affine=False),
    "instance": lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
    "batch, untracked": lambda: nn.BatchNorm2d(4, track_running_stats=False),
    "instance, untracked": lambda: nn.InstanceNorm2d(4),
}
TRACKING = [k for k in NORMS if "untracked" not in k]


def normed(kind: str) -> Normed:
    model = Normed(NORMS[kind]())
    model(torch.randn(5, 3, 8, 8) + 1)  # statistics that are nobody's defaults
    return model


def train(model: nn.Module, tuning: peftlib.Tuning, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(tuning.parameters(), lr=0.1)
    for _ in range(steps):
        model(torch.randn(5, 3, 8, 8) * 3).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", NORMS)
def test_training_on_top_leaves_frozen_statistics(kind):
    model = normed(kind)
    before, plain = state(model), dict(vars(model.norm))
    tuning = peftlib.attach(model, LoRA(rank=2), targets=["conv", "head"])
    train(model, tuning)
    if kind.startswith("batch"):
        assert not changed(model, before)
    tuning.detach()
    assert not changed(model, before)
    assert vars(model.norm) == plain


@pytest.mark.parametrize("kind", TRACKING)
def test_frozen_statistics_give_the_same_outputs(kind):
    model = normed(kind)
    twin = copy.deepcopy(model)
    tuning = peftlib.attach(model, LoRA(rank=2), targets=["conv"])
    x = torch.randn(5, 3, 8, 8)
    assert torch.equal(model(x), twin(x))
    model.eval(), twin.eval()
    twin.load_state_dict(state(model), strict=False)
    assert torch.equal(model(x), twin(x))
    tuning.detach()


@pytest.mark.parametrize("kind", [k for k in TRACKING if k.startswith("batch")])
def test_not_even_a_broken_batch_marks_frozen_statistics(kind):
    model = normed(kind)
    before = state(model)
    peftlib.attach(model, LoRA(rank=2), targets=["conv"])
    model(torch.full((2, 3, 8, 8), torch.nan))
    assert not changed(model, before)


@pytest.mark.parametrize("kind", TRACKING)
@pytest.mark.parametrize("method", [FullFineTuning(), PartialFineTuning(targets=["norm", "head"])], ids=str)
def test_a_tuning_that_trains_a_norm_moves_its_statistics(kind, method):
    model = normed(kind)
    twin, before, plain = copy.deepcopy(model), state(model), dict(vars(model.norm))
    tuning = peftlib.attach(model, method)
    x = torch.randn(5, 3, 8, 8)
    model(x), twin(x)
    moved = dict(model.norm.named_buffers(recurse=False))
    assert all(torch.equal(v, moved[k]) for k, v in twin.norm.named_buffers())
    assert "norm.running_mean" in changed(model, before)
    with tuning.disabled():
        assert not changed(model, before)
        model(x)
        assert not changed(model, before) or kind == "instance"
    assert "norm.running_mean" in changed(model, before)
    tuning.detach()
    assert not changed(model, before)
    assert vars(model.norm) == plain


def test_statistics_without_parameters_are_saved_with_full_fine_tuning(tmp_path):
    model = normed("batch, no affine")
    fresh = copy.deepcopy(model)
    tuning = peftlib.attach(model, FullFineTuning())
    train(model, tuning)
    tuning.save(tmp_path / "full.safetensors")
    peftlib.load(fresh, tmp_path / "full.safetensors")
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(fresh.eval()(x), model.eval()(x))


def test_training_the_bias_of_a_norm_does_not_move_its_statistics():
    model = normed("batch")
    tuning = peftlib.attach(model, BitFit())
    before = {k: v.clone() for k, v in model.named_buffers()}
    train(model, tuning)
    assert all(torch.equal(v, before[k]) for k, v in model.named_buffers())


def test_without_freezing_statistics_follow_the_data():
    model = normed("batch")
    before = state(model)
    peftlib.attach(model, LoRA(rank=2), targets=["conv"], freeze=False)
    model(torch.randn(5, 3, 8, 8))
    assert "norm.running_mean" in changed(model, before)


@pytest.mark.parametrize("first", ["part", "whole"])
def test_statistics_of_nested_roots_are_released_by_the_last(first):
    model: Any = nn.Sequential(normed("batch"))
    before = state(model)
    part = peftlib.attach(model[0], LoRA(rank=2), targets=["conv"], name="part")
    whole = peftlib.attach(model, LoRA(rank=2), targets=["0.head"], name="whole")
    one, other = (part, whole) if first == "part" else (whole, part)
    one.detach()
    model(torch.randn(5, 3, 8, 8))
    assert not changed(model, before)
    other.detach()
    model(torch.randn(5, 3, 8, 8))
    assert "0.norm.running_mean" in changed(model, before)
