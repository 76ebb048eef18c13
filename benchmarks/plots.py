"""A family's results as a figure: dots with quartiles and a mark at each target, or lines along an axis.

Needs the `plot` extra.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peftlib.storage import write_atomically

COLOURS = {
    "base": "0.6",
    "addmm": "0.6",
    "torch": "0.6",
    "peftlib": "tab:blue",
    "peftlib, example=": "tab:cyan",
    "peftlib, merged": "tab:green",
    "peftlib, one tuning": "tab:cyan",
    "HF peft": "tab:orange",
    "loralib": "tab:red",
}
LABELS = {
    "ratio": "ratio to the floor of the same run (median, quartiles)",
    "extra": "µs a wrapped linear, beyond the frozen one",
    "ms": "milliseconds",
}


def draw(family: str, cases: Sequence[dict[str, Any]], path: Path) -> bool:
    """Write the figure, whole or not at all; without matplotlib, or with no number to show, there is none."""
    try:
        # the figure class alone: pyplot would choose a window system
        from matplotlib.figure import Figure
    except ImportError:
        return False
    cases = [case for case in cases if case["rows"]]
    if not cases:
        return False
    lines = all("at" in case for case in cases)
    figure = Figure(figsize=(11, 4 if lines else 1.8 + 0.55 * len(cases)), layout="constrained")
    handles = _lines(figure, cases) if lines else _dots(figure, cases)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, fontsize="small")
    about = cases[0]["about"]
    figure.suptitle(
        f"{family}: {about['processor'].split(',')[0]}, torch {about['versions']['torch']}, {about['date']}",
        x=0.01,
        ha="left",
        fontsize="small",
    )
    image = io.BytesIO()
    figure.savefig(image, dpi=110, format="png")
    write_atomically(path, image.getvalue())
    return True


def _dots(figure: Any, cases: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A panel for each metric: families may mix them."""
    metrics = list(dict.fromkeys(case["metric"] for case in cases))
    heights = [sum(case["metric"] == metric for case in cases) for metric in metrics]
    panels = figure.subplots(len(metrics), 1, squeeze=False, height_ratios=heights)[:, 0]
    handles: dict[str, Any] = {}
    for metric, axes in zip(metrics, panels, strict=True):
        chosen = [case for case in cases if case["metric"] == metric]
        for y, case in enumerate(chosen):
            rows = case["rows"] if metric == "ms" else case["rows"][1:]
            for number, row in enumerate(rows):
                name = row["contestant"]
                error = [[row["median"] - row["low"]], [row["high"] - row["median"]]]
                handles[name] = axes.errorbar(
                    row["median"],
                    y + 0.16 * (number - (len(rows) - 1) / 2),
                    xerr=error,
                    fmt="o",
                    color=COLOURS.get(name, "black"),
                    capsize=3,
                )
            if "target" in case:
                handles["target"] = axes.vlines(case["target"]["at_most"], y - 0.4, y + 0.4, color="black")
        if metric == "ratio":
            axes.axvline(1, color="0.6", linestyle=":")
        axes.set_yticks(range(len(chosen)), [case["case"] for case in chosen])
        axes.set_ylim(len(chosen) - 0.5, -0.5)
        values = [row["median"] for case in chosen for row in case["rows"] if row["median"] > 0]
        if max(values) > 8 * min(values):
            axes.set_xscale("log")
        axes.set_xlabel(LABELS[metric])
        axes.grid(axis="x", alpha=0.3)
    return handles


def _lines(figure: Any, cases: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A panel for each axis."""
    names = list(dict.fromkeys(case["at"][0] for case in cases))
    panels = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
    handles: dict[str, Any] = {}
    for name, axes in zip(names, panels, strict=True):
        chosen = sorted((case for case in cases if case["at"][0] == name), key=lambda case: case["at"][1])
        series: dict[str, list[tuple[int, dict[str, Any]]]] = {}
        for case in chosen:
            for row in case["rows"][1:]:
                series.setdefault(row["contestant"], []).append((case["at"][1], row))
        for contestant, points in series.items():
            handles[contestant] = axes.errorbar(
                [at for at, _ in points],
                [row["median"] for _, row in points],
                yerr=[
                    [row["median"] - row["low"] for _, row in points],
                    [row["high"] - row["median"] for _, row in points],
                ],
                fmt="o-",
                color=COLOURS.get(contestant, "black"),
                capsize=3,
            )
        places = [case["at"][1] for case in chosen]
        axes.set_xscale("log", base=2)
        axes.set_xticks(places, [str(place) for place in places])
        axes.minorticks_off()
        axes.axhline(1, color="0.6", linestyle=":")
        axes.set_xlabel(name)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("ratio to the floor")
    return handles
