"""Where a training's rows go while it runs. A logger is any function of one row; this file has two, and a bar."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from peftlib import PeftlibError
from peftlib.progress import bar_on_stderr
from peftlib.report import format_bytes


class JsonlLog:
    """A file with one JSON object per step; a resumed run takes away the rows that it makes again.

    Args:
        path: the file; its folder is there.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "log.jsonl"
        >>> log = JsonlLog(path)
        >>> for step in range(3):
        ...     log({"step": step})
        >>> JsonlLog(path)({"step": 1, "loss": 0.5})
        >>> print(path.read_text(), end="")
        {"step": 0}
        {"step": 1, "loss": 0.5}
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._begun = False

    def __call__(self, row: Mapping[str, Any]) -> None:
        """Write a row down."""
        if not self._begun:
            self._drop_from(row["step"])
            self._begun = True
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def _drop_from(self, step: int) -> None:
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        kept = []
        for line in lines:
            # who was killed may have left half a line
            with contextlib.suppress(ValueError):
                if json.loads(line)["step"] < step:
                    kept.append(line)
        self.path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


class TensorBoardLog:
    """Every number of every step for TensorBoard; a resumed run takes away the steps that it makes again.

    A callback of :func:`peftlib.train.fit`; needs the package ``tensorboard``.

    Args:
        folder: where the event files go; made if it is not there.

    Raises:
        PeftlibError: at the first row, if the package is missing.

    Example:
        >>> log = TensorBoardLog("runs/first")  # fit(..., callbacks=[log])
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._writer: Any = None

    def __call__(self, row: Mapping[str, Any]) -> None:
        """Write a row's numbers down."""
        if self._writer is None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise PeftlibError("TensorBoardLog needs a package: pip install tensorboard") from error
            self._writer = SummaryWriter(str(self.folder), purge_step=row["step"])
        for name, value in row.items():
            if name != "step":
                self._writer.add_scalar(name, value, row["step"])
        # now and not at the end, which nobody announces
        self._writer.flush()


@contextlib.contextmanager
def progress_bar(
    total: int, done: int, shown: bool | None
) -> Iterator[Callable[[Mapping[str, Any], float], None]]:
    """A function of (row, its seconds) that moves a bar with loss, rate, targets per second and memory."""
    with bar_on_stderr("step", shown, total, done) as bar:

        def show(row: Mapping[str, Any], seconds: float) -> None:
            if bar is not None:
                speed = row["targets"] / max(seconds, 1e-9)
                numbers = {
                    "loss": f"{row['loss']:.4g}",
                    "rate": f"{row['rate']:.3g}",
                    "targets/s": f"{speed:.4g}",
                }
                bar.set_postfix({**numbers, "memory": format_bytes(_peak())}, refresh=False)
                bar.update()

        yield show


def _peak() -> int:
    """Most bytes held so far: by the GPU if one is in use, else by the process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
