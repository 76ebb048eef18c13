"""Examples from JSON lines, in the four shapes they come in; whatever is wrong is named by file, line and key.

A line is an object with ``instruction``, ``output`` and perhaps ``input``; with ``prompt`` and ``completion``; with
``messages`` of ``role`` and ``content``; or with ``prompt``, ``chosen`` and ``rejected``. All lines of a file have the
shape of its first; other keys are ignored.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftlib import PeftlibError
from peftlib.train.chat import ChatTemplate

SHAPES = {
    "instruction": ("instruction", "output"),
    "messages": ("messages",),
    "preference": ("prompt", "chosen", "rejected"),
    "completion": ("prompt", "completion"),
}
"""Name of a shape -> the keys it needs. The first whose keys are all there is the file's."""
ROLES = ("system", "user", "assistant")
JSON = {type(None): "null", list: "a list", dict: "an object", bool: "true or false"}
"""What a value that is no text is called."""


@dataclass(frozen=True)
class Template:
    """How turns become text. What an assistant says is trained, with an end token after it; the rest is not.

    Args:
        system: text around a system turn, with ``{content}`` in its place.
        user: around a user turn.
        assistant: what stands before an assistant's turn.
        between: what stands after an assistant's turn and its end token, if more turns follow.

    Example:
        >>> Template(user="Q: {content} ", assistant="A: ").segments([("user", "1+1?"), ("assistant", "2")])
        (('Q: 1+1? A: ', False), ('2', True))
    """

    system: str = "{content}\n\n"
    user: str = "### User:\n{content}\n\n"
    assistant: str = "### Assistant:\n"
    between: str = "\n\n"

    def __post_init__(self) -> None:
        for name in ("system", "user"):
            if "{content}" not in getattr(self, name):
                raise PeftlibError(
                    f"Template({name}={getattr(self, name)!r}) needs {{content}} where the text goes."
                )

    def segments(self, turns: Sequence[tuple[str, str]]) -> tuple[tuple[str, bool], ...]:
        """Turns (role, content) as pieces (text, whether it is trained)."""
        pieces: list[tuple[str, bool]] = []
        before = ""
        for role, content in turns:
            if role == "assistant":
                pieces += [(before + self.assistant, False), (content, True)]
                before = self.between
            else:
                # not str.format: the content may have braces of its own
                before += (self.system if role == "system" else self.user).replace("{content}", content)
        return tuple(pieces)


@dataclass(frozen=True)
class Example:
    """What a model reads and says.

    Attributes:
        segments: pieces of text, and whether each is trained.
        source: file and line.
        closed: trained pieces hold the token that ends them; otherwise ``encode`` adds it.

    Example:
        >>> question = Example((("1+1=", False), ("2", True)), source="sums.jsonl, line 1")
        >>> "".join(text for text, trained in question.segments if trained)
        '2'
    """

    segments: tuple[tuple[str, bool], ...]
    source: str = ""
    closed: bool = False


@dataclass(frozen=True)
class Preference:
    """One prompt and two completions, of which ``chosen`` is the better.

    Example:
        >>> Preference(prompt="1+1=", chosen="2", rejected="3").chosen
        '2'
    """

    prompt: str
    chosen: str
    rejected: str
    source: str = ""


def read_jsonl(path: str | os.PathLike[str], *, template: Template | ChatTemplate | None = None) -> list[Any]:
    """The examples of a file of JSON lines, a :class:`Preference` each if it has those, else an :class:`Example`.

    Instructions and messages go through the template; ``prompt`` and ``completion`` stand as they are. In
    ``messages`` every assistant turn is trained. Empty lines are passed over.

    Args:
        path: UTF-8 text.
        template: by default ``Template()``; or a tokenizer's own, :class:`ChatTemplate`.

    Raises:
        PeftlibError: not JSON, not an object, a key that is missing, not text or empty, an unknown role, messages that
            do not end with the assistant, or no example at all; with file, line and key.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "data.jsonl"
        >>> _ = path.write_text('{"prompt": "首都：", "completion": "北京"}', encoding="utf-8")
        >>> read_jsonl(path)[0].segments
        (('首都：', False), ('北京', True))
    """
    template = template or Template()
    found: list[Any] = []
    shape = None
    try:
        # not splitlines: U+2028 may stand inside a JSON string
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError as error:
        raise PeftlibError(f"There is no file {os.fspath(path)!r}.") from error
    except OSError as error:
        raise PeftlibError(f"{os.fspath(path)!r} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise PeftlibError(f"{os.fspath(path)!r} is not UTF-8: {error}. Convert it first.") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{os.fspath(path)}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise PeftlibError(f"{where}: this is not JSON: {error}. Write one object per line.") from error
        if not isinstance(row, dict):
            raise PeftlibError(f"{where}: this is a JSON {type(row).__name__}, not an object with keys.")
        shape = shape or _shape(row, where)
        found.append(_example(shape, row, template, where))
    if not found:
        raise PeftlibError(f"{os.fspath(path)!r} has no example in it. Write one JSON object per line.")
    return found


def _shape(row: Mapping[str, Any], where: str) -> str:
    for name, keys in SHAPES.items():
        if all(key in row for key in keys):
            return name
    known = "; ".join(", ".join(keys) for keys in SHAPES.values())
    raise PeftlibError(f"{where}: the keys are {', '.join(row) or '(none)'}. An example has one of: {known}.")


def _example(
    shape: str, row: Mapping[str, Any], template: Template | ChatTemplate, where: str
) -> Example | Preference:
    if shape == "messages":
        return _told(_turns(row, where), template, where)
    if shape == "preference":
        prompt, chosen, rejected = (_text(row, key, where) for key in SHAPES[shape])
        if chosen == rejected:
            raise PeftlibError(f"{where}: 'chosen' and 'rejected' are the same text. Leave the line out.")
        return Preference(prompt, chosen, rejected, where)
    if shape == "completion":
        # a text without a prompt is one to go on training with
        prompt = _text(row, "prompt", where, empty=True)
        return Example(((prompt, False), (_text(row, "completion", where), True)), where)
    asked, more = _text(row, "instruction", where), _text(row, "input", where, empty=True)
    user = f"{asked}\n\n{more}" if more else asked
    return _told([("user", user), ("assistant", _text(row, "output", where))], template, where)


def _told(turns: list[tuple[str, str]], template: Template | ChatTemplate, where: str) -> Example:
    try:
        return Example(template.segments(turns), where, isinstance(template, ChatTemplate))
    except PeftlibError as error:
        raise PeftlibError(f"{where}: {error}") from error


def _turns(row: Mapping[str, Any], where: str) -> list[tuple[str, str]]:
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise PeftlibError(
            f"{where}: 'messages' is no list of turns. Write [{{'role': ..., 'content': ...}}, ...]."
        )
    turns = []
    for i, message in enumerate(messages):
        at = f"{where}, messages[{i}]"
        if not isinstance(message, dict):
            raise PeftlibError(f"{at}: this is no object with 'role' and 'content'.")
        role = _text(message, "role", at)
        if role not in ROLES:
            raise PeftlibError(f"{at}: 'role' is {role!r}; it has to be one of {', '.join(ROLES)}.")
        turns.append((role, _text(message, "content", at)))
    if turns[-1][0] != "assistant":
        raise PeftlibError(
            f"{where}: 'messages' ends with {turns[-1][0]!r}; nothing after it is trained. Cut it off."
        )
    return turns


def _text(row: Mapping[str, Any], key: str, where: str, *, empty: bool = False) -> str:
    value = row.get(key)
    if value is None and empty:
        return ""
    if not isinstance(value, str):
        what = JSON.get(type(value), "a number") if key in row else "missing"
        raise PeftlibError(f"{where}: {key!r} is {what}. Write a text, {json.dumps({key: '...'})}.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PeftlibError(
            f"{where}: {key!r} has half a character, {value[error.start]!a} at {error.start}, which is no text. "
            "Write both halves of the pair, or the character itself."
        ) from error
    if not value.strip() and not empty:
        raise PeftlibError(f"{where}: {key!r} is empty. Leave the line out, or give a text.")
    return value
