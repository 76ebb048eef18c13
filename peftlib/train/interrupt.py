"""Ctrl-C at the right moment: a training ends after the step that it is in, with its checkpoint."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def after_this_step() -> Iterator[Callable[[Any], bool]]:
    """A callback of :func:`peftlib.train.fit` that ends it once Ctrl-C was pressed; pressed again, it ends at once."""
    asked = threading.Event()

    def ask(number: int, frame: Any) -> None:
        asked.set()
        signal.signal(signal.SIGINT, before)
        sys.stderr.write("\nEnding after this step, with a checkpoint; Ctrl-C again ends at once.\n")

    # only the main thread may ask for signals; elsewhere nobody presses keys
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, ask) if main else signal.SIG_DFL
    try:
        yield lambda row: asked.is_set()
    finally:
        if main:
            signal.signal(signal.SIGINT, before)
