"""One fake forward: shapes, attention sites, executed modules, output heads.

The forward runs on a structural copy whose parameters are fake CPU tensors (also where the model lies on a GPU or
on meta), so it costs no memory, and a module that caches tensors in its first call does so in the copy. Where a
model asks a tensor for its value, fake tensors cannot follow; then the copy is a whole one and runs for real.
What is seen of it is in ``observe``.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from peftlib.copies import cloned, spared, structural_copy
from peftlib.errors import ProbeError
from peftlib.methods.base import Site
from peftlib.observe import Record, Trace, observe


class Probe:
    """The record of one example forward, and the means to run another on the same copy.

    Args:
        model: any module, tunings on it or not.
        example: positional arguments (a tensor, a tuple or list) or keyword arguments (a mapping).

    Raises:
        ProbeError: the model cannot be copied, or refuses the example.
    """

    def __init__(self, model: nn.Module, example: Any):
        self.args, self.kwargs = as_call(example)
        self.fake = True
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._copy = structural_copy(model, self._faked)
        try:
            self.record = self.run(self.args, self.kwargs)
        except Exception as error:
            if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
                raise ProbeError(_why(model, error)) from error
            # A whole copy: a forward that writes to its own weights must not write to the user's.
            self.fake = False
            self._copy = structural_copy(model, cloned)
            try:
                self.record = self.run(self.args, self.kwargs)
            except Exception as second:
                raise ProbeError(_why(model, second)) from second
        self.heads = self.record.heads

    def trace(self, site: Site) -> Trace | None:
        return self.record.traces.get(site.name)

    def executed(self, site: Site) -> bool:
        """Whether the site ran; a raw parameter counts as read, and the passage through a module as a run."""
        if site.parameter is not None:
            return True
        return site.name in self.record.traces

    def read_elsewhere(self, site: Site) -> tuple[str, str] | None:
        """A weight of the site that is read while the site does not run, and the module whose forward reads it."""
        reads = self.record.reads
        weights = (own for own, p in site.module._parameters.items() if p is not None and p.dim() > 1)
        names = (f"{site.name}.{own}" for own in weights)
        return next(((name, reads[name]) for name in names if name in reads), None)

    def part(self, name: str) -> nn.Module:
        """The copy's module of a name."""
        return self._copy.get_submodule(name)

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str = "") -> Record:
        """Run the copy, or the named part of it, on inputs whose shapes count, and record what happens."""
        record = Record()
        part = self.part(name)
        args, kwargs = spared((args, dict(kwargs)))
        with torch.random.fork_rng(devices=[], enabled=not self.fake), torch.enable_grad():
            if self.fake:
                with self._mode, quiet():
                    args, kwargs = pytree.tree_map_only(Tensor, self._faked, (args, dict(kwargs)))
                    record.output = observe(part, args, kwargs, record, name)
            else:
                with torch.no_grad():
                    record.output = observe(part, args, kwargs, record, name)
        return record

    def activations(self, model: nn.Module, inputs: Any) -> dict[str, tuple[Tensor, Tensor]]:
        """Keys and values of the first SDPA call in each attention, from a real forward without gradients.

        Raises:
            ProbeError: the model is on meta, or refuses the inputs.
        """
        if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
            raise ProbeError(
                "A start at real activations needs a model with values; this one is on the meta device."
            )
        record = Record(values={})
        args, kwargs = as_call(inputs)
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                observe(structural_copy(model, cloned), args, kwargs, record)
        except Exception as error:
            raise ProbeError(_why(model, error)) from error
        assert record.values is not None
        return record.values

    def _faked(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor) and tensor.fake_mode is self._mode:
            return tensor
        with self._mode:
            # Always on the CPU: fake CUDA tensors abort the process in SDPA, meta ones fail in several models.
            fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
        return fake.requires_grad_(tensor.requires_grad) if fake.is_floating_point() else fake


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without torch's own log of a failing fake operator: the error that is raised says it."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


class Call(NamedTuple):
    """The arguments of one forward; an example that has both kinds."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def as_call(example: Any) -> Call:
    """``example`` as positional and keyword arguments."""
    if isinstance(example, Call):
        return example
    if isinstance(example, Mapping):
        return Call((), dict(example))
    if isinstance(example, (tuple, list)):
        return Call(tuple(example), {})
    return Call((example,), {})


def _why(model: nn.Module, error: Exception) -> str:
    where = getattr(error, "peft_where", "")
    lines = str(error).strip().splitlines()
    advice = (
        "Pass the inputs of one forward: a tensor, a tuple of positional arguments, or a dict of keyword arguments (a "
        "forward that takes one tuple or dict gets it as (x,))."
    )
    if isinstance(error, DataDependentOutputException):
        # on meta, or it would have run for real
        advice = (
            "It asks a tensor for its value, and a model on the meta device has none. Give a model with weights, or "
            "leave example= out where the method needs none, as plan_memory does if hint= says what the tensor answers."
        )
    return (
        f"The example could not be run through {type(model).__name__}"
        f"{f', in {where!r}' if where else ''}: {type(error).__name__}: {lines[0] if lines else ''} -- "
        f"{advice}"
    )
