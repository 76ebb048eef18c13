"""Safetensors files, read straight into each tensor's own memory: no pickle, no copy, no second look at the path.

A header is believed only as far as the file's size bears it out, so nothing larger than the file is ever allocated.
Every tensor owns its memory, as a freshly made one does: a tuning that leaves frees all of it, and products of its
weights are rounded as they were before saving (kernels look at how memory is aligned).

Left out on purpose: what a file means (``container``, ``hf``), and memory maps, which fail later and elsewhere when a
file shrinks under them.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftlib.errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

METADATA = "__metadata__"
_LARGEST_HEADER = 100_000_000
"""The format's own limit."""
_CHUNK = 1 << 18
_TOO_LARGE = 2**63


class Entry(NamedTuple):
    """Where one tensor lies in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


class Stored:
    """One open file, its header understood and checked; what is read later is of the same file, whatever the path
    names by then.

    Attributes:
        header: the header as it lies in the file.
        metadata: its strings by name.
        entries: tensors by name, in the order in which they lie.

    Raises:
        ValueError: it is no safetensors file, or not of the size that its header says.
        OSError: it cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str]):
        if sys.byteorder != "little":
            raise ValueError("its numbers are little-endian and this machine's are not")
        self._file = Path(path).open("rb", buffering=0)  # noqa: SIM115 (closed by __exit__)
        try:
            size = os.fstat(self._file.fileno()).st_size
            length = int.from_bytes(self._file.read(8), "little")
            if not 0 < length <= min(size - 8, _LARGEST_HEADER):
                raise ValueError(f"it has {size} bytes, and announces a header of {length}")
            self.header = self._file.read(length)
            if len(self.header) != length:
                raise ValueError("it ends within its header")
            self._data = 8 + length
            self.metadata, self.entries = _understood(self.header, size - self._data)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Stored:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def read(self, names: Iterable[str], sums: Mapping[str, int] | None = None) -> dict[str, Tensor]:
        """Tensors on the CPU, each in memory of its own; with ``sums`` their CRC-32 has to be right.

        Raises:
            ValueError: a sum is wrong, or the file became shorter.
        """
        found: dict[str, Tensor] = {}
        at = -1
        for name in names:
            dtype, shape, start, stop = self.entries[name]
            tensor = found[name] = torch.empty(shape, dtype=dtype)
            if start != at:
                self._file.seek(self._data + start)
            total, rest = 0, _bytes(tensor)
            while rest:
                # In pieces, so that they are summed while the processor still has them.
                piece = rest[:_CHUNK]
                count = self._file.readinto(piece)
                if not count:
                    raise ValueError(f"it ends within {name!r}")
                if sums is not None:
                    total = zlib.crc32(piece[:count], total)
                rest = rest[count:]
            if sums is not None and total != sums[name]:
                raise ValueError(f"the checksum of {name!r} does not fit its content")
            at = stop
        return found


def _understood(header: bytes, size: int) -> tuple[dict[str, str], dict[str, Entry]]:
    """Metadata and entries of a header that describes exactly ``size`` bytes, without a gap or an overlap."""
    try:
        values = json.loads(header.decode(), object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("its header is nested too deep") from error
    if not isinstance(values, dict):
        raise ValueError(f"its header is {type(values).__name__}, not an object")
    metadata = values.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError(f"{METADATA} is no object of strings")
    entries: dict[str, Entry] = {}
    end = 0
    for name, entry in sorted(((n, _entry(n, v)) for n, v in values.items()), key=lambda item: item[1][2:]):
        if entry.start != end:
            raise ValueError(f"the data of {name!r} begin at {entry.start}, and those before end at {end}")
        entries[name], end = entry, entry.stop
    if end != size:
        raise ValueError(f"its header describes {end} bytes of data, and there are {size}")
    return metadata, entries


def _entry(name: str, about: Any) -> Entry:
    if not isinstance(about, dict) or about.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r} is not described by dtype, shape and data_offsets alone")
    dtype = DTYPES.get(about["dtype"]) if isinstance(about["dtype"], str) else None
    if dtype is None:
        raise ValueError(f"{name!r} is of the unknown kind {about['dtype']!r}")
    shape, offsets = about["shape"], about["data_offsets"]
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        raise ValueError(f"{name!r} has no shape and offsets of integers")
    if offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name!r} has another number of bytes than its shape {tuple(shape)} needs")
    return Entry(dtype, tuple(shape), *offsets)


def _counts(value: Any) -> bool:
    """Whether it is a list of sizes; the bound keeps even those of empty tensors within what torch takes."""
    if not isinstance(value, list):
        return False
    for v in value:  # noqa: SIM110 (a file has thousands of these; all() takes twice as long)
        if type(v) is not int or not 0 <= v < _TOO_LARGE:
            return False
    return True


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands in its header twice")
    return found


def laid_out(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, memoryview]]:
    """The header's entries, and the bytes of each tensor in the order in which they lie in the file.

    Raises:
        CheckpointError: a tensor's numbers are of a kind that the format does not have.
    """
    if sys.byteorder != "little":
        raise CheckpointError("Safetensors are little-endian; this machine's numbers are not.")
    entries: dict[str, Any] = {}
    data: dict[str, memoryview] = {}
    end = 0
    # Wide numbers first, so that every tensor begins at a multiple of its own.
    for name in sorted(tensors, key=lambda n: (-tensors[n].dtype.itemsize, n)):
        tensor = tensors[name].detach()
        if tensor.dtype not in _NAMES:
            raise CheckpointError(f"{name!r} is {tensor.dtype}, for which the file format has no name.")
        data[name] = as_bytes(tensor)
        stop = end + len(data[name])
        entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, stop],
        }
        end = stop
    return entries, data


def as_bytes(tensor: Tensor) -> memoryview:
    """A tensor's numbers in order; its own memory if it is contiguous and on the CPU."""
    return _bytes(tensor.detach().cpu().contiguous())


def _bytes(tensor: Tensor) -> memoryview:
    array: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(array)


def is_sharded(tensor: Tensor) -> bool:
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Any) -> Tensor:
    """All of a tensor, of which this process may hold a shard (then a collective call)."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def like(value: Tensor, own: Any) -> Tensor:
    """A whole tensor as one of ``own``'s kind: this process's shard of it, if ``own`` is sharded."""
    if not is_sharded(own) or is_sharded(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    # every process has the whole and cuts its own shard: nothing is sent
    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


def encoded(header: Mapping[str, Any]) -> bytes:
    """A header as it lies in a file, its length in front, filled up with blanks to whole words."""
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_atomically(path: Path, *chunks: bytes | memoryview) -> None:
    """Write a file so that at every moment either the old or the new content is whole on disk.

    Raises:
        CheckpointError: it cannot be written; the old file, if there is one, is untouched.
    """
    with staged(path, *chunks) as new:
        new.replace(path)
    sync_folder(path.parent)


@contextmanager
def staged(path: Path, *chunks: bytes | memoryview) -> Iterator[Path]:
    """The content on disk beside ``path``, to be renamed to it within the context; afterwards gone unless it was.

    Raises:
        CheckpointError: it cannot be written or renamed.
    """
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except OSError as error:
        raise CheckpointError(f"Cannot write into {str(path.parent)!r}: {error}.") from error
    new = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes the file private; a saved file has the permissions that any new file gets.
        os.umask(mask := os.umask(0))
        new.chmod(0o666 & ~mask)
        yield new
    except OSError as error:
        raise CheckpointError(
            f"Cannot write {str(path)!r}: {error}. The old file, if there was one, is untouched."
        ) from error
    finally:
        new.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make the renames in a folder durable."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
