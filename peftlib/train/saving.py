"""A training in a folder: each tuning with its optimizer in a file, the rest in another, which is the one that counts.

``state.safetensors`` says which step it is of, and so which tunings' files belong to it. It is written last and
replaced at once, so a training that is killed at any moment leaves a whole checkpoint, the last one or the one before.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftlib import PeftlibError, Tuning
from peftlib.container import reading, write
from peftlib.storage import whole
from peftlib.train.arguments import length_of
from peftlib.train.batches import Batches
from peftlib.train.buffers import Buffers, put
from peftlib.train.history import History
from peftlib.train.logs import JsonlLog
from peftlib.train.parallel import Ranks
from peftlib.train.rng import capture, generators_of, restore
from peftlib.train.state import State

STATE, LOG = "state.safetensors", "log.jsonl"
_APART = ("epoch_rng", "best_values", "best_buffers", "stopped", "history")


class Place:
    """Where a training is kept, or nowhere (``folder=None``).

    Args:
        folder: of its own.
        trained: what is trained and its optimizer, by the name of its file.
        settings: what has to be the same when it goes on.
        batches: whose samplers may have a state.
        ranks: of which the first writes.
        scaler: of the losses, if they are scaled.
    """

    def __init__(
        self,
        folder: Path | None,
        trained: Mapping[str, tuple[Tuning | nn.Module, torch.optim.Optimizer]],
        settings: Mapping[str, Any],
        batches: Any,
        ranks: Ranks,
        scaler: torch.amp.GradScaler | None = None,
    ):
        tunings = {name: (one, o) for name, (one, o) in trained.items() if isinstance(one, Tuning)}
        if folder is not None and len(tunings) < len(trained):
            raise PeftlibError(
                "checkpoint_dir= keeps a tuning, and the optimizer trains parameters outside of one. Attach one "
                "(FullFineTuning() trains all), and make the optimizer of its parameters."
            )
        self.folder, self.trained = folder, tunings
        rates = {name: [float(g["lr"]) for g in o.param_groups] for name, (_, o) in trained.items()}
        self.settings = {**settings, **_described(batches), "rates": rates}
        self.scaler, self.ranks = scaler, ranks
        self.batches = batches if isinstance(batches, Batches) else None
        self.log = JsonlLog(folder / LOG) if folder is not None and ranks.first else lambda row: None

    def open(self, resume: bool, buffers: Buffers) -> State:
        """A state to begin with, or the saved one, put into tunings, optimizers, buffers and generators."""
        self.buffers = buffers
        if self.folder is None:
            if resume:
                raise PeftlibError("resume=True needs the checkpoint_dir= to go on from.")
            return State()
        there = self.ranks.agreed((self.folder / STATE).exists())
        if there and not resume:
            raise PeftlibError(
                f"{str(self.folder)!r} already holds a training. Pass resume=True to go on with it, or another folder."
            )
        if there:
            return self._load(State())
        log = self.folder / LOG
        if self.ranks.agreed(log.exists() and log.stat().st_size > 0):
            raise PeftlibError(
                f"{str(log)!r} has rows, and no training is beside it to which they belong. Give a folder of its own."
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PeftlibError(
                f"{str(self.folder)!r} cannot be a training's folder: {error.strerror}. Name another."
            ) from error
        # at once: what cannot be saved is known now, and initial values drawn at random are kept
        state = State()
        self.save(state)
        return state

    def save(self, state: State) -> None:
        """All files; afterwards the tunings of the checkpoint before are gone."""
        assert self.folder is not None
        current = {name: self._tuning(name, state.step) for name in self.trained}
        for name, (tuning, optimizer) in self.trained.items():
            if self.ranks.first or self.ranks.sharded(tuning):
                tuning.save(current[name], optimizer=optimizer)
        plain = {f.name: getattr(state, f.name) for f in dataclasses.fields(state) if f.name not in _APART}
        about = {
            "state": plain,
            "rows": state.history.rows,
            "seconds": state.history.seconds,
            "settings": self.settings,
            "scaler": {} if self.scaler is None else self.scaler.state_dict(),
        }
        groups = {
            "rng": capture(),
            "epoch_rng": state.epoch_rng,
            "buffers": self.buffers.changed(),
            "best_values": state.best_values,
            "best_buffers": state.best_buffers,
        }
        if self.batches is not None:
            groups["batches"] = self.batches.state_dict()
        tensors = {f"{group}/{k}": whole(t) for group, held in groups.items() for k, t in held.items()}
        if self.ranks.first:
            write(self.folder / STATE, tensors, about)
            for name, new in current.items():
                for old in self.folder.iterdir():
                    # no others: users have files of like names
                    if old != new and re.fullmatch(rf"{re.escape(name)}-\d+\.safetensors", old.name):
                        old.unlink()
        self.ranks.wait()

    def _load(self, state: State) -> State:
        assert self.folder is not None
        with reading(self.folder / STATE) as file:
            about, tensors = file.about, file.tensors()
        for name, value in self.settings.items():
            if about["settings"].get(name) != value:
                raise PeftlibError(
                    f"{str(self.folder)!r} was trained with {name}={about['settings'].get(name)!r}, not {value!r}. Go "
                    "on with the same, or begin in another folder."
                )
        for name, value in about["state"].items():
            setattr(state, name, value)
        if self.batches is not None:
            self.batches.load_state_dict(_group(tensors, "batches"))
        before = {
            name: copy.deepcopy((t.state_dict(), o.state_dict())) for name, (t, o) in self.trained.items()
        }
        try:
            for name, (tuning, optimizer) in self.trained.items():
                path = self._tuning(name, state.step)
                with reading(path) as file:
                    values = file.tensors(key for key in file.entries if not key.startswith("optimizer/"))
                tuning.load_state_dict(values)
                tuning.load_optimizer(optimizer, path)
        except PeftlibError:
            for name, (tuning, optimizer) in self.trained.items():
                values, progress = before[name]
                tuning.load_state_dict(values)
                optimizer.load_state_dict(progress)
            raise
        if self.scaler is not None and self.scaler.is_enabled():
            self.scaler.load_state_dict(about["scaler"])
        state.history = History(rows=about["rows"], seconds=about["seconds"])
        for name in ("epoch_rng", "best_values", "best_buffers"):
            setattr(state, name, _group(tensors, name))
        put(self.buffers.model, _group(tensors, "buffers"))
        restore(_group(tensors, "rng"))
        return state

    def _tuning(self, name: str, step: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}-{step}.safetensors"


def last_step(folder: Path) -> int | None:
    """How many steps the training in a folder has made, if there is one."""
    if not (folder / STATE).exists():
        return None
    with reading(folder / STATE) as file:
        return int(file.about["state"]["step"])


def _described(batches: Any) -> dict[str, Any]:
    """What a place in the data is a place in."""
    if isinstance(batches, Batches):
        sampler = None if batches.sampler is None else type(batches.sampler).__name__
        order = {"batch_seed": batches.seed, "shuffle": batches.shuffle, "sampler": sampler}
        return {"examples": len(batches.examples), "size": batches.size, **order}
    return {"batches": length_of(batches), "generators": len(generators_of(batches))}


def _group(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {k.removeprefix(f"{name}/"): t for k, t in tensors.items() if k.startswith(f"{name}/")}
