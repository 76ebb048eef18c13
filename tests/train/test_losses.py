"""Losses against naive twins in float64, with every gradient; what they refuse; what they hold in memory."""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import peftlib
from peftlib import LoRA, PeftlibError
from peftlib.train import (
    causal_lm,
    chunked_cross_entropy,
    classification,
    cross_entropy,
    mask_tokens,
    masked_lm,
    regression,
)

V, D = 11, 4
IDS = torch.tensor([[4, 7, 1], [0, 9, 3]])


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(V, D), nn.Linear(D, D), nn.Linear(D, V)

    def forward(self, ids):
        return self.head(torch.tanh(self.body(self.embed(ids))))


def decoder():
    torch.manual_seed(1)
    return Decoder().double()


def naive(logits, labels):
    """One number at a time."""
    total, count = logits.new_zeros(()), 0
    for row, label in zip(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1).tolist(), strict=True):
        if label != -100:
            total = total - (row[label] - row.exp().sum().log())
            count += 1
    return total, count


def gradients(model, total):
    return torch.autograd.grad(total, list(model.parameters()))


@st.composite
def labelled(draw, least=2):
    rows, positions = draw(st.integers(1, 3)), draw(st.integers(least, 7))
    torch.manual_seed(draw(st.integers(0, 99)))
    ids = torch.randint(V, (rows, positions))
    labels = torch.where(torch.rand(rows, positions) < 0.4, -100, ids)
    labels[-1, -1] = ids[-1, -1]
    return ids, labels


@given(labelled())
def test_causal_lm_is_its_naive_twin_whole_or_in_chunks(case):
    ids, labels = case
    model = decoder()
    expected, count = naive(model(ids)[:, :-1], labels[:, 1:])
    wanted = gradients(model, expected)
    for loss in (causal_lm, *(partial(causal_lm, head="head", chunk=n) for n in (1, 3, 99))):
        total, found = loss(model, {"inputs": ids, "labels": labels})
        assert found == count
        torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradients(model, total), wanted, rtol=1e-10, atol=1e-12)
    assert "forward" not in model.head.__dict__


@given(labelled())
def test_sums_and_counts_of_each_row_are_those_of_its_naive_twin(case):
    ids, labels = case
    model = decoder()
    for loss, shift in (
        (causal_lm, 1),
        (partial(causal_lm, head="head", chunk=2), 1),
        (classification, 0),
        (masked_lm, 0),
    ):
        sums, counts = loss(model, {"inputs": ids, "labels": labels}, each=True)
        positions = ids.shape[1] - shift
        expected = [
            naive(row[:positions], wanted[shift:]) for row, wanted in zip(model(ids), labels, strict=True)
        ]
        torch.testing.assert_close(sums, torch.stack([e for e, _ in expected]), rtol=1e-12, atol=1e-12)
        assert counts.tolist() == [count for _, count in expected]
        factors = torch.arange(1.0, len(ids) + 1, dtype=torch.float64)  # each row's gradient is its own
        torch.testing.assert_close(
            gradients(model, (factors * sums).sum()),
            gradients(model, sum(f * e for f, (e, _) in zip(factors, expected, strict=True))),
            rtol=1e-10,
            atol=1e-12,
        )


@given(labelled(least=1))
def test_classification_of_tokens_and_of_sequences(case):
    ids, labels = case
    model = decoder()
    for inputs, wanted in ((ids, labels), (ids[-1], labels[-1])):
        expected, count = naive(model(inputs), wanted)
        for loss in (classification, masked_lm):
            total, found = loss(model, {"inputs": inputs, "labels": wanted})
            assert found == count
            torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(
                gradients(model, total),
                gradients(model, naive(model(inputs), wanted)[0]),
                rtol=1e-10,
                atol=1e-12,
            )


def test_classes_may_weigh_differently_and_labels_be_smoothed():
    logits, labels = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 2, -100, 1, 2])
    weights, eps = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64), 0.1
    expected = 0.0
    for row, label in zip(logits.log_softmax(-1), labels.tolist(), strict=True):
        if label != -100:
            expected += -(1 - eps) * weights[label] * row[label] - eps / 3 * (weights * row).sum()
    batch = {"inputs": logits, "labels": labels}
    total, count = classification(nn.Identity(), batch, class_weights=weights, label_smoothing=eps)
    torch.testing.assert_close(total, expected)
    assert count == 4


def test_regression_counts_every_number_but_nan():
    y = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[1.0, math.nan], [2.0, 3.0], [math.nan, math.nan]], dtype=torch.float64)
    total, count = regression(nn.Identity(), {"inputs": y, "labels": labels})
    expected = (y[0, 0] - 1) ** 2 + (y[1, 0] - 2) ** 2 + (y[1, 1] - 3) ** 2
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(*(torch.autograd.grad(t, y, retain_graph=True)[0] for t in (total, expected)))
    assert count == 3
    sums, counts = regression(nn.Identity(), {"inputs": y, "labels": labels}, each=True)
    torch.testing.assert_close(sums, torch.stack([(y[0, 0] - 1) ** 2, *(y[1] - labels[1]).square().sum()[None],
                                                  y.new_zeros(())]))  # fmt: skip
    torch.testing.assert_close(
        *(torch.autograd.grad(t, y, retain_graph=True)[0] for t in (sums.sum(), total))
    )
    assert counts.tolist() == [1, 2, 0]


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.uint8])
def test_labels_may_be_integers_of_any_size(dtype):
    labels = IDS if dtype is torch.uint8 else torch.where(torch.arange(3) == 1, -100, IDS)
    for loss in (causal_lm, partial(causal_lm, head="head"), classification):
        found, expected = (
            loss(decoder(), {"inputs": IDS, "labels": given}) for given in (labels.to(dtype), labels)
        )
        assert torch.equal(found[0], expected[0])
        assert found[1] == expected[1]


def test_low_precision_is_summed_in_float32():
    logits, labels = torch.randn(64, 50).bfloat16(), torch.randint(50, (64,))
    exact = cross_entropy(logits.double(), labels)[0]
    assert cross_entropy(logits, labels)[0].dtype is torch.float32
    assert cross_entropy(logits, labels)[0].item() == pytest.approx(exact.item(), rel=1e-5)


def test_any_shape_of_output_and_of_inputs():
    logits, labels = torch.randn(2, 3), torch.tensor([0, 2])
    expected = cross_entropy(logits, labels)[0]

    class Gives(nn.Module):
        def __init__(self, wrap):
            super().__init__()
            self.wrap = wrap

        def forward(self, x):
            return self.wrap(x)

    for wrap in (
        lambda x: x,
        lambda x: (x, None),
        lambda x: {"logits": x},
        lambda x: SimpleNamespace(logits=x),
    ):
        for inputs in (logits, (logits,), {"x": logits}):
            total, _ = classification(Gives(wrap), {"inputs": inputs, "labels": labels})
            assert torch.equal(total, expected)


def test_chunks_work_with_tunings_in_the_head_and_with_autocast():
    model = decoder().float()
    tuning = peftlib.attach(model, LoRA(rank=2), targets=["body", "head"])
    for p in tuning.parameters():
        nn.init.normal_(p)
    ids = torch.randint(V, (2, 6))
    for context in (
        torch.autocast("cpu", torch.bfloat16, enabled=False),
        torch.autocast("cpu", torch.bfloat16),
    ):
        found = []
        for loss in (causal_lm, partial(causal_lm, head="head", chunk=3)):
            with context:
                total, _ = loss(model, {"inputs": ids, "labels": ids})
            found.append((total.detach(), torch.autograd.grad(total, list(tuning.parameters()))))
        torch.testing.assert_close(found[0], found[1], rtol=1e-2, atol=1e-2)


def test_chunks_never_hold_all_logits():
    """Peak bytes: whole logits cost several times B T V numbers, chunks less than once."""
    b, t, v, d = 2, 64, 512, 8
    ids, head, embed = torch.randint(v, (b, t)), nn.Linear(d, v), nn.Embedding(v, d)
    model = nn.Sequential(embed, head)
    peaks = []
    for loss in (causal_lm, partial(causal_lm, head="1", chunk=8)):

        def step(loss=loss):
            loss(model, {"inputs": ids, "labels": ids})[0].backward()
            model.zero_grad()

        report = peftlib.measure_memory(step, model=model)
        peaks.append(report.activation_bytes + report.temporary_bytes)
    logits = 4 * b * t * v
    assert peaks[0] > 1.9 * logits
    assert peaks[1] < 0.4 * logits


class Capped(Decoder):
    def forward(self, ids):
        return torch.tanh(super().forward(ids))


@pytest.mark.parametrize(
    "loss, model, batch, message",
    [
        (causal_lm, decoder(), {"inputs": IDS}, "'inputs' and 'labels'.*'labels'"),
        (causal_lm, decoder(), IDS, "got Tensor"),
        (causal_lm, decoder(), {"inputs": IDS, "labels": IDS[:, :2]}, r"\(2, 3, 11\).*\(2, 2\)"),
        (causal_lm, decoder(), {"inputs": IDS, "labels": IDS[0]}, "integer labels"),
        (causal_lm, decoder(), {"inputs": IDS, "labels": torch.full_like(IDS, -100)}, "No target in a batch"),
        (causal_lm, decoder(), {"inputs": IDS[:, :1], "labels": IDS[:, :1]}, "No target in a batch"),
        (partial(causal_lm, head="head", chunk=0), decoder(), {"inputs": IDS, "labels": IDS}, "chunk=0"),
        (partial(causal_lm, head="tail"), decoder(), {"inputs": IDS, "labels": IDS}, "no module 'tail'"),
        (partial(causal_lm, head="body"), decoder(), {"inputs": IDS, "labels": IDS}, "does more than return"),
        (partial(causal_lm, head="head"), Capped().double(), {"inputs": IDS, "labels": IDS}, "does more"),
        (classification, decoder(), {"inputs": IDS, "labels": IDS[0]}, "all axes but the last"),
        (
            classification,
            decoder(),
            {"inputs": IDS, "labels": IDS.float()},
            r"labels are torch.float32.*integers",
        ),
        (
            classification,
            decoder(),
            {"inputs": IDS, "labels": IDS + V},
            "A label is 20, and the model gives 11",
        ),
        (causal_lm, decoder(), {"inputs": IDS, "labels": IDS - 99}, r"A label is -\d+, .* from 0 to 10"),
        (partial(causal_lm, head="head"), decoder(), {"inputs": IDS, "labels": IDS + V}, "A label is"),
        (regression, nn.Identity(), {"inputs": torch.ones(3, 2), "labels": torch.ones(3)}, "Reshape one"),
        (
            regression,
            nn.Identity(),
            {"inputs": torch.ones(2), "labels": torch.full((2,), math.nan)},
            "No target",
        ),
    ],
)
def test_what_does_not_go_together_is_named(loss, model, batch, message):
    with pytest.raises(PeftlibError, match=message):
        loss(model, batch)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_an_output_without_a_tensor_is_named():
    class Words(nn.Module):
        def forward(self, ids):
            return "words"

    with pytest.raises(PeftlibError, match=r"Words gave str.*\.logits"):
        classification(Words(), {"inputs": IDS, "labels": IDS})


def test_masks_are_80_10_10_and_never_special():
    ids = torch.randint(5, 1000, (200, 100))
    ids[:, 0], padding = 1, torch.zeros_like(ids, dtype=torch.bool)
    padding[:, 90:] = True
    inputs, labels = mask_tokens(ids, mask_id=4, vocabulary=1000, special=[0, 1, 2, 3], keep=padding)
    chosen = labels != -100
    assert torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(inputs[~chosen], ids[~chosen])
    assert not chosen[:, 0].any()
    assert not chosen[padding].any()
    assert chosen.sum() / (200 * 89) == pytest.approx(0.15, abs=0.01)
    masked, same = inputs[chosen] == 4, inputs[chosen] == ids[chosen]
    assert masked.float().mean().item() == pytest.approx(0.8, abs=0.03)
    assert same.float().mean().item() == pytest.approx(0.1, abs=0.03)
    assert inputs[chosen][~masked].min() > 4


def test_masking_is_the_generators_alone_and_leaves_no_row_without_target():
    ids = torch.randint(5, 50, (30, 3))
    first, again = (
        mask_tokens(ids, mask_id=4, vocabulary=50, generator=torch.Generator().manual_seed(2))
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert (first[1] != -100).any(-1).all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"share": 0.0}, "share=0.0"),
        ({"keep": torch.ones(1, 2) > 0}, "nothing to choose"),
        ({"vocabulary": 1}, "only"),
    ],
)
def test_masking_refuses(change, message):
    arguments = {"mask_id": 0, "vocabulary": 9, **change}
    with pytest.raises(PeftlibError, match=message):
        mask_tokens(torch.tensor([[5, 6]]), **arguments)


def test_chunked_cross_entropy_takes_any_function():
    weight = torch.randn(V, D, dtype=torch.float64, requires_grad=True)
    hidden, labels = torch.randn(7, D, dtype=torch.float64), torch.randint(V, (7,))
    total, count = chunked_cross_entropy(hidden, labels, lambda x: x @ weight.T, 2)
    expected, _ = naive(hidden @ weight.T, labels)
    torch.testing.assert_close(*(torch.autograd.grad(t, weight)[0] for t in (total, expected)))
    assert count == 7
