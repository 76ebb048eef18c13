"""Stacked bars, stacked areas and curves: in a file, with matplotlib, or as lines of text.

A figure has one colour per series: the one that is named for it, else in the order in which they are given. Left out
on purpose: windows (a figure goes to a file), and everything that a caller can do with the numbers himself.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peftlib.errors import PeftlibError
from peftlib.report import UNITS, format_bytes

GLYPHS = "█▓▒░·+-~"
BLANK, MARK = " ", "│"


def bar_chart(
    path: str | Path,
    labels: Sequence[str],
    series: Mapping[str, Sequence[float]],
    title: str = "",
    unit: str = "",
    *,
    limit: float | None = None,
    colors: Mapping[str, str] | None = None,
) -> None:
    """Draw stacked horizontal bars into a file, one bar per label, one colour per series.

    Args:
        path: the file to write; its suffix chooses the format (.png, .svg, .pdf).
        labels: names of the bars, top to bottom.
        series: name -> one value per bar, in ``unit``, stacked in this order.
        title: what is shown and on which machine.
        unit: unit of the values, on the axis; "bytes" shows KiB, MiB, ... as the longest bar needs.
        limit: a value to mark with a line.
        colors: name of a series -> its colour, where figures are to be compared.

    Raises:
        PeftlibError: a series has another length than the labels, or as :func:`check_file`.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     bar_chart(
        ...         f"{folder}/peak.svg", ["LoRA"], {"weights": [9e6], "activations": [4e6]}, unit="bytes"
        ...     )
    """
    _check(labels, series)
    figure = _figure(path, 8, 1.2 + 0.45 * max(len(labels), 1))
    totals = [sum(map(abs, bar)) for bar in zip(*series.values(), strict=True)]
    scale, shown = _scale(max([*totals, limit or 0]), unit)
    axes = figure.add_subplot()
    left = [0.0] * len(labels)
    for name, values in series.items():
        axes.barh(
            range(len(labels)),
            [value / scale for value in values],
            left=left,
            label=name,
            color=(colors or {}).get(name),
        )
        left = [start + value / scale for start, value in zip(left, values, strict=True)]
    if limit is not None:
        size = format_bytes(limit) if unit == "bytes" else f"{limit:g} {unit}".rstrip()
        axes.axvline(limit / scale, color="black", linestyle="--", linewidth=1, label=f"limit, {size}")
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xlabel(shown)
    axes.set_title(title)
    if len(series) > 1:
        figure.legend(loc="outside right upper")
    _write(figure, path)


def area_chart(
    path: str | Path,
    series: Mapping[str, Sequence[float]],
    spans: Sequence[tuple[int, str]] = (),
    title: str = "",
    unit: str = "",
    *,
    colors: Mapping[str, str] | None = None,
) -> None:
    """Draw values over time into a file, one area upon the other.

    Args:
        path: the file to write; its suffix chooses the format (.png, .svg, .pdf).
        series: name -> one value per instant, in ``unit``, stacked in this order.
        spans: (first instant, name) of the stretches to tell apart; each ends where the next begins.
        title: what is shown and on which machine.
        unit: unit of the values; "bytes" shows KiB, MiB, ... as the highest value needs.
        colors: name of a series -> its colour, where figures are to be compared.

    Raises:
        PeftlibError: series of different lengths, or as :func:`check_file`.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     area_chart(
        ...         f"{folder}/step.svg", {"weights": [4, 4, 4], "activations": [0, 2, 1]}, [(0, "forward")]
        ...     )
    """
    length = len(next(iter(series.values()), ()))
    _check(range(length), series)
    figure = _figure(path, 9, 4.5)
    scale, unit = _scale(max(map(sum, zip(*series.values(), strict=True)), default=0), unit)
    axes = figure.add_subplot()
    values = [[value / scale for value in one] for one in series.values()]
    chosen = [colors[name] for name in series] if colors else None
    axes.stackplot(range(length), *values, labels=list(series), colors=chosen, step="post", linewidth=0)
    ends = [*(start for start, _ in spans[1:]), length]
    for (start, name), end in zip(spans, ends, strict=True):
        axes.axvline(start, color="black", linewidth=0.5, alpha=0.5)
        # a name stands where there is room for it
        if end - start > length / 12:
            where = {"xycoords": ("data", "axes fraction"), "ha": "center", "va": "bottom"}
            axes.annotate(name, ((start + end) / 2, 1.005), fontsize="small", **where)
    axes.margins(x=0)
    axes.set_xlabel("allocations and releases, in order")
    axes.set_xticks([])
    axes.set_ylabel(unit)
    axes.set_title(title, pad=18)
    figure.legend(loc="outside right upper", reverse=True)
    _write(figure, path)


def line_chart(
    path: str | Path, series: Mapping[str, Sequence[tuple[float, float]]], title: str = "", unit: str = ""
) -> None:
    """Draw curves into a file.

    Args:
        path: the file to write; its suffix chooses the format (.png, .svg, .pdf).
        series: name -> (x, y) points, in order.
        title: what is shown and on which machine.
        unit: what x counts.

    Raises:
        PeftlibError: as :func:`check_file`.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     line_chart(f"{folder}/loss.svg", {"loss": [(0, 2.0), (1, 1.5)]}, unit="step")
    """
    figure = _figure(path, 8, 4.5)
    axes = figure.add_subplot()
    for name, points in series.items():
        # few points are dots too: a line through one would be nothing
        dots = "." if len(points) < 50 else ""
        axes.plot([x for x, _ in points], [y for _, y in points], dots + "-", label=name, linewidth=1)
    axes.set_xlabel(unit)
    axes.set_title(title)
    if len(series) > 1:
        figure.legend(loc="outside right upper")
    _write(figure, path)


def text_bars(
    labels: Sequence[str],
    series: Mapping[str, Sequence[float]],
    *,
    limit: float | None = None,
    width: int = 50,
) -> str:
    """Stacked horizontal bars as text, values in bytes, with a legend under them.

    Args:
        labels: names of the bars, top to bottom.
        series: name -> bytes of one bar each, stacked in this order; at most eight.
        limit: bytes to mark with a vertical line.
        width: characters of the longest bar.

    Raises:
        PeftlibError: a series has another length than the labels.

    Example:
        >>> print(text_bars(["LoRA", "full"], {"weights": [8, 8], "gradients": [0, 8]}, limit=12, width=16))
        LoRA  ████████    │     8 B
        full  ████████▓▓▓▓│▓▓▓  16 B
              █ weights  ▓ gradients  │ 12 B
    """
    _check(labels, series)
    totals = [sum(bar) for bar in zip(*series.values(), strict=True)]
    scale = max([*totals, limit or 0], default=0) / width or 1
    indent = max(map(len, labels), default=0)
    lines = []
    for i, label in enumerate(labels):
        ends = [round(end / scale) for end in itertools.accumulate(values[i] for values in series.values())]
        starts = [0, *ends[:-1]]
        bar = "".join(glyph * (b - a) for glyph, a, b in zip(GLYPHS, starts, ends, strict=False))
        cells = list(bar.ljust(width + 1, BLANK))
        if limit is not None:
            cells[round(limit / scale)] = MARK
        lines.append(
            f"{label.ljust(indent)}  {''.join(cells).rstrip().ljust(width)}  {format_bytes(totals[i])}"
        )
    legend = [f"{glyph} {name}" for glyph, name in zip(GLYPHS, series, strict=False)]
    if limit is not None:
        legend.append(f"{MARK} {format_bytes(limit)}")
    return "\n".join([*lines, f"{' ' * indent}  {'  '.join(legend)}"])


def _check(labels: Sequence[Any], series: Mapping[str, Sequence[float]]) -> None:
    for name, values in series.items():
        if len(values) != len(labels):
            raise PeftlibError(
                f"series {name!r} has {len(values)} value(s), there are {len(labels)} label(s): give one each"
            )


def check_file(path: str | Path) -> None:
    """Whether a figure can be drawn into a file, known before the work for it.

    Raises:
        PeftlibError: there is no such folder, no such format, or matplotlib is missing.
    """
    _figure(path, 1, 1)


def _figure(path: str | Path, width: float, height: float) -> Any:
    try:
        # the figure class alone: pyplot would keep the figure and choose a window system
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PeftlibError(
            "drawing needs matplotlib, which is not installed: pip install 'peftlib[plot]'"
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    path = Path(path)
    if not path.parent.is_dir():
        raise PeftlibError(f"{path} cannot be drawn: there is no folder {path.parent}")
    if path.suffix[1:].lower() not in figure.canvas.get_supported_filetypes() or path.is_dir():
        raise PeftlibError(f"{path} cannot be drawn: give a file that ends in .png, .svg or .pdf")
    return figure


def _write(figure: Any, path: str | Path) -> None:
    try:
        figure.savefig(path)
    except (ValueError, OSError) as error:
        raise PeftlibError(
            f"{str(path)!r} cannot be drawn: {error}. Name a .png, .svg or .pdf file."
        ) from error


def _scale(largest: float, unit: str) -> tuple[float, str]:
    """Ticks at round numbers of the unit that the largest value is named in."""
    if unit != "bytes":
        return 1, unit
    named = format_bytes(largest).split()[-1]
    return 1024 ** UNITS.index(named), named
