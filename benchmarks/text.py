"""Real text that every machine with Python holds: the standard library's docstrings, and its code.

Both domains are split by file, so that no file has a part in training and another held out. Test suites,
character tables (`encodings`) and topic dumps (`pydoc_data`) are left out: they repeat themselves more than
text does. A text becomes a 1-D int64 tensor of tokens; for bytes, 0..255.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.inputs import Encode, InputError, utf8

SKIPPED = {"dist-packages", "encodings", "idle_test", "pydoc_data", "site-packages", "test", "tests"}
HELD_OUT_ONE_IN = 10

Owner = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, kw_only=True)
class Domain:
    """One kind of text: tokens to train on and tokens that are only ever scored."""

    name: str
    train: Tensor
    held_out: Tensor


def standard_library(root: Path | None = None, encode: Encode = utf8) -> tuple[Domain, Domain]:
    """Two domains out of the modules below `root`: their docstrings, and their code without them."""
    root = root or library()
    parts: dict[tuple[str, bool], list[str]] = {
        (kind, apart): [] for kind in ("docstrings", "code") for apart in (False, True)
    }
    for path, source, tree in modules(root):
        apart = held_out(path, root)
        parts["docstrings", apart].append(docstrings(tree))
        parts["code", apart].append(code(tree, source))
    for part in parts.values():
        if not part:
            raise InputError(f"{root} holds too few Python modules to split by file")
    prose, program = (
        Domain(
            name=kind,
            train=tokens("".join(parts[kind, False]), encode),
            held_out=tokens("".join(parts[kind, True]), encode),
        )
        for kind in ("docstrings", "code")
    )
    return prose, program


def library() -> Path:
    """Where this Python keeps its standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def held_out(path: Path, root: Path) -> bool:
    """Whether a file is only ever scored: by the hash of its path, so that others coming or going don't move it."""
    digest = hashlib.sha256(path.relative_to(root).as_posix().encode()).digest()
    return digest[0] % HELD_OUT_ONE_IN == 0


def modules(root: Path) -> Iterator[tuple[Path, str, ast.Module]]:
    """Path, text and syntax tree of every Python file below `root`, in a fixed order."""
    for path in sorted(root.rglob("*.py")):
        if not SKIPPED.isdisjoint(path.relative_to(root).parts):
            continue
        try:
            # old modules hold escapes that a newer parser warns of
            with tokenize.open(path) as file, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                source = file.read()
                tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError):
            # some distributions ship templates and bad examples under the name of a module
            continue
        yield path, source, tree


def docstrings(tree: ast.Module) -> str:
    r"""The docstrings of a module, their indentation taken off, an empty line after each.

    >>> docstrings(ast.parse('def f(x):\n    "Twice x."\n    return 2 * x'))
    'Twice x.\n\n'
    """
    texts = (ast.get_docstring(owner) for owner, _ in _documented(tree))
    return "".join(f"{text}\n\n" for text in texts if text)


def code(tree: ast.Module, source: str) -> str:
    r"""A module without its docstrings: comments and code as they stand.

    >>> source = 'def f(x):\n    "Twice x."\n    return 2 * x  # exact\n'
    >>> code(ast.parse(source), source)
    'def f(x):\n    return 2 * x  # exact\n'
    """
    lines = source.splitlines(keepends=True)
    dropped: set[int] = set()
    for _, node in _documented(tree):
        first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
        # columns count UTF-8 bytes
        before = lines[first].encode()[: node.col_offset]
        after = lines[last].encode()[node.end_col_offset :]
        # a docstring that shares its line with code stays: dropping the line would drop the code
        if not before.strip() and not after.strip():
            dropped.update(range(first, last + 1))
    return "".join(line for number, line in enumerate(lines) if number not in dropped)


def _documented(tree: ast.Module) -> list[tuple[Owner, ast.Expr]]:
    """Everything with a docstring, and the statement that is its docstring, in the order of the file."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, Owner) and node.body and isinstance(first := node.body[0], ast.Expr):
            if isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
                found.append((node, first))
    return sorted(found, key=lambda pair: pair[1].lineno)


def text_file(path: Path, encode: Encode = utf8) -> Domain:
    """A text file as a domain: the first nine tenths train, the last tenth is held out."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; give a UTF-8 text file") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    if not text.strip():
        raise InputError(f"{path} is empty; give a UTF-8 text file")
    all_tokens = tokens(text, encode)
    cut = len(all_tokens) - len(all_tokens) // HELD_OUT_ONE_IN
    return Domain(name=path.name, train=all_tokens[:cut], held_out=all_tokens[cut:])


def tokens(text: str, encode: Encode = utf8) -> Tensor:
    """Text as a 1-D int64 tensor.

    >>> tokens("aé")
    tensor([ 97, 195, 169])
    """
    try:
        encoded = torch.tensor(encode(text), dtype=torch.int64)
    except Exception as error:
        # the encoder may be the user's own
        raise InputError(f"encode(text) failed with {type(error).__name__}: {error}") from error
    if encoded.ndim != 1 or (len(encoded) and encoded.min() < 0):
        raise InputError("encode(text) must give a flat list of ids, 0 or larger")
    return encoded


def check_length(domains: Sequence[Domain], context: int) -> None:
    """Refuse a domain whose parts do not hold one window of `context` tokens and the token after it."""
    for domain in domains:
        for part, length in (("training", len(domain.train)), ("held-out", len(domain.held_out))):
            if length <= context:
                raise InputError(
                    f"{domain.name} is too short: its {part} part has {length} tokens, and a context of {context} "
                    f"needs at least {context + 1}; give a longer text or a smaller --context"
                )


def batches(train: Tensor, *, steps: int, batch: int, context: int, seed: int) -> Iterator[Tensor]:
    """Random windows of a text, (batch, context + 1) int64 each: inputs and, shifted by one, targets."""
    generator = torch.Generator().manual_seed(seed)
    windows = train.unfold(0, context + 1, 1)
    for _ in range(steps):
        yield windows[torch.randint(len(windows), (batch,), generator=generator)]


def spread(held_out: Tensor, *, count: int, context: int) -> Tensor:
    """At most `count` windows (n, context + 1), evenly spread over a text and without overlap."""
    windows = held_out.unfold(0, context + 1, context + 1)
    count = min(count, len(windows))
    return windows[torch.arange(count) * len(windows) // count]
