"""Preferences and judged answers as batches: what DPO, KTO and the reward model read.

A batch of B pairs has 2 B rows, the chosen ones first, so that one forward does for both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from peftlib import PeftlibError
from peftlib.train.data import Example, Preference
from peftlib.train.losses import IGNORE
from peftlib.train.packing import Encoded, encode, pad
from peftlib.train.tokens import Tokenizer


@dataclass(frozen=True)
class Pair:
    """Two completions of one prompt; ``margin`` is by how much the first is better, if that is known.

    Example:
        >>> Pair(Encoded([1, 2], [-100, 2]), Encoded([1, 3], [-100, 3])).margin
        0.0
    """

    chosen: Encoded
    rejected: Encoded
    margin: float = 0.0


@dataclass(frozen=True)
class Judged:
    """A prompt with one completion, and whether it is a good one.

    Example:
        >>> Judged(Encoded([1, 2], [-100, 2]), desirable=True).desirable
        True
    """

    example: Encoded
    desirable: bool


def encode_pair(preference: Preference, tokenizer: Tokenizer, *, max_length: int | None = None) -> Pair:
    """Both completions after the prompt, each with an end token, see :func:`peftlib.train.encode`.

    Raises:
        PeftlibError: a completion is empty or does not fit.

    Example:
        >>> from peftlib.train import byte_tokenizer
        >>> encode_pair(Preference("a", "b", "c"), byte_tokenizer()).rejected
        Encoded(ids=[97, 99, 257], labels=[-100, 99, 257])
    """

    def one(completion: str) -> Encoded:
        if not completion:
            raise PeftlibError(f"{preference.source or 'A preference'}: a completion is empty.")
        segments = ((preference.prompt, False), (completion, True))
        return encode(Example(segments, preference.source), tokenizer, max_length=max_length)

    return Pair(one(preference.chosen), one(preference.rejected))


def pad_pairs(pairs: Sequence[Pair], pad_id: int) -> dict[str, Any]:
    """``inputs`` and ``labels`` (2 B, T), chosen rows first, and ``margin`` (B,).

    Example:
        >>> pair = Pair(Encoded([1, 2], [-100, 2]), Encoded([1, 3, 4], [-100, 3, 4]))
        >>> pad_pairs([pair], pad_id=0)["inputs"].tolist()
        [[1, 2, 0], [1, 3, 4]]
    """
    batch = pad([*(pair.chosen for pair in pairs), *(pair.rejected for pair in pairs)], pad_id)
    return {**batch, "margin": torch.tensor([pair.margin for pair in pairs])}


def pad_judged(judged: Sequence[Judged], pad_id: int) -> dict[str, Any]:
    """``inputs`` and ``labels`` (B, T), ``desirable`` (B,), and the same prompts with each other's completions.

    ``mismatched`` has each prompt with the completion of the next row that has another prompt, from which KTO estimates
    its KL. Where both are longer than the batch, the prompt loses its beginning.

    Raises:
        PeftlibError: an example without a completion, or whose prompt is not one piece before it; a batch of one prompt
            alone, which has no mismatched completion (batches of one row, too).

    Example:
        >>> good = Judged(Encoded([1, 2], [-100, 2]), True)
        >>> batch = pad_judged([good, Judged(Encoded([3, 4], [-100, 4]), False)], pad_id=0)
        >>> batch["desirable"].tolist(), batch["mismatched"]["inputs"].tolist()
        ([True, False], [[1, 4], [3, 2]])
    """
    halves = [_halves(i, one.example) for i, one in enumerate(judged)]
    width, others = max((len(one.example.ids) for one in judged), default=0), []
    for i, (prompt, _) in enumerate(halves):
        done = next((done for other, done in (*halves[i:], *halves[:i]) if other != prompt), None)
        if done is None:
            raise PeftlibError(
                f"KTO estimates a KL from completions of other prompts, and all {len(judged)} row(s) of this batch "
                "have one prompt. Give larger batches, and shuffle them."
            )
        prompt = prompt[max(0, len(prompt) + len(done) - width) :]
        others.append(Encoded(prompt + done, [IGNORE] * len(prompt) + done))
    return {
        **pad([one.example for one in judged], pad_id),
        "desirable": torch.tensor([one.desirable for one in judged]),
        "mismatched": pad(others, pad_id),
    }


def pair_padder(tokenizer: Tokenizer) -> Callable[[Sequence[Pair]], dict[str, Any]]:
    """:func:`pad_pairs` as ``collate`` of :class:`peftlib.train.Batches`.

    Example:
        >>> from peftlib.train import Batches, byte_tokenizer
        >>> tokenizer = byte_tokenizer()
        >>> pairs = [encode_pair(Preference("1+1=", "2", "three"), tokenizer)]
        >>> [batch["inputs"].shape for batch in Batches(pairs, 8, pair_padder(tokenizer))]
        [torch.Size([2, 10])]
    """
    return partial(pad_pairs, pad_id=tokenizer.pad_id)


def judged_padder(tokenizer: Tokenizer) -> Callable[[Sequence[Judged]], dict[str, Any]]:
    """:func:`pad_judged` as ``collate`` of :class:`peftlib.train.Batches`.

    Example:
        >>> from peftlib.train import Batches, byte_tokenizer
        >>> tokenizer = byte_tokenizer()
        >>> texts = [("1+1=", "2", True), ("2+2=", "5", False)]
        >>> judged = [
        ...     Judged(encode(Example(((a, False), (b, True))), tokenizer), good) for a, b, good in texts
        ... ]
        >>> [batch["inputs"].shape for batch in Batches(judged, 8, judged_padder(tokenizer))]
        [torch.Size([2, 6])]
    """
    return partial(pad_judged, pad_id=tokenizer.pad_id)


def _halves(row: int, example: Encoded) -> tuple[list[int], list[int]]:
    first = next((i for i, label in enumerate(example.labels) if label != IGNORE), None)
    if first is None:
        raise PeftlibError(f"Row {row} has no completion: all its labels are -100. Leave empty ones out.")
    if example.labels[first:] != example.ids[first:]:
        raise PeftlibError("KTO takes a prompt and one completion after it; here are several trained pieces.")
    return example.ids[:first], example.ids[first:]
