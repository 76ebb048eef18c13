"""An estimate gives the bytes that the real step gives: every host, every method, every way to train.

A row is (host, method) with one way: checkpointing, micro-batches, autocast, optimizer. A few hosts do not do the same
on fake tensors; here they are trained in the way that does, and the tests at the end show what the reports say else.
"""

import functools
import itertools
import random

import pytest
import torch

import peftlib
from peftlib.errors import TargetError
from peftlib.memory import checkpointed, default_loss, estimate_memory, measure_memory
from peftlib.methods.adapter import repeated_blocks
from peftlib.targets import Tree
from tests.zoo import CASES, HOSTS, PAIRS, Pair

OPTIMIZERS = {"adamw": torch.optim.AdamW, "sgd": functools.partial(torch.optim.SGD, lr=0.1)}
WAYS = list(itertools.product((None, True), (1, 3), (None, torch.bfloat16), OPTIMIZERS))
ROWS = [
    (pair, way)
    for pair, way in itertools.product(PAIRS, WAYS)
    # autocast is from float32, and no other floating type is cast alike everywhere
    if way[2] is None or pair.host.dtype is torch.float32
]


def row_name(row):
    pair, (checkpointing, accumulate, autocast, optimizer) = row
    marks = ("checkpointed" if checkpointing else "", "autocast" if autocast else "", optimizer)
    return "-".join(filter(None, [str(pair), *marks, f"x{accumulate}"]))


def measured(model, example, checkpointing, accumulate, autocast, optimizer):
    args, kwargs = ((), example) if isinstance(example, dict) else (example, {})
    chosen = OPTIMIZERS[optimizer]([w for w in model.parameters() if w.requires_grad])

    def step():
        for _ in range(accumulate):
            with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
                output = model(*args, **kwargs)
                result = default_loss(output)
            (result if accumulate == 1 else result / accumulate).backward()
        chosen.step()
        chosen.zero_grad()

    with checkpointed(model, checkpointing):
        step()
        return measure_memory(step, model=model)


def both(model, example, way):
    checkpointing, accumulate, autocast, optimizer = way
    estimate = estimate_memory(
        model,
        example,
        optimizer=OPTIMIZERS[optimizer],
        checkpointing=checkpointing,
        accumulate=accumulate,
        autocast=autocast,
    )
    return estimate, measured(model, example, *way)


def checkpointing_has_no_blocks(pair, way):
    return way[0] is True and not repeated_blocks(Tree(pair.host.model()))


def check(pair: Pair, way):
    model, example = pair.host.model(), pair.host.example()
    if pair.host.name in ("gpt2", "llama"):
        # transformers asks a real mask whether it is needed, and keeps a fake one; a whole one it takes as it is
        batch, length = example["input_ids"].shape
        example["attention_mask"] = torch.ones(batch, 1, length, length).tril().bool()
    peftlib.attach(model, pair.case.method, targets=pair.host.places[pair.case.place], example=example)
    if pair.host.name == "encoder-padded":
        model.train()  # in eval it nests the batch
    try:
        estimate, real = both(model, example, way)
    except TargetError:
        assert checkpointing_has_no_blocks(pair, way)
        pytest.skip("no blocks to compute twice")
    assert estimate == real, str(estimate.compare(real, ("estimate", "measured")))


def daily():
    """Rows that show every host, every method and every way, few twice."""
    shown = set()
    for pair, way in random.Random(0).sample(ROWS, len(ROWS)):
        new = {pair.host.name, pair.case.name, way} - shown
        if new and not checkpointing_has_no_blocks(pair, way):
            shown |= new
            yield pair, way


DAILY = list(daily())


@pytest.mark.parametrize("row", DAILY, ids=row_name)
def test_estimate_equals_measure(row):
    check(*row)


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=row_name)
def test_estimate_equals_measure_everywhere(row):
    check(*row)


def test_the_sample_shows_everything():
    assert {pair.case.name for pair, _ in DAILY} == set(CASES)
    assert {pair.host.name for pair, _ in DAILY} == set(HOSTS)
    assert {way for _, way in DAILY} == set(WAYS)
    assert len(DAILY) < 50


# --- where the two runs differ, the reports say so ---------------------------------------------------------------


def test_a_model_that_asks_its_mask():
    pair = next(p for p in PAIRS if str(p) == "gpt2-lora")
    model, _ = pair.attached()
    estimate, real = both(model, pair.host.example(), WAYS[0])
    assert real.asked == ("transformer",)
    assert estimate.asked == ()
    table = estimate.compare(real, ("estimate", "measured"))
    # the fake mask is kept, and so are the copies of it that each layer's attention saves
    assert table.footer["difference"] == estimate.peak_bytes - real.peak_bytes > 0
    assert any("only in measured: aten._local_scalar_dense" in note for note in table.notes)
    assert any("only in estimate" in note and "aten.arange" in note for note in table.notes)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_batch():
    pair = next(p for p in PAIRS if str(p) == "encoder-padded-lora")
    model, _ = pair.attached()
    estimate, real = both(model, pair.host.example(), WAYS[0])
    assert any("nests a padded batch" in note for note in estimate.notes)
    assert any("aten._nested_tensor" in note for note in estimate.compare(real, ("e", "m")).notes)
    model.train()
    assert estimate_memory(model, pair.host.example()).notes == []
