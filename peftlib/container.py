"""A safetensors file with a description and a checksum, written so that it is whole or absent.

The checksum covers every byte that matters: the tensors' data as it lies in the file, and the header's meaning.
It guards against damage, not against forgery.
"""

from __future__ import annotations

import json
import os
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from peftlib.errors import CheckpointError

FORMAT = "peftlib"
VERSION = 1


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write tensors and a JSON-able description, atomically and durably.

    Raises:
        CheckpointError: the folder or disk refuses; an old file of that name is then untouched.
    """
    # Each tensor on its own: safetensors refuses tensors that share storage.
    plain = {k: t.detach().to("cpu", copy=True).contiguous() for k, t in tensors.items()}
    metadata = {"format": FORMAT, "version": str(VERSION), "tuning": json.dumps(about)}
    data = safetensors.torch.save(plain, metadata)
    header, start = _header(data)
    header["__metadata__"]["checksum"] = _checksum(header, memoryview(data)[start:])
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    write_atomically(Path(path), len(encoded).to_bytes(8, "little"), encoded, memoryview(data)[start:])


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description and the tensors (on the CPU) of a file, checked whole before anything is returned.

    Raises:
        CheckpointError: missing, truncated, damaged, of another format or of a later version.
    """
    shown = repr(os.fspath(path))
    try:
        # One read: a file replaced meanwhile cannot mix with its successor.
        data = Path(path).read_bytes()
        tensors = safetensors.torch.load(data)
        header, start = _header(data)
        metadata = header.get("__metadata__", {})
    except FileNotFoundError as error:
        raise CheckpointError(f"There is no file {shown}.") from error
    except (OSError, safetensors.SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{shown} is no readable tuning file (truncated, damaged or something else): {error}. "
            "Restore it from a copy."
        ) from error
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{shown} is a safetensors file, but not of a peftlib tuning. Save one with Tuning.save(path)."
        )
    if metadata.get("version") != str(VERSION):
        raise CheckpointError(
            f"{shown} has the format version {metadata.get('version')!r}; this peftlib reads version {VERSION}. "
            "Update peftlib."
        )
    if metadata.get("checksum") != _checksum(header, memoryview(data)[start:]):
        raise CheckpointError(
            f"{shown} is damaged: its checksum does not fit its content. Restore it from a copy."
        )
    try:
        about = json.loads(metadata["tuning"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{shown} has no readable description of its tuning: {error}.") from error
    if not isinstance(about, dict):
        raise CheckpointError(f"{shown} describes its tuning as {type(about).__name__}, not as an object.")
    return about, tensors


def write_atomically(path: Path, *chunks: bytes | memoryview) -> None:
    """Write a file so that at every moment either the old or the new content is whole on disk.

    Raises:
        CheckpointError: it cannot be written; the old file, if there is one, is untouched.
    """
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except OSError as error:
        raise CheckpointError(f"Cannot write into {str(path.parent)!r}: {error}.") from error
    try:
        with os.fdopen(handle, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes the file private; a saved file has the permissions that any new file gets.
        os.umask(mask := os.umask(0))
        Path(temporary).chmod(0o666 & ~mask)
        Path(temporary).replace(path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise CheckpointError(
                f"Cannot write {str(path)!r}: {error}. The old file, if there was one, is untouched."
            ) from error
        raise
    if hasattr(os, "O_DIRECTORY"):
        # The rename itself is durable only once the folder is.
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _header(data: bytes) -> tuple[dict[str, Any], int]:
    """The parsed header and where the tensors' data begins."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    if not isinstance(header, dict):
        raise TypeError(f"its header is {type(header).__name__}, not an object")
    return header, start


def _checksum(header: Mapping[str, Any], data: memoryview) -> str:
    metadata = {k: v for k, v in header.get("__metadata__", {}).items() if k != "checksum"}
    meaning = json.dumps({**header, "__metadata__": metadata}, sort_keys=True).encode()
    return f"{zlib.crc32(meaning):08x}{zlib.crc32(data):08x}"
