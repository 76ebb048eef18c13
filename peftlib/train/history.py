"""What happened in a training: a row per step, as a table and as curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftlib import PeftlibError
from peftlib.charts import line_chart
from peftlib.report import Table


@dataclass(repr=False, eq=False)
class History:
    """One row per step; prints as a table. Histories are equal if their rows are, NaN being equal to NaN.

    Attributes:
        rows: ``step``, ``epoch``, ``rate``, ``loss`` (mean over the window's targets), ``norm`` (of the gradients,
            before clipping), ``targets``, ``made`` (False: not finite, left out), and ``eval_...`` where there was an
            evaluation.
        seconds: what each step took.
        skipped: (step, batches) of steps left out in this process, the last ten; not kept in files.

    Example:
        >>> history = History(rows=[{"step": 0, "loss": 2.0}, {"step": 1, "loss": 1.5, "eval_loss": 1.75}])
        >>> history.last("loss"), history.column("eval_loss")
        (1.5, [(1, 1.75)])
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    skipped: list[tuple[int, list[Any]]] = field(default_factory=list)

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, History):
            return NotImplemented
        # as text, which gives each bit of a float back: a step that was left out has NaN on both sides
        mine, theirs = (repr([sorted(row.items()) for row in h.rows]) for h in (self, other))
        return mine == theirs

    def add(self, row: dict[str, Any], seconds: float) -> None:
        """Append a step."""
        self.rows.append(row)
        self.seconds.append(seconds)

    def column(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of every row that has the number.

        Raises:
            PeftlibError: no row has it.
        """
        found = [(row["step"], row[name]) for row in self.rows if name in row]
        if not found:
            raise PeftlibError(f"No row has {name!r}; there are: {', '.join(self._names()) or 'no rows'}.")
        return found

    def last(self, name: str) -> float:
        """The newest value of a number."""
        return self.column(name)[-1][1]

    def to_dict(self) -> dict[str, Any]:
        """Rows and seconds as JSON-able values."""
        return {"rows": self.rows, "seconds": self.seconds}

    def plot(self, path: str | Path, names: Sequence[str] = ("loss", "eval_loss"), title: str = "") -> None:
        """Draw numbers over the steps into a file (.png, .svg, .pdf); names that no row has are left out.

        Raises:
            PeftlibError: none of the names is there, or matplotlib is missing.
        """
        there = [name for name in names if name in self._names()]
        if not there:
            raise PeftlibError(f"No row has {', '.join(names)}; there are: {', '.join(self._names())}.")
        line_chart(path, {name: self.column(name) for name in there}, title, "step")

    def __str__(self) -> str:
        # as many rows as a screen has; all evaluations and the last step are among them
        every = max(1, -(-len(self.rows) // 20))
        shown = [
            row
            for i, row in enumerate(self.rows)
            if i % every == 0 or i == len(self.rows) - 1 or any(k.startswith("eval_") for k in row)
        ]
        left = [row["step"] for row in self.rows if not row.get("made", True)]
        notes = [f"not finite and left out: steps {left[:20]}"] if left else []
        columns = [name for name in self._names() if name != "made"]
        formats = {"loss": "float", "rate": "float", "norm": "float", "targets": "float"}
        if not shown:
            return "(no steps)"
        return str(
            Table(
                rows=shown,
                columns=columns,
                formats={k: formats[k] for k in columns if k in formats},
                notes=notes,
            )
        )

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f"<pre>{self}</pre>"

    def _names(self) -> list[str]:
        return list(dict.fromkeys(name for row in self.rows for name in row))
