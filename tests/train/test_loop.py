"""The trainer against naive twins in float64, and what it says about bad input."""

from __future__ import annotations

import itertools
import math
import re
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import peftlib
from peftlib import FullFineTuning, LoRA, PeftlibError
from peftlib.train import Batches, EarlyStopping, NonFiniteError, constant, cosine, fit, linear


def make(dtype=torch.float64, dropout=0.0):
    torch.manual_seed(1)
    block = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(dropout))
    model = nn.Sequential(nn.ModuleList([block]).pop(0), nn.Linear(6, 3)).to(dtype)
    return model, peftlib.attach(model, LoRA(rank=2), targets=["0.0", "1"])


def data(lengths, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    return [
        (
            torch.randn(n, 6, dtype=dtype, generator=generator),
            torch.randn(n, 3, dtype=dtype, generator=generator),
        )
        for n in lengths
    ]


def squares(model, batch):
    return (model(batch[0]) - batch[1]).square().sum(), batch[1].numel()


def mean_of_squares(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


def adam(tuning, lr=0.05):
    return torch.optim.Adam(tuning.parameters(), lr=lr)


def values(tuning):
    return torch.cat([p.detach().flatten() for p in tuning.parameters()])


@given(lengths=st.lists(st.integers(1, 7), min_size=1, max_size=5))
def test_a_window_of_unequal_batches_is_one_big_batch(lengths):
    """The field's recurring bug: a mean of means."""
    parts = data(lengths)
    big = [tuple(torch.cat(column) for column in zip(*parts, strict=True))]
    found = []
    for batches, accumulate in ((parts, len(parts)), (big, 1)):
        model, tuning = make()
        optimizer = torch.optim.SGD(tuning.parameters(), lr=0.1)
        history = fit(model, batches, squares, optimizer=optimizer, steps=2, accumulate=accumulate)
        found.append((values(tuning), history.last("loss"), history.last("norm")))
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-14)


def test_a_mean_of_means_would_be_seen():
    # the test above can fail: with means as losses the two runs differ
    parts = data([1, 7])
    big = [tuple(torch.cat(column) for column in zip(*parts, strict=True))]
    found = []
    for batches, accumulate in ((parts, 2), (big, 1)):
        model, tuning = make()
        fit(model, batches, mean_of_squares, optimizer=adam(tuning), steps=1, accumulate=accumulate)
        found.append(values(tuning))
    assert (found[0] - found[1]).abs().max() > 1e-6


@pytest.mark.parametrize("clip", [None, 0.01])
@pytest.mark.parametrize(
    "schedule", [constant, partial(linear, warmup=2), partial(cosine, warmup=1, floor=0.1)]
)
def test_it_is_the_loop_one_would_write(clip, schedule):
    batches = data([2, 3, 4])
    model, tuning = make()
    history = fit(model, batches, squares, optimizer=adam(tuning), epochs=2, scheduler=schedule, clip=clip)

    naive, own = make()
    optimizer = adam(own)
    losses = []
    for step in range(6):
        loss = mean_of_squares(naive, batches[step % 3])
        optimizer.zero_grad()
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(own.parameters(), clip)
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * schedule(step, 6)
        optimizer.step()
        losses.append(loss.item())
    torch.testing.assert_close(values(tuning), values(own), rtol=1e-11, atol=1e-13)
    torch.testing.assert_close([row["loss"] for row in history.rows], losses)
    assert [row["epoch"] for row in history.rows] == [0, 0, 0, 1, 1, 1]


def test_schedules_rise_and_fall():
    for schedule in (linear, cosine):
        curve = [schedule(i, 100, warmup=10, floor=0.1) for i in range(101)]
        assert curve[:11] == pytest.approx([(i + 1) / 11 for i in range(11)])
        assert all(a > b for a, b in itertools.pairwise(curve[10:]))
        assert curve[100] == pytest.approx(0.1)
        assert schedule(1000, 100, warmup=10, floor=0.1) == pytest.approx(0.1)
        assert all(0 < schedule(i, 3, warmup=9) <= 1 for i in range(3))


def test_the_last_step_of_an_epoch_may_be_short_and_batches_are_drawn_once():
    model, tuning = make()
    history = fit(model, data([1] * 5), squares, optimizer=adam(tuning), epochs=2, accumulate=2)
    assert [row["targets"] for row in history.rows] == [6, 6, 3] * 2


def test_same_seed_same_bits_and_the_callers_generators_do_not_notice():
    found, after = [], []
    for seed in (5, 5, 6):
        model, tuning = make(dropout=0.5)
        torch.manual_seed(seed + 10)
        history = fit(model, data([4, 4]), squares, optimizer=adam(tuning), steps=3, seed=min(seed, 6))
        found.append((values(tuning), history))
        after.append(torch.rand(2))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    assert not torch.equal(found[0][0], found[2][0])
    torch.manual_seed(15)
    assert torch.equal(after[0], torch.rand(2))


def test_modes_come_back_and_evaluation_changes_nothing():
    plain, own = make(dropout=0.5)
    fit(plain, data([4, 4]), squares, optimizer=adam(own), steps=4)
    model, tuning = make(dropout=0.5)
    model[0].eval()
    seen = []

    def evaluate(model):
        seen.append((model.training, torch.is_grad_enabled(), torch.rand(1)))
        return {"accuracy": len(seen)}

    history = fit(
        model, data([4, 4]), squares, optimizer=adam(tuning), steps=4, evaluate=evaluate, evaluate_every=3
    )
    assert [seen_[:2] for seen_ in seen] == [(False, False)] * 2
    assert history.column("eval_accuracy") == [(2, 1.0), (3, 2.0)]
    assert torch.equal(values(tuning), values(own))
    assert (model.training, model[0].training, model[0][0].training) == (True, False, False)


def test_evaluation_over_batches_is_one_mean_over_all_targets():
    model, tuning = make()
    parts = data([1, 6])
    history = fit(model, parts, squares, optimizer=adam(tuning), steps=1, evaluate=parts)
    with torch.no_grad():
        expected = sum(squares(model, b)[0] for b in parts) / 21
    assert history.last("eval_loss") == pytest.approx(float(expected), rel=1e-12)


def test_early_stopping_puts_the_best_values_back():
    model, tuning = make()
    scores, kept = iter([3.0, 1.0, math.nan, 2.0, 5.0]), []

    def evaluate(model):
        kept.append(values(tuning))
        return next(scores)

    history = fit(
        model,
        data([3]),
        squares,
        optimizer=adam(tuning),
        steps=50,
        evaluate=evaluate,
        early_stopping=EarlyStopping(patience=2),
    )
    assert len(history.rows) == 4
    assert torch.equal(values(tuning), kept[1])
    assert not torch.equal(values(tuning), kept[3])


def poisoned(at):
    batches = data([2] * 4)
    batches[at][0][0, 0] = math.nan
    return batches


def test_what_is_not_finite_stops_before_the_step_with_the_batch_at_hand():
    model, tuning = make()
    batches, optimizer = poisoned(2), adam(tuning)
    short, own = make()
    fit(short, batches[:2], squares, optimizer=adam(own), steps=2)
    with pytest.raises(NonFiniteError, match="Step 2: loss nan") as caught:
        fit(model, batches, squares, optimizer=optimizer, steps=4)
    assert caught.value.step == 2
    assert caught.value.batches[0] is batches[2]
    assert torch.equal(values(tuning), values(own))
    assert all(p.grad is None for p in tuning.parameters())


def test_what_is_not_finite_is_skipped_and_kept():
    model, tuning = make()
    batches = poisoned(1)
    history = fit(model, batches, squares, optimizer=adam(tuning), steps=4, nonfinite="skip")
    assert [row["made"] for row in history.rows] == [True, False, True, True]
    assert history.skipped == [(1, [batches[1]])]
    assert values(tuning).isfinite().all()
    assert "not finite and left out: steps [1]" in str(history)
    own = make()[1]
    fit(own.model, [b for i, b in enumerate(batches) if i != 1], squares, optimizer=adam(own), steps=3)
    assert torch.equal(values(tuning), values(own))


def test_skipping_all_the_time_stops():
    model, tuning = make()
    with pytest.raises(NonFiniteError, match="Step 10"):
        fit(model, poisoned(0)[:1], squares, optimizer=adam(tuning), steps=99, nonfinite="skip")


def test_a_gradient_that_is_not_finite_counts_too():
    model, tuning = make()

    def root(model, batch):
        return (model(batch[0]) * 0).abs().sqrt().sum() * 0 + 1.0, 1

    with pytest.raises(NonFiniteError, match="norm of the gradients nan"):
        fit(model, data([2]), root, optimizer=adam(tuning), steps=1)


def test_autocast_and_scaling_train_close_to_float32():
    found = []
    for autocast in (None, torch.bfloat16, torch.float16):
        model, tuning = make(torch.float32)
        history = fit(
            model, data([8, 8], torch.float32), squares, optimizer=adam(tuning), steps=20, autocast=autocast
        )
        assert [row["made"] for row in history.rows].count(False) <= 5
        found.append(history.last("loss"))
    assert found[1:] == pytest.approx([found[0]] * 2, rel=0.05)


def nan_in_the_gradient_alone(at=None):
    step = itertools.count()

    def loss(model, batch):
        value, count = squares(model, batch)
        bad = at is None or next(step) in at
        return value + (0 * (0 * value).sqrt() if bad else 0), count

    return loss


def test_a_gradient_that_no_scale_makes_finite_is_reported():
    model, tuning = make(torch.float32)
    options = {"optimizer": adam(tuning), "steps": 99, "autocast": torch.float16}
    # the scale begins at 2^16, and is halved 17 times before it is not to blame
    with pytest.raises(NonFiniteError, match=r"Step 16: loss .*gradients nan"):
        fit(model, data([2], torch.float32), nan_in_the_gradient_alone(), **options)
    with pytest.raises(NonFiniteError, match="Step 26: loss"):
        fit(model, data([2], torch.float32), nan_in_the_gradient_alone(), nonfinite="skip", **options)


def test_skipped_gradients_do_not_use_up_the_scale():
    batches, found = data([2], torch.float32), []
    # one in three is bad: without a floor the scale would end at 2^-24, where gradients vanish
    for bad, steps in ((range(0, 120, 3), 120), ((), 80)):
        model, tuning = make(torch.float32)
        loss, options = nan_in_the_gradient_alone(bad), {"autocast": torch.float16, "nonfinite": "skip"}
        history = fit(model, batches, loss, optimizer=adam(tuning, 0.01), steps=steps, **options)
        assert sum(row["made"] for row in history.rows) == 80
        found.append(history.last("loss"))
    assert found[0] == pytest.approx(found[1], rel=0.05)


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(0.5)) for _ in range(3)
        )
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def test_checkpointed_activations_change_no_bit_and_leave_nothing_behind():
    found = []
    for where in (False, True, "blocks.1"):
        torch.manual_seed(1)
        model = Blocks()
        tuning = peftlib.attach(model, LoRA(rank=2, dropout=0.3), targets=["blocks.*.0"])
        fit(
            model,
            data([4, 4], torch.float32),
            squares,
            optimizer=adam(tuning),
            steps=3,
            checkpoint_activations=where,
        )
        assert not any("forward" in module.__dict__ for module in model.modules())
        found.append(values(tuning))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_model_without_a_tuning_trains_too():
    model = nn.Linear(6, 3).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    history = fit(model, data([4]), squares, optimizer=optimizer, steps=30)
    assert history.rows[-1]["loss"] < history.rows[0]["loss"] / 2


def test_one_batch_is_overfitted_by_every_kind_of_tuning():
    for method in (LoRA(rank=3), FullFineTuning()):
        model = make()[0]
        peftlib.tunings(model)["default"].detach()
        tuning = peftlib.attach(model, method, targets=["0.0", "1"])
        history = fit(model, data([2]), squares, optimizer=adam(tuning), steps=300)
        assert history.last("loss") < 1e-4


def test_callbacks_see_rows_and_may_end_it():
    model, tuning = make()
    rows = []
    history = fit(
        model,
        data([2]),
        squares,
        optimizer=adam(tuning),
        steps=9,
        callbacks=[rows.append, lambda row: row["step"] == 3],
    )
    assert rows == history.rows
    assert len(rows) == 4


def test_the_bar_shows_what_happens(capsys):
    model, tuning = make()
    fit(model, data([2]), squares, optimizer=adam(tuning), steps=2, progress=True)
    shown = capsys.readouterr().err
    assert all(word in shown for word in ("2/2", "loss=", "rate=0.05", "targets/s=", "memory="))
    # the time that is left, beside what has passed
    assert re.search(r"\[\d\d:\d\d<\d\d:\d\d", shown)


def detached(model, batch):
    value, count = squares(model, batch)
    return value.detach(), count


BAD = [
    ({"steps": 1, "epochs": 1}, "Give steps= or epochs="),
    ({}, "Give steps= or epochs="),
    ({"steps": 0}, "nothing to do"),
    ({"steps": 1, "accumulate": 0}, "at least one batch"),
    ({"steps": 1, "nonfinite": "hope"}, "use 'stop' or 'skip'"),
    ({"steps": 1, "clip": 0.0}, "clip=0.0: give the largest norm"),
    ({"steps": 1, "early_stopping": EarlyStopping()}, "needs evaluate="),
    ({"steps": 1, "resume": True}, "needs the checkpoint_dir="),
    ({"steps": 1, "loss": detached}, "does not depend on anything that is trained"),
    ({"steps": 1, "loss": lambda m, b: (squares(m, b)[0], 0)}, "counted 0 targets"),
    ({"steps": 1, "loss": lambda m, b: m(b[0])}, r"gave a tensor of shape \(2, 3\)"),
    ({"steps": 1, "loss": lambda m, b: None}, "gave NoneType"),
    ({"steps": 1, "batches": []}, "has no batch"),
    ({"steps": 3, "batches": iter(data([2]))}, "Epoch 1 has no batch"),
    ({"epochs": 3, "batches": iter(data([2]))}, "epochs= needs batches with a length"),
    ({"steps": 3, "batches": iter(data([2])), "evaluate": lambda m: 1.0}, "give evaluate_every="),
    ({"steps": 1, "evaluate": lambda m: 1.0, "evaluate_every": 0}, "evaluate_every=0"),
    ({"steps": 1, "evaluate": []}, "evaluate= has no batches"),
    (
        {"steps": 1, "evaluate": lambda m: 1.0, "early_stopping": EarlyStopping(metric="eval_f1")},
        "watches 'eval_f1'.*eval_loss",
    ),
    ({"steps": 1, "checkpoint_activations": True}, "no module list"),
    ({"steps": 2.5}, "steps=2.5: give a whole number"),
    ({"epochs": 0.5}, "epochs=0.5: give a whole number"),
    ({"steps": 1, "accumulate": 1.5}, "accumulate=1.5: give a whole number"),
    ({"steps": 1, "evaluate": lambda m: 1.0, "evaluate_every": 1.5}, "evaluate_every=1.5: give a whole"),
    ({"steps": 1, "scheduler": "cosine"}, "scheduler='cosine': give a function"),
    ({"steps": 1, "scheduler": object()}, "scheduler='object': give a function"),
    ({"steps": 1, "scheduler": partial(cosine, warmup=-1)}, "warmup=-1: give a number of steps from 0"),
    ({"steps": 1, "scheduler": partial(constant, warmup=-1)}, "warmup=-1"),
    ({"steps": 1, "autocast": "bf16"}, "autocast='bf16': give torch.bfloat16"),
    ({"steps": 1, "callbacks": print}, "give a list of functions of a row"),
    ({"steps": 1, "callbacks": ["print"]}, "give a list of functions of a row"),
]


@pytest.mark.parametrize("change, message", BAD, ids=[message for _, message in BAD])
def test_bad_input_is_named(change, message):
    model, tuning = make()
    arguments = {"batches": data([2]), "loss": squares, **change}
    with pytest.raises(PeftlibError, match=message):
        fit(model, arguments.pop("batches"), arguments.pop("loss"), optimizer=adam(tuning), **arguments)


def test_parameters_of_something_else_are_refused():
    model, _ = make()
    with pytest.raises(PeftlibError, match="not the model's"):
        fit(model, data([2]), squares, optimizer=torch.optim.SGD(make()[1].parameters()), steps=1)


@pytest.mark.parametrize("arguments", [{"patience": 0}, {"by": -1.0}])
def test_early_stopping_checks_itself(arguments):
    with pytest.raises(PeftlibError, match="EarlyStopping takes"):
        EarlyStopping(**arguments)


@given(n=st.integers(1, 9), size=st.integers(1, 10), start=st.integers(0, 9), epoch=st.integers(0, 3))
def test_batches_hold_every_example_once_and_begin_anywhere(n, size, start, epoch):
    batches = Batches(range(n), size, seed=2)
    all_of_it = list(batches.epoch(epoch))
    assert sorted(i for batch in all_of_it for i in batch) == list(range(n))
    assert len(all_of_it) == len(batches)
    assert list(batches.epoch(epoch, start)) == all_of_it[start:]


def test_half_precision_weights_are_not_scaled():
    model = nn.Linear(6, 3).half()
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(PeftlibError, match="Keep them in float32"):
        fit(model, data([2]), squares, optimizer=optimizer, steps=1, autocast=torch.float16)


def test_sparse_gradients_are_refused():
    model = nn.Embedding(5, 3, sparse=True)
    optimizer = torch.optim.SparseAdam(model.parameters())
    with pytest.raises(PeftlibError, match="sparse=False"):
        fit(model, [torch.arange(3)], lambda model, x: model(x).sum(), optimizer=optimizer, steps=1)


def test_examples_need_a_length():
    with pytest.raises(PeftlibError, match="cannot be made of a generator"):
        Batches((i for i in range(3)), 2)


def test_batches_refuse_nothing():
    for examples, size in (([], 1), ([1], 0)):
        with pytest.raises(PeftlibError, match="at least one of each"):
            Batches(examples, size)
