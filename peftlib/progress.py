"""A bar on stderr, where somebody looks."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def bar_on_stderr(unit: str, shown: bool | None, total: int | None = None, done: int = 0) -> Iterator[Any]:
    """Yields a tqdm bar, or None where it is not shown or tqdm is missing; None shows it in a terminal only."""
    bar = None
    if shown or (shown is None and sys.stderr.isatty()):
        with contextlib.suppress(ImportError):
            from tqdm import tqdm

            bar = tqdm(total=total, initial=done, unit=unit)
    try:
        yield bar
    finally:
        if bar is not None:
            bar.close()
