"""A safetensors file with a description and checksums, written so that it is whole or absent.

Every byte is covered: the header by a sum of its own, each tensor by one in the header, so that a reader that wants
some tensors only (the tuning, not the optimizer beside it) reads and checks those. Sums guard against damage, not
against forgery; what a forged file may ask for is limited in ``storage`` (sizes) and ``checkpoint`` (names).
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from peftlib.errors import CheckpointError
from peftlib.storage import METADATA, Stored, encoded, laid_out, write_atomically

FORMAT = "peftlib"
VERSION = 1

_BEGIN = b'{"__metadata__":{"checksum":"'
"""How each file's header begins; the header's sum follows, of the header with zeros in its place."""
_ZEROS = "00000000"


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write tensors and a JSON-able description, atomically and durably.

    Raises:
        CheckpointError: the folder or disk refuses; an old file of that name is then untouched.
    """
    # A copy: who trains on in another thread must not come between a sum and what it is of.
    entries, data = laid_out({k: t.detach().to("cpu", copy=True) for k, t in tensors.items()})
    metadata = {
        "checksum": _ZEROS,
        "format": FORMAT,
        "version": str(VERSION),
        "tuning": json.dumps(about),
        "sums": "".join(f"{zlib.crc32(chunk):08x}" for chunk in data.values()),
    }
    header = encoded({METADATA: metadata, **entries})
    at = 8 + len(_BEGIN)
    summed = header[:at] + f"{zlib.crc32(header[8:]):08x}".encode() + header[at + 8 :]
    write_atomically(Path(path), summed, *data.values())


class Reading:
    """One open file of which header and description were checked: ``about``, ``entries`` and the tensors at wish."""

    def __init__(self, stored: Stored, shown: str):
        self._stored, self._shown = stored, shown
        self.entries = stored.entries
        self.about = self._description()
        try:
            digits = stored.metadata["sums"]
            numbers = [int(digits[i : i + 8], 16) for i in range(0, len(digits), 8)]
            self._sums = dict(zip(stored.entries, numbers, strict=True))
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{shown} has no checksum for each of its tensors.") from error

    def tensors(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """The named tensors (all by default), on the CPU, each in memory of its own."""
        try:
            return self._stored.read(self.entries if names is None else names, self._sums)
        except (ValueError, OSError, RuntimeError) as error:
            raise CheckpointError(f"{self._shown} is damaged: {error}. Restore it from a copy.") from error

    def _description(self) -> dict[str, Any]:
        metadata, shown = self._stored.metadata, self._shown
        if metadata.get("format") != FORMAT:
            raise CheckpointError(
                f"{shown} is a safetensors file, but not of a peftlib tuning. Save one with Tuning.save(path)."
            )
        if metadata.get("version") != str(VERSION):
            raise CheckpointError(
                f"{shown} has the format version {metadata.get('version')!r}; this peftlib reads version {VERSION}. "
                "Update peftlib."
            )
        header, at = self._stored.header, len(_BEGIN)
        blank = header[:at] + _ZEROS.encode() + header[at + 8 :]
        if not header.startswith(_BEGIN) or metadata.get("checksum") != f"{zlib.crc32(blank):08x}":
            raise CheckpointError(
                f"{shown} is damaged: the checksum of its header does not fit. Restore it from a copy."
            )
        try:
            about = json.loads(metadata["tuning"])
        except (KeyError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{shown} has no readable description of its tuning: {error}.") from error
        if not isinstance(about, dict):
            raise CheckpointError(
                f"{shown} describes its tuning as {type(about).__name__}, not as an object."
            )
        return about


@contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[Reading]:
    """Open a file; what is read is of one state of it, even if another is put in its place meanwhile.

    Raises:
        CheckpointError: missing, truncated, damaged, of another format or of a later version.
    """
    shown = repr(os.fspath(path))
    try:
        stored = Stored(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"There is no file {shown}.") from error
    except IsADirectoryError as error:
        raise CheckpointError(
            f"{shown} is a directory. Give the file that Tuning.save wrote; HF peft's are read by peftlib.hf.load."
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{shown} is no readable tuning file (truncated, damaged or something else): {error}. "
            "Restore it from a copy."
        ) from error
    with stored:
        yield Reading(stored, shown)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description and all tensors of a file; see :func:`reading`."""
    with reading(path) as file:
        return file.about, file.tensors()
