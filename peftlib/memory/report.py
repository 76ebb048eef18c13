"""What a step's peak consists of, as numbers, as tables and as plots."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftlib.charts import area_chart, bar_chart
from peftlib.errors import PeftlibError
from peftlib.report import Table, format_bytes

PARTS = {
    "frozen_bytes": "frozen weights",
    "trained_bytes": "trained weights",
    "gradient_bytes": "gradients",
    "optimizer_bytes": "optimizer state",
    "activation_bytes": "activations",
    "temporary_bytes": "temporaries",
    "input_bytes": "inputs",
}
MODULES_SHOWN = 8
COLORS = {
    "frozen weights": "#1b3a5c",
    "weights": "#2f6690",
    "trained weights": "#5fa8d3",
    "gradients": "#f4a259",
    "optimizer state": "#8cb369",
    "optimizer": "#8cb369",
    "activations": "#bc4b51",
    "temporaries": "#a7a7a7",
    "other": "#a7a7a7",
    "inputs": "#d9d9d9",
}
"""The same part has the same colour in every figure."""
REPEATED = "backward and recomputation"


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """Live bytes through a step: at most a thousand instants, the fullest of their neighbours.

    Attributes:
        parts: part (as in :class:`MemoryReport`) -> bytes at each instant.
        phases: (first instant, what ran from there on).
    """

    parts: Mapping[str, Sequence[int]]
    phases: Sequence[tuple[int, str]]

    def totals(self) -> list[int]:
        """Bytes at each instant, all parts together."""
        return [sum(instant) for instant in zip(*self.parts.values(), strict=True)]


@dataclass(frozen=True, kw_only=True)
class MemoryReport:
    """The largest number of bytes alive at once, and what they were.

    Attributes:
        peak_bytes: the peak; the seven parts below add up to it.
        frozen_bytes, trained_bytes: parameters by ``requires_grad``; buffers are frozen.
        gradient_bytes, optimizer_bytes, activation_bytes, temporary_bytes, input_bytes: see :mod:`peftlib.memory`.
        tuning_bytes: how much of the weights tunings added, trained or not. 0 where no model was given.
        peak_at: where the peak was first reached, such as "backward of layers.3.mlp" or "optimizer step".
        modules: module name -> activation bytes at the peak that its own forward made (not its children's), most
            first; they add up to ``activation_bytes``. Empty where no model was given.
        device: the device the bytes lie on: the busiest accelerator, else the CPU.
        cuda_peak_bytes: what CUDA's allocator gave out at its own peak, or None.
        operations: operator -> how often the step called it.
        asked: modules whose forward asked a tensor for its value, which a fake tensor does not have.
        timeline: live bytes through the step.
        notes: what a reader of the numbers should know.

    Two reports are equal if their bytes, places and modules are.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> layer, x = nn.Linear(4, 4), torch.ones(2, 4)
        >>> from peftlib.memory import measure_memory
        >>> report = measure_memory(lambda: layer(x).sum().backward(), model=layer)
        >>> report.trained_bytes, report.gradient_bytes, report.input_bytes
        (80, 80, 32)
    """

    peak_bytes: int
    frozen_bytes: int = 0
    trained_bytes: int = 0
    gradient_bytes: int = 0
    optimizer_bytes: int = 0
    activation_bytes: int = 0
    temporary_bytes: int = 0
    input_bytes: int = 0
    tuning_bytes: int = 0
    peak_at: str
    modules: Mapping[str, int] = field(default_factory=dict)
    device: str = "cpu"
    cuda_peak_bytes: int | None = field(default=None, compare=False)
    operations: Mapping[str, int] = field(default_factory=dict, compare=False, repr=False)
    asked: Sequence[str] = field(default=(), compare=False)
    timeline: Timeline | None = field(default=None, compare=False, repr=False)
    notes: Sequence[str] = field(default=(), compare=False)

    def parts(self) -> dict[str, int]:
        """The seven parts by name; they add up to ``peak_bytes``.

        Example:
            >>> sum(MemoryReport(peak_bytes=8, input_bytes=8, peak_at="forward").parts().values())
            8
        """
        return {name: getattr(self, name) for name in PARTS}

    def to_dict(self) -> dict[str, Any]:
        """Every field by name, as JSON can hold it, but the timeline."""
        fields = dataclasses.asdict(dataclasses.replace(self, timeline=None))
        del fields["timeline"]
        return fields | {"asked": list(self.asked), "notes": list(self.notes)}

    def plot(self, path: str | Path) -> None:
        """Draw the parts of the peak as one stacked bar into a file (.png, .svg, .pdf).

        Raises:
            PeftlibError: the file cannot be drawn.
        """
        series = {label: [getattr(self, name)] for name, label in PARTS.items()}
        title = f"peak of one step: {format_bytes(self.peak_bytes)} in the {self.peak_at}"
        bar_chart(path, [self.device], series, title, "bytes", colors=COLORS)

    def plot_timeline(self, path: str | Path, title: str = "one step") -> None:
        """Draw the live bytes through the step, part upon part, into a file (.png, .svg, .pdf).

        Args:
            path: the file.
            title: what was run; device, peak and its place are added.

        Raises:
            PeftlibError: the file cannot be drawn, or the report has no timeline (it was put together from others).
        """
        if self.timeline is None:
            raise PeftlibError(
                "this report has no timeline: it was computed from other reports, or read from a file. Plot the "
                "report that estimate_memory or measure_memory gave"
            )
        series = {label: self.timeline.parts[name] for name, label in PARTS.items()}
        peak = f"{format_bytes(self.peak_bytes)} in the {self.peak_at}"
        title = f"live bytes through {title} ({self.device})\npeak {peak}"
        area_chart(path, series, _spans(self.timeline.phases), title, "bytes", colors=COLORS)

    def compare(self, other: MemoryReport, names: tuple[str, str] = ("this", "other")) -> Table:
        """A table of the parts of two reports and their difference, with the operators that only one called.

        Two runs of one step, fake and real, give the same bytes where they call the same operators. A model that
        asks a tensor for its value, or asks whether it is fake, may not.

        Args:
            other: the report to subtract.
            names: what to call the two.

        Example:
            >>> a = MemoryReport(peak_bytes=8, input_bytes=8, peak_at="forward")
            >>> b = MemoryReport(peak_bytes=4, input_bytes=4, peak_at="forward")
            >>> print(a.compare(b).rows[-1])
            {'part': 'inputs', 'this': 8, 'other': 4, 'difference': 4}
        """
        one, two = names
        rows = [
            {"part": PARTS[name], one: mine, two: theirs, "difference": mine - theirs}
            for (name, mine), theirs in zip(self.parts().items(), other.parts().values(), strict=True)
        ]
        peak = {
            "part": "peak",
            one: self.peak_bytes,
            two: other.peak_bytes,
            "difference": self.peak_bytes - other.peak_bytes,
        }
        notes = []
        for name, mine, theirs in ((one, self, other), (two, other, self)):
            more = {
                op: n - theirs.operations.get(op, 0)
                for op, n in mine.operations.items()
                if n > theirs.operations.get(op, 0)
            }
            if more:
                listed = ", ".join(f"{op} ×{n}" for op, n in list(more.items())[:MODULES_SHOWN])
                notes.append(f"only in {name}: {listed}{', ...' if len(more) > MODULES_SHOWN else ''}")
        if not notes and self.operations and other.operations:
            notes.append("both called the same operators")
        notes += [note for report in (self, other) for note in report.notes]
        sizes = dict.fromkeys((one, two, "difference"), "bytes")
        return Table(title="Peak memory of one step", rows=rows, formats=sizes, footer=peak, notes=notes)

    def tables(self) -> list[Table]:
        """The parts of the peak, and the modules that hold most activations."""
        rows = [
            {"part": PARTS[name], "bytes": size, "share": size / max(self.peak_bytes, 1)}
            for name, size in self.parts().items()
        ]
        notes = [f"reached in: {self.peak_at}"]
        if self.tuning_bytes:
            notes.append(f"of the weights, tunings added: {format_bytes(self.tuning_bytes)}")
        if self.cuda_peak_bytes is not None:
            notes.append(f"CUDA's allocator at its own peak: {format_bytes(self.cuda_peak_bytes)}")
        notes += self.notes
        formats = {"bytes": "bytes", "share": "percent"}
        footer = {"part": "peak", "bytes": self.peak_bytes}
        title = f"Peak memory of one step ({self.device})"
        tables = [Table(title=title, rows=rows, formats=formats, footer=footer, notes=notes)]
        if self.modules:
            shown = list(self.modules.items())[:MODULES_SHOWN]
            rows = [{"activations of": name or "(root)", "bytes": size} for name, size in shown]
            left_out = len(self.modules) - len(shown)
            notes = [f"and {left_out} more"] if left_out else []
            tables.append(Table(rows=rows, formats=formats, notes=notes))
        return tables

    def __str__(self) -> str:
        return "\n\n".join(map(str, self.tables()))

    def _repr_html_(self) -> str:
        return "".join(table._repr_html_() for table in self.tables())


def _spans(phases: Sequence[tuple[int, str]]) -> list[tuple[int, str]]:
    """Phases to name in a figure: recomputed blocks, which alternate with their backward, in one."""
    spans: list[tuple[int, str]] = []
    for start, phase in phases:
        if spans and {spans[-1][1], phase} <= {"backward", "recomputation", REPEATED}:
            spans[-1] = (spans[-1][0], REPEATED)
        else:
            spans.append((start, phase))
    return spans
