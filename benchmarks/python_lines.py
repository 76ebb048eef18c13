"""A task whose reward can be checked and not talked round: complete a line of Python so that it parses.

A prompt is the beginning of a real line of the standard library, cut where it does not parse by itself; a completion
earns 1 if it ends with a newline and the line, prompt and completion together, is Python to `ast`, else 0. The scorer
reads nothing but these bytes: it has not seen how the line went on, and knows no model.

Cheap ways out are closed by the choice of prompts: what does not parse alone does not parse with an empty completion
or a comment after it either. What is left is to close what is open, and a short way to do so earns as much as a long
one: the reward says "parses", not "means something".
"""

from __future__ import annotations

import ast
import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.inputs import InputError
from benchmarks.text import code, held_out, library, modules

NEWLINE = 10
"""Ends a completion."""
SHORTEST, LONGEST = 12, 40
"""Bytes of a line."""
BEFORE, AFTER = 8, 2
"""Least bytes of a prompt, and of what is left to say."""


@dataclass(frozen=True)
class Line:
    """A line of code, cut in two: what is given, and how it went on, which only SFT sees."""

    prompt: str
    rest: str


def parses(source: str | bytes) -> bool:
    """Whether Python's own parser takes it.

    >>> parses("print('a', end='')"), parses("print('a', end="), parses("return ]"), parses(bytes([255]))
    (True, False, False, False)
    """
    try:
        # what the parser only warns of (a lone backslash in a string) is Python too
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(source)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        # ValueError: a null byte; the last two: brackets a hundred deep
        return False
    return True


def truth(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> list[float]:
    r"""1 for each completion that ends with a newline and makes its prompt a line that parses, else 0; ids are bytes.

    >>> truth([list(b"print(")] * 3, [list(b"1)\n"), list(b"1)"), list(b"# 1)\n")])
    [1.0, 0.0, 0.0]
    """
    return [
        float(done[-1:] == [NEWLINE] and parses(bytes([*prompt, *done])))
        for prompt, done in zip(prompts, map(list, completions), strict=True)
    ]


def cut(line: str, draw: random.Random) -> Line | None:
    """The line, cut at a place where its beginning does not parse, even with a comment after it; None without one.

    >>> cut("value = 1 + 2 + 3", random.Random(0)) is None, cut("import os", random.Random(0))
    (False, None)
    """
    places = range(BEFORE, len(line) - AFTER + 1)
    for place in draw.sample(places, len(places)):
        if not parses(line[:place]) and not parses(line[:place] + "#"):
            return Line(line[:place], line[place:])
    return None


def lines(root: Path | None = None, *, seed: int = 0) -> tuple[list[Line], list[Line]]:
    """Lines of the modules below `root`, to train on and held out by file; no line is in both, or twice in one."""
    root = root or library()
    found: dict[bool, dict[str, None]] = {True: {}, False: {}}
    for path, source, tree in modules(root):
        for line in code(tree, source).splitlines():
            line = line.strip()
            if SHORTEST <= len(line) <= LONGEST and line.isascii() and line.isprintable() and line[0] != "#":
                found[held_out(path, root)][line] = None
    parts = []
    for part, others in ((found[False], {}), (found[True], found[False])):
        # each line is cut by itself, so that others coming or going don't move it
        new = (line for line in part if line not in others and parses(line))
        cuts = (cut(line, random.Random(f"{seed} {line}")) for line in new)
        parts.append([line for line in cuts if line])
    if not all(parts):
        raise InputError(f"{root} holds too few lines of Python to split by file")
    return parts[0], parts[1]
