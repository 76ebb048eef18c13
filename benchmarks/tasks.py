"""What the quality run trains on: real pretrained weights, real text, a loss and a number to judge by.

Letters: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.inputs import logits_of
from benchmarks.pretrained import Classifier, minilm, smollm2
from benchmarks.reviews import (
    Review,
    characters,
    chinese_reviews,
    naive_bayes,
    rotten_tomatoes,
    split,
    words,
)
from benchmarks.text import batches as windows
from benchmarks.text import spread, standard_library
from peftlib import train
from peftlib.train.losses import Weighted

Score = Callable[[nn.Module], dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Size:
    """What a task spends. ``length`` is in tokens; longer texts are cut. ``batch`` rows a step."""

    train: int
    validation: int
    test: int
    steps: int
    batch: int
    length: int


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task, ready to run.

    Attributes:
        title: what is tuned on what.
        base: the pretrained model, never trained itself.
        renew: gives a copy of the base what has to be new: called with it after the seed is set.
        example: keyword arguments of one forward.
        head: name of the new output layer, which every method trains; None where there is none.
        body: targets of what is pretrained, if that is not all.
        query_value: targets of a LoRA as in its paper.
        batches: seed -> what `fit` iterates.
        loss: as `fit` takes it.
        validation: scores a model on the part that chooses rates.
        test: scores a model on the part that is reported.
        metric: the score that counts.
        higher_is_better: of the metric.
        autocast: dtype of the forward.
        notes: what a reader has to know about the data.
    """

    title: str
    base: nn.Module
    renew: Callable[[nn.Module], object] = lambda model: None
    example: dict[str, Tensor]
    head: str | None
    body: list[str] | None
    query_value: list[str]
    batches: Callable[[int], Iterable[Any]]
    loss: Callable[[nn.Module, Any], Any]
    validation: Score
    test: Score
    metric: str
    higher_is_better: bool
    size: Size
    autocast: torch.dtype | None = None
    notes: list[str] = field(default_factory=list)


class ByLength:
    """A sampler that puts rows of like length into a batch, so that little is padded.

    Ten batches' worth of rows are drawn at random and sorted; then the batches are shuffled, one that is short last.
    """

    def __init__(self, lengths: Sequence[int], size: int, seed: int) -> None:
        self.lengths, self.size, self.seed = torch.tensor(lengths), size, seed

    def __len__(self) -> int:
        return len(self.lengths)

    def __call__(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + epoch)
        drawn = torch.randperm(len(self), generator=generator).split(10 * self.size)
        rows = torch.cat([pool[self.lengths[pool].argsort(stable=True)] for pool in drawn])
        whole, rest = rows.split([len(rows) - len(rows) % self.size, len(rows) % self.size])
        batches = whole.reshape(-1, self.size)
        return torch.cat([batches[torch.randperm(len(batches), generator=generator)].reshape(-1), rest])


def classifier_batches(rows: Sequence[tuple[list[int], int]], size: int, seed: int) -> train.Batches:
    """Batches of token ids and labels; seeds far apart, as the order counts its epochs from them."""
    sampler = ByLength([len(ids) for ids, _ in rows], size, 1000 * seed)
    return train.Batches(rows, size, collate, sampler=sampler)


def collate(rows: Sequence[tuple[list[int], int]]) -> dict[str, Any]:
    """Token ids and labels as a batch of a classifier; padding is id 0 under a mask of 0.

    >>> collate([([5, 6], 1), ([7], 0)])["inputs"]["attention_mask"]
    tensor([[1, 1],
            [1, 0]])
    """
    longest = max(len(ids) for ids, _ in rows)
    ids_BT = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rows])
    mask_BT = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows])
    return {
        "inputs": {"input_ids": ids_BT, "attention_mask": mask_BT},
        "labels": torch.tensor([label for _, label in rows]),
    }


def accuracy(batches: Sequence[Mapping[str, Any]]) -> Score:
    """The share of rows whose largest logit is the label's, and the mean loss."""

    def score(model: nn.Module) -> dict[str, float]:
        right, total, rows = 0, 0.0, 0
        for batch in batches:
            logits_BC, labels_B = model(**batch["inputs"]), batch["labels"]
            right += int((logits_BC.argmax(-1) == labels_B).sum())
            loss, count = train.cross_entropy(logits_BC, labels_B)
            total, rows = total + loss.item(), rows + count
        return {"accuracy": right / rows, "loss": total / rows}

    return score


def classify(
    title: str,
    reviews: list[Review],
    size: Size,
    units: Callable[[str], list[str]],
    note: str,
) -> Task:
    """MiniLM with a new head on reviews."""
    encoder, tokenizer = minilm()
    # a layer on the first token: a mean has no use for it
    encoder.register_module("pooler", None)
    parts = split(reviews, train=size.train, validation=size.validation, test=size.test)

    def rows(part: list[Review]) -> list[tuple[list[int], int]]:
        ids = tokenizer([text for text, _ in part], truncation=True, max_length=size.length)["input_ids"]
        return [(row, label) for row, (_, label) in zip(ids, part, strict=True)]

    def scored(part: list[Review]) -> Score:
        by_length = sorted(rows(part), key=lambda row: len(row[0]))
        return accuracy([collate(by_length[i : i + 50]) for i in range(0, len(by_length), 50)])

    learned = rows(parts.train)
    used = [token for ids, _ in learned for token in ids]
    unknown = used.count(tokenizer.unk_token_id) / len(used)
    return Task(
        title=f"MiniLM (6 layers, English) on {title}",
        base=Classifier(encoder, width=384),
        renew=lambda model: model.get_submodule("head").reset_parameters(),  # type: ignore[operator]
        example=collate(learned[:2])["inputs"],
        head="head",
        body=["encoder"],
        query_value=["query", "value"],
        batches=lambda seed: classifier_batches(learned, size.batch, seed),
        loss=train.classification,
        validation=scored(parts.validation),
        test=scored(parts.test),
        metric="accuracy",
        higher_is_better=True,
        size=size,
        notes=[
            f"{len(reviews):,} distinct texts: {size.train:,} train, {size.validation:,} choose the rate, "
            f"{size.test:,} test.{note}",
            f"The tokenizer reads {unknown:.1%} of the training text as unknown. Without a pretrained model: naive "
            f"Bayes on the same texts has {naive_bayes(parts, units):.3f}.",
        ],
    )


def rotten(quick: bool) -> Task:
    """English: the encoder's own language."""
    size = Size(train=2400, validation=500, test=500, steps=75, batch=32, length=64)
    return classify(
        "Rotten Tomatoes",
        rotten_tomatoes(),
        Size(train=40, validation=20, test=20, steps=5, batch=8, length=16) if quick else size,
        words,
        "",
    )


def chinese(quick: bool) -> Task:
    """Chinese: a language that the encoder was never taught."""
    size = Size(train=1280, validation=500, test=500, steps=40, batch=32, length=40)
    return classify(
        "Chinese reviews",
        chinese_reviews(),
        Size(train=40, validation=20, test=20, steps=5, batch=8, length=16) if quick else size,
        characters,
        f" Cut to {size.length} tokens, a character each.",
    )


def smollm(quick: bool) -> Task:
    """A language model on the docstrings of Python's standard library."""
    base, tokenizer = smollm2()
    text, _ = standard_library(encode=lambda text: tokenizer(text)["input_ids"])
    size = Size(
        train=len(text.train),
        validation=4 if quick else 8,
        test=4 if quick else 16,
        steps=3 if quick else 12,
        batch=2,
        length=16 if quick else 64,
    )
    held = spread(text.held_out, count=size.validation + size.test, context=size.length)
    # every third window chooses the rate: both parts come from all files
    chooses = torch.arange(len(held)) % 3 == 2

    def scored(held_BT: Tensor) -> Score:
        def score(model: nn.Module) -> dict[str, float]:
            total, count = 0.0, 0
            for ids_BT in held_BT.split(8):
                loss, targets = next_token(model, ids_BT)
                total, count = total + loss.item(), count + targets
            return {"loss": total / count}

        return score

    return Task(
        title="SmolLM2-135M on the docstrings of Python's standard library",
        base=base,
        example={"input_ids": held[:1]},
        head=None,
        body=None,
        query_value=["q_proj", "v_proj"],
        batches=lambda seed: list(
            windows(text.train, steps=8 * size.steps, batch=size.batch, context=size.length, seed=seed)
        ),
        loss=next_token,
        validation=scored(held[chooses]),
        test=scored(held[~chooses]),
        metric="loss",
        higher_is_better=False,
        size=size,
        notes=[
            f"{len(text.train):,} tokens train; the held-out files are others: {int(chooses.sum())} windows of "
            f"{size.length} choose the rate, {int((~chooses).sum())} test. Nats per token.",
        ],
    )


def next_token(model: nn.Module, ids_BT: Tensor) -> Weighted:
    """Cross-entropy of each token given those before it."""
    return train.cross_entropy(logits_of(model(input_ids=ids_BT))[:, :-1], ids_BT[:, 1:])


TASKS: Mapping[str, Callable[[bool], Task]] = {
    "rotten-tomatoes": rotten,
    "chinese-reviews": chinese,
    "smollm2": smollm,
}
