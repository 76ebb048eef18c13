"""Results of cases as one table, and beside those that stand in a file already."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peftlib.report import Table, format_bytes

UNITS = {"ratio": "", "extra": " µs", "ms": " ms"}


def merged(path: Path, fresh: dict[str, Any], order: Sequence[str]) -> list[dict[str, Any]]:
    """The fresh result in place of that of the same case in the file, in the registry's order."""
    have: list[dict[str, Any]] = []
    if path.exists():
        have = json.loads(path.read_text(encoding="utf-8"))["cases"]
    found = {case["case"]: case for case in (*have, fresh)}

    def place(name: str) -> tuple[int, str]:
        own = name.split(" ")[0]
        return (order.index(own) if own in order else len(order), name)

    return [found[name] for name in sorted(found, key=place)]


def table(cases: Sequence[dict[str, Any]]) -> Table:
    """A row for each contestant; what was aimed at and whether it was reached stands in peftlib's rows."""
    rows = [row for case in cases for row in _rows(case)]
    columns = {
        "case": "case",
        "contestant": "contestant",
        "run": "a run",
        "value": "median",
        "quartiles": "quartiles",
        "rate": "tokens/s",
        "target": "target",
        "verdict": "",
        "seen": "prototype",
        "hf": "HF then",
    }
    used = {key: label for key, label in columns.items() if any(key in row for row in rows)}
    if not any(row.get("verdict") for row in rows):
        used.pop("verdict", None)
    return Table(rows=rows, columns=used, notes=["", *_notes(cases)], width=120)


def _rows(case: dict[str, Any]) -> list[dict[str, Any]]:
    target = case.get("target")
    goal = (
        {"target": f"{target['at_most']:g}"} | {k: target[k] for k in ("seen", "hf") if target[k]}
        if target
        else {}
    )
    if "unavailable" in case:
        return [{"case": case["case"], "contestant": case["unavailable"], **goal}]
    rows: list[dict[str, Any]] = []
    for number, row in enumerate(case["rows"]):
        floor = number == 0 and case["metric"] != "ms"
        shown = {"case": case["case"] if number == 0 else "", "contestant": row["contestant"]}
        shown["run"] = format_bytes(row["run"]) if case["unit"] == "bytes" else f"{row['run']:.4g} ms"
        if not floor:
            shown["value"] = _number(row["median"], case["metric"]) + UNITS[case["metric"]]
            if case["rounds"] > 1:
                shown["quartiles"] = " - ".join(_number(row[key], case["metric"]) for key in ("low", "high"))
        if "rate" in row:
            shown["rate"] = f"{row['rate']:.0f}"
        if "verdict" in row:
            shown |= {**goal, "verdict": row["verdict"]}
        rows.append(shown)
    rows += [{"case": "", "contestant": name, "run": why} for name, why in case["missing"].items()]
    return rows


def _number(value: float, metric: str) -> str:
    return f"{value:.3f}" if metric == "ratio" else f"{value:.1f}"


def _notes(cases: Sequence[dict[str, Any]]) -> list[str]:
    notes = []
    if any(case.get("quick") for case in cases):
        notes.append("A quick run: that it works is all that the numbers show.")
    if any(case["metric"] == "ratio" and case["rows"] for case in cases):
        notes.append("Median and quartiles: of each round's ratio to the first contestant of the case.")
    if any(case["metric"] == "extra" for case in cases):
        notes.append("Median and quartiles: of what one linear takes beyond the frozen one.")
    conditions: dict[str, list[str]] = {}
    for case in cases:
        if "about" not in case:
            continue
        about = case["about"]
        versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        line = (
            f"{about['threads']} thread{'s' * (about['threads'] > 1)} of {about['cores']} cores, {about['processor']}"
            + (f", {about['device']}" if about["device"] != "cpu" else "")
            + f"; {versions}; {about['date']}."
        )
        conditions.setdefault(line, []).append(case["case"])
    if len(conditions) == 1:
        return [*notes, *conditions]
    return [*notes, *(f"{', '.join(names)}: {line}" for line, names in conditions.items())]
