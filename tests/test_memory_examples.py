"""Examples of other sizes: which axis is the batch, which is the sequence."""

import pytest
import torch

from peftlib.errors import PeftlibError
from peftlib.memory.examples import Examples


def test_resized_examples():
    example = {
        "ids": torch.zeros(2, 7, dtype=torch.long),
        "mask": torch.ones(2, 1, 7, 7),
        "positions": torch.arange(7)[None],
        "scale": torch.tensor(1.0),
        "use_cache": False,
    }
    resized = Examples(example)(5, 9)
    assert {k: tuple(v.shape) for k, v in resized.items() if isinstance(v, torch.Tensor)} == {
        "ids": (5, 9),
        "mask": (5, 1, 9, 9),
        "positions": (1, 9),
        "scale": (),
    }
    assert resized["use_cache"] is False
    assert Examples(example)(2, 7) == example
    image = Examples(torch.zeros(4, 3, 8, 8))
    assert (image.batch, image.length) == (4, None)
    assert image(6, None)[0].shape == (6, 3, 8, 8)


def test_examples_that_cannot_be_resized():
    with pytest.raises(PeftlibError, match="shows no sequence"):
        Examples(torch.zeros(4, 3, 8, 8))(4, 16)
    with pytest.raises(PeftlibError, match=r"two axes of the example's first tensor \(4, 4\)"):
        Examples(torch.zeros(4, 4, dtype=torch.long))(4, 16)
    with pytest.raises(PeftlibError, match="without a tensor"):
        Examples({"text": "hello"})


def sizes(example, batch, length=None):
    made = Examples(example)(batch, length)
    return [tuple(tensor.shape) for tensor in (made.values() if isinstance(made, dict) else made)]


def ints(*shape):
    return torch.zeros(*shape, dtype=torch.long)


@pytest.mark.parametrize(
    "example, expected",
    [
        ((ints(1, 8), ints(4, 8)), [(1, 9), (5, 9)]),  # positions for every row
        ((ints(4, 8), ints(1, 8)), [(5, 9), (1, 9)]),
        ((torch.ones(8, 8), ints(4, 8)), [(9, 9), (5, 9)]),  # a mask of positions
        ((torch.ones(4, 8, 16), torch.ones(8, 8), torch.arange(8)), [(5, 9, 16), (9, 9), (9,)]),
        ((ints(4, 8), ints(4, 6), ints(4)), [(5, 9), (5, 6), (5,)]),  # another sequence, one label a row
        ((ints(1, 8), ints(1, 8)), [(5, 9), (5, 9)]),
        ((ints(1, 8), torch.ones(8, 8)), [(5, 9), (9, 9)]),
    ],
)
def test_the_batch_is_what_the_tensors_share(example, expected):
    assert sizes(example, 5, 9) == expected
    names = dict(zip("abc", example, strict=False))
    assert sizes(names, 5, 9) == expected


def test_one_axis_alone_is_the_batch():
    assert sizes({"x": torch.ones(7), "y": ints(7)}, 3) == [(3,), (3,)]


@pytest.mark.parametrize("example", [(ints(4, 8), ints(6, 8)), (ints(4, 8), ints(8, 4)), (ints(4), ints(3))])
def test_a_batch_that_cannot_be_told_is_refused(example):
    with pytest.raises(
        PeftlibError, match=r"begin with axes of . and ., so the batch cannot be told: \(.*function"
    ):
        Examples(example)
