"""The savings table as a figure: what each method costs beside what it buys. Needs the `plot` extra."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def draw(results: dict[str, Any], path: Path) -> str:
    """Draw three panels of bars, one bar per method; returns the file's name, or why there is none."""
    try:
        # the figure class alone: pyplot would choose a window system
        from matplotlib.figure import Figure
    except ImportError:
        return "no figure (pip install 'peftlib[plot]')"
    rows, machine = results["rows"], results["machine"]
    names = [row["method"] for row in rows]
    figure = Figure(figsize=(12, 1.6 + 0.36 * len(rows)), layout="constrained")
    memory, file, loss = figure.subplots(1, 3, sharey=True)
    memory.barh(names, [row["peak_bytes"] / 2**20 for row in rows], color="tab:blue")
    memory.set(xlabel="peak memory of a training step (MiB)")
    memory.invert_yaxis()
    # points, not bars: on a logarithmic axis the length of a bar says nothing
    file.plot([row["file_bytes"] / 2**10 for row in rows], names, "o", color="tab:blue")
    file.set(xlabel="tuning file (KiB, logarithmic)", xscale="log")
    file.grid(axis="y", alpha=0.3)
    for offset, (domain, before) in enumerate(results["base"]["losses"].items()):
        colour = ("tab:green", "tab:orange")[offset]
        loss.axvline(before, color=colour, linestyle=":", label=f"{domain}, before")
        loss.plot(
            [row["losses"][domain] for row in rows],
            names,
            "o",
            color=colour,
            label=f"{domain}, after",
        )
    loss.set(xlabel="held-out loss (nats per token)")
    loss.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside upper right", ncols=4, fontsize="small")
    figure.suptitle(
        f"{results['model']} with {results['base']['parameters']:,} parameters; "
        f"{machine['threads']} threads, torch {machine['torch']}, {machine['date']}",
        x=0.01,
        ha="left",
        fontsize="small",
    )
    figure.savefig(path, dpi=120)
    return path.name
