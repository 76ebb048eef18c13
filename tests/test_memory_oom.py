"""Running out of memory raises an error that helps; nothing else changes."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_module

import peftlib
from peftlib.errors import PeftlibError
from peftlib.memory import MemoryReport, OutOfMemory, ShardedOver, estimate_memory, explain_oom
from peftlib.memory import oom as oom_module
from peftlib.probe import Call
from peftlib.report import parse_bytes
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


def test_it_finds_the_model_by_itself_and_keywords_as_well():
    model, x = KeywordOnly(), {"ids": ids(), "mask": torch.ones(2, 5, dtype=torch.bool)}
    with (
        pytest.raises(OutOfMemory, match=r"One step of KeywordOnly with this batch of 2 needs"),
        explain_oom(),
    ):
        run_out(model, **x)
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
    with pytest.raises(OutOfMemory, match="nor 64 ranks make it fit"), explain_oom(model, budget=1000):
        run_out(model, batch(2))
    with pytest.raises(OutOfMemory, match="no model was called"), explain_oom():
        torch.empty(TOO_MUCH)
    with pytest.raises(OutOfMemory, match="Decoder was not called"), explain_oom(model):
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
    others = (
        RuntimeError("shapes"),
        RuntimeError("the queue is out of memory slots, and can't allocate memory for more"),
        RuntimeError("not enough memory cells"),
        KeyError("x"),
        OutOfMemory("inner"),
    )
    for error in others:
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
    text = "sharding over 4 ranks of 1 each"
    assert [remedy.text for remedy in caught.value.remedies] == [text]
    assert f"- {text}: " in str(caught.value)
    assert " a rank\n" in str(caught.value)  # whose bytes these are
    assert caught.value.remedies[0].peak_bytes == ShardedOver(4)(model, caught.value.report).peak_bytes


# --- what is forwarded to the estimate -----------------------------------------------------------------------------


def after(steps, model=None, **options):
    """The error where memory runs out after these."""
    with pytest.raises(OutOfMemory) as caught, explain_oom(model, **options):
        run_out(steps)
    return caught.value


def explained(model, *args, options=None, **kwargs):
    """The error where memory runs out after a call."""
    return after(lambda: model(*args, **kwargs), model, **options or {})


def test_the_loss_is_the_callers():
    def loss(output):
        return (output @ torch.ones(23, 1000)).exp().sum()

    model = model_of()
    report = explained(model, batch(4), options={"loss": loss}).report
    assert report == estimate_memory(model, batch(4), loss=loss)
    assert report != estimate_memory(model, batch(4))


def test_autocast_is_the_callers():
    model = model_of()
    report = explained(model, batch(64), options={"autocast": torch.bfloat16}).report
    assert report == estimate_memory(model, batch(64), autocast=torch.bfloat16)
    assert report != estimate_memory(model, batch(64))


def test_the_optimizer_may_be_a_function_or_none():
    model = model_of()
    for optimizer in (torch.optim.SGD, None):
        report = explained(model, batch(4), options={"optimizer": optimizer}).report
        assert report == estimate_memory(model, batch(4), optimizer=optimizer)
        assert report != estimate_memory(model, batch(4))


def test_the_settings_of_the_optimizer_count():
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters(), amsgrad=True)
    report = explained(model, batch(4), options={"optimizer": optimizer}).report
    assert report == estimate_memory(model, batch(4), optimizer=lambda p: torch.optim.AdamW(p, amsgrad=True))
    assert report != estimate_memory(model, batch(4))


def test_the_last_call_counts():
    model = model_of()
    for given in (model, None):
        error = after(lambda: (model(batch(2)), model(batch(7))), given)
        assert error.report == estimate_memory(model, batch(7))


def test_positions_and_keywords_of_one_call():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x, *more, scale):
            return self.linear(x) * scale + sum(more)

    model, x = Mixed(), torch.ones(6, 8)
    error = explained(model, x, x, scale=x, options={"budget": 2500})
    assert (
        error.report.peak_bytes
        == estimate_memory(model, Call((x, x.clone()), {"scale": x.clone()})).peak_bytes
    )
    assert "this batch of 6" in str(error)
    assert all(remedy.way.batch < 6 for remedy in error.remedies if "micro" in remedy.text)


# --- errors while explaining ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [torch.optim.SparseAdam, torch.optim.Adafactor, lambda p: 3])
def test_optimizers_that_cannot_be_followed_are_left_out_and_said_to_be(optimizer):
    model = model_of()
    error = explained(model, batch(64), options={"optimizer": optimizer, "budget": "200KiB"})
    assert error.report == estimate_memory(model, batch(64), optimizer=None)
    assert "Without the optimizer's state and step, which cannot be told: " in str(error)
    assert "One step of Decoder" in str(error)
    assert ".." not in str(error)
    assert error.remedies
    assert isinstance(error.__cause__, RuntimeError)


def test_models_that_refuse_other_sizes_are_explained():
    class Folding(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(8, 64), nn.BatchNorm1d(64), nn.Linear(64, 2)

        def forward(self, x):
            return self.last(self.norm(self.first(x)).view(2, -1, 64))

    model = Folding()
    error = explained(model, torch.ones(24, 8), options={"budget": "25KiB"})
    assert error.report == estimate_memory(model, torch.ones(24, 8))
    assert all(remedy.way.batch % 2 == 0 for remedy in error.remedies)
    assert error.remedies[0].text.startswith("micro-batches of ")


def test_no_error_of_the_explanation_hides_the_one_that_is_explained(monkeypatch):
    def broken(*args, **kwargs):
        raise ZeroDivisionError("deep inside.")

    first = "can't allocate memory"
    for name in ("remedies", "estimator", "_memory_of", "_maker", "_split", "_advice", "Examples"):
        model, x = nn.Linear(16, 16), torch.ones(64, 16)
        with monkeypatch.context() as patch:
            patch.setattr(oom_module, name, broken)
            error = explained(model, x, options={} if name == "_memory_of" else {"budget": "16KiB"})
        assert first in str(error).splitlines()[0]
        assert "cannot be told: ZeroDivisionError: deep inside." in str(error)
        assert ".." not in str(error)
        assert isinstance(error.__cause__, RuntimeError)
        assert first in str(error.__cause__)
        if name == "remedies":
            # the split was there before
            assert error.report == estimate_memory(model, x)
            assert "temporaries" in str(error)


def test_a_memory_of_unknown_size_leaves_the_split(monkeypatch):
    monkeypatch.delattr("os.sysconf")
    error = explained(model_of(), batch(64))
    assert "with this batch of 64 needs" in str(error)
    assert error.report.peak_bytes > 0
    assert error.remedies == []
    assert "would fit" not in str(error)


def test_a_model_that_is_none():
    for wrong in ([1], nn.Linear, "model"):
        with pytest.raises(PeftlibError, match=r"explain_oom got .*: give the model"), explain_oom(wrong):
            pass
    with pytest.raises(PeftlibError, match="no size"), explain_oom(budget="much"):
        pass
    assert not torch_module._global_forward_pre_hooks


def test_calls_that_cannot_be_noted_pass():
    model = nn.Sequential(nn.Linear(4, 4))
    model.forward = lambda x: torch.sparse.mm(x, model[0].weight)
    with explain_oom(model):
        assert model(torch.eye(4).to_sparse()).shape == (4, 4)


# --- what is advised -----------------------------------------------------------------------------------------------


def largest(error):
    return max(error.report.parts(), key=error.report.parts().get)


def test_the_largest_part_is_advised_on():
    wide = nn.Linear(64, 64)
    frozen = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 2))
    frozen[0].requires_grad_(False)
    cases = {
        "activation_bytes": (model_of(), batch(64), {}, "activations: take shorter sequences"),
        "optimizer_bytes": (wide, torch.ones(1, 64), {}, "optimizer state: train fewer parameters"),
        "frozen_bytes": (frozen, torch.ones(1, 256), {}, "frozen weights: load them in a smaller type"),
        "temporary_bytes": (
            wide,
            torch.ones(1, 64),
            {"loss": lambda y: torch.ones(64, 4000).sum() * y.sum()},
            "temporaries: compute the loss in chunks",
        ),
        "input_bytes": (nn.Linear(64, 1), torch.ones(1000, 64), {}, "inputs: take a smaller batch"),
    }
    for part, (model, x, options, text) in cases.items():
        for budget in (100, "200KiB"):
            error = explained(model, x, options={"budget": budget, **options})
            assert largest(error) == part
            if error.report.peak_bytes > parse_bytes(budget):
                assert f"The largest part are {text}" in str(error)
            else:
                assert "largest part" not in str(error)


def test_checkpointing_is_not_advised_to_who_checkpoints():
    def advised(checkpointed):
        model = Decoder(depth=4, checkpointed=checkpointed)
        error = explained(model, batch(64), options={"budget": "300KiB"})
        return [remedy.text for remedy in error.remedies]

    assert any("checkpointing" in text for text in advised(checkpointed=False))
    assert advised(checkpointed=True)
    assert not any("checkpointing" in text for text in advised(checkpointed=True))


def test_who_accumulates_is_told_of_smaller_micro_batches():
    def error(between, times=3):
        model = model_of()
        optimizer = torch.optim.AdamW(model.parameters())

        def steps():
            for _ in range(times):
                model(batch(64)).square().mean().backward()
                between(optimizer)

        return after(steps, optimizer=optimizer, budget="200KiB")

    found = error(lambda optimizer: None)
    assert found.report == estimate_memory(model_of(), batch(64), accumulate=2)
    assert "with accumulated micro-batches of 64 needs" in str(found)
    assert found.remedies[0].text == "micro-batches of 16, 4 times as many"
    alone = estimate_memory(model_of(), batch(64))
    assert alone != found.report
    # gradients that the last step left are none of this step's
    assert error(lambda optimizer: optimizer.step()).report == alone
    assert error(lambda optimizer: optimizer.zero_grad()).report == alone
    assert error(lambda optimizer: None, times=1).report == alone


# --- other calls than of the model ---------------------------------------------------------------------------------


class Encoding(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.layer = nn.Embedding(23, 8), nn.Sequential(nn.Linear(8, 9), nn.Dropout())

    def encode(self, ids):
        return self.layer(self.embed(ids))

    def forward(self, ids):
        return self.encode(ids)


def test_a_method_that_is_not_forward():
    model = Encoding()
    error = after(lambda: model.encode(batch(4)), model)
    assert "Encoding itself was not called in explain_oom(), only Embedding, Sequential: a method" in str(
        error
    )
    assert error.report is None
    error = after(lambda: model.encode(batch(4)))
    assert "Only the largest of several modules that were called one by one (Embedding, Sequential)" in str(
        error
    )
    assert error.report == estimate_memory(model.embed, batch(4))
    # the whole, once called, is what counts; losses hold nothing
    error = after(lambda: (model.encode(batch(4)), nn.MSELoss()(model(batch(4)), torch.zeros(4, 8, 9))))
    assert "one by one" not in str(error)
    assert error.report == estimate_memory(model, batch(4))


def test_blocks_that_the_backward_computes_again_are_no_calls():
    model = Decoder(checkpointed=True)
    error = after(lambda: model(batch(4)).square().mean().backward())
    assert "one by one" not in str(error)
    assert error.report == estimate_memory(model, batch(4))


def test_a_model_inside_another_is_seen():
    model = model_of()
    error = after(lambda: nn.Sequential(model)(batch(4)), model)
    assert error.report == estimate_memory(model, batch(4))


class Greedy(nn.Module):
    """Runs out of memory in its first forward."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.full = [True]

    def forward(self, *, x):
        return self.linear(x) + (torch.empty(TOO_MUCH) if self.full and self.full.pop() else 0)


def test_a_call_that_itself_runs_out_of_memory_is_seen():
    for given in (True, False):
        model = Greedy()
        error = explained(model, x=torch.ones(3, 8)) if given else after(lambda: model(x=torch.ones(3, 8)))  # noqa: B023
        assert "One step of Greedy with this batch of 3 needs" in str(error)
        assert not model._forward_hooks


def test_copies_and_estimates_in_the_context_are_no_calls_of_the_model():
    model = model_of()

    def steps():
        model(batch(4))
        pickle.loads(pickle.dumps(model))
        copy.deepcopy(model)
        estimate_memory(model, batch(9))

    for given in (model, None):
        assert after(steps, given).report == estimate_memory(model, batch(4))


def test_temporaries_of_the_optimizers_step_are_its_copies():
    for place, advice in (("optimizer step", "foreach=False"), ("backward of head", "the loss in chunks")):
        report = MemoryReport(peak_bytes=8, temporary_bytes=8, peak_at=place)
        assert advice in oom_module._advice(report, [])[-1]
