"""Single rows of an embedding, and the logits of a tied output layer."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import peftlib
from peftlib import PeftlibError, TokenRows


class Tied(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.tok = nn.Embedding(11, 6)
        self.mix = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=bias)
        self.head.weight = self.tok.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.mix(self.tok(ids))))


def twin(model, ids, chosen, rows):
    """The same model with a whole table in which the chosen rows are replaced."""
    table = model.tok.weight.detach().index_copy(0, torch.tensor(chosen), rows)
    hidden = torch.tanh(F.linear(F.embedding(ids, table), model.mix.weight.detach(), model.mix.bias.detach()))
    bias = None if model.head.bias is None else model.head.bias.detach()
    return F.linear(hidden, table, bias)


@pytest.mark.parametrize("bias", [True, False])
def test_equals_a_table_with_replaced_rows(bias):
    model = Tied(bias).double()
    ids = torch.tensor([[9, 1, 10, 9], [0, 2, 3, 4]])
    before = model(ids)
    tuning = peftlib.attach(model, TokenRows(ids=[10, 9]))
    assert tuning.num_parameters == 12
    assert torch.equal(model(ids), before)
    (rows,) = tuning.parameters()
    with torch.no_grad():
        rows.add_(torch.randn_like(rows))
    free = rows.detach().clone().requires_grad_()
    expected = twin(model, ids, [10, 9], free)
    torch.testing.assert_close(model(ids), expected)
    cotangent = torch.randn_like(expected)
    (wanted,) = torch.autograd.grad(expected, free, cotangent)
    (got,) = torch.autograd.grad(model(ids), rows, cotangent)
    torch.testing.assert_close(got, wanted)
    tuning.merge()
    torch.testing.assert_close(model(ids), expected)
    tuning.unmerge()
    tuning.detach()
    assert torch.equal(model(ids), before)


def test_file_holds_the_rows_alone_and_brings_them_back(tmp_path):
    model = Tied()
    fresh = copy.deepcopy(model)
    ids = torch.tensor([[9, 1, 10]])
    tuning = peftlib.attach(model, TokenRows(ids=[9, 10]))
    with torch.no_grad():
        next(tuning.parameters()).normal_()
    assert [tuple(t.shape) for t in tuning.state_dict().values()] == [(2, 6)]
    tuning.save(tmp_path / "rows.safetensors")
    peftlib.load(fresh, tmp_path / "rows.safetensors")
    assert torch.equal(fresh(ids), model(ids))
    assert torch.equal(copy.deepcopy(model)(ids), model(ids))


def test_only_its_rows_learn():
    model = Tied()
    tuning = peftlib.attach(model, TokenRows(ids=[9]))
    table = model.tok.weight.detach().clone()
    optimizer = torch.optim.AdamW(tuning.parameters(), lr=0.1)
    model(torch.tensor([[9, 1]])).square().mean().backward()
    optimizer.step()
    assert torch.equal(model.tok.weight, table)
    assert not torch.equal(next(tuning.parameters())[0], table[9])


def test_refusals_leave_the_model_alone():
    for bad in ([], [1, 1], [-1], [1.5]):
        with pytest.raises(PeftlibError, match="distinct token ids"):
            TokenRows(ids=bad)
    model = Tied()
    with pytest.raises(PeftlibError, match="outside its table of 11"):
        peftlib.attach(model, TokenRows(ids=[11]))
    with pytest.raises(PeftlibError, match=r"rows are those of an nn\.Embedding"):
        peftlib.attach(model, TokenRows(ids=[1]), targets=["mix"])
    model.other = nn.Embedding(3, 6)
    with pytest.raises(PeftlibError, match="has 2 embeddings"):
        peftlib.attach(model, TokenRows(ids=[1]))
    assert not peftlib.tunings(model)
    assert type(model.tok) is nn.Embedding
