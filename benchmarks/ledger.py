"""Results that are not computed twice: a line each in a file, so that a long run that was killed goes on.

Several processes may share a file and so the work, if they go through it in different orders.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Ledger:
    """A file of results by key.

    Args:
        path: the file; it is made with the first result.
        settings: what every result here depends on; those under other settings are left alone.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "ledger.jsonl"
        ...     first = Ledger(file, {"steps": 5}).get(["lora", 0], lambda: 0.75)
        ...     again = Ledger(file, {"steps": 5}).get(["lora", 0], lambda: 0.25)
        ...     other = Ledger(file, {"steps": 9}).get(["lora", 0], lambda: 0.25)
        >>> first, again, other
        (0.75, 0.75, 0.25)
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, settings
        self.known: dict[str, Any] = {}

    def get(self, key: list[Any], make: Callable[[], Any]) -> Any:
        """The value of a key, JSON-able; made and written down if it is not there."""
        name = json.dumps(key)
        if name not in self.known:
            # another process may have come to it meanwhile
            self._read()
        if name not in self.known:
            entry = {"settings": self.settings, "key": key, "value": make()}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"{json.dumps(entry)}\n")
            # as a later run would read it
            self.known[name] = json.loads(json.dumps(entry["value"]))
        return self.known[name]

    def _read(self) -> None:
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []:
            try:
                entry = json.loads(line)
            except ValueError:
                # who was killed may have left half a line
                continue
            if entry["settings"] == self.settings:
                self.known.setdefault(json.dumps(entry["key"]), entry["value"])
