"""The random state of torch, numpy and Python as tensors, so that it goes into a file without pickles."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor


def generators_of(batches: Any) -> dict[str, torch.Generator]:
    """The generators of its own that a DataLoader, or a sampler of it, was given."""
    holders = (batches, getattr(batches, "sampler", None), getattr(batches, "batch_sampler", None))
    found = [getattr(holder, "generator", None) for holder in holders]
    return {f"own{i}": one for i, one in enumerate(found) if isinstance(one, torch.Generator)}


def capture(own: Mapping[str, torch.Generator] = MappingProxyType({})) -> dict[str, Tensor]:
    """The state of every generator that a loss, a model or a data set may draw from, and of ``own`` ones."""
    _, keys, *rest = np.random.get_state()
    version, internal, gauss = random.getstate()
    states = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
        # position, whether a normal number waits, and which
        "numpy_rest": torch.tensor([float(x) for x in rest], dtype=torch.float64),
        "python": torch.tensor(internal, dtype=torch.int64),
        "python_rest": torch.tensor([version, *([] if gauss is None else [gauss])], dtype=torch.float64),
    }
    if torch.cuda.is_initialized():
        states |= {f"cuda{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return states | {name: generator.get_state() for name, generator in own.items()}


def restore(states: Mapping[str, Tensor], own: Mapping[str, torch.Generator] = MappingProxyType({})) -> None:
    """Put back what :func:`capture` gave."""
    torch.set_rng_state(states["torch"])
    position, waits, normal = states["numpy_rest"].tolist()
    keys = states["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(waits), normal))
    version, *gauss = states["python_rest"].tolist()
    random.setstate((int(version), tuple(states["python"].tolist()), gauss[0] if gauss else None))
    for name, state in states.items():
        if name.startswith("cuda"):
            torch.cuda.set_rng_state(state, int(name.removeprefix("cuda")))
    for name, generator in own.items():
        generator.set_state(states[name])


@contextlib.contextmanager
def untouched() -> Iterator[None]:
    """What is drawn within is not missed outside."""
    before = capture()
    try:
        yield
    finally:
        restore(before)


@contextlib.contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Every generator starts from ``seed`` within, and is as it was afterwards; ``None`` leaves all alone."""
    if seed is None:
        yield
        return
    with untouched():
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        yield
