"""The quality run as a table, and as a figure: training loss and test score over steps, and the score over time."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from peftlib.report import Table

SMOOTH = 5
"""Steps on either side that a point of the training loss is the mean of."""


def spread(values: Sequence[float]) -> str:
    """The mean, and the standard deviation over seeds.

    >>> spread([0.5, 0.75, 1.0]), spread([0.5])
    ('0.750 ±0.250', '0.500')
    """
    mean = f"{statistics.fmean(values):.3f}"
    return f"{mean} ±{statistics.stdev(values):.3f}" if len(values) > 1 else mean


def table(results: dict[str, Any]) -> Table:
    """The results as they are printed."""
    size, where, rows = results["size"], results["machine"], results["rows"]
    equal = {
        what: f"{label} ({size['steps']} steps{of})"
        for what, label, of in (("steps", "equal steps", ""), ("time", "equal time", " of full"))
        if f"equal_{what}" in rows[0]
    }

    def line(row: dict[str, Any]) -> dict[str, Any]:
        return {
            "method": row["method"],
            "trained": row["trained"],
            "rate": row["rate"],
            "step": row["step_relative"],
            **{what: spread(row[f"equal_{what}"]) for what in equal},
            **({"in_time": row["equal_time_steps"]} if "time" in equal else {}),
        }

    seeds = len(rows[0]["losses"])
    head = f" The new head's, beside a method: {results['head_rate']:g}." if results["head_rate"] else ""
    direction = "higher" if results["higher_is_better"] else "lower"
    before = "" if results["higher_is_better"] else f" Before: {results['before']['loss']:.3f}."
    return Table(
        title=f"{results['task']}: test {results['metric']}",
        rows=[line(row) for row in rows],
        columns={
            "method": "method",
            "trained": "trained",
            "rate": "rate",
            "step": "step/full",
            **equal,
            **({"in_time": "steps"} if "time" in equal else {}),
        },
        formats={"rate": lambda rate: f"{rate:g}", "step": lambda ratio: f"{ratio:.2f}"},
        notes=[
            "",
            *results["notes"],
            f"{seeds} seed{'s' * (seeds > 1)}: mean ± standard deviation; {direction} is better.{before}",
            f"Batches of {size['batch']}, at most {size['length']} tokens a row; AdamW, {results['warmup']} steps of "
            f"warm-up, then constant; {results['precision']}.",
            f"Rate: {results['rates_from']}.{head}",
            f"Time: {results['clock']} time of a step beside that of full fine-tuning, in turns, median of "
            f"{results['rounds']}.",
            *(f"{name} is left out: {why}" for name, why in results["refused"].items()),
            f"Threads: {where['threads']} of {where['cores']} cores, {where['processor']}; "
            f"torch {where['versions']['torch']}, Python {where['python']}, {where['date']}.",
        ],
    )


def draw(results: dict[str, Any], path: Path) -> str:
    """Draw three panels, a line per method, means over the seeds; returns the file's name, or why there is none."""
    try:
        # the figure class alone: pyplot would choose a window system
        from matplotlib.figure import Figure
    except ImportError:
        return "no figure (pip install 'peftlib[plot]')"
    figure = Figure(figsize=(15, 5), layout="constrained")
    training, steps, time = figure.subplots(1, 3)
    end = results["size"]["steps"]
    colours = [f"C{i}" for i in range(10)] + ["black", "gold"]
    for row, colour in zip(results["rows"], colours, strict=False):
        look = {"color": colour, "linewidth": 1.3, "linestyle": "--" if row["method"] == "head" else "-"}
        losses = [fmean(step) for step in zip(*row["losses"], strict=True)]
        shown = smooth(losses)[:end]
        training.plot(range(1, len(shown) + 1), shown, label=row["method"], **look)
        score = [
            (points[0][0], fmean(value for _, value in points)) for points in zip(*row["curves"], strict=True)
        ]
        for axes, factor in ((steps, 1.0), (time, row["step_relative"])):
            axes.plot([s * factor for s, _ in score], [v for _, v in score], marker=".", **look)
    training.set(xlabel="steps", ylabel="training loss (nats)", xlim=(1, end))
    steps.set(xlabel="steps", ylabel=f"test {results['metric']}", xlim=(0, 1.02 * end))
    time.set(
        xlabel="time (steps of full fine-tuning)", ylabel=f"test {results['metric']}", xlim=(0, 1.02 * end)
    )
    if not results["higher_is_better"]:
        for axes in (steps, time):
            axes.axhline(results["before"][results["metric"]], color="grey", linestyle=":")
    for axes in (training, steps, time):
        axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize="small")
    seeds = len(results["rows"][0]["curves"])
    figure.suptitle(
        f"{results['task']}; mean of {seeds} seed{'s' * (seeds > 1)}", x=0.01, ha="left", fontsize="medium"
    )
    figure.savefig(path, dpi=110)
    return path.name


def smooth(values: list[float]) -> list[float]:
    """Means of each value and its neighbours, as many on both sides.

    >>> smooth([0.0, 3.0, 6.0])
    [0.0, 3.0, 6.0]
    """
    found = []
    for i in range(len(values)):
        reach = min(SMOOTH, i, len(values) - 1 - i)
        found.append(fmean(values[i - reach : i + reach + 1]))
    return found
