"""Running out of memory raises an error that helps; nothing else changes."""

import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_module

import peftlib
from peftlib.errors import PeftlibError
from peftlib.memory import OutOfMemory, ShardedOver, estimate_memory, explain_oom
from tests.zoo import Decoder, KeywordOnly, ids

TOO_MUCH = 2**60  # bytes; no machine has them


def model_of(depth=2):
    return Decoder(depth=depth)


def batch(rows):
    return torch.zeros(rows, 8, dtype=torch.long)


def run_out(model, *args, times=1, error=None, **kwargs):
    for _ in range(times):
        model(*args, **kwargs)
    if error is not None:
        raise error
    torch.empty(TOO_MUCH)


def test_the_split_and_three_remedies():
    model = model_of()
    with pytest.raises(OutOfMemory) as caught, explain_oom(model, budget="200KiB"):
        run_out(model, batch(64))
    error, report = caught.value, estimate_memory(model, batch(64))
    assert isinstance(error, torch.OutOfMemoryError)
    assert isinstance(error, PeftlibError)
    assert isinstance(error.__cause__, RuntimeError)
    assert error.report == report
    assert 1 <= len(error.remedies) <= 3
    first = error.remedies[0]
    size, times = int(first.text.split()[2].rstrip(",")), int(first.text.split()[3])
    assert size * times >= 64
    assert first.peak_bytes == estimate_memory(model, batch(size), accumulate=times).peak_bytes <= 200 * 1024
    text = str(error)
    assert "can't allocate memory" in text.splitlines()[0]
    assert "One step of Decoder with this batch of 64 needs" in text
    assert "of 200.0 KiB, with its peak in the backward" in text
    assert "activations" in text
    assert f"- {first.text}: " in text


def test_it_finds_the_model_by_itself_and_keywords_from_the_second_call_on():
    model, x = KeywordOnly(), {"ids": ids(), "mask": torch.ones(2, 5, dtype=torch.bool)}
    with (
        pytest.raises(OutOfMemory, match=r"One step of KeywordOnly with this batch of 2 needs"),
        explain_oom(),
    ):
        run_out(model, times=2, **x)
    other = model_of()
    with pytest.raises(OutOfMemory, match="One step of Decoder with this batch of 5"), explain_oom():
        run_out(other, batch(5))


def test_what_fits_is_said_to_fit():
    model = model_of()
    with pytest.raises(OutOfMemory, match="something else holds memory") as caught, explain_oom(model):
        run_out(model, batch(2))
    assert caught.value.remedies == []


def test_nothing_helps_and_nothing_known():
    model = model_of()
    with pytest.raises(OutOfMemory, match="train fewer parameters"), explain_oom(model, budget=1000):
        run_out(model, batch(2))
    with pytest.raises(OutOfMemory, match="No model was called"), explain_oom():
        torch.empty(TOO_MUCH)
    frozen = model_of().requires_grad_(False)
    with pytest.raises(OutOfMemory, match=r"cannot be told[\s\S]*requires_grad"), explain_oom(frozen):
        run_out(frozen, batch(2))


def test_your_optimizer_counts():
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with pytest.raises(OutOfMemory) as caught, explain_oom(model, optimizer=optimizer, budget="200KiB"):
        run_out(model, batch(64))
    momentum = sum(p.nbytes for p in model.parameters())
    assert caught.value.report.optimizer_bytes == momentum


def test_errors_of_a_gpus_allocator_and_of_python():
    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError("no more"),
    ):
        model = model_of()
        with pytest.raises(OutOfMemory, match=r"^(CUDA out|no more)") as caught, explain_oom(model):
            run_out(model, batch(2), error=error)
        assert caught.value.__cause__ is error


def test_other_errors_and_good_steps_pass_and_nothing_stays():
    model = model_of()
    for error in (RuntimeError("shapes"), KeyError("x"), OutOfMemory("inner")):
        with pytest.raises(type(error)) as caught, explain_oom(model):
            raise error
        assert caught.value is error
    with explain_oom():
        assert model(batch(2)).shape == (2, 8, 23)
    assert not model._forward_pre_hooks
    assert not torch_module._global_forward_pre_hooks


def test_sharding_is_offered_where_weights_are_too_many():
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64)) for _ in range(8)))
    with pytest.raises(OutOfMemory) as caught, peftlib.explain_oom(model, budget="300KiB"):
        run_out(model, torch.ones(1, 64))
    assert [remedy.text for remedy in caught.value.remedies] == ["sharding over 4 ranks, per rank"]
    assert caught.value.remedies[0].peak_bytes == ShardedOver(4)(model, caught.value.report).peak_bytes
