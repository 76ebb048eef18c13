"""DPO and KTO as losses of :func:`peftlib.train.fit`: a policy and its reference on one base.

The reference is the base with its tunings disabled, so nothing is held twice. To go on from a tuning, load its file a
second time under another name: ``load(model, path, name="sft", trainable=False)`` and ``reference=("sft",)``.

Dropout is off in both: a log-ratio is about two policies, not about what was dropped of one of them. (:func:`fit` has
the model in train mode; a loss switches it for its own forwards.)

Letters: B pairs or rows, T positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftlib import PeftlibError
from peftlib.train.evaluation import mode
from peftlib.train.losses import IGNORE, causal_lm
from peftlib.train.outputs import get
from peftlib.train.preference import dpo_loss, kto_loss
from peftlib.train.reference import Reference, as_reference


def sequence_logps(
    model: nn.Module, batch: Mapping[str, Any], *, mean: bool = False, head: str | None = None
) -> Tensor:
    """``sum_t log p(label_t | before)`` of each row, (B,), in float32 or wider.

    Args:
        model: causal.
        batch: ``inputs``, ``labels`` (B, T), -100 where nothing is summed.
        mean: divide by the number of labels.
        head: dotted name of the module that makes the logits, to make them in chunks, see
            :func:`peftlib.train.causal_lm`.

    Raises:
        PeftlibError: a row without a label, which would be a completion of no token.

    Example:
        >>> ids = torch.tensor([[0, 1, 2], [2, 1, 0]])
        >>> batch = {"inputs": ids, "labels": ids}
        >>> torch.nn.init.zeros_((model := nn.Embedding(3, 3)).weight).shape
        torch.Size([3, 3])
        >>> sequence_logps(model, batch)  # 2 ln(1/3)
        tensor([-2.1972, -2.1972], grad_fn=<NegBackward0>)
    """
    total_B, count_B = causal_lm(model, batch, head=head, each=True)
    if (count_B == 0).any():
        raise PeftlibError(
            f"Row {int((count_B == 0).nonzero()[0])} has no completion: all its labels but the first are -100. Leave "
            "empty completions out."
        )
    return -total_B / count_B if mean else -total_B


def dpo(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    reference: Reference = (),
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    kind: str = "sigmoid",
    head: str | None = None,
) -> tuple[Tensor, int]:
    """:func:`peftlib.train.dpo_loss` of the model as it is against its reference; ln 2 before the first step.

    For :func:`peftlib.train.fit`, with ``functools.partial(dpo, beta=0.05)``.

    Args:
        model: the policy, its tuning enabled.
        batch: from :func:`peftlib.train.pad_pairs`; ``reference_logps`` (2 B,) in it, sums
            from :func:`sequence_logps` whatever the kind, save the reference's forward.
        reference: names of the tunings that make it; none is the base. Or a module.
        beta: how dear it is to leave the reference.
        label_smoothing: share of labels that are wrong, of ``"sigmoid"``.
        kind: ``"sigmoid"``, ``"hinge"``, or ``"ipo"``, which takes means over tokens.
        head: see :func:`sequence_logps`.

    Returns:
        The sum over pairs, and their number.

    Raises:
        PeftlibError: the policy is its own reference, an odd number of rows, an empty completion.

    Example:
        >>> import peftlib
        >>> from peftlib.train import Encoded, Pair, pad_pairs
        >>> model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 9))
        >>> tuning = peftlib.attach(model, peftlib.LoRA(rank=2), targets=["1"])
        >>> pair = Pair(chosen=Encoded([1, 2], [-100, 2]), rejected=Encoded([1, 3], [-100, 3]))
        >>> loss, pairs = dpo(model, pad_pairs([pair], pad_id=0))
        >>> round(loss.item(), 4), pairs
        (0.6931, 1)
    """
    if len(get(batch, "labels")) % 2:
        raise PeftlibError("dpo takes pairs: the chosen rows and then as many rejected ones; see pad_pairs.")
    mean = kind == "ipo"
    reference_logps = _reference_logps(model, batch, reference, mean, head)
    with mode(model, False):
        chosen, rejected = sequence_logps(model, batch, mean=mean, head=head).chunk(2)
    reference_chosen, reference_rejected = reference_logps.chunk(2)
    loss = dpo_loss(chosen, rejected, reference_chosen, reference_rejected, beta, label_smoothing, kind)
    return loss * len(chosen), len(chosen)


def kto(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    reference: Reference = (),
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    head: str | None = None,
) -> tuple[Tensor, int]:
    """:func:`peftlib.train.kto_loss` of the model as it is against its reference; a half before the first step.

    Args:
        model: the policy, its tuning enabled.
        batch: from :func:`peftlib.train.pad_judged`; its mismatched completions give the KL. It is that of each batch
            alone, also where ``accumulate`` makes a step of several: make batches as large as memory allows.
        reference: names of the tunings that make it; none is the base. Or a module.
        beta: how soon gains and losses saturate.
        desirable_weight: of good answers.
        undesirable_weight: of bad ones.
        head: see :func:`sequence_logps`.

    Returns:
        The sum over rows, and their number.

    Raises:
        PeftlibError: as :func:`dpo`.

    Example:
        >>> import peftlib
        >>> from peftlib.train import Encoded, Judged, pad_judged
        >>> model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 9))
        >>> tuning = peftlib.attach(model, peftlib.LoRA(rank=2), targets=["1"])
        >>> good, bad = (Judged(Encoded([i, 2], [-100, 2]), desirable=i == 1) for i in (1, 3))
        >>> loss, rows = kto(model, pad_judged([good, bad], pad_id=0))
        >>> round((loss / rows).item(), 4)
        0.5
    """
    desirable, mismatched = get(batch, "desirable"), get(batch, "mismatched")
    reference_logps = _reference_logps(model, batch, reference, False, head)
    with mode(model, False):
        logps = sequence_logps(model, batch, head=head)
        with torch.no_grad():
            log_ratios = sequence_logps(model, mismatched, head=head)
    log_ratios = log_ratios - _reference_logps(model, mismatched, reference, False, head)
    loss = kto_loss(logps, reference_logps, desirable, log_ratios, beta, desirable_weight, undesirable_weight)
    return loss * len(logps), len(logps)


def _reference_logps(
    model: nn.Module, batch: Mapping[str, Any], reference: Reference, mean: bool, head: str | None
) -> Tensor:
    if (known := batch.get("reference_logps")) is not None:
        return known / (get(batch, "labels")[:, 1:] != IGNORE).sum(1) if mean else known
    with as_reference(model, reference) as other:
        return sequence_logps(other, batch, mean=mean, head=head)
