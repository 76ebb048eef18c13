"""What a batch is a function of: seed, epoch, place, and the sampler's state."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peftlib import PeftlibError
from peftlib.train import Batches


class Twice:
    """Every example twice, the later ones first."""

    def __init__(self, examples):
        self.examples = examples

    def __len__(self):
        return 2 * self.examples

    def __call__(self, epoch):
        return torch.arange(self.examples).flip(0).repeat(2)


def jitter(example, generator):
    return example, torch.rand(2, generator=generator).tolist()


def numbered(rows):
    return {"rows": rows}


@given(
    n=st.integers(1, 9), size=st.integers(1, 4), epoch=st.integers(0, 3), start=st.integers(0, 9),
    sampled=st.booleans(), augmented=st.booleans(), index=st.booleans(),
)  # fmt: skip
def test_any_place_is_found_without_what_is_before_it(n, size, epoch, start, sampled, augmented, index):
    batches = Batches(
        range(n), size, numbered, seed=3, sampler=Twice(n) if sampled else None,
        augment=jitter if augmented else None, index=index,
    )  # fmt: skip
    torch.manual_seed(epoch + start)  # the global generator has no part in it
    whole, rest = list(batches.epoch(epoch)), list(batches.epoch(epoch, start))
    assert len(whole) == len(batches)
    assert [b["rows"] for b in rest] == [b["rows"] for b in whole[start:]]
    if index:
        chosen = torch.cat([b["index"] for b in whole]).tolist()
        rows = [row for b in whole for row in b["rows"]]
        assert chosen == [row[0] for row in rows] if augmented else chosen == rows
        assert sorted(chosen) == sorted(list(range(n)) * (2 if sampled else 1))


def test_each_draw_has_a_generator_of_its_own():
    drawn = [
        tuple(numbers)
        for seed in range(3)
        for epoch in range(3)
        for batch in Batches([7, 7], 1, seed=seed, sampler=Twice(2), augment=jitter).epoch(epoch)
        for _, numbers in batch
    ]
    assert len(set(drawn)) == len(drawn) == 3 * 3 * 4  # seed 0 in epoch 1 is not seed 1 in epoch 0


def test_what_does_not_go_together_is_refused():
    with pytest.raises(PeftlibError, match=r"index=True adds batch\['index'\], and collate= gives list"):
        next(Batches([1], 1, index=True).epoch(0))
    with pytest.raises(
        PeftlibError, match="Twice, of length 6, drew 6 numbers, and not all of them are those of 2"
    ):
        next(Batches([1, 2], 1, sampler=Twice(3)).epoch(0))
    with pytest.raises(PeftlibError, match="saved with a sampler that keeps"):
        Batches([1], 1).load_state_dict({"loss": torch.zeros(1)})
