"""Completions of prompts by any module that maps ids to logits, with the log-probabilities of what was drawn.

Left out on purpose: beams, and serving many at speed.

Letters: B prompts, P longest prompt, T new tokens, L = longest prompt with its completion, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftlib import PeftlibError
from peftlib.train.decoding import source
from peftlib.train.evaluation import mode


@dataclass(frozen=True)
class Generated:
    """What :func:`generate` gives.

    Attributes:
        ids: (B, L), each prompt, its completion and then padding.
        prompt_lengths: (B,).
        completions: (B, T) ids, padded after the stop id.
        mask: (B, T) booleans, true up to and with the stop id.
        logps: (B, T), log-probability of each id at the temperature it was drawn at, before top-k and top-p; 0 outside.
        stopped: (B,), whether a stop id came.
        cached: whether keys and values were kept; else the model ran over everything for each token.

    Example:
        >>> done = generate(nn.Embedding(7, 7), [[1], [2, 3]], max_new_tokens=4)
        >>> done.completions.shape, done.mask.all().item(), done.stopped.any().item()
        (torch.Size([2, 4]), True, False)
        >>> done.lists() == done.completions.tolist()
        True
    """

    ids: Tensor
    prompt_lengths: Tensor
    completions: Tensor
    mask: Tensor
    logps: Tensor
    stopped: Tensor
    cached: bool

    def lists(self) -> list[list[int]]:
        """The completions as lists of ids, without padding."""
        pairs = zip(self.completions, self.mask, strict=True)
        return [ids[inside].tolist() for ids, inside in pairs]


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_ids: Collection[int] = (),
    pad_id: int = 0,
    context: int | None = None,
    cache: bool | None = None,
    drop_ended: bool = False,
    generator: torch.Generator | None = None,
) -> Generated:
    """Draw a completion of each prompt: ``id ~ softmax(logits / temperature)``, in eval mode.

    Args:
        model: causal, ids (B, T) -> logits (B, T, V) or something with ``.logits``.
        prompts: rows of ids, of any lengths from 1.
        max_new_tokens: at most, per prompt.
        temperature: 0 takes the likeliest id, whose log-probability is then that at temperature 1.
        top_k: draw among the k likeliest.
        top_p: draw among the likeliest that together have this probability, the last of them included.
        stop_ids: a completion ends with the first of these, which belongs to it.
        pad_id: fills rows; the model never sees it where it matters.
        context: most positions the model has; by default what its ``config`` says, if it has one.
        cache: True insists on keys and values being kept, False re-runs; None keeps them where the model offers it, see
            :func:`peftlib.train.decoding.source`; ``cached`` of the result says what was done.
        drop_ended: without a cache, run only rows that still go on: faster, by the mean length over the longest. For
            models that need nothing but a row's ids; under :func:`peftlib.route` rows have to stay in their places.
        generator: to draw from, instead of torch's own.

    Raises:
        PeftlibError: no prompts or an empty one, one that is too long for the context, settings out of their range, a
            model that fails on the ids, logits that are not (B, T, V) or no distribution.

    Example:
        >>> def cyclic(ids):
        ...     return 9.0 * nn.functional.one_hot((ids + 1) % 5, 5)
        >>> class Model(nn.Module):
        ...     forward = staticmethod(cyclic)
        >>> generate(Model(), [[1], [2, 3]], max_new_tokens=4, temperature=0, stop_ids=[0]).lists()
        [[2, 3, 4, 0], [4, 0]]
    """
    _check(prompts, max_new_tokens, temperature, top_k, top_p, pad_id)
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    rows = rows_of_ids(prompts, device)
    _check_context(model, prompts, max_new_tokens, context)
    lengths_B = torch.tensor([len(row) for row in rows], device=device)
    stops = torch.tensor(checked_stops(stop_ids), device=device, dtype=torch.long)
    chosen, logps, alive = [], [], [torch.ones_like(lengths_B, dtype=torch.bool)]
    with mode(model, False):
        next_logits, cached = source(model, rows, pad_id, cache)
        last, every = None, alive[0]
        for _ in range(max_new_tokens):
            logits_BV = next_logits(last, alive[-1] if drop_ended else every)
            ids_B, logps_B = _choose(logits_BV, temperature, top_k, top_p, generator)
            last = torch.where(alive[-1], ids_B, pad_id)
            chosen.append(last)
            logps.append(torch.where(alive[-1], logps_B, 0))
            alive.append(alive[-1] & ~torch.isin(last, stops))
            if not alive[-1].any():
                break
    mask_BT = torch.stack(alive[:-1], 1)
    completions_BT = torch.stack(chosen, 1)
    whole = [
        torch.cat((row, new[inside])) for row, new, inside in zip(rows, completions_BT, mask_BT, strict=True)
    ]
    return Generated(
        ids=nn.utils.rnn.pad_sequence(whole, batch_first=True, padding_value=pad_id),
        prompt_lengths=lengths_B,
        completions=completions_BT,
        mask=mask_BT,
        logps=torch.stack(logps, 1),
        stopped=~alive[-1],
        cached=cached,
    )


def _choose(
    logits_BV: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """Ids, (B,), and their log-probabilities under the whole distribution."""
    logits_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))
    logps_BV = (logits_BV / (temperature or 1.0)).log_softmax(-1)
    if logps_BV.isnan().any():
        row = int(logps_BV.isnan().any(1).nonzero()[0])
        raise PeftlibError(
            f"The model's logits for prompt {row} are no distribution: NaN or an infinity is among them, or all are "
            "-infinity. Nothing can be drawn from them."
        )
    if temperature == 0:
        ids_B = logps_BV.argmax(-1)
    else:
        ids_B = torch.multinomial(_narrowed(logps_BV, top_k, top_p).exp(), 1, generator=generator)[:, 0]
    return ids_B, logps_BV.gather(1, ids_B[:, None])[:, 0]


def _narrowed(logps_BV: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    if top_k is not None and top_k < logps_BV.shape[1]:
        least = logps_BV.topk(top_k).values[:, -1:]
        logps_BV = logps_BV.masked_fill(logps_BV < least, -torch.inf)
    if top_p is not None:
        ranked, order = logps_BV.sort(descending=True)
        shares = ranked.softmax(-1)
        # an id stays while those before it have less than top_p together: the first always does
        beyond = shares.cumsum(-1) - shares >= top_p
        logps_BV = logps_BV.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -torch.inf)
    return logps_BV


def _check(
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    pad_id: int,
) -> None:
    if not len(prompts):
        raise PeftlibError("generate needs prompts of at least one id each; there are no prompts.")
    for name, value, fine, range_ in (
        ("max_new_tokens", max_new_tokens, isinstance(max_new_tokens, int) and max_new_tokens >= 1, "from 1"),
        (
            "temperature",
            temperature,
            isinstance(temperature, (int, float)) and 0 <= temperature < float("inf"),
            "from 0",
        ),
        ("pad_id", pad_id, isinstance(pad_id, int) and pad_id >= 0, "from 0"),
        ("top_k", top_k, top_k is None or top_k >= 1, "from 1, or None"),
        ("top_p", top_p, top_p is None or 0 < top_p <= 1, "above 0 and at most 1, or None"),
    ):
        if not fine:
            raise PeftlibError(f"{name}={value}: give a number {range_}.")


def rows_of_ids(prompts: Sequence[Sequence[int]], device: torch.device) -> list[Tensor]:
    """Each prompt as a tensor.

    Raises:
        PeftlibError: one is empty, or is no row of integers.
    """
    rows = []
    for i, prompt in enumerate(prompts):
        try:
            row = torch.tensor([] if len(prompt) == 0 else list(prompt), device=device)
        except (TypeError, ValueError, RuntimeError):
            row = torch.tensor(0.5)
        if not row.numel():
            raise PeftlibError(
                f"generate needs prompts of at least one id each; prompt {i} is empty. Begin with a start token."
            )
        if row.dim() != 1 or row.is_floating_point() or row.dtype == torch.bool:
            raise PeftlibError(
                f"Prompt {i} is {str(prompt)[:40]!r}, and not a row of ids. generate takes rows, [[1, 2], [3]]; ppo "
                "and grpo take batches of them, [[[1, 2], [3]]] or Batches(rows, 2)."
            )
        rows.append(row)
    return rows


def checked_stops(stop_ids: Collection[int]) -> list[int]:
    """In order.

    Raises:
        PeftlibError: they are no ids.
    """
    try:
        return sorted({int(stop) for stop in stop_ids})
    except (TypeError, ValueError) as error:
        raise PeftlibError(
            f"stop_ids={stop_ids!r}: give a collection of ids, [2], or () for none."
        ) from error


def _check_context(
    model: nn.Module, prompts: Sequence[Sequence[int]], max_new_tokens: int, context: int | None
) -> None:
    if context is None:
        context = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if context is None:
        return
    row = max(range(len(prompts)), key=lambda i: len(prompts[i]))
    if len(prompts[row]) + max_new_tokens > context:
        raise PeftlibError(
            f"Prompt {row} has {len(prompts[row])} ids, and with max_new_tokens={max_new_tokens} that is more than the "
            f"{context} positions of the model. Cut the prompt, or ask for fewer tokens."
        )
