"""Out of memory, explained: what the step needs, of what, and what would help."""

from __future__ import annotations

import contextlib
import inspect
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftlib.errors import PeftlibError, ProbeError
from peftlib.memory.calls import Calls
from peftlib.memory.estimate import Optimizers
from peftlib.memory.examples import Examples
from peftlib.memory.lives import STEP
from peftlib.memory.remedies import Remedy, Search, remedies
from peftlib.memory.report import PARTS, MemoryReport
from peftlib.memory.ways import Way, estimator
from peftlib.report import format_bytes, parse_bytes

SHOWN = 3
RANKS = (2, 4, 8, 16, 32, 64)
CPU_WORDS = re.compile(r"DefaultCPUAllocator: (can't allocate|not enough) memory")
FEWER = "train fewer parameters, as LoRA and other methods of peftlib do"
ADVICE = {
    "frozen_bytes": "load them in a smaller type (bfloat16, or 8 or 4 bits)",
    "trained_bytes": FEWER,
    "gradient_bytes": FEWER,
    "optimizer_bytes": f"{FEWER}, or take an optimizer that keeps less (SGD, or moments in 8 bits)",
    "activation_bytes": "take shorter sequences, fused attention (F.scaled_dot_product_attention) or autocast",
    "temporary_bytes": "compute the loss in chunks",
    "input_bytes": "take a smaller batch",
}


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

    Until then it only notes the shapes that modules are called with. On an error of CUDA's or the CPU's allocator it
    estimates the step on fake tensors, which needs no memory, and re-raises it as :class:`OutOfMemory`, with the
    split of the peak and the cheapest three remedies. What a step already does (micro-batches that are accumulated,
    blocks that are computed twice) is seen and not advised again. Other errors pass.

    Args:
        model: the model that is trained. None takes the largest of the modules that are called in the context.
        optimizer: yours, or what makes one of a list of parameters, as in :func:`estimate_memory`.
        loss: the forward's output -> a scalar, as in :func:`estimate_memory`.
        autocast: the type of your autocast, if there is one.
        budget: bytes or a text such as "24GiB"; None takes the device's memory.

    Raises:
        OutOfMemory: in place of the allocator's error, which is its cause; also a ``torch.OutOfMemoryError``.
        PeftlibError: ``model`` is no module, ``budget`` no size.

    Example:
        >>> model = nn.Linear(1000, 1000)
        >>> try:
        ...     with explain_oom(model, budget="24MiB"):
        ...         _ = model(torch.ones(1000, 1000))
        ...         torch.empty(2**60)  # more than there is
        ... except torch.OutOfMemoryError as error:
        ...     print(error.remedies[0])
        Remedy(text='micro-batches of 125, 8 accumulated', peak_bytes=25016012)
    """
    if model is not None and not isinstance(model, nn.Module):
        raise PeftlibError(
            f"explain_oom got {type(model).__name__}: give the model that is trained, or nothing"
        )
    limit = None if budget is None else parse_bytes(budget)
    calls = Calls(model)
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, OutOfMemory) or not _is_out_of_memory(error):
            raise
        calls.release()  # the estimate calls modules too
        raise _explained(error, calls, limit, optimizer, loss, autocast) from error
    finally:
        calls.release()


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or bool(CPU_WORDS.search(str(error)))


def _explained(
    error: BaseException,
    calls: Calls,
    limit: int | None,
    optimizer: torch.optim.Optimizer | Optimizers | None,
    loss: Callable[[Any], Tensor] | None,
    autocast: torch.dtype | None,
) -> OutOfMemory:
    """As much as can be told: an error while explaining must not hide the error that is explained."""
    lines = [str(error).strip().partition("\n")[0] or type(error).__name__]
    report, found = None, []
    try:
        model = calls.model()
        lines += calls.remarks()
        place = next((p.device for p in model.parameters()), torch.device("cpu"))
        limit = _memory_of(place) if limit is None else limit
        examples = Examples(calls.call())
        way = Way("this", examples.batch, accumulate=2 if calls.accumulates() else 1)
        options: dict[str, Any] = {
            "loss": loss,
            "autocast": autocast,
            "device": "cuda" if place.type == "cuda" else "cpu",
            "optimizer": _maker(optimizer),
        }
        estimate = estimator(lambda _: model, examples, **options)
        try:
            report = estimate(way)
        except ProbeError as second:
            # some optimizers cannot step without values
            estimate = estimator(lambda _: model, examples, **options | {"optimizer": None})
            report = estimate(way)
            lines.append(f"Without the optimizer's state and step, which cannot be told: {_sentence(second)}")
        lines.append(_split(report, model, way, limit))
        if limit is not None and report.peak_bytes > limit:
            search = Search(estimate, limit, checkpointing=(None, True), ranks=RANKS)
            found = remedies(search, way)[:SHOWN]
            lines += _advice(report, found)
        elif limit is not None:
            lines.append(
                "That would fit: something else holds memory (other tensors, other processes, fragments of the "
                "allocator)."
            )
    except Exception as second:  # noqa: BLE001
        what = "What the step needs" if report is None else "What would help"
        lines.append(f"{what} cannot be told: {_sentence(second)}")
    return OutOfMemory("\n".join(lines), report, found)


def _split(report: MemoryReport, model: nn.Module, way: Way, limit: int | None) -> str:
    parts = [f"{PARTS[name]} {format_bytes(size)}" for name, size in report.parts().items() if size]
    batch = f"{'accumulated micro-batches' if way.accumulate > 1 else 'this batch'} of {way.batch}"
    of = "" if limit is None else f" of {format_bytes(limit)}"
    return (
        f"One step of {type(model).__name__} with {batch} needs {format_bytes(report.peak_bytes)}{of}, with its peak "
        f"in the {report.peak_at}: {', '.join(parts)}."
    )


def _advice(report: MemoryReport, found: Sequence[Remedy]) -> list[str]:
    parts = report.parts()
    largest = max(parts, key=lambda name: parts[name])
    if found:
        lines = ["What would help, cheapest first:"]
        lines += [
            f"- {remedy.text}: {format_bytes(remedy.peak_bytes)}{' a rank' if remedy.way.ranks > 1 else ''}"
            for remedy in found
        ]
    else:
        lines = [f"Neither micro-batches, nor checkpointing, nor {RANKS[-1]} ranks make it fit."]
    advice = ADVICE[largest]
    if largest == "temporary_bytes" and report.peak_at == STEP:
        advice = "make the optimizer with foreach=False"
    return [*lines, f"The largest part are {PARTS[largest]}: {advice}."]


def _sentence(error: Exception) -> str:
    text = str(error).strip().rstrip(".")
    return f"{text}." if isinstance(error, PeftlibError) else f"{type(error).__name__}: {text}."


def _maker(optimizer: torch.optim.Optimizer | Optimizers | None) -> Optimizers | None:
    if isinstance(optimizer, torch.optim.Optimizer):
        kind, defaults = type(optimizer), dict(optimizer.defaults)
        taken = set(inspect.signature(kind).parameters)
        return lambda parameters: kind(parameters, **{k: v for k, v in defaults.items() if k in taken})
    return optimizer


def _memory_of(device: torch.device) -> int | None:
    """The device's bytes, or None where nothing tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if device.type != "cpu":
        return None
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on Windows
        return None
