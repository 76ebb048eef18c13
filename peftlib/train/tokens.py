"""Tokenizers: bytes, which need no vocabulary, and those of others, behind four names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from peftlib import PeftlibError


@dataclass(frozen=True)
class Tokenizer:
    """Text to ids and back, without adding anything.

    Attributes:
        encode: text -> ids.
        decode: ids -> text.
        eos_id: ends a completion.
        pad_id: fills rows; it may be ``eos_id``, as padding is known by lengths here and never by its id.
        vocabulary: ids are below it.
        bos_id: begins each example, where the tokenizer has such a token.

    Example:
        >>> words = ["<end>", "no", "yes"]
        >>> tokenizer = Tokenizer(
        ...     encode=lambda text: [words.index(word) for word in text.split()],
        ...     decode=lambda ids: " ".join(words[i] for i in ids),
        ...     eos_id=0,
        ...     pad_id=0,
        ...     vocabulary=len(words),
        ... )
        >>> tokenizer.decode(tokenizer.encode("yes no"))
        'yes no'
    """

    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    eos_id: int
    pad_id: int
    vocabulary: int
    bos_id: int | None = None


PAD, EOS = 256, 257


def byte_tokenizer() -> Tokenizer:
    """The 256 bytes of UTF-8, and after them pad and end: any text of any language, back without loss.

    No text gives the two special ids; bytes that are no UTF-8 decode to the replacement character.

    Example:
        >>> tokenizer = byte_tokenizer()
        >>> tokenizer.encode("é学"), tokenizer.decode([*tokenizer.encode("学"), tokenizer.eos_id])
        ([195, 169, 229, 173, 166], '学')
    """

    def decode(ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < PAD).decode("utf-8", errors="replace")

    return Tokenizer(lambda text: list(text.encode("utf-8")), decode, EOS, PAD, 258)


def as_tokenizer(tokenizer: Any, *, eos: str | None = None, pad: str | None = None) -> Tokenizer:
    """One of ours, of ``tokenizers`` or of transformers, as one of ours.

    What it puts before a text by itself, if that is one token, is ``bos_id``: that a token is called so is not enough.

    Args:
        tokenizer: a :class:`Tokenizer`, a ``tokenizers.Tokenizer`` or a transformers tokenizer.
        eos: the text of the token that ends a completion; transformers tokenizers know theirs.
        pad: of the token that fills rows; by default their own, or the one that ends.

    Raises:
        PeftlibError: something else, or no end token is known.

    Example:
        >>> as_tokenizer(byte_tokenizer()).eos_id
        257
    """
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    if callable(getattr(tokenizer, "convert_tokens_to_ids", None)):
        eos_id = tokenizer.eos_token_id if eos is None else tokenizer.convert_tokens_to_ids(eos)
        pad_id = tokenizer.pad_token_id if pad is None else tokenizer.convert_tokens_to_ids(pad)
        if eos is not None and eos_id == tokenizer.unk_token_id:
            eos_id = None

        def encode(text: str, special: bool = False) -> list[int]:
            return list(tokenizer(text, add_special_tokens=special)["input_ids"])

        size = len(tokenizer)
    elif callable(getattr(tokenizer, "token_to_id", None)):
        eos_id = None if eos is None else tokenizer.token_to_id(eos)
        pad_id = None if pad is None else tokenizer.token_to_id(pad)

        def encode(text: str, special: bool = False) -> list[int]:
            return list(tokenizer.encode(text, add_special_tokens=special).ids)

        size = tokenizer.get_vocab_size()
    else:
        raise PeftlibError(
            f"{type(tokenizer).__name__} is no tokenizer that is known here. Pass byte_tokenizer(), one of "
            "tokenizers or transformers, or Tokenizer(encode, decode, eos_id, pad_id, vocabulary)."
        )
    if eos_id is None:
        raise PeftlibError(
            f"{type(tokenizer).__name__} has no end token{'' if eos is None else f' {eos!r}'}, and a model that "
            "never sees one never stops. Name one of its tokens: as_tokenizer(tokenizer, eos='</s>')."
        )
    if pad is not None and pad_id is None:
        raise PeftlibError(
            f"{type(tokenizer).__name__} has no token {pad!r} to pad with. Name one of its tokens."
        )

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=True))

    pad_id = eos_id if pad_id is None else pad_id
    return Tokenizer(encode, decode, eos_id, pad_id, size, _begins(encode, decode, size))


def _begins(encode: Callable[..., list[int]], decode: Callable[..., str], size: int) -> int | None:
    """The one token that stands before a text, found with the first token that is a text."""
    for i in range(size):
        if plain := encode(text := decode([i])):
            whole = encode(text, True)
            before = whole[1 : 1 + len(plain)] == plain and whole[: len(plain)] != plain
            return whole[0] if before else None
    return None
