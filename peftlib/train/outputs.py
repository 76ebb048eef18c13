"""What a loss reads: a batch's ``inputs`` and ``labels``, and of a model's output the tensor that counts."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from peftlib import PeftlibError


def forward(model: nn.Module, batch: Mapping[str, Any], *, causal: bool = False) -> Tensor:
    """The model's first tensor for a batch's ``inputs``, with its ``attention_mask`` where that changes anything."""
    inputs = get(batch, "inputs")
    if isinstance(inputs, Mapping):
        output = model(**inputs)
    elif isinstance(inputs, (tuple, list)):
        output = model(*inputs)
    else:
        _check_documents(batch.get("documents"))
        output = model(inputs, **_padding(model, batch.get("attention_mask"), causal))
    return first_tensor(output, model)


def _told(model: nn.Module, mask: Tensor) -> dict[str, Tensor]:
    """Of a mask (B, T) and of positions from 0 at each row's first real token, those that the model's forward names."""
    # a compiled module's own forward names nothing
    names = inspect.signature(getattr(model, "_orig_mod", model).forward).parameters
    more = {"attention_mask": mask.long(), "position_ids": (mask.long().cumsum(1) - 1).clamp(min=0)}
    return {name: value for name, value in more.items() if name in names}


def _check_documents(documents: Tensor | None) -> None:
    if documents is not None and documents.max() > 0:
        raise PeftlibError(
            "The batch has rows of several documents, and inputs is a tensor alone, so later documents would read "
            "earlier ones. Give inputs={...} with document_mask(documents) and positions by the names that the model "
            "takes; or, if they may be read, a batch without 'documents'."
        )


def _padding(model: nn.Module, mask: Tensor | None, causal: bool) -> dict[str, Tensor]:
    if mask is None:
        return {}
    if mask.dim() != 2:
        raise PeftlibError(
            f"attention_mask is {tuple(mask.shape)}, and has to be (rows, positions). For another kind of mask give "
            "inputs={...}, all that the model takes by name."
        )
    right = bool((mask[:, 1:] <= mask[:, :-1]).all())
    if mask.all() or (causal and right):
        return {}
    given = _told(model, mask)
    if right and "attention_mask" in given:
        return {"attention_mask": given["attention_mask"]}
    if causal and len(given) == 2:
        return given
    if right:
        raise PeftlibError(
            f"The batch has padding, and {type(model).__name__}.forward names no attention_mask, so other tokens would "
            "see it. Give inputs={...}, all that the model takes by name; or, if it knows padding by the ids, a batch "
            "without 'attention_mask'."
        )
    raise PeftlibError(
        f"The batch is padded on the left: a causal model whose forward names attention_mask and position_ids can "
        f"compute it; {type(model).__name__} with this loss cannot. Pad on the right, which pad() and padder() do."
    )


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


def without_head(model: nn.Module, name: str, batch: Mapping[str, Any]) -> tuple[Tensor, nn.Module]:
    """What the head was given, and the head; the logits are not made."""
    head = dict(model.named_modules()).get(name)
    if head is None:
        raise PeftlibError(
            f"{type(model).__name__} has no module {name!r}. Name the one that makes the logits."
        )
    given: list[Tensor] = []
    with _replaced(head, given):
        output = forward(model, batch, causal=True)
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


def get(batch: Any, key: str) -> Any:
    if not isinstance(batch, Mapping) or key not in batch:
        what = f"one with {sorted(batch)}" if isinstance(batch, Mapping) else type(batch).__name__
        raise PeftlibError(f"The loss needs a batch with 'inputs' and 'labels'; got {what}. Give {key!r}.")
    return batch[key]


def check_places(output: Tensor, labels: Tensor) -> None:
    if output.shape[:-1] != labels.shape:
        raise PeftlibError(
            f"The model gives {tuple(output.shape)} and the labels are {tuple(labels.shape)}: all axes but the last "
            "have to be the same."
        )
