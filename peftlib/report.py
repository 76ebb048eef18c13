"""What peftlib tells people: rows of numbers that print as aligned tables.

A :class:`Table` keeps the raw values and formats them only when it is shown, so a program reads the same
object a person does. Left out on purpose: colours, the width of the terminal (the same table prints the same
everywhere), sorting and filtering (that is what the rows are for), and the width of East Asian characters.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peftlib.errors import PeftlibError

UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
MISSING = "-"
GAP = "  "
SHORTEST = 12  # a clipped name keeps at least this many characters


def format_bytes(n: float) -> str:
    """A number of bytes in the largest binary unit that keeps it at 1 or above.

    Args:
        n: bytes; negative for a saving.

    Example:
        >>> format_bytes(1572864), format_bytes(1023), format_bytes(-2048)
        ('1.5 MiB', '1023 B', '-2.0 KiB')
    """
    size, unit = abs(n), 0
    # 1023.95 would print as 1024.0: that is already one of the next unit
    while (size >= 1024 if unit == 0 else round(size, 1) >= 1024) and unit < len(UNITS) - 1:
        size, unit = size / 1024, unit + 1
    sign = "-" if n < 0 else ""
    return f"{sign}{size:.0f} B" if unit == 0 else f"{sign}{size:,.1f} {UNITS[unit]}"


def parse_bytes(size: str | float) -> int:
    """The number of bytes that a text such as "24GiB" or "80 GB" names; a number is one already.

    Raises:
        PeftlibError: no number, an unknown unit, or nothing above zero.

    Example:
        >>> parse_bytes("24GiB"), parse_bytes("80 GB"), parse_bytes(512)
        (25769803776, 80000000000, 512)
    """
    found = re.fullmatch(r"\s*([0-9.]+(?:e\+?[0-9]+)?)\s*([kmgtp]?)(i?)b?\s*", str(size), re.IGNORECASE)
    try:
        number, prefix, binary = (float(found[1]), found[2], found[3]) if found else (0.0, "", "")
        bytes_ = int(number * (1024 if binary else 1000) ** " kmgtp".index(prefix.lower() or " "))
    except (ValueError, OverflowError):
        bytes_ = 0
    if bytes_ <= 0:
        raise PeftlibError(f"{size!r} is no size: give bytes, or a text such as '24GiB' or '80GB'")
    return bytes_


def format_count(n: int) -> str:
    """A count with thousands separators.

    Args:
        n: how many.

    Example:
        >>> format_count(124439808)
        '124,439,808'
    """
    return f"{int(n):,}"


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"


def _float(x: float) -> str:
    return f"{x:.4g}"


FORMATS: dict[str, Callable[[Any], str]] = {
    "bytes": format_bytes,
    "count": format_count,
    "percent": _percent,
    "float": _float,
    "text": str,
}


@dataclass(frozen=True, repr=False, kw_only=True)
class Table:
    """Rows of values that print as an aligned table; numbers stand right, text stands left.

    Args:
        rows: one mapping per row, column key -> raw value; a missing key or None prints as "-".
        title: a line above the table.
        columns: keys in order, or key -> label; None takes every key in order of first appearance.
        formats: column key -> "bytes", "count", "percent" (of a fraction), "float", "text" or a function to
            str. Columns without one show integers as counts and floats with four digits.
        footer: one more row, under a rule: the totals.
        notes: lines under the table.
        width: longest line; the longest names are clipped in the middle until it fits.

    Raises:
        PeftlibError: a format is unknown, or a column is in no row.

    Example:
        >>> print(Table(rows=[{"site": "q_proj", "bytes": 2048}], formats={"bytes": "bytes"}))
        site      bytes
        ------  -------
        q_proj  2.0 KiB
    """

    rows: Sequence[Mapping[str, Any]]
    title: str | None = None
    columns: Sequence[str] | Mapping[str, str] | None = None
    formats: Mapping[str, str | Callable[[Any], str]] | None = None
    footer: Mapping[str, Any] | None = None
    notes: Sequence[str] = ()
    width: int = 110

    def __post_init__(self) -> None:
        for key, chosen in (self.formats or {}).items():
            if not callable(chosen) and chosen not in FORMATS:
                known = ", ".join(map(repr, FORMATS))
                raise PeftlibError(
                    f"unknown format {chosen!r} for column {key!r}: use one of {known}, or a function"
                )
        present = {key for row in self._all_rows() for key in row}
        if self.rows and (unknown := [key for key in self._labels() if key not in present]):
            raise PeftlibError(f"no row has the column(s) {unknown}: the rows have {sorted(present)}")

    def to_dict(self) -> dict[str, Any]:
        """The table as JSON-able values: title, labels, raw rows, footer and notes.

        Example:
            >>> Table(rows=[{"rank": 8}]).to_dict()["rows"]
            [{'rank': 8}]
        """
        return {
            "title": self.title,
            "columns": self._labels(),
            "rows": [{key: _plain(value) for key, value in row.items()} for row in self.rows],
            "footer": None if self.footer is None else {k: _plain(v) for k, v in self.footer.items()},
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        keys, cells = list(self._labels()), self._cells()
        if not self.rows:
            return "\n".join([*([self.title] if self.title else []), "(empty)", *self.notes])
        right = [self._is_number(key) for key in keys]
        widths = self._widths(cells, right)
        lines = [
            GAP.join(
                (cell.rjust if number else cell.ljust)(width)
                for cell, width, number in zip(map(_clip, row, widths), widths, right, strict=True)
            ).rstrip()
            for row in cells
        ]
        rule = GAP.join("-" * width for width in widths)
        lines.insert(1, rule)
        if self.footer is not None:
            lines.insert(-1, rule)
        return "\n".join([*([self.title] if self.title else []), *lines, *self.notes])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        right = [self._is_number(key) for key in self._labels()]

        def line(tag: str, row: Sequence[str]) -> str:
            cells = (
                f'<{tag} style="text-align:{"right" if number else "left"}">{html.escape(cell)}</{tag}>'
                for cell, number in zip(row, right, strict=True)
            )
            return f"<tr>{''.join(cells)}</tr>"

        head, *body = self._cells()
        foot = f"<tfoot>{line('th', body.pop())}</tfoot>" if self.footer is not None else ""
        caption = f"<caption>{html.escape(self.title)}</caption>" if self.title else ""
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        rows = "".join(line("td", row) for row in body)
        return f"<table>{caption}<thead>{line('th', head)}</thead><tbody>{rows}</tbody>{foot}</table>{notes}"

    def _all_rows(self) -> list[Mapping[str, Any]]:
        return [*self.rows, *([self.footer] if self.footer is not None else [])]

    def _labels(self) -> dict[str, str]:
        if isinstance(self.columns, Mapping):
            return dict(self.columns)
        keys: Iterable[str] = (
            self.columns if self.columns is not None else (k for r in self._all_rows() for k in r)
        )
        return {key: key for key in keys}

    def _cells(self) -> list[list[str]]:
        """Header, rows and footer as text."""
        labels = self._labels()
        body = [[self._show(key, row.get(key)) for key in labels] for row in self._all_rows()]
        return [list(labels.values()), *body]

    def _show(self, key: str, value: Any) -> str:
        if value is None:
            return MISSING
        chosen = (self.formats or {}).get(key)
        if chosen is None:
            kind = (
                "text"
                if isinstance(value, (bool, str))
                else {int: "count", float: "float"}.get(type(value), "text")
            )
            return FORMATS[kind](value)
        # a column of numbers may hold a word here and there, such as "shared"
        if isinstance(value, str):
            return value
        return (chosen if callable(chosen) else FORMATS[chosen])(value)

    def _is_number(self, key: str) -> bool:
        values = [row[key] for row in self._all_rows() if row.get(key) is not None]
        numbers = [v for v in values if not isinstance(v, (str, bool)) and hasattr(v, "__float__")]
        return bool(numbers) and 2 * len(numbers) >= len(values)

    def _widths(self, cells: list[list[str]], right: list[bool]) -> list[int]:
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        while sum(widths) + len(GAP) * (len(widths) - 1) > self.width:
            # only text gives way: a clipped number would be another number
            room = [0 if number else width for width, number in zip(widths, right, strict=True)]
            widest = max(range(len(room)), key=room.__getitem__)
            if room[widest] <= SHORTEST:
                break
            widths[widest] -= 1
        return widths


def _clip(text: str, width: int) -> str:
    """The text with its middle left out, so that a dotted name keeps its root and its last part."""
    if len(text) <= width:
        return text
    head = (width - 1) // 3
    return f"{text[:head]}…{text[len(text) - (width - 1 - head) :]}"


def _plain(value: Any) -> Any:
    """The value as JSON can hold it; what JSON has no word for (a dtype, a path) becomes its text."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    # numpy and torch scalars
    return _plain(value.item()) if hasattr(value, "item") else str(value)
