"""Out of memory, explained: what the step needs, of what, and what would help."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils import _pytree as pytree

from peftlib.errors import PeftlibError
from peftlib.memory.estimate import Optimizers, estimate_memory
from peftlib.memory.examples import Examples
from peftlib.memory.remedies import Cost, Remedy, Way, remedies
from peftlib.memory.report import PARTS, MemoryReport
from peftlib.memory.sharding import ShardedOver
from peftlib.methods.calls import argument_names, by_name
from peftlib.report import format_bytes, parse_bytes

SHOWN = 3
RANKS = (2, 4, 8, 16, 32, 64)
CPU_WORDS = ("DefaultCPUAllocator", "can't allocate memory", "not enough memory")


class OutOfMemory(PeftlibError, torch.OutOfMemoryError):
    """A step ran out of memory; says what it needs and what would help.

    Attributes:
        report: the estimate of the step, or None where it could not be made.
        remedies: what would make it fit, cheapest first, at most three.
    """

    def __init__(self, message: str, report: MemoryReport | None = None, remedies: Sequence[Remedy] = ()):
        super().__init__(message)
        self.report = report
        self.remedies = list(remedies)


class _Seen:
    """The model that ran last, and the shapes it was called with."""

    def __init__(self, model: nn.Module | None):
        self.model = model
        self.example: Any = None
        self._stack: list[int] = []
        self._handles: list[Any] = []
        if model is not None:
            self._watch(model)
        else:
            self._handles.append(register_module_forward_pre_hook(self._first))

    def _first(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        # the first module that runs is the outermost; its own hook sees keywords as well, from its next call on
        if self.model is None:
            self.model = module
            self._note(module, args, {})
            self._watch(module)

    def _watch(self, model: nn.Module) -> None:
        self._handles.append(model.register_forward_pre_hook(self._note, with_kwargs=True))

    def _note(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        def shape(tensor: Tensor) -> Tensor:
            meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
            return meta.requires_grad_(tensor.requires_grad)

        call = by_name(argument_names(type(model).forward), args, kwargs) if kwargs else args
        self.example = pytree.tree_map_only(Tensor, shape, call)

    def release(self) -> None:
        for handle in self._handles:
            handle.remove()


@contextlib.contextmanager
def explain_oom(
    model: nn.Module | None = None,
    *,
    optimizer: torch.optim.Optimizer | Optimizers | None = torch.optim.AdamW,
    loss: Callable[[Any], Tensor] | None = None,
    autocast: torch.dtype | None = None,
    budget: str | float | None = None,
) -> Iterator[None]:
    """Within this context, running out of memory raises an error that says what the step needs and what would help.

    Until then it only notes the shapes that the model is called with. On an error of CUDA's or the CPU's allocator it
    estimates the step on fake tensors, which needs no memory, and re-raises it as :class:`OutOfMemory`, with the
    split of the peak and the cheapest three remedies. Other errors pass.

    Args:
        model: the model that is trained. None takes the first module called in the context; then keyword arguments
            are seen from its second call on.
        optimizer: yours, or what makes one of a list of parameters, as in :func:`estimate_memory`.
        loss: the forward's output -> a scalar, as in :func:`estimate_memory`.
        autocast: the type of your autocast, if there is one.
        budget: bytes or a text such as "24GiB"; None takes the device's memory.

    Raises:
        OutOfMemory: in place of the allocator's error; also a ``torch.OutOfMemoryError``.

    Example:
        >>> model = nn.Linear(1000, 1000)
        >>> try:
        ...     with explain_oom(model, budget="24MiB"):
        ...         _ = model(torch.ones(1000, 1000))
        ...         torch.empty(2**60)  # more than there is
        ... except torch.OutOfMemoryError as error:
        ...     print(error.remedies[0])
        Remedy(text='micro-batches of 143, 7 accumulated', peak_bytes=25160012)
    """
    seen = _Seen(model)
    limit = None if budget is None else parse_bytes(budget)
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, OutOfMemory) or not _is_out_of_memory(error):
            raise
        raise _explained(error, seen, optimizer, loss, autocast, limit) from error
    finally:
        seen.release()


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return any(word in str(error) for word in CPU_WORDS)


def _explained(
    error: BaseException,
    seen: _Seen,
    optimizer: torch.optim.Optimizer | Optimizers | None,
    loss: Callable[[Any], Tensor] | None,
    autocast: torch.dtype | None,
    limit: int | None,
) -> OutOfMemory:
    said = str(error).strip().partition("\n")[0]
    if seen.model is None or seen.example is None:
        return OutOfMemory(f"{said}\nNo model was called before in explain_oom(): there is no step to split.")
    model = seen.model
    place = next((p.device for p in model.parameters()), torch.device("cpu"))
    limit = _memory_of(place) if limit is None else limit
    maker = _maker(optimizer)
    device = "cuda" if place.type == "cuda" else "cpu"
    try:
        examples = Examples(seen.example)

        @functools.cache
        def of(way: Way) -> MemoryReport:
            return estimate_memory(
                model,
                examples(way.batch, None),
                optimizer=maker,
                loss=loss,
                accumulate=way.accumulate,
                checkpointing=way.checkpointing,
                autocast=autocast,
                device=device,
            )

        def sharded(way: Way, ranks: int) -> MemoryReport:
            return ShardedOver(ranks)(model, of(way), optimizer=maker)

        cost = Cost(of, sharded, limit, checkpointing=(None, True), ranks=RANKS)
        way = Way("this", examples.batch)
        report, fits = of(way), cost.fits(way)
        found = [] if fits else remedies(cost, way)[:SHOWN]
    except PeftlibError as second:
        return OutOfMemory(f"{said}\nWhat the step needs cannot be told: {second}")
    parts = [
        f"{label} {format_bytes(report.parts()[name])}"
        for name, label in PARTS.items()
        if report.parts()[name]
    ]
    lines = [
        said,
        f"One step of {type(model).__name__} with this batch of {examples.batch} needs "
        f"{format_bytes(report.peak_bytes)} of {format_bytes(limit)}, with its peak in the {report.peak_at}: "
        f"{', '.join(parts)}.",
    ]
    if fits:
        lines.append(
            "That would fit: something else holds memory (other tensors, other processes, fragments of the allocator)."
        )
    elif found:
        lines.append("What would help, cheapest first:")
        lines += [f"- {remedy.text}: {format_bytes(remedy.peak_bytes or 0)}" for remedy in found]
    else:
        lines.append(
            "Neither micro-batches, nor checkpointing, nor 64 ranks make it fit: train fewer parameters."
        )
    return OutOfMemory("\n".join(lines), report, found)


def _maker(optimizer: torch.optim.Optimizer | Optimizers | None) -> Optimizers | None:
    if isinstance(optimizer, torch.optim.Optimizer):
        kind, defaults = type(optimizer), dict(optimizer.defaults)
        taken = set(inspect.signature(kind).parameters)
        return lambda parameters: kind(parameters, **{k: v for k, v in defaults.items() if k in taken})
    return optimizer


def _memory_of(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
