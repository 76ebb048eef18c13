"""Progress bars where tqdm is installed (the `progress` extra), plain lines where it is not."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any


class Progress:
    """A context manager that counts steps on standard error.

    Args:
        total: number of steps.
        label: what is being done.
    """

    def __init__(self, total: int, label: str) -> None:
        self.total = total
        self.label = label
        self.done = 0
        self.shown = self.started = time.monotonic()
        self.bar: Any = None

    def __enter__(self) -> Progress:
        try:
            from tqdm import tqdm
        except ImportError:
            self._line("")
        else:
            # into a file or a CI log a bar is a line every few seconds
            self.bar = tqdm(total=self.total, desc=self.label, mininterval=0.1 if sys.stderr.isatty() else 10)
        return self

    def step(self, note: str = "") -> None:
        """One step is done; `note` stands beside the count."""
        self.done += 1
        if self.bar is not None:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update()
        elif time.monotonic() - self.shown > 10 or self.done == self.total:
            self._line(note)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.close()

    def _line(self, note: str) -> None:
        self.shown = time.monotonic()
        seconds = self.shown - self.started
        print(
            f"{self.label}: {self.done}/{self.total} in {seconds:.0f} s {note}".rstrip(),
            file=sys.stderr,
            flush=True,
        )
