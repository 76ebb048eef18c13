"""Losses: ``(model, batch) -> (sum over the targets, number of targets)``, so that a window has one true mean.

A batch is a mapping with ``"inputs"`` (a tensor, a tuple of positional or a dict of keyword arguments of the model)
and ``"labels"``. The model gives a tensor, an object or mapping with ``logits``, or a tuple whose first is the tensor.
``"attention_mask"`` (B, T), true where a token is, goes to a model that names it, wherever it matters: not where rows
are padded on the right and the loss is causal, as there nothing real sees padding. Where it matters and the model does
not name it, the batch is refused. ``inputs`` of several arguments are all that the model is given.

Left out on purpose: SFT has no loss of its own. It is :func:`causal_lm` with labels of -100 outside the completion,
which :func:`peftlib.train.encode` writes.

With ``each=True`` (``functools.partial(causal_lm, each=True)``) a loss gives both numbers for each sample of the batch.

Letters: B rows, T positions, V vocabulary, C classes, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peftlib import PeftlibError
from peftlib.train.outputs import check_places, forward, get, without_head

IGNORE = -100
"""A label that is no target."""
Weighted = tuple[Tensor, Any]
"""The sum and the number of targets; with ``each=True`` one per sample, (B,) both."""


def causal_lm(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    head: str | None = None,
    chunk: int = 256,
    each: bool = False,
) -> Weighted:
    """Each position predicts the next label: ``-sum log softmax(logits[:, t])[labels[:, t+1]]``.

    Also the loss of SFT (labels of -100 outside the completion) and of packed rows (-100 where a document begins).

    Args:
        model: gives (B, T, V).
        batch: ``inputs``, ``labels`` (B, T) of integers, not shifted, -100 where there is no target.
        head: dotted name of the module that makes the logits, to compute them ``chunk`` positions at a time, see
            :func:`chunked_cross_entropy`; with ``functools.partial(causal_lm, head="lm_head")``.
        chunk: positions whose logits exist at once.
        each: sums and counts of each row.

    Raises:
        PeftlibError: shapes that do not go together, no targets, or a model that changes its logits after ``head``.

    Example:
        >>> ids = torch.tensor([[0, 1, 2, 1]])
        >>> total, count = causal_lm(nn.Embedding(3, 3), {"inputs": ids, "labels": ids})
        >>> total.shape, count
        (torch.Size([]), 3)
    """
    labels = get(batch, "labels")
    if labels.dim() != 2 or labels.is_floating_point():
        raise PeftlibError(
            f"causal_lm takes integer labels of shape (rows, positions); got {labels.dtype} of {tuple(labels.shape)}."
        )
    if head is None:
        logits = forward(model, batch, causal=True)
        check_places(logits, labels)
        return cross_entropy(logits[:, :-1], labels[:, 1:], each=each)
    hidden, output = without_head(model, head, batch)
    check_places(hidden, labels)
    return chunked_cross_entropy(hidden[:, :-1], labels[:, 1:], output, chunk, each=each)


def classification(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    each: bool = False,
) -> Weighted:
    """Cross-entropy of a class per label: sequences (B, C) with labels (B,), tokens (B, T, C) with labels (B, T).

    Args:
        model: gives logits whose last axis is the classes.
        batch: ``inputs``, integer ``labels`` with -100 where there is no target.
        class_weights: (C,) factors of each class's terms; the count stays the number of targets.
        label_smoothing: share of the target spread over all classes.
        each: sums and counts of each row.

    Raises:
        PeftlibError: shapes that do not go together, or no targets.

    Example:
        >>> batch = {"inputs": torch.zeros(3, 2), "labels": torch.tensor([0, 1, -100])}
        >>> total, count = classification(nn.Identity(), batch)
        >>> round(total.item(), 4), count
        (1.3863, 2)
    """
    logits, labels = forward(model, batch), get(batch, "labels")
    check_places(logits, labels)
    return cross_entropy(
        logits, labels, class_weights=class_weights, label_smoothing=label_smoothing, each=each
    )


def masked_lm(model: nn.Module, batch: Mapping[str, Any], *, each: bool = False) -> Weighted:
    """Cross-entropy at the hidden positions; :func:`peftlib.train.mask_tokens` makes inputs and labels.

    Example:
        >>> from peftlib.train import mask_tokens
        >>> ids = torch.tensor([[2, 5, 6, 7, 3]])
        >>> inputs, labels = mask_tokens(ids, mask_id=4, vocabulary=8, special=[2, 3])
        >>> _, count = masked_lm(nn.Embedding(8, 8), {"inputs": inputs, "labels": labels})
        >>> count == (labels != -100).sum().item()
        True

    Source: Devlin et al. 2019, arXiv:1810.04805, section 3.1.
    """
    return classification(model, batch, each=each)


def regression(model: nn.Module, batch: Mapping[str, Any], *, each: bool = False) -> Weighted:
    """Squared error ``sum (y - labels)^2`` over every number of ``labels``; NaN labels are no targets.

    An output (B, 1) goes with labels (B,).

    Raises:
        PeftlibError: shapes that do not go together, or no targets.

    Example:
        >>> batch = {"inputs": torch.tensor([[1.0], [2.0]]), "labels": torch.tensor([1.0, 4.0])}
        >>> regression(nn.Identity(), batch)
        (tensor(4.), 2)
    """
    output, labels = forward(model, batch), get(batch, "labels")
    if output.dim() == labels.dim() + 1 and output.shape[-1] == 1:
        output = output.squeeze(-1)
    if output.shape != labels.shape:
        # no broadcasting: (B, 1) - (B,) is B x B differences
        raise PeftlibError(
            f"The model gives {tuple(output.shape)} and the labels are {tuple(labels.shape)}. Reshape one."
        )
    there = ~labels.isnan()
    wide = torch.promote_types(output.dtype, torch.float32)
    count = _some(there)
    if each:
        # a place without a target is compared with itself: no loss, and a gradient of zero, not NaN
        output = output.to(wide)
        squares = (output - torch.where(there, labels.to(wide), output)).square()
        return _each(squares), _each(there)
    return (output.to(wide)[there] - labels.to(wide)[there]).square().sum(), count


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    each: bool = False,
) -> Weighted:
    """``-sum log softmax(logits)[label]`` over labels that are not -100, in float32 or wider, and their number.

    Args:
        logits: (..., V).
        labels: (...) integers of any size.
        class_weights: (V,).
        label_smoothing: 0 to 1.
        each: sums and counts along the first axis.

    Raises:
        PeftlibError: every label is -100, one is not below V, or they are no integers.

    Example:
        >>> cross_entropy(torch.zeros(3, 2), torch.tensor([0, 1, -100]))  # 2 ln 2
        (tensor(1.3863), 2)
    """
    if labels.is_floating_point() or labels.is_complex():
        raise PeftlibError(
            f"The labels are {labels.dtype}, and classes are integers: use labels.long(), or regression() for numbers."
        )
    labels = labels.long()
    there = labels != IGNORE
    count = _some(there)
    low, high = labels[there].aminmax()
    if low < 0 or high >= logits.shape[-1]:
        # on a GPU torch would end the whole process
        raise PeftlibError(
            f"A label is {int(low if low < 0 else high)}, and the model gives {logits.shape[-1]} numbers, for labels "
            f"from 0 to {logits.shape[-1] - 1}; {IGNORE} is no target. Do tokenizer and model, or classes, go together?"
        )
    # reshape, not transpose: the kernel for (rows, classes) is the fast one
    rows = logits.reshape(-1, logits.shape[-1])
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    total = F.cross_entropy(
        rows,
        labels.reshape(-1),
        ignore_index=IGNORE,
        reduction="none" if each else "sum",
        weight=None if class_weights is None else class_weights.to(rows),
        label_smoothing=label_smoothing,
    )
    return (_each(total.view_as(labels)), _each(there)) if each else (total, count)


def chunked_cross_entropy(
    hidden: Tensor,
    labels: Tensor,
    head: Callable[[Tensor], Tensor],
    chunk: int = 256,
    *,
    each: bool = False,
) -> Weighted:
    """:func:`cross_entropy` of ``head(hidden)``, of which only ``chunk`` positions exist at a time.

    Logits of B T V numbers, their softmax and their gradient never exist: each chunk is computed again in the
    backward, which costs the head's forward once more. Positions without a target are left out altogether.

    Args:
        hidden: (..., D), what the head takes.
        labels: (...) integers, -100 where there is no target.
        head: any module or function (n, D) -> (n, V), with a tuning in it or not.
        chunk: positions at a time.
        each: sums and counts along the first axis.

    Raises:
        PeftlibError: every label is -100, or ``chunk`` below 1.

    Example:
        >>> hidden, labels = torch.randn(2, 5, 4), torch.randint(7, (2, 5))
        >>> head = nn.Linear(4, 7)
        >>> plain, chunked = (
        ...     cross_entropy(head(hidden), labels),
        ...     chunked_cross_entropy(hidden, labels, head, 3),
        ... )
        >>> torch.allclose(plain[0], chunked[0]), chunked[1]
        (True, 10)
    """
    if chunk < 1:
        raise PeftlibError(f"chunk={chunk}: give the number of positions at a time, from 1.")
    there = labels.reshape(-1) != IGNORE
    count = _some(there)
    rows, targets = hidden.reshape(-1, hidden.shape[-1])[there], labels.reshape(-1)[there]

    def part(some: Tensor, wanted: Tensor) -> Tensor:
        return cross_entropy(head(some), wanted, each=each)[0]

    total = [
        checkpoint(part, some, wanted, use_reentrant=False)
        for some, wanted in zip(rows.split(chunk), targets.split(chunk), strict=True)
    ]
    if each:
        losses = torch.cat(total)
        row = torch.arange(len(labels), device=labels.device).repeat_interleave(labels[0].numel())[there]
        return losses.new_zeros(len(labels)).index_add(0, row, losses), _each(labels != IGNORE)
    return torch.stack(total).sum(), count


def _each(values: Tensor) -> Tensor:
    return values.reshape(len(values), -1).sum(1)


def _some(there: Tensor) -> int:
    count = int(there.sum())
    if not count:
        raise PeftlibError(
            f"No target in a batch of {there.numel()} label(s): all of them are ignored. Leave such examples out; a "
            "prompt that fills the whole length leaves no room for its completion."
        )
    return count
