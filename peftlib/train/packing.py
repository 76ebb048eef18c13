"""Examples as rows of ids: cut, padded, or packed several to a row.

Padding is known by lengths and never by its id, so the end token is trained even where it pads too, and a model
learns to stop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from peftlib import PeftlibError
from peftlib.train.data import Example
from peftlib.train.losses import IGNORE
from peftlib.train.tokens import Tokenizer


@dataclass(frozen=True)
class Encoded:
    """One example: ``ids``, and ``labels`` that are the id where it is trained and -100 elsewhere.

    Example:
        >>> example = Encoded(ids=[5, 6, 2], labels=[-100, 6, 2])
        >>> sum(label != -100 for label in example.labels)  # tokens that are trained
        2
    """

    ids: list[int]
    labels: list[int]


def encode(
    example: Example, tokenizer: Tokenizer, *, max_length: int | None = None, whole: bool = False
) -> Encoded:
    """An example's ids, with an end token after each trained segment, trained too; labels for the completions only.

    Segments are encoded one by one: a token never spans a prompt and its completion, as none does when the model
    is asked. The tokenizer's ``bos_id``, if it has one, is first, but where a chat template wrote the text.

    Args:
        example: from :func:`peftlib.train.read_jsonl`.
        tokenizer: see :func:`peftlib.train.as_tokenizer`.
        max_length: a longer one loses its beginning, down to its last prompt's; of completions that go, nothing is
            trained.
        whole: train the prompt as well.

    Raises:
        PeftlibError: nothing is trained, or the last that is does not fit with at least one token before it.

    Example:
        >>> from peftlib.train import byte_tokenizer
        >>> encode(Example((("a", False), ("b", True))), byte_tokenizer())
        Encoded(ids=[97, 98, 257], labels=[-100, 98, 257])
    """
    ids: list[int] = []
    labels: list[int] = []
    completions: list[tuple[int, int]] = []
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    for text, trained in example.segments:
        new = tokenizer.encode(text) + ([tokenizer.eos_id] if trained and not example.closed else [])
        if not ids and not example.closed and new[:1] != bos:
            new = bos + new
        completions += [(len(ids), len(ids) + len(new))] if trained else []
        ids += new
        labels += new if trained or whole else [IGNORE] * len(new)
    where = example.source or "The example"
    if all(label == IGNORE for label in labels[1:]):
        raise PeftlibError(
            f"{where}: there is nothing to train on: the completion has no token after the first."
        )
    if max_length is None or len(ids) <= max_length:
        return Encoded(ids, labels)
    begin = bos if ids[:1] == bos else []
    cut = len(begin) + len(ids) - max_length
    if not whole:
        start, end = completions[-1]
        if cut >= start:
            raise PeftlibError(
                f"{where}: the last completion has {end - start} tokens and max_length={max_length}, so "
                "nothing would be left of the prompt. Raise max_length, or leave the example out."
            )
        # an answer without the whole of its question is read, not trained
        for first, after in completions:
            if first <= cut < after:
                labels[first:after] = [IGNORE] * (after - first)
    return Encoded(begin + ids[cut:], [IGNORE] * len(begin) + labels[cut:])


def split(text: str, tokenizer: Tokenizer, length: int, *, context: int = 1) -> list[Encoded]:
    """A text to go on training with, in pieces of at most ``length`` tokens, an end token after its last.

    Every token but the first, which is the tokenizer's ``bos_id`` if it has one, is trained exactly once: a piece
    begins with the ``context`` last tokens of the one before it, which are read and not trained.

    Args:
        text: not empty.
        tokenizer: see :func:`peftlib.train.as_tokenizer`.
        length: of a piece, at most.
        context: tokens that a piece has in common with the one before, at least 1.

    Raises:
        PeftlibError: an empty text, or no room for anything new in a piece.

    Example:
        >>> from peftlib.train import byte_tokenizer
        >>> [(piece.ids, piece.labels) for piece in split("abc", byte_tokenizer(), 3)]
        [([97, 98, 99], [97, 98, 99]), ([99, 257], [-100, 257])]
    """
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    own = tokenizer.encode(text)
    if own in ([], bos) or not 1 <= context < length:
        raise PeftlibError(
            f"split takes a text with a token in it and 1 <= context < length; got {text[:20]!r}, context={context}, "
            f"length={length}."
        )
    ids = [*([] if own[:1] == bos else bos), *own, tokenizer.eos_id]
    pieces = [Encoded(ids[:length], ids[:length])]
    for start in range(length - context, len(ids) - context, length - context):
        piece = ids[start : start + length]
        pieces.append(Encoded(piece, [IGNORE] * context + piece[context:]))
    return pieces


def pad(
    examples: Sequence[Encoded], pad_id: int, *, side: str = "right", multiple: int = 1
) -> dict[str, Any]:
    """Rows of one length: ``inputs`` (B, T), ``labels`` with -100 at the padding, and ``attention_mask``.

    The mask says which positions are real, by lengths. Losses give it to a model that names ``attention_mask`` where
    it matters; rows padded on the right need no mask in a causal model.

    Args:
        examples: at least one.
        pad_id: what fills; it may be the end token.
        side: "right", or "left" for causal models that name ``attention_mask`` and ``position_ids``, counted from 0.
        multiple: T is a multiple of it.

    Raises:
        PeftlibError: no examples, or another side.

    Example:
        >>> batch = pad([Encoded([5, 2], [-100, 2]), Encoded([6, 7, 2], [-100, 7, 2])], pad_id=2)
        >>> batch["inputs"].tolist(), batch["labels"].tolist()
        ([[5, 2, 2], [6, 7, 2]], [[-100, 2, -100], [-100, 7, 2]])
    """
    if not examples or side not in ("right", "left") or multiple < 1:
        raise PeftlibError(
            f"pad takes examples, side 'right' or 'left' and multiple >= 1; got {len(examples)}, {side!r}, {multiple}."
        )
    length = -(-max(len(e.ids) for e in examples) // multiple) * multiple

    def row(values: Sequence[int], fill: int) -> list[int]:
        more = [fill] * (length - len(values))
        return [*values, *more] if side == "right" else [*more, *values]

    return {
        "inputs": torch.tensor([row(e.ids, pad_id) for e in examples]),
        "labels": torch.tensor([row(e.labels, IGNORE) for e in examples]),
        "attention_mask": torch.tensor([row([1] * len(e.ids), 0) for e in examples]).bool(),
    }


def padder(tokenizer: Tokenizer, **options: Any) -> Callable[[Sequence[Encoded]], dict[str, Any]]:
    """:func:`pad` with a tokenizer's padding, as ``collate`` of :class:`peftlib.train.Batches`.

    Example:
        >>> from peftlib.train import byte_tokenizer
        >>> collate = padder(byte_tokenizer(), multiple=4)
        >>> collate([Encoded([97], [97]), Encoded([98, 99], [98, 99])])["inputs"].tolist()
        [[97, 256, 256, 256], [98, 99, 256, 256]]
    """
    return partial(pad, pad_id=tokenizer.pad_id, **options)


def pack(examples: Sequence[Encoded], length: int, pad_id: int) -> list[dict[str, Tensor]]:
    """Several documents to a row of ``length``, each in the first row with room, so that little is padding.

    ``documents`` numbers the documents of a row from 0 (-1 is padding), ``positions`` start at 0 in each, and a
    document's first label is -100, so that none is predicted from the one before. A model sees the documents apart if
    it is given :func:`document_mask`, or, if its attention is told so by positions that start anew, ``positions``, with
    a collate that makes ``inputs`` a dict of them. Losses refuse rows of several documents without one; a batch without
    ``documents`` says that later ones may read earlier ones.

    Args:
        examples: none longer than ``length``.
        length: of every row.
        pad_id: what fills the rest.

    Raises:
        PeftlibError: an example that is too long.

    Example:
        >>> rows = pack([Encoded([1, 2], [1, 2]), Encoded([3], [3]), Encoded([4, 5], [4, 5])], 4, pad_id=0)
        >>> (
        ...     [row["inputs"].tolist() for row in rows],
        ...     rows[0]["documents"].tolist(),
        ...     rows[0]["positions"].tolist(),
        ... )
        ([[1, 2, 3, 0], [4, 5, 0, 0]], [0, 0, 1, -1], [0, 1, 0, 0])
    """
    rows: list[list[Encoded]] = []
    room: list[int] = []
    for number, example in enumerate(examples):
        size = len(example.ids)
        if size > length:
            raise PeftlibError(
                f"Example {number} has {size} tokens and a row {length}. Encode with max_length={length}."
            )
        fits = next((i for i, left in enumerate(room) if left >= size), len(rows))
        if fits == len(rows):
            rows.append([])
            room.append(length)
        rows[fits].append(example)
        room[fits] -= size
    return [_packed(row, length, pad_id) for row in rows]


def _packed(row: Sequence[Encoded], length: int, pad_id: int) -> dict[str, Tensor]:
    columns: dict[str, list[int]] = {"inputs": [], "labels": [], "documents": [], "positions": []}
    for number, example in enumerate(row):
        size = len(example.ids)
        columns["inputs"] += example.ids
        columns["labels"] += [IGNORE, *example.labels[1:]]
        columns["documents"] += [number] * size
        columns["positions"] += range(size)
    fill = {"inputs": pad_id, "labels": IGNORE, "documents": -1, "positions": 0}
    return {
        name: torch.tensor([*values, *[fill[name]] * (length - len(values))])
        for name, values in columns.items()
    }


def document_mask(documents: Tensor) -> Tensor:
    """Which key a query sees: an earlier one, or itself, of its own document; (B, T) -> (B, 1, T, T), True is seen.

    For ``F.scaled_dot_product_attention(..., attn_mask=...)``; padding sees padding, so that no row is empty.

    Example:
        >>> document_mask(torch.tensor([[0, 0, 1]]))[0, 0].int().tolist()
        [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    """
    same = documents[:, :, None] == documents[:, None, :]
    return (same & torch.ones_like(same).tril())[:, None]
