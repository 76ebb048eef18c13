"""Another call with the same optimizer, another program with the same folder: nothing of before acts unseen."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler

import peftlib
from peftlib import FullFineTuning, LoRA, PeftlibError
from peftlib.train import Batches, EarlyStopping, NonFiniteError, cosine, fit, regression

DATA = [{"inputs": torch.ones(4, 3), "labels": torch.zeros(4)}]


def start(lr=0.1):
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    tuning = peftlib.attach(model, FullFineTuning())
    return model, tuning, torch.optim.SGD(tuning.parameters(), lr=lr)


def test_rates_are_the_users_own_again_after_each_call():
    model, tuning, _ = start()
    groups = [{"params": [p], "lr": lr} for p, lr in zip(tuning.parameters(), (0.1, 0.2), strict=True)]
    optimizer = torch.optim.SGD(groups)
    fit(model, DATA, regression, optimizer=optimizer, steps=4, scheduler=cosine)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]
    optimizer.param_groups[0]["lr"] = 1e-3
    assert fit(model, DATA, regression, optimizer=optimizer, steps=1).column("rate") == [(0, 1e-3)]
    bad = [{"inputs": torch.full((1, 3), torch.inf), "labels": torch.zeros(1)}]
    with pytest.raises(NonFiniteError):
        fit(model, bad, regression, optimizer=optimizer, steps=9, scheduler=lambda step, total: 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 0.2]


def test_another_rate_is_refused_and_the_same_is_scheduled_anew(tmp_path):
    options = {"checkpoint_dir": tmp_path, "resume": True, "scheduler": cosine}
    model, _, optimizer = start()
    fit(model, DATA, regression, optimizer=optimizer, steps=2, **options)
    model, _, optimizer = start()
    history = fit(model, DATA, regression, optimizer=optimizer, steps=4, **options)
    assert history.column("rate")[2:] == [(2, 0.1 * cosine(2, 4)), (3, 0.1 * cosine(3, 4))]
    assert optimizer.param_groups[0]["lr"] == 0.1
    model, _, optimizer = start(lr=1e-4)
    with pytest.raises(PeftlibError, match=r"was trained with rates=.*0\.1.*not .*0\.0001"):
        fit(model, DATA, regression, optimizer=optimizer, steps=6, **options)


ROWS = [{"inputs": torch.tensor([float(i), 1.0, 1.0]), "labels": torch.zeros(())} for i in range(12)]


def stacked(rows):
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


class Stop(Exception):
    pass


def stopping(row):
    if row["step"] == 9:
        raise Stop


def by_loader(generator):
    return DataLoader(ROWS, batch_size=3, shuffle=True, generator=generator)


def by_sampler(generator):
    return DataLoader(ROWS, batch_size=3, sampler=RandomSampler(ROWS, generator=generator))


@pytest.mark.parametrize("every", [3, 4])
@pytest.mark.parametrize("make", [by_loader, by_sampler])
def test_a_loaders_own_generator_goes_on(tmp_path, make, every):
    def run(name, **more):
        model, _, optimizer = start(0.001)
        batches = make(torch.Generator().manual_seed(7))
        options = {"steps": 12, "checkpoint_every": every, "checkpoint_dir": tmp_path / name, "resume": True}
        return fit(model, batches, regression, optimizer=optimizer, **options, **more), model.weight

    whole, weight = run("whole")
    with pytest.raises(Stop):
        run("parts", callbacks=[stopping])
    resumed, other = run("parts")
    assert resumed == whole
    assert torch.equal(weight, other)


def test_a_loader_without_its_generator_is_another(tmp_path):
    options = {"checkpoint_dir": tmp_path, "resume": True, "steps": 2}
    model, _, optimizer = start()
    fit(model, by_loader(None), regression, optimizer=optimizer, **options)
    with pytest.raises(PeftlibError, match="was trained with generators=0, not"):
        fit(model, by_loader(torch.Generator()), regression, optimizer=optimizer, **options)


CHANGED = [
    (Batches(ROWS, 3, stacked), "size=2, not 3"),
    (Batches(ROWS[:6], 2, stacked), "examples=12, not 6"),
    (Batches(ROWS, 2, stacked, seed=9), "batch_seed=0, not 9"),
    (Batches(ROWS, 2, stacked, shuffle=False), "shuffle=True, not False"),
    ([stacked(ROWS)], "batches=None, not 1"),
]


@pytest.mark.parametrize("batches, message", CHANGED, ids=[message for _, message in CHANGED])
def test_other_data_is_refused(tmp_path, batches, message):
    model, _, optimizer = start()
    fit(model, Batches(ROWS, 2, stacked), regression, optimizer=optimizer, steps=1, checkpoint_dir=tmp_path)
    model, _, optimizer = start()
    with pytest.raises(PeftlibError, match=message):
        fit(model, batches, regression, optimizer=optimizer, steps=2, checkpoint_dir=tmp_path, resume=True)


def test_another_number_of_batches_is_refused(tmp_path):
    model, _, optimizer = start()
    fit(model, DATA, regression, optimizer=optimizer, steps=1, checkpoint_dir=tmp_path)
    with pytest.raises(PeftlibError, match="batches=1, not 2"):
        fit(model, DATA * 2, regression, optimizer=optimizer, steps=2, checkpoint_dir=tmp_path, resume=True)


def stopped_early(folder):
    model, _, optimizer = start()
    scores = iter([1.0, 2.0, 2.0, 2.0])
    early = EarlyStopping(patience=3)
    options = {"evaluate": lambda model: next(scores), "evaluate_every": 1, "early_stopping": early}
    assert (
        len(
            fit(model, DATA, regression, optimizer=optimizer, steps=10, checkpoint_dir=folder, **options).rows
        )
        == 4
    )


def test_more_patience_goes_on(tmp_path):
    stopped_early(tmp_path)
    model, _, optimizer = start()
    options = {
        "evaluate": lambda model: 2.0,
        "evaluate_every": 1,
        "early_stopping": EarlyStopping(patience=5),
    }
    history = fit(
        model,
        DATA,
        regression,
        optimizer=optimizer,
        steps=50,
        checkpoint_dir=tmp_path,
        resume=True,
        **options,
    )
    assert len(history.rows) == 6


def test_without_early_stopping_it_goes_on_and_keeps_what_it_learns(tmp_path):
    stopped_early(tmp_path)
    model, _, optimizer = start()
    fit(model, DATA, regression, optimizer=optimizer, steps=40, checkpoint_dir=tmp_path, resume=True)
    whole, _, optimizer = start()
    fit(whole, DATA, regression, optimizer=optimizer, steps=40)
    assert torch.equal(model.weight, whole.weight)


def test_a_training_that_a_callback_ended_goes_on(tmp_path):
    options = {"checkpoint_dir": tmp_path, "resume": True, "steps": 5}
    model, _, optimizer = start()
    fit(model, DATA, regression, optimizer=optimizer, callbacks=[lambda row: row["step"] == 1], **options)
    model, _, optimizer = start()
    assert len(fit(model, DATA, regression, optimizer=optimizer, **options).rows) == 5


def test_files_of_the_users_stay(tmp_path):
    model, tuning, optimizer = start()

    def keep(row):
        tuning.save(tmp_path / "tuning-best.safetensors")

    fit(model, DATA, regression, optimizer=optimizer, steps=4, checkpoint_dir=tmp_path, callbacks=[keep])
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {"tuning-best.safetensors", "tuning-4.safetensors", "state.safetensors", "log.jsonl"}


def test_a_log_of_somebody_else_is_not_cut(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 7}\n')
    model, _, optimizer = start()
    with pytest.raises(PeftlibError, match="has rows, and no training is beside it"):
        fit(model, DATA, regression, optimizer=optimizer, steps=1, checkpoint_dir=tmp_path)
    assert log.read_text() == '{"step": 7}\n'


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    model, _, optimizer = start()
    with pytest.raises(PeftlibError, match="cannot be a training's folder: File exists"):
        fit(model, DATA, regression, optimizer=optimizer, steps=1, checkpoint_dir=tmp_path / "file")


def test_callbacks_that_draw_or_change_the_mode_change_nothing():
    found = []
    for meddling in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))

        def meddle(row, model=model):
            torch.rand(1)
            model.eval()

        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        callbacks = [meddle] if meddling else []
        found.append(fit(model, DATA, regression, optimizer=optimizer, steps=3, callbacks=callbacks))
    assert found[0] == found[1]


@pytest.mark.parametrize("lora", [False, True])
def test_what_the_optimizer_does_not_hold_gets_no_gradients(lora):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    trained = list(model[1].parameters())
    others = list(model[0].parameters())
    if lora:  # B alone
        named = dict(peftlib.attach(model, LoRA(rank=1), targets=["0", "1"]).named_parameters())
        trained = [p for name, p in named.items() if name.endswith(".b")]
        others = [p for name, p in named.items() if name.endswith(".a")]
    seen = []

    def loss(model, batch):
        seen.append([p.requires_grad for p in others])
        return regression(model, batch)

    fit(model, DATA, loss, optimizer=torch.optim.SGD(trained, lr=0.1), steps=2)
    assert seen == [[False, False]] * 2
    assert all(p.requires_grad and p.grad is None for p in others)


def test_a_compiled_model_is_trained_and_kept(tmp_path):
    model, _, optimizer = start()
    compiled = torch.compile(model, backend="eager")
    fit(compiled, DATA, regression, optimizer=optimizer, steps=3, checkpoint_dir=tmp_path)
    plain, _, optimizer = start()
    fit(plain, DATA, regression, optimizer=optimizer, steps=3)
    torch.testing.assert_close(model.weight, plain.weight)
    # and gone on with by the plain one
    again, _, optimizer = start()
    fit(again, DATA, regression, optimizer=optimizer, steps=3, checkpoint_dir=tmp_path, resume=True)
    assert torch.equal(again.weight, model.weight)
