"""Penalties against naive twins and finite differences in float64, and that a step has them once."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import peftlib
from peftlib import (
    BitFit,
    FullFineTuning,
    LoRA,
    NewHead,
    PartialFineTuning,
    PeftlibError,
    PrefixTuning,
    TokenRows,
)
from peftlib.train import Fisher, ewc, fisher, fit, l2_sp, regression, with_penalty
from peftlib.train.fisher import base_weights


class Raw(nn.Module):
    """A raw weight, and a linear that is used twice."""

    def __init__(self):
        super().__init__()
        self.stack = nn.Parameter(torch.randn(2, 3, 4))
        self.first = nn.Linear(4, 4)

    def forward(self, x):
        return torch.einsum("eoi,bi->bo", self.stack, self.first(self.first(x)))


def convolutions():
    return nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(6, 3, bias=False))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attn(x, x, x)[0]


def linears():
    return nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3))


CASES = {
    "lora": (linears, LoRA(rank=2, alpha=6), {}),
    "rslora": (linears, LoRA(rank=2, use_rslora=True), {}),
    "dora": (linears, LoRA(rank=2, use_dora=True), {}),
    "slices": (linears, {"0": LoRA(rank=1, rows=[(0, 1), (2, 4)])}, {}),
    "convolution": (convolutions, LoRA(rank=1), {"targets": ["0", "2"]}),
    "convolution, dora": (convolutions, LoRA(rank=1, use_dora=True), {"targets": ["0"]}),
    "embedding": (lambda: nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4)), LoRA(rank=2), {"targets": ["*"]}),
    "attention": (Attention, LoRA(rank=2), {"targets": ["q_proj", "v_proj", "out_proj"]}),
    "raw": (Raw, LoRA(rank=2), {"targets": ["stack", "first"]}),
    "full": (linears, FullFineTuning(), {}),
    "partial": (linears, PartialFineTuning(targets=["2"]), {}),
    "bias": (linears, BitFit(), {}),
    "rows": (lambda: nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4)), TokenRows(ids=[1, 3]), {}),
    "mixed": (linears, {"0": LoRA(rank=2), "1": FullFineTuning(), "2": BitFit()}, {}),
}  # fmt: skip


def make(case, moved=True):
    torch.manual_seed(1)
    build, method, options = CASES[case]
    model = build().double()
    tuning = peftlib.attach(model, method, **options)
    if moved:
        move(tuning)
    return model, tuning


@torch.no_grad()
def move(tuning):
    for parameter in tuning.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))


def values(model):
    state = peftlib.merged_state_dict(model)
    return {name: state[name].clone() for name in base_weights(model)}


def information(model):
    generator = torch.Generator().manual_seed(5)
    found = {n: torch.rand(w.shape, generator=generator).double() for n, w in base_weights(model).items()}
    return Fisher(found, 1.0, "data")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("late", [False, True])
def test_it_is_half_the_strength_times_the_squared_change_and_so_are_its_gradients(case, weighted, late):
    """``w0`` are the weights when the penalty was made, before (of the base) or after some training."""
    model, tuning = make(case, moved=late)
    known = information(model)
    penalty = ewc(tuning, known, 0.7) if weighted else l2_sp(tuning, 0.7)
    start = values(model)
    assert penalty().item() == pytest.approx(0, abs=1e-20)
    move(tuning)

    def naive():
        changes = {name: value - start[name] for name, value in values(model).items()}
        return 0.35 * sum(
            ((known.values[n] if weighted else 1.0) * change.square()).sum().item()
            for n, change in changes.items()
        )

    total = penalty()
    assert naive() > 1e-3
    assert total.item() == pytest.approx(naive(), rel=1e-12)
    total.backward()
    for name, parameter in tuning.named_parameters():
        # central differences of a naive twin that knows nothing of autograd
        flat, gradient = parameter.data.view(-1), parameter.grad.view(-1)
        for i in {0, len(flat) // 2, len(flat) - 1}:
            before, step = flat[i].item(), 1e-5
            flat[i] = before + step
            up = naive()
            flat[i] = before - step
            down = naive()
            flat[i] = before
            assert gradient[i].item() == pytest.approx((up - down) / (2 * step), rel=1e-5, abs=1e-8), name
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_lora_written_out():
    _, tuning = make("lora", moved=False)
    penalty, state = l2_sp(tuning, 2.0), dict(tuning.named_parameters())
    move(tuning)
    expected = sum((3 * state[f"{n}.lora.b"] @ state[f"{n}.lora.a"]).square().sum() for n in ("0", "2"))
    torch.testing.assert_close(penalty(), expected, rtol=1e-12, atol=0)
    wanted = torch.autograd.grad(expected, list(tuning.parameters()))
    torch.testing.assert_close(torch.autograd.grad(penalty(), list(tuning.parameters())), wanted)


def test_a_tied_weight_counts_once():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)).double()
    model[1].weight = model[0].weight
    penalty = l2_sp(peftlib.attach(model, FullFineTuning()), 2.0)
    with torch.no_grad():
        model[0].weight.add_(1.0)
    assert penalty().item() == pytest.approx(20)


def test_a_model_without_a_tuning():
    torch.manual_seed(1)
    model = linears().double()
    model[0].weight.requires_grad_(False)
    penalty = l2_sp(model, 2.0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    expected = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert penalty().item() == pytest.approx(expected)


def data(lengths):
    generator = torch.Generator().manual_seed(3)
    draw = partial(torch.randn, dtype=torch.float64, generator=generator)
    return [{"inputs": draw(n, 5), "labels": draw(n, 3)} for n in lengths]


@pytest.mark.parametrize("each", [False, True])
@settings(max_examples=20)
@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_a_step_has_it_once_however_its_targets_lie_in_batches(each, lengths):
    """Against a loop that adds it to the mean over all targets, on unequal micro-batches."""
    parts = data(lengths)
    model, tuning = make("mixed", moved=False)
    optimizer = torch.optim.SGD(tuning.parameters(), lr=0.05)
    loss = with_penalty(partial(regression, each=each), ewc(tuning, information(model), 3.0))
    history = fit(model, parts, loss, optimizer=optimizer, steps=3, accumulate=len(parts))

    naive, own = make("mixed", moved=False)
    start, known = values(naive), information(naive).values
    optimizer = torch.optim.SGD(own.parameters(), lr=0.05)
    x, y = (torch.cat([part[key] for part in parts]) for key in ("inputs", "labels"))
    state = dict(own.named_parameters())
    for row in history.rows:
        w0 = naive[0].weight.detach() + state["0.lora.b"] @ state["0.lora.a"]
        now = {"0.weight": w0, "1.weight": naive[1].weight, "1.bias": naive[1].bias, "2.bias": naive[2].bias}
        total = (naive(x) - y).square().mean()
        total = total + 1.5 * sum((known[n] * (w - start[n]).square()).sum() for n, w in now.items())
        assert row["loss"] == pytest.approx(total.item(), rel=1e-12)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    for mine, theirs in zip(tuning.parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-13)


def test_one_penalty_per_micro_batch_would_be_seen():
    parts = data([1, 4])
    found = []
    for per_batch in (False, True):
        model, tuning = make("full", moved=False)
        penalty = l2_sp(tuning, 3.0)

        def summed(model, batch, penalty=penalty):
            value, count = regression(model, batch)
            return value + penalty(), count

        loss = summed if per_batch else with_penalty(regression, penalty)
        optimizer = torch.optim.SGD(tuning.parameters(), lr=0.05)
        found.append(fit(model, parts, loss, optimizer=optimizer, steps=3, accumulate=2).last("loss"))
    assert abs(found[0] - found[1]) > 1e-4


def test_evaluation_has_the_plain_loss():
    model, tuning = make("full", moved=False)
    (batch,) = data([4])
    optimizer = torch.optim.SGD(tuning.parameters(), lr=0.1)
    loss = with_penalty(regression, l2_sp(tuning, 5.0))
    history = fit(model, [batch], loss, optimizer=optimizer, steps=2, evaluate=[batch], evaluate_every=1)
    with torch.no_grad():
        plain, count = regression(model, batch)
    assert history.last("eval_loss") == pytest.approx(plain.item() / count, rel=1e-12)


@pytest.mark.parametrize("case", ["full", "lora", "dora"])
def test_autocast_and_narrow_weights_do_not_narrow_it(case):
    torch.manual_seed(1)
    build, method, options = CASES[case]
    model = build().bfloat16()
    tuning = peftlib.attach(model, method, **options)
    penalty = l2_sp(tuning, 1.0)
    move(tuning)
    exact = penalty()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(penalty(), exact)
    assert exact.dtype is torch.float32
    after = {n: v.double() for n, v in values(model).items()}
    with tuning.disabled():
        before = {n: w.detach().double() for n, w in base_weights(model).items()}
    expected = sum((after[n] - before[n]).square().sum().item() for n in after) / 2
    # merged weights are rounded to bfloat16, trained ones are what they are
    assert exact.item() == pytest.approx(expected, rel=1e-5 if case == "full" else 0.05)


def test_what_it_cannot_hold_is_refused_or_left_alone():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, batch_first=True)
    model = nn.Sequential(layer, nn.Linear(8, 2))
    mixed = {"linear1": LoRA(rank=2), "self_attn": PrefixTuning(length=2), "1": NewHead(3)}
    tuning = peftlib.attach(model, mixed, example=torch.randn(2, 4, 8))
    for free in ((), ("1",)):
        with pytest.raises(PeftlibError, match="changes no weight that a penalty could hold"):
            l2_sp(tuning, 1.0, free=free)
    move(tuning)
    held = l2_sp(tuning, 1.0, free=("1", "*self_attn*"))
    assert [w.name for w in held.weights] == ["0.linear1.weight"]
    with pytest.raises(PeftlibError, match="free='q_proj' names nothing that is trained"):
        l2_sp(tuning, 1.0, free=("1", "*self_attn*", "q_proj"))
    with pytest.raises(PeftlibError, match="No weight is left"):
        l2_sp(tuning, 1.0, free=("*",))
    with pytest.raises(PeftlibError, match="a penalty needs a number above 0"):
        l2_sp(tuning, 0.0, free=("1", "*self_attn*"))
    with tuning.disabled(), pytest.raises(PeftlibError, match="does not act as it will in training"):
        l2_sp(tuning, 1.0)


def test_a_fisher_information_of_something_else_is_refused():
    model, tuning = make("lora")
    good = information(model).values
    with pytest.raises(PeftlibError, match=r"'0\.weight' of shape \(2, 2\); in this model it is \(4, 5\)"):
        ewc(tuning, Fisher({**good, "0.weight": torch.ones(2, 2)}, 1.0, "data"), 1.0)
    with pytest.raises(PeftlibError, match=r"has 'gone' of shape \(1,\); in this model there is none"):
        ewc(tuning, Fisher({**good, "gone": torch.ones(1)}, 1.0, "data"), 1.0)
    with pytest.raises(PeftlibError, match=r"has nothing of 0\.weight, which is trained"):
        ewc(tuning, Fisher({"2.weight": good["2.weight"]}, 1.0, "data"), 1.0)


def test_old_data_is_kept_better_than_by_chance():
    """Two tasks of one linear: inputs of the old one lie in the first two directions, of the new one in all."""
    found = {}
    for remedy in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(4, 1, bias=False).double()
        x = torch.randn(64, 4).double()
        old_x = x * torch.tensor([1.0, 1.0, 0.0, 0.0])
        old = {"inputs": old_x, "labels": model(old_x).detach()[:, 0]}
        new = {"inputs": x, "labels": x.sum(1) + 3}
        samples = [{k: v[i : i + 1] for k, v in old.items()} for i in range(64)]
        known = fisher(model, samples, regression, labels="model")
        tuning = peftlib.attach(model, FullFineTuning())
        loss = with_penalty(regression, ewc(tuning, known, 100.0)) if remedy else regression
        fit(model, [new], loss, optimizer=torch.optim.SGD(tuning.parameters(), lr=0.005), steps=400)
        found[remedy] = [regression(model, task)[0].item() / 64 for task in (old, new)]
    assert found[True][0] < 0.1 * found[False][0]


def test_one_changed_weight_is_there_at_a_time():
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(12)))
    tuning = peftlib.attach(model, LoRA(rank=1), targets=["*"])
    penalty = l2_sp(tuning, 1.0)
    move(tuning)
    report = peftlib.measure_memory(lambda: penalty().backward(), model=model)
    assert report.activation_bytes + report.temporary_bytes < 6 * 64 * 64 * 4  # of 12
