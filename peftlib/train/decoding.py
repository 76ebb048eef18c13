"""The logits of the next id, token after token: from keys and values that are kept, or by running the model again.

A model that keeps keys and values (``past_key_values``, as in transformers) runs once per token, on prompts padded on
the left with a mask and positions that start at each prompt's first token. Any other causal model is run again on all
that is there, padded on the right, where a causal model cannot see it: no mask or position has to be named.

Letters: B prompts, P longest prompt, V vocabulary.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftlib import PeftlibError
from peftlib.train.outputs import first_tensor

NextLogits = Callable[[Tensor | None, Tensor], Tensor]
"""The ids chosen last, (B,), or None at the start, and which rows are needed -> logits of the next, (B, V)."""


def source(
    model: nn.Module, rows: Sequence[Tensor], pad_id: int, cache: bool | None
) -> tuple[NextLogits, bool]:
    """Where the next logits come from, and whether keys and values are kept.

    Prompts of several lengths are padded on the left, which a model has to be told of: with ``attention_mask`` and
    ``position_ids`` by name it is; with the mask alone, or with ``**kwargs``, two tokens are tried, whether it gives
    what it gives without a cache; without a mask it is run again.

    Raises:
        PeftlibError: the cache is insisted on, and there is none or it would give something else.
    """
    takes = inspect.signature(model.forward).parameters
    missing = {"past_key_values", "use_cache"} - takes.keys()
    if cache and missing:
        raise PeftlibError(
            f"cache=True: {type(model).__name__}.forward takes no past_key_values and use_cache. Leave cache= out; the "
            "model is then run again for each token."
        )
    if cache is False or missing:
        return _again(model, rows, pad_id), False
    if len({len(row) for row in rows}) > 1 and not {"attention_mask", "position_ids"} <= takes.keys():
        told = "attention_mask" in takes or _takes_any(takes)
        if not (told and _same_with_cache(model, rows, pad_id)):
            if cache:
                raise PeftlibError(
                    f"cache=True: prompts of several lengths are padded on the left, and {type(model).__name__} "
                    + ("gives other logits for them." if told else "takes no attention_mask.")
                    + " Leave cache= out, or give prompts of one length."
                )
            return _again(model, rows, pad_id), False
    return _with_cache(model, rows, pad_id), True


def _takes_any(takes: Mapping[str, inspect.Parameter]) -> bool:
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values())


def _same_with_cache(model: nn.Module, rows: Sequence[Tensor], pad_id: int) -> bool:
    kept, again = _with_cache(model, rows, pad_id), _again(model, rows, pad_id)
    every = torch.ones(len(rows), dtype=torch.bool, device=rows[0].device)
    for last in (None, torch.stack([row[0] for row in rows])):
        one, other = (step(last, every).float().log_softmax(-1) for step in (kept, again))
        if not torch.where(one == other, 0, (one - other).abs()).mean() <= rounding(model):
            return False
    return True


def _with_cache(model: nn.Module, rows: Sequence[Tensor], pad_id: int) -> NextLogits:
    takes = inspect.signature(model.forward).parameters
    prompts_BP = nn.utils.rnn.pad_sequence(
        list(rows), batch_first=True, padding_value=pad_id, padding_side="left"
    )
    lengths_B = torch.tensor([len(row) for row in rows], device=prompts_BP.device)
    places = torch.arange(prompts_BP.shape[1], device=prompts_BP.device)
    mask = (places >= prompts_BP.shape[1] - lengths_B[:, None]).long()
    uneven = not mask.all()
    past: Any = None

    def step(last: Tensor | None, needed: Tensor) -> Tensor:
        nonlocal mask, past
        if last is None:
            ids, positions = prompts_BP, (mask.cumsum(1) - 1).clamp(min=0)
        else:
            mask = torch.cat((mask, torch.ones_like(last)[:, None]), 1)
            ids, positions = last[:, None], mask.sum(1, keepdim=True) - 1
        more = {"attention_mask": mask, "position_ids": positions}
        more = {k: v for k, v in more.items() if k in takes or (uneven and _takes_any(takes))}
        with running(model, ids):
            output = model(ids, past_key_values=past, use_cache=True, **more)
        past = getattr(output, "past_key_values", None)
        if past is None:
            raise PeftlibError(
                f"{type(model).__name__} takes past_key_values and gives none back. Pass cache=False to run it again "
                "for each token."
            )
        return _last(first_tensor(output, model), ids)[:, -1]

    return step


def _again(model: nn.Module, rows: Sequence[Tensor], pad_id: int) -> NextLogits:
    whole = list(rows)

    def step(last: Tensor | None, needed: Tensor) -> Tensor:
        if last is not None:
            whole[:] = [torch.cat((row, new[None])) for row, new in zip(whole, last, strict=True)]
        some = [row for row, wanted in zip(whole, needed.tolist(), strict=True) if wanted]
        ids = nn.utils.rnn.pad_sequence(some, batch_first=True, padding_value=pad_id)
        with running(model, ids):
            output = model(ids)
        logits = _last(first_tensor(output, model), ids)
        ends = torch.tensor([len(row) for row in some], device=ids.device) - 1
        logits_BV = logits.new_zeros(len(whole), logits.shape[-1])
        logits_BV[needed] = logits[torch.arange(len(some), device=ids.device), ends]
        return logits_BV

    return step


def _last(logits: Tensor, ids: Tensor) -> Tensor:
    if logits.dim() != 3 or logits.shape[:2] != ids.shape:
        raise PeftlibError(
            f"The model gave logits of shape {tuple(logits.shape)} for ids of {tuple(ids.shape)}; generation needs "
            "(rows, positions, vocabulary), as the output itself, its .logits, or the first of a tuple."
        )
    return logits


@contextlib.contextmanager
def running(model: nn.Module, ids: Tensor) -> Iterator[None]:
    """What goes wrong inside the model on these ids is told with what it was given."""
    try:
        yield
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, (PeftlibError, torch.OutOfMemoryError)):
            raise
        largest = f", the largest of them {int(ids.max())}" if ids.device.type == "cpu" else ""
        raise PeftlibError(
            f"{type(model).__name__} fails on ids of shape {tuple(ids.shape)}{largest}: {error}. It has to take ids "
            "(rows, positions) alone. If there are more positions than it has (those of virtual tokens count too), cut "
            "the prompts or ask for fewer tokens; if an id is beyond its vocabulary, mend the prompts or pad_id=."
        ) from error


def rounding(model: nn.Module) -> float:
    """By how much per token two forwards of one model may differ: 1e-3, or 0.02 where products are of half precision.

    With a cache and without one it was 2e-7 in float32 and 1.2e-3 in bfloat16, for a small Llama.
    """
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    half = any(p.dtype.itemsize < 4 or torch.is_autocast_enabled(p.device.type) for p in parameters)
    return 0.02 if half or torch.get_float32_matmul_precision() != "highest" else 1e-3
