"""A step on fake tensors under the tracker: no memory, no values."""

from __future__ import annotations

import contextlib
import dataclasses
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointError

from peftlib.copies import structural_copy
from peftlib.errors import PeftlibError, ProbeError, TargetError
from peftlib.memory.fakes import Answers, Faked, Hint
from peftlib.memory.gpu_kernels import GPUKernels
from peftlib.memory.live import LiveBytes
from peftlib.memory.places import place
from peftlib.memory.report import MemoryReport
from peftlib.memory.step import checkpointed, default_loss, training_step
from peftlib.probe import as_call, quiet

CUDA_BLOCK = 512
"""Bytes in which CUDA's caching allocator gives out memory (kMinBlockSize)."""
REPEATING = 2
"""From the second micro-batch on, each is like the one before: its gradients meet those that are there."""
Optimizers = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def estimate_memory(
    model: nn.Module,
    example: Any,
    *,
    optimizer: Optimizers | None = torch.optim.AdamW,
    loss: Callable[[Any], Tensor] | None = None,
    accumulate: int = 1,
    checkpointing: Any = None,
    device: str | torch.device | None = None,
    autocast: torch.dtype | None = None,
    hint: Hint | None = None,
) -> MemoryReport:
    """The report that :func:`measure_memory` would give for a step of training, without running one.

    The step runs on a structural copy of fake CPU tensors: it needs neither the memory nor the values, and the
    weights may lie on meta. It is the usual one::

        for _ in range(accumulate):
            with torch.autocast(device, autocast):  # if asked for
                output = model(*example)
                result = loss(output)
            (result / accumulate).backward()  # result.backward() without accumulation
        optimizer.step()
        optimizer.zero_grad()

    and its second run counts, since the optimizer's state is there from then on. The bytes are the real step's where
    that calls the same operators. Where it may not, ``notes`` say so, and ``report.compare(measured)`` by how much.

    Args:
        model: any module; what has ``requires_grad`` is trained.
        example: one (micro-)batch: positional arguments (a tensor, a tuple) or keyword arguments (a dict) of one
            forward.
        optimizer: makes the optimizer of a list of parameters; None leaves the step out.
        loss: the forward's output -> a scalar; None takes its ``.loss``, else the mean square of its first
            floating tensor.
        accumulate: how many micro-batches a step adds up.
        checkpointing: what the backward computes again, see :func:`checkpointed`: True for the repeated blocks, or a
            glob on module names. None leaves the model as it is.
        device: None or "cpu": bytes as the CPU holds them. "cuda": as CUDA's caching allocator would give them out, in
            blocks of 512 bytes, with torch's choice of kernels there: attention and RMS norm fused, foreach
            optimizers, CUDA's autocast. Not yet measured on a GPU.
        autocast: forward and loss run under autocast to this type.
        hint: what a fake tensor answers when model, loss or optimizer ask for its value (``if mask.any():``): a number,
            a bool, or a function of the tensor. None: asking raises.

    Raises:
        PeftlibError: nothing in the model is trained, a lazy module has no size, or an argument is none of these.
        TargetError: ``checkpointing`` matches nothing, or what does something else when it is computed again.
        ProbeError: the model or the loss cannot run on fake tensors.

    Example:
        >>> from torch import nn
        >>> model = nn.Linear(65536, 65536, device="meta")
        >>> estimate_memory(model, torch.ones(1, 65536)).trained_bytes
        17180131328
    """
    target = _check(model, optimizer, loss, accumulate, device, autocast)
    args, kwargs = as_call(example)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake = Faked(mode)
    copy = structural_copy(model, fake, idle=True)
    args, kwargs = pytree.tree_map_only(Tensor, fake, (args, kwargs))
    trained = [parameter for parameter in copy.parameters() if parameter.requires_grad]
    if not trained:
        raise PeftlibError(
            f"no parameter of {type(model).__name__} has requires_grad: attach a method first, or unfreeze what "
            "is to be trained"
        )
    on_cuda = target == "cuda"
    notes = _unlike(copy, on_cuda)
    answering = Answers(copy, hint, on_cuda)
    kernels = GPUKernels() if on_cuda else contextlib.nullcontext()
    with checkpointed(copy, checkpointing):
        try:
            with quiet(), mode, answering, kernels, torch.enable_grad():
                chosen = None if optimizer is None else optimizer(trained)
                if chosen is not None and on_cuda:
                    _prefer_foreach(chosen)
                step = training_step(
                    copy, args, kwargs, chosen, loss or default_loss, min(accumulate, REPEATING), autocast
                )
                step()
                with LiveBytes(copy, block=CUDA_BLOCK if on_cuda else 1) as live:
                    step()
        except CheckpointError as error:
            raise TargetError(
                f"checkpointing={checkpointing!r} does not work in {type(model).__name__}: a module keeps something "
                "else for the backward when it is computed again, as one that fills a cache does. Turn the cache "
                "off in the example (use_cache=False), or name other modules"
            ) from error
        except Exception as error:
            raise ProbeError(_why(copy, error)) from error
    report = live.report()
    if answering.places:
        where = ", ".join(answering.places)
        notes.append(f"{where} asked a tensor for its value and got the hint's: {hint!r}")
    if on_cuda:
        notes.append(
            "blocks of 512 bytes, fused attention and norms, foreach optimizer; not yet measured on a GPU"
        )
    return dataclasses.replace(report, device=target, notes=notes)


def _check(model: Any, optimizer: Any, loss: Any, accumulate: Any, device: Any, autocast: Any) -> str:
    if not isinstance(model, nn.Module):
        raise PeftlibError(f"estimate_memory needs an nn.Module; got {type(model).__name__}")
    lazy = [name for name, weight in model.named_parameters() if is_lazy(weight)]
    if lazy:
        raise PeftlibError(
            f"{lazy[0]!r} has no size yet: a lazy module learns its sizes in its first forward. Run the model once on "
            "real tensors, or write the sizes down (nn.Linear for nn.LazyLinear)"
        )
    if isinstance(optimizer, torch.optim.Optimizer) or not (optimizer is None or callable(optimizer)):
        raise PeftlibError(
            f"optimizer= is {type(optimizer).__name__}: give what makes one of a list of parameters, such as "
            "torch.optim.AdamW or lambda parameters: torch.optim.SGD(parameters, lr=0.1), or None"
        )
    if not (loss is None or callable(loss)):
        raise PeftlibError(
            f"loss= is {type(loss).__name__}: give a function of the forward's output, or None"
        )
    if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
        raise PeftlibError(
            f"accumulate={accumulate!r}: give the number of micro-batches in a step, 1 or more"
        )
    if autocast is not None and not (isinstance(autocast, torch.dtype) and autocast.is_floating_point):
        raise PeftlibError(f"autocast={autocast!r}: give a floating type such as torch.bfloat16, or None")
    try:
        kind = "cpu" if device is None else torch.device(device).type
    except (RuntimeError, TypeError) as error:
        raise PeftlibError(f"device={device!r} is no device: give 'cpu', 'cuda' or None") from error
    if kind not in ("cpu", "cuda"):
        raise PeftlibError(
            f"device={device!r}: memory is estimated for 'cpu' and for 'cuda', whose blocks are known"
        )
    return kind


def _unlike(copy: nn.Module, on_cuda: bool) -> list[str]:
    """Turn off what fake tensors cannot follow, and say so."""
    notes = []
    nesting = [m for m in copy.modules() if isinstance(m, nn.TransformerEncoder) and m.use_nested_tensor]
    for module in nesting:
        module.use_nested_tensor = False
    if any(not module.training for module in nesting):
        notes.append(
            "in eval, an nn.TransformerEncoder nests a padded batch; it is estimated as it would be in training"
        )
    if on_cuda and any(isinstance(module, nn.RNNBase) for module in copy.modules()):
        notes.append(
            "recurrent layers are a CPU's here: what cuDNN's keep instead is not known without a GPU"
        )
    return notes


def _prefer_foreach(optimizer: torch.optim.Optimizer) -> None:
    """What the optimizer chooses by itself on CUDA."""
    for group in optimizer.param_groups:
        if "foreach" in group and group["foreach"] is None and not group.get("fused"):
            group["foreach"] = True


def _why(model: nn.Module, error: Exception) -> str:
    where = place((frame for frame, _ in traceback.walk_tb(error.__traceback__)), model)
    reason = str(error).strip().partition("\n")[0]
    if isinstance(error, DataDependentOutputException):
        return (
            f"in {where}, a step of {type(model).__name__} asks a tensor for its value ({reason}), which a fake tensor "
            "does not have. Say what it would answer with hint= (True, a number, or a function of the tensor), or "
            "measure shrunken copies with measure_memory and continue them with peftlib.memory.extrapolate"
        )
    if isinstance(error, DynamicOutputShapeException):
        return (
            f"in {where}, a step of {type(model).__name__} makes a tensor whose shape depends on values ({reason}), "
            "which fake tensors do not have. Write it with a fixed shape (a mask instead of an index list), or measure "
            "shrunken copies with measure_memory and continue them with peftlib.memory.extrapolate"
        )
    return (
        f"a training step of {type(model).__name__} cannot run on fake tensors: in {where}, {type(error).__name__}: "
        f"{reason}. Check example= and loss=; where the model needs values, use measure_memory on a real step"
    )
