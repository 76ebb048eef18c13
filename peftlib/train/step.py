"""One optimizer step over a window of micro-batches: the mean over all its targets, whatever batch they came in.

A mean of means weighs a target in a short batch more than one in a long batch. Here every loss gives its *sum* and how
many targets are in it, gradients add up, and are divided once, by the targets of the whole window.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from peftlib import PeftlibError
from peftlib.storage import whole
from peftlib.train.buffers import buffers_of, copied, put
from peftlib.train.parallel import ALONE, Idle, Ranks

Loss = Callable[[nn.Module, Any], Any]
"""(model, batch) -> (sum over the targets, number of targets), or a scalar that counts as one target.

Sum and number may also be one per sample, (B,) each: what works on samples (weights, mining) is made of such losses.
"""


class NonFiniteError(PeftlibError):
    """A loss or a gradient that is no number; the model has the values from before the step.

    Attributes:
        step: the step that was not made.
        batches: the micro-batches of its window.

    Example:
        >>> from peftlib.train import fit
        >>> model = nn.Linear(1, 1)
        >>> data = [torch.ones(1, 1), torch.full((1, 1), torch.inf)]
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> try:
        ...     fit(model, data, lambda model, x: model(x).sum(), optimizer=optimizer, epochs=1)
        ... except NonFiniteError as error:
        ...     print(error.step, error.batches)
        1 [tensor([[inf]])]
    """

    def __init__(self, message: str, step: int, batches: Sequence[Any]):
        super().__init__(message)
        self.step = step
        self.batches = batches


def train_step(
    model: nn.Module,
    window: Sequence[Any],
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    *,
    clip: float | None = None,
    autocast: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Backward over the window, clip, step: ``L = sum of losses / sum of counts``, over all its micro-batches.

    With ``ranks``, over those of all processes; each gives its own part of the window.

    Returns:
        ``loss`` and ``norm`` (of the gradients, before clipping) as floats, ``targets``, and ``made``: False if a
        number was not finite, and then values and buffers (running means, say) are what they were.

    Raises:
        PeftlibError: the loss does not depend on what is trained, or counts no targets; a gradient is sparse.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.zeros_(model.weight)
        >>> window = [torch.ones(1, 1), torch.ones(3, 1)]  # two micro-batches, four targets
        >>> row = train_step(
        ...     model,
        ...     window,
        ...     lambda model, x: ((model(x) - 2).square().sum(), len(x)),
        ...     torch.optim.SGD(model.parameters(), lr=0.25),
        ... )
        >>> row["loss"], row["norm"], row["targets"], model.weight.item()
        (4.0, 4.0, 4.0, 1.0)
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    device = parameters[0].device
    scaler = scaler or torch.amp.GradScaler(device.type, enabled=False)
    before = copied(buffers_of(model))
    sums, counts, first = [], 0.0, 0.0
    for number, batch in enumerate(window, 1):
        with ranks.adding(last=number == len(window)):
            value, count = weighted(loss, model, moved(batch, device), autocast, device)
            if not value.requires_grad:
                raise PeftlibError(
                    "The loss does not depend on anything that is trained. Attach a tuning before training, and "
                    "compute the loss from the model's output without detach() or no_grad()."
                )
            # the first count keeps the gradients' size; the true one is known when the window is through
            first = first or ranks.total(count)[0]
            scaler.scale(value / first).backward()
        sums.append(value.detach().double())
        counts += count
    total, targets = ranks.total(sum(sums), counts)
    scaler.unscale_(optimizer) if scaler.is_enabled() else None
    gradients = [p.grad for p in parameters if p.grad is not None]
    if any(gradient.is_sparse for gradient in gradients):
        raise PeftlibError(
            "A gradient is sparse, and has no norm to check or clip. Make the embedding with sparse=False "
            "(embedding.sparse = False of one that is there)."
        )
    # torch's engines give the mean over the processes
    if targets != first * ranks.world:
        torch._foreach_mul_(gradients, first * ranks.world / targets)
    norm = get_total_norm(gradients)
    row = {"loss": total / targets, "norm": float(whole(norm)), "targets": targets}
    row["made"] = math.isfinite(row["loss"]) and math.isfinite(row["norm"])
    if row["made"]:
        if clip is not None:
            clip_grads_with_norm_(parameters, clip, norm)
        scaler.step(optimizer)
    else:
        put(model, before)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return row


def weighted(
    loss: Loss, model: nn.Module, batch: Any, autocast: torch.dtype | None, device: torch.device
) -> tuple[Tensor, float]:
    """A loss's sum and count, checked; of what is :class:`Idle` both are 0."""
    if isinstance(batch, Idle):
        value, _ = weighted(loss, model, batch.batch, autocast, device)
        return value * 0, 0.0
    cast = torch.autocast(device.type, autocast) if autocast is not None else contextlib.nullcontext()
    with cast:
        result = loss(model, batch)
    value, count = counted(result)
    if isinstance(value, Tensor) and isinstance(count, Tensor) and value.shape == count.shape:
        value, count = value.sum(), count.sum()
    if not isinstance(value, Tensor) or value.numel() != 1:
        what = (
            f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        )
        raise PeftlibError(
            f"The loss gave {what}. Return (sum over the targets, number of targets), both of the batch or both one "
            "per sample, or one scalar tensor."
        )
    count = float(count)
    if not count > 0:
        raise PeftlibError(
            f"The loss counted {count:g} targets in a batch. Leave out batches without targets."
        )
    return value.reshape(()), count


def counted(result: Any) -> tuple[Any, Any]:
    """What a loss gave, as value and count."""
    return result if isinstance(result, tuple) and len(result) == 2 else (result, 1)


def moved(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on ``device``; dicts, lists and tuples are followed, anything else stays."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Idle):
        return Idle(moved(batch.batch, device))
    if isinstance(batch, Mapping):
        return {key: moved(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(moved(value, device) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(moved(value, device) for value in batch)
    return batch
