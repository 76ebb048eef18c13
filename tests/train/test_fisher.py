"""The Fisher information against naive twins and closed forms, in float64."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import default_collate

import peftlib
from peftlib import LoRA, PeftlibError
from peftlib.train import (
    Batches,
    Encoded,
    Fisher,
    causal_lm,
    classification,
    fisher,
    masked_lm,
    pack,
    regression,
)


class Decoder(nn.Module):
    def __init__(self, vocabulary=7, width=4):
        super().__init__()
        self.embed, self.body, self.head = (
            nn.Embedding(vocabulary, width), nn.Linear(width, width), nn.Linear(width, vocabulary),
        )  # fmt: skip
        self.drop = nn.Dropout(0.5)

    def forward(self, ids):
        return self.head(self.drop(torch.tanh(self.body(self.embed(ids)))))


def decoder():
    torch.manual_seed(1)
    return Decoder().double()


def rows(count=5, length=6):
    generator = torch.Generator().manual_seed(2)
    ids = [torch.randint(7, (length - i % 3,), generator=generator) for i in range(count)]
    return [{"inputs": i[None], "labels": torch.where(torch.arange(len(i)) < 2, -100, i)[None]} for i in ids]


def naive(model, samples):
    """One sample, one position, one weight after the other."""
    model.eval()
    found, targets = {name: torch.zeros_like(p) for name, p in model.named_parameters()}, 0
    for sample in samples:
        logits, labels = model(sample["inputs"])[0], sample["labels"][0]
        total = 0.0
        for t in range(1, len(labels)):
            if labels[t] != -100:
                total = total - logits[t - 1].log_softmax(-1)[labels[t]]
                targets += 1
        for name, p in model.named_parameters():
            (gradient,) = torch.autograd.grad(total, p, retain_graph=True)
            found[name] += gradient**2
    return {name: value / targets for name, value in found.items()}, targets


def test_it_is_its_naive_twin_and_not_the_square_of_a_sum():
    model, samples = decoder(), rows()
    expected, targets = naive(decoder(), samples)
    state = torch.get_rng_state()
    model.body.bias.requires_grad_(False)
    model.body.eval()
    found = fisher(model, samples, causal_lm)
    assert found.targets == targets
    assert found.labels == "data"
    assert found.values.keys() == expected.keys()
    for name, value in found.values.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-11, atol=1e-15)
    # nothing of the model or of the generators has changed
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not model.body.training
    assert not model.body.bias.requires_grad
    assert all(p.grad is None for p in model.parameters())
    # it can fail: the square of the summed gradients is another matrix
    model.eval().requires_grad_(True)
    (summed,) = torch.autograd.grad(sum(causal_lm(model, s)[0] for s in samples), model.head.weight)
    assert (summed.square() / targets - expected["head.weight"]).abs().max() > 0.1 * expected[
        "head.weight"
    ].max()


def test_a_subset_of_the_weights():
    model = decoder()
    whole = fisher(model, rows(), causal_lm)
    some = fisher(model, rows(), causal_lm, names=("head.*", "*.bias"))
    assert some.values.keys() == {"head.weight", "head.bias", "body.bias"}
    assert all(torch.equal(value, whole.values[name]) for name, value in some.values.items())


def test_labels_drawn_from_the_model_give_the_true_one():
    """Softmax regression: ``mean over x of x_d^2 p_c (1 - p_c)``; the empirical one has ``(p_c - y_c)^2``."""
    torch.manual_seed(0)
    model = nn.Linear(2, 3, bias=False).double()
    x = torch.randn(6, 2).double()
    p = model(x).softmax(-1).detach()
    samples = [{"inputs": x[i : i + 1], "labels": torch.tensor([2])} for i in range(6)]
    true = torch.einsum("nd,nc->cd", x**2, p * (1 - p)) / 6
    y = torch.tensor([0.0, 0.0, 1.0])
    empirical = torch.einsum("nd,nc->cd", x**2, (p - y) ** 2) / 6
    for loss in (classification, masked_lm, partial(classification, each=True)):
        torch.testing.assert_close(fisher(model, samples, loss).values["weight"], empirical)
    many = fisher(model, samples * 600, classification, labels="model")
    torch.testing.assert_close(many.values["weight"], true, rtol=0.1, atol=0)
    assert (empirical - true).abs().max() > 0.1 * true.max()
    assert many.labels == "model"


def test_drawn_tokens_and_values():
    """A causal model that ignores its input: every target adds ``p_c (1 - p_c)`` to the bias; -100 stays no target."""
    model = decoder()
    nn.init.zeros_(model.head.weight)
    p = model.head.bias.detach().softmax(-1)
    drawn = fisher(model, rows(40) * 20, causal_lm, names=("head.bias",), labels="model")
    torch.testing.assert_close(drawn.values["head.bias"], p * (1 - p), rtol=0.15, atol=0)
    assert drawn.targets == 20 * sum(int((r["labels"][:, 1:] != -100).sum()) for r in rows(40))

    line = nn.Linear(1, 1, bias=False).double()
    samples = [{"inputs": torch.full((1, 1), 3.0).double(), "labels": torch.full((1,), 7.0).double()}]
    found = fisher(line, samples * 2000, regression, labels="model").values["weight"]
    assert found.item() == pytest.approx(2 * 3**2, rel=0.1)  # 4 Var x^2, of variance 1/2
    again = fisher(line, samples * 2000, regression, labels="model").values["weight"]
    assert torch.equal(found, again)
    other = fisher(line, samples * 2000, regression, labels="model", seed=1).values["weight"]
    assert not torch.equal(found, other)
    own = fisher(line, samples, regression, labels=lambda model, sample, generator: sample)
    assert torch.equal(own.values["weight"], fisher(line, samples, regression).values["weight"])


def test_with_a_tuning_on_it_is_that_of_the_weights_that_act():
    """By the kernel's own backward: the gradient of W is that of W + dW."""
    model, samples = decoder(), rows()
    tuning = peftlib.attach(model, LoRA(rank=2), targets=["body", "head"])
    for parameter in tuning.parameters():
        nn.init.normal_(parameter)
    plain = Decoder().double()
    plain.load_state_dict(peftlib.merged_state_dict(model))
    found, expected = fisher(model, samples, causal_lm), fisher(plain, samples, causal_lm)
    assert found.values.keys() == expected.values.keys()
    for name, value in found.values.items():
        torch.testing.assert_close(value, expected.values[name], rtol=1e-9, atol=1e-14)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        n for n, p in model.named_parameters() if n.endswith((".a", ".b"))
    ]


def test_narrow_weights_are_squared_in_float32():
    samples = [{"inputs": torch.full((1, 2), 1e-12), "labels": torch.ones(1)}]
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    half = [{k: v.bfloat16() for k, v in s.items()} for s in samples]
    found = fisher(model.bfloat16(), half, regression).values["weight"]
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, torch.full((1, 2), 4e-24), rtol=0.02, atol=0)


def test_it_goes_into_a_file_and_comes_back(tmp_path):
    found = fisher(decoder(), rows(), causal_lm)
    found.save(tmp_path / "old.safetensors")
    back = Fisher.load(tmp_path / "old.safetensors")
    assert (back.targets, back.labels) == (found.targets, found.labels)
    assert back.values.keys() == found.values.keys()
    assert all(torch.equal(back.values[n], v) for n, v in found.values.items())
    model = decoder()
    peftlib.attach(model, LoRA(rank=1), targets=["body"]).save(tmp_path / "tuning.safetensors")
    with pytest.raises(PeftlibError, match="holds no Fisher information"):
        Fisher.load(tmp_path / "tuning.safetensors")
    (tmp_path / "old.safetensors").write_bytes((tmp_path / "old.safetensors").read_bytes()[:-3])
    with pytest.raises(PeftlibError, match=r"old\.safetensors"):
        Fisher.load(tmp_path / "old.safetensors")


def test_what_it_cannot_estimate_is_refused():
    model, samples = decoder(), rows()
    with pytest.raises(PeftlibError, match="a batch of 2 samples"):
        fisher(model, [{"inputs": torch.zeros(2, 3).long(), "labels": torch.zeros(2, 3).long()}], causal_lm)
    with pytest.raises(PeftlibError, match="was given no samples"):
        fisher(model, [], causal_lm)
    with pytest.raises(PeftlibError, match="'neck' matches no weight of Decoder"):
        fisher(model, samples, causal_lm, names=("neck",))
    with pytest.raises(PeftlibError, match="labels='true' is unknown"):
        fisher(model, samples, causal_lm, labels="true")
    with pytest.raises(PeftlibError, match="labels='model' draws for causal_lm"):
        fisher(model, samples, lambda model, batch: causal_lm(model, batch), labels="model")
    bad = [{"inputs": torch.full((1, 1), math.inf), "labels": torch.ones(1)}]
    with pytest.raises(PeftlibError, match="are not finite"):
        fisher(nn.Linear(1, 1), bad, regression)


@pytest.mark.parametrize(
    "sample",
    [
        (torch.ones(8, 1), torch.ones(8)),
        torch.ones(8, 1),
        {"inputs": {"x": torch.ones(8, 1)}, "labels": torch.tensor(1.0)},
        [torch.ones(1, 1), torch.ones(8)],
    ],
)
def test_several_samples_in_any_kind_of_batch_are_refused(sample):
    def loss(model, batch):
        raise AssertionError("refused before anything is computed")

    with pytest.raises(PeftlibError, match="a batch of 8 samples"):
        fisher(nn.Linear(1, 1), [sample], loss)


def test_one_sample_in_a_batch_that_is_no_mapping_is_a_sample():
    def loss(model, batch):
        return (model(batch[0])[:, 0] - batch[1]).square().sum(), len(batch[1])

    x, y = torch.randn(8, 2, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    model = nn.Linear(2, 1).double()
    pairs = fisher(model, [(x[i : i + 1], y[i : i + 1]) for i in range(8)], loss).values["weight"]
    errors = (model(x)[:, 0] - y).detach()
    torch.testing.assert_close(pairs[0], (2 * errors[:, None] * x).square().mean(0))


def test_a_packed_row_is_as_many_samples_as_documents():
    def batch(*lengths):
        (row,) = pack([Encoded([1] * n, [1] * n) for n in lengths], 6, 0)
        return {"inputs": row["inputs"], "labels": row["labels"], "documents": row["documents"]}

    model = decoder()
    with pytest.raises(PeftlibError, match=r"a batch of 2 samples.*packed"):
        fisher(model, [default_collate([batch(3, 2)])], causal_lm)
    fisher(model, [default_collate([batch(3)])], causal_lm)


def test_batches_of_one_are_samples():
    found = fisher(decoder(), Batches(rows(), 1, lambda one: one[0], shuffle=False), causal_lm)
    expected = fisher(decoder(), rows(), causal_lm)
    assert all(torch.equal(v, expected.values[n]) for n, v in found.values.items())
