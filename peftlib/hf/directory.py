"""The two files of a directory: ``adapter_config.json``, field by field, and ``adapter_model.safetensors``."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from peftlib.errors import CheckpointError
from peftlib.storage import Stored, staged, sync_folder, write_atomically

try:
    import fcntl
except ImportError:  # not on this system
    fcntl = None  # type: ignore[assignment]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

ABOUT = {"peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"}
ABOUT |= {"peft_version", "runtime_config"}


class Config:
    """The fields of one ``adapter_config.json``; a wrong type is an error that names the field."""

    def __init__(self, values: Mapping[str, Any], path: Path):
        self.values, self.path = values, path
        self.weights = repr(str(path.parent / WEIGHTS))

    def error(self, name: str, why: str) -> CheckpointError:
        return CheckpointError(f"{str(self.path)!r}: {name}={self.values.get(name)!r}: {why}")

    def get(self, name: str, kinds: tuple[type, ...], default: Any = None) -> Any:
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise self.error(name, f"expected {' or '.join(k.__name__ for k in kinds)}.")
        return value

    def count(self, name: str) -> int:
        value = self.get(name, (int,), 0)
        if value < 1:
            raise self.error(name, "expected an integer of at least 1.")
        return int(value)

    def names(self, name: str) -> list[str]:
        value = self.get(name, (list,), [])
        if not all(isinstance(v, str) and v for v in value):
            raise self.error(name, "expected a list of module names.")
        return list(dict.fromkeys(value))

    def pattern(self, name: str) -> dict[str, Any]:
        value = self.get(name, (dict,), {})
        for key, number in value.items():
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                raise self.error(name, f"expected a number at {key!r}.")
            self.search(name, rf"(.*\.)?({key})$", "")
        return value

    def search(self, name: str, pattern: str, text: str, full: bool = False) -> bool:
        try:
            return bool(re.fullmatch(pattern, text) if full else re.match(pattern, text))
        except re.error as error:
            raise self.error(name, f"not a regular expression: {error}.") from error

    def refuse_unknown(self, known: set[str]) -> None:
        """Refuse what has a value and no meaning here; HF writes every field, most of them empty."""
        for name, value in self.values.items():
            if name not in known and value not in (None, False, 0, "", [], {}):
                raise self.error(
                    name,
                    "this changes what the tuning computes in a way that peftlib does not have. It is not read.",
                )


def read(directory: str | os.PathLike[str]) -> tuple[Config, dict[str, Tensor]]:
    """The configuration and the tensors of a directory, on the CPU."""
    folder = Path(directory)
    path, weights = folder / CONFIG, folder / WEIGHTS
    try:
        with _locked(folder, exclusive=False):
            text = path.read_bytes()
            stored = Stored(weights)
    except FileNotFoundError as error:
        raise CheckpointError(_what_is_missing(folder)) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{str(weights)!r} is not a readable safetensors file: {error}") from error
    with stored:
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{str(path)!r} is not readable JSON: {error}") from error
        if not isinstance(values, dict):
            raise CheckpointError(f"{str(path)!r} holds no JSON object but {type(values).__name__}.")
        for key, entry in stored.entries.items():
            if not entry.dtype.is_floating_point and not key.endswith("num_batches_tracked"):
                raise CheckpointError(
                    f"{str(weights)!r}: {key!r} is {entry.dtype}; adapters are floating point."
                )
        try:
            return Config(values, path), stored.read(stored.entries)
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{str(weights)!r} cannot be read: {error}") from error


def _what_is_missing(folder: Path) -> str:
    if not (folder / CONFIG).exists():
        inside = sorted(p.parent.name for p in folder.glob(f"*/{CONFIG}"))
        return f"There is no {CONFIG} in {str(folder)!r}." + (
            " A save into it may have been interrupted. Save again."
            if (folder / WEIGHTS).exists()
            else f" There is one in its folder(s) {', '.join(map(repr, inside))}; name one of those."
            if inside
            else ""
        )
    pickled = sorted(p.name for p in folder.glob("adapter_model.*"))
    return f"There is no {WEIGHTS} in {str(folder)!r}." + (
        f" {pickled[0]} may be a pickle, which can run code when it is opened, so it is not read. Convert it "
        "where you trust it: HF peft's save_pretrained(..., safe_serialization=True)."
        if pickled
        else ""
    )


def write(folder: Path, config: bytes, *weights: bytes | memoryview) -> None:
    """Write both files so that nobody ever finds the one of one save beside the other of another.

    A new folder appears with both in it. In an old one, a configuration that changes is taken away before the weights
    are replaced: who is stopped in between leaves a folder that is refused.

    Raises:
        CheckpointError: it cannot be written. What is in an old folder is then as it was.
    """
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{str(folder)!r} is a file; name a directory.")
    if not folder.exists():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        except OSError as error:
            raise CheckpointError(f"Cannot write to {str(folder.parent)!r}: {error}") from error
        try:
            write_atomically(temporary / WEIGHTS, *weights)
            write_atomically(temporary / CONFIG, config)
            temporary.chmod(0o755)
            temporary.replace(folder)
            sync_folder(folder.parent)
            return
        except OSError as error:
            if not folder.is_dir():
                raise CheckpointError(f"Cannot write {str(folder)!r}: {error}") from error
            # Somebody else made it meanwhile: it is an old folder now.
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    _replace(folder, config, *weights)


def _replace(folder: Path, config: bytes, *weights: bytes | memoryview) -> None:
    path = folder / CONFIG
    # What can fail for want of room or rights comes first.
    with staged(folder / WEIGHTS, *weights) as new_weights, staged(path, config) as new_config:
        with _locked(folder, exclusive=True):
            # No sync in between: it would make the moment a thousand times longer, and journals keep this order.
            if not path.exists() or path.read_bytes() != config:
                path.unlink(missing_ok=True)
            new_weights.replace(folder / WEIGHTS)
            new_config.replace(path)
            sync_folder(folder)


@contextmanager
def _locked(folder: Path, exclusive: bool) -> Iterator[None]:
    """Keep other processes of this library from replacing the files meanwhile, where the system has such locks."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        # No such folder, or a system on which it cannot be opened: what comes next says so, or does without.
        yield
        return
    try:
        if fcntl is not None:
            with suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        yield
    finally:
        os.close(handle)
