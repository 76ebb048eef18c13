"""Losses: ``(model, batch) -> (sum over the targets, number of targets)``, so that a window has one true mean.

A batch is a mapping with ``"inputs"`` (a tensor, a tuple of positional or a dict of keyword arguments of the model)
and ``"labels"``. The model gives a tensor, an object or mapping with ``logits``, or a tuple whose first is the tensor.

Left out on purpose: SFT has no loss of its own. It is :func:`causal_lm` with labels of -100 outside the completion,
which :func:`peftlib.train.encode` writes.

Letters: B rows, T positions, V vocabulary, C classes, D width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peftlib import PeftlibError

IGNORE = -100
"""A label that is no target."""
Weighted = tuple[Tensor, int]


def causal_lm(
    model: nn.Module, batch: Mapping[str, Any], *, head: str | None = None, chunk: int = 256
) -> Weighted:
    """Each position predicts the next label: ``-sum log softmax(logits[:, t])[labels[:, t+1]]``.

    Also the loss of SFT (labels of -100 outside the completion) and of packed rows (-100 where a document begins).

    Args:
        model: gives (B, T, V).
        batch: ``inputs``, ``labels`` (B, T) of integers, not shifted, -100 where there is no target.
        head: dotted name of the module that makes the logits, to compute them ``chunk`` positions at a time, see
            :func:`chunked_cross_entropy`; with ``functools.partial(causal_lm, head="lm_head")``.
        chunk: positions whose logits exist at once.

    Raises:
        PeftlibError: shapes that do not go together, no targets, or a model that changes its logits after ``head``.

    Example:
        >>> ids = torch.tensor([[0, 1, 2, 1]])
        >>> total, count = causal_lm(nn.Embedding(3, 3), {"inputs": ids, "labels": ids})
        >>> total.shape, count
        (torch.Size([]), 3)
    """
    labels = _get(batch, "labels")
    if labels.dim() != 2 or labels.is_floating_point():
        raise PeftlibError(
            f"causal_lm takes integer labels of shape (rows, positions); got {labels.dtype} of {tuple(labels.shape)}."
        )
    if head is None:
        logits = forward(model, batch)
        _same_places(logits, labels)
        return cross_entropy(logits[:, :-1], labels[:, 1:])
    hidden, output = _without(model, head, batch)
    _same_places(hidden, labels)
    return chunked_cross_entropy(hidden[:, :-1], labels[:, 1:], output, chunk)


def classification(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Weighted:
    """Cross-entropy of a class per label: sequences (B, C) with labels (B,), tokens (B, T, C) with labels (B, T).

    Args:
        model: gives logits whose last axis is the classes.
        batch: ``inputs``, integer ``labels`` with -100 where there is no target.
        class_weights: (C,) factors of each class's terms; the count stays the number of targets.
        label_smoothing: share of the target spread over all classes.

    Raises:
        PeftlibError: shapes that do not go together, or no targets.

    Example:
        >>> batch = {"inputs": torch.zeros(3, 2), "labels": torch.tensor([0, 1, -100])}
        >>> total, count = classification(nn.Identity(), batch)
        >>> round(total.item(), 4), count
        (1.3863, 2)
    """
    logits, labels = forward(model, batch), _get(batch, "labels")
    _same_places(logits, labels)
    return cross_entropy(logits, labels, class_weights=class_weights, label_smoothing=label_smoothing)


def masked_lm(model: nn.Module, batch: Mapping[str, Any]) -> Weighted:
    """Cross-entropy at the hidden positions; :func:`peftlib.train.mask_tokens` makes inputs and labels.

    Source: Devlin et al. 2019, arXiv:1810.04805, section 3.1.
    """
    return classification(model, batch)


def regression(model: nn.Module, batch: Mapping[str, Any]) -> Weighted:
    """Squared error ``sum (y - labels)^2`` over every number of ``labels``; NaN labels are no targets.

    An output (B, 1) goes with labels (B,).

    Raises:
        PeftlibError: shapes that do not go together, or no targets.

    Example:
        >>> batch = {"inputs": torch.tensor([[1.0], [2.0]]), "labels": torch.tensor([1.0, 4.0])}
        >>> regression(nn.Identity(), batch)
        (tensor(4.), 2)
    """
    output, labels = forward(model, batch), _get(batch, "labels")
    if output.dim() == labels.dim() + 1 and output.shape[-1] == 1:
        output = output.squeeze(-1)
    if output.shape != labels.shape:
        # no broadcasting: (B, 1) - (B,) is B x B differences
        raise PeftlibError(
            f"The model gives {tuple(output.shape)} and the labels are {tuple(labels.shape)}. Reshape one."
        )
    there = ~labels.isnan()
    wide = torch.promote_types(output.dtype, torch.float32)
    return (output.to(wide)[there] - labels.to(wide)[there]).square().sum(), _some(there)


def cross_entropy(
    logits: Tensor, labels: Tensor, *, class_weights: Tensor | None = None, label_smoothing: float = 0.0
) -> Weighted:
    """``-sum log softmax(logits)[label]`` over labels that are not -100, in float32 or wider, and their number.

    Args:
        logits: (..., V).
        labels: (...) integers.
        class_weights: (V,).
        label_smoothing: 0 to 1.

    Raises:
        PeftlibError: every label is -100.
    """
    count = _some(labels != IGNORE)
    # reshape, not transpose: the kernel for (rows, classes) is the fast one
    rows = logits.reshape(-1, logits.shape[-1])
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    total = F.cross_entropy(
        rows,
        labels.reshape(-1),
        ignore_index=IGNORE,
        reduction="sum",
        weight=None if class_weights is None else class_weights.to(rows),
        label_smoothing=label_smoothing,
    )
    return total, count


def chunked_cross_entropy(
    hidden: Tensor, labels: Tensor, head: Callable[[Tensor], Tensor], chunk: int = 256
) -> Weighted:
    """:func:`cross_entropy` of ``head(hidden)``, of which only ``chunk`` positions exist at a time.

    Logits of B T V numbers, their softmax and their gradient never exist: each chunk is computed again in the
    backward, which costs the head's forward once more. Positions without a target are left out altogether.

    Args:
        hidden: (..., D), what the head takes.
        labels: (...) integers, -100 where there is no target.
        head: any module or function (n, D) -> (n, V), with a tuning in it or not.
        chunk: positions at a time.

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
        return cross_entropy(head(some), wanted)[0]

    total = [
        checkpoint(part, some, wanted, use_reentrant=False)
        for some, wanted in zip(rows.split(chunk), targets.split(chunk), strict=True)
    ]
    return torch.stack(total).sum(), count


def forward(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The model's first tensor for a batch's ``inputs``."""
    return first_tensor(_call(model, _get(batch, "inputs")), model)


def first_tensor(output: Any, model: nn.Module) -> Tensor:
    """The output itself, its ``logits``, or its first element."""
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if isinstance(found, (tuple, list)) and found:
        found = found[0]
    if not isinstance(found, Tensor):
        raise PeftlibError(
            f"{type(model).__name__} gave {type(output).__name__}; the loss needs a tensor, something with .logits, or "
            "a tuple that begins with a tensor. Write a loss of your own: (model, batch) -> (sum, count)."
        )
    return found


def _call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def _without(model: nn.Module, name: str, batch: Mapping[str, Any]) -> tuple[Tensor, nn.Module]:
    """What the head was given, and the head; the logits are not made."""
    head = dict(model.named_modules()).get(name)
    if head is None:
        raise PeftlibError(
            f"{type(model).__name__} has no module {name!r}. Name the one that makes the logits."
        )
    given: list[Tensor] = []
    with _replaced(head, given):
        output = forward(model, batch)
    if len(given) != 1 or output is not given[0]:
        raise PeftlibError(
            f"{type(model).__name__} does more than return what {name!r} gives (it ran {len(given)} times), so its "
            "logits cannot be made in chunks. Use the loss without head=."
        )
    return output, head


@contextlib.contextmanager
def _replaced(head: nn.Module, given: list[Tensor]) -> Iterator[None]:
    """The head hands on its input; in the instance, as its class may be others' too."""

    def hand_on(x: Tensor) -> Tensor:
        given.append(x)
        return x

    before = head.__dict__.get("forward")
    head.__dict__["forward"] = hand_on
    try:
        yield
    finally:
        head.__dict__.pop("forward")
        head.__dict__.update({} if before is None else {"forward": before})


def _get(batch: Any, key: str) -> Any:
    if not isinstance(batch, Mapping) or key not in batch:
        what = f"one with {sorted(batch)}" if isinstance(batch, Mapping) else type(batch).__name__
        raise PeftlibError(f"The loss needs a batch with 'inputs' and 'labels'; got {what}. Give {key!r}.")
    return batch[key]


def _same_places(output: Tensor, labels: Tensor) -> None:
    if output.shape[:-1] != labels.shape:
        raise PeftlibError(
            f"The model gives {tuple(output.shape)} and the labels are {tuple(labels.shape)}: all axes but the last "
            "have to be the same."
        )


def _some(there: Tensor) -> int:
    count = int(there.sum())
    if not count:
        raise PeftlibError(
            f"No target in a batch of {there.numel()} label(s): all of them are ignored. Leave such examples out; a "
            "prompt that fills the whole length leaves no room for its completion."
        )
    return count
