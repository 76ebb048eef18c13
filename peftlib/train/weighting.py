"""How much each sample counts in a loss.

What works on samples takes a loss that gives sums and counts of each (``partial(causal_lm, each=True)``), and looks
them up by ``batch["index"]`` (``Batches(..., index=True)``). In evaluation, where no gradients are taken, the loss is
as it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftlib import PeftlibError
from peftlib.train.step import Loss, counted


def with_weights(loss: Loss, weights: Tensor | Sequence[float]) -> Loss:
    """``L = sum_i v_i l_i / sum_i v_i n_i`` over a step: each sample's targets weigh v_i in the sum and in the count.

    A weight of 2 is the example twice, and a common factor of all weights changes nothing.

    Args:
        loss: gives sums l (B,) and counts n (B,).
        weights: of each example, (N,), above 0; an example of weight 0 is one to leave out.

    Raises:
        PeftlibError: weights that are not above 0, a loss of whole batches, or batches without ``index``.

    Example:
        >>> from functools import partial
        >>> from peftlib.train import regression
        >>> batch = {
        ...     "inputs": torch.tensor([1.0, 2.0]),
        ...     "labels": torch.zeros(2),
        ...     "index": torch.tensor([0, 1]),
        ... }
        >>> sums, counts = with_weights(partial(regression, each=True), [1.0, 3.0])(nn.Identity(), batch)
        >>> float(sums.sum() / counts.sum())  # (1 * 1 + 3 * 4) / (1 + 3)
        3.25
    """
    table = torch.as_tensor(weights, dtype=torch.float64, device="cpu")
    if table.dim() != 1 or not bool((table > 0).all()) or not bool(table.isfinite().all()):
        raise PeftlibError(
            f"Weights are one finite number above 0 per example; got shape {tuple(table.shape)}, least "
            f"{float(table.min()) if table.numel() else None}. Leave examples of weight 0 out."
        )

    def weighing(model: nn.Module, batch: Any) -> Any:
        result = loss(model, batch)
        if not torch.is_grad_enabled():
            return result
        sums, counts, index = of_samples(result, batch)
        own = table[index.cpu()].to(sums)
        return sums * own, counts * own

    return weighing


def inverse_frequency(classes: Tensor | Sequence[int]) -> Tensor:
    """``N / (C n_c)`` for each example, n_c its class's size, C the number of classes: each class has the same sum.

    For :class:`Balanced` (classes are drawn alike) or :func:`with_weights` (classes count alike).

    Raises:
        PeftlibError: not one class per example.

    Example:
        >>> inverse_frequency([0, 0, 0, 7])
        tensor([0.6667, 0.6667, 0.6667, 2.0000])
    """
    labels = torch.as_tensor(classes)
    if labels.dim() != 1 or not len(labels) or labels.is_floating_point():
        raise PeftlibError(
            f"Give one integer class per example; got {labels.dtype} of {tuple(labels.shape)}."
        )
    found, which, sizes = labels.unique(return_inverse=True, return_counts=True)
    return len(labels) / (len(found) * sizes[which].float())


def of_samples(result: Any, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Sums, counts and numbers of a batch's samples, checked."""
    index = batch.get("index") if isinstance(batch, Mapping) else None
    if not isinstance(index, Tensor):
        raise PeftlibError(
            "Samples are known by batch['index'], which is not there. Use Batches(..., index=True)."
        )
    sums, counts = counted(result)
    if not (
        isinstance(sums, Tensor) and isinstance(counts, Tensor) and sums.shape == counts.shape == index.shape
    ):
        raise PeftlibError(
            f"The loss has to give sums and counts of each of {len(index)} samples. Use partial(loss, each=True), or "
            "return two tensors of that length."
        )
    return sums, counts, index
