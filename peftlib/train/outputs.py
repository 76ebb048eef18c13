"""What a loss reads: a batch's ``inputs`` and ``labels``, and of a model's output the tensor that counts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from peftlib import PeftlibError


def forward(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The model's first tensor for a batch's ``inputs``."""
    return first_tensor(_call(model, get(batch, "inputs")), model)


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


def without_head(model: nn.Module, name: str, batch: Mapping[str, Any]) -> tuple[Tensor, nn.Module]:
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
