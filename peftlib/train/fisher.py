"""What of a model old data depends on: the diagonal of its Fisher information, one sample at a time.

A square of a mean is not a mean of squares, so each sample's gradient is taken alone: a loop, which takes any model and
any loss. Left out on purpose: ``torch.func.vmap`` (it cannot follow a loss that counts its targets, nor the kernels).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peftlib import PeftlibError, tunings
from peftlib.container import reading, write
from peftlib.train.evaluation import mode
from peftlib.train.losses import IGNORE, causal_lm, classification, masked_lm, regression
from peftlib.train.outputs import forward
from peftlib.train.rng import untouched
from peftlib.train.step import Loss, moved, weighted

Draw = Callable[[nn.Module, Any, torch.Generator], Any]
"""(model, sample, generator) -> the sample with labels that the model itself gave."""


@dataclass(frozen=True)
class Fisher:
    """The diagonal of the Fisher information of some of a model's weights, per target; made by :func:`fisher`.

    Attributes:
        values: name of a weight in the model -> its shape, float32 or wider.
        targets: how many there were.
        labels: whose labels they were, ``"data"`` or ``"model"``.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Fisher({"weight": torch.tensor([20.0])}, targets=2, labels="data").save(
        ...         f"{folder}/old.safetensors"
        ...     )
        ...     Fisher.load(f"{folder}/old.safetensors").values
        {'weight': tensor([20.])}
    """

    values: Mapping[str, Tensor]
    targets: float
    labels: str

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to one safetensors file, whole or not at all."""
        write(path, self.values, {"fisher": {"targets": self.targets, "labels": self.labels}})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Fisher:
        """What :meth:`save` wrote; whether it fits a model is checked where it is used.

        Raises:
            PeftlibError: missing, damaged, or a file of something else.
        """
        with reading(path) as file:
            about = file.about.get("fisher")
            if not isinstance(about, Mapping) or not about.keys() >= {"targets", "labels"}:
                raise PeftlibError(f"{os.fspath(path)!r} holds no Fisher information. Fisher.save writes it.")
            return cls(file.tensors(), about["targets"], about["labels"])


def fisher(
    model: nn.Module,
    samples: Iterable[Any],
    loss: Loss,
    *,
    names: Sequence[str] = ("*",),
    labels: str | Draw = "data",
    seed: int = 0,
) -> Fisher:
    """``F_i = (1 / targets) sum over samples of (d loss(sample) / d w_i)^2``, of the model as it is now.

    The loss of a sample is its negative log-likelihood, summed over its targets. With ``labels="data"`` it is that of
    the labels given: the *empirical* Fisher, which any loss has, and which also grows where the model is wrong. With
    ``labels="model"`` labels are drawn from the model's own predictions, once per sample: an unbiased estimate of the
    true Fisher. Squared error is then the likelihood of a normal distribution of variance 1/2.

    Args:
        model: computes in eval mode; nothing of it is changed. Weights are its own, those of its tunings are not.
        samples: batches of *one* sample each: ``Batches(examples, 1, collate)``. A few hundred do. A packed row is as
            many samples as documents.
        loss: as for :func:`fit`, without penalties.
        names: globs on the names of the weights.
        labels: ``"data"``, ``"model"`` (with this library's losses), or a function (model, sample, generator) ->
            sample that draws labels.
        seed: of what is drawn.

    Returns:
        One tensor per weight, float32 or wider.

    Raises:
        PeftlibError: several samples in a batch, none at all, a name that matches nothing, a loss whose labels cannot
            be drawn, or squares that are no numbers.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.zeros_(model.weight)
        >>> samples = [{"inputs": torch.tensor([[x]]), "labels": torch.tensor([1.0])} for x in (1.0, 3.0)]
        >>> fisher(model, samples, regression).values  # ((2 x)^2 summed) / 2: not (2 + 6)^2
        {'weight': tensor([[20.]])}

    Source: Kirkpatrick et al. 2017, arXiv:1612.00796, section 2.1; on the empirical one, Kunstner et al. 2019,
    arXiv:1905.12558, section 3.
    """
    weights = chosen_weights(model, names)
    draw = _draw(loss, labels)
    device = next(iter(weights.values())).device
    generator = torch.Generator(device).manual_seed(seed)
    sums = {
        name: torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32))
        for name, w in weights.items()
    }
    targets = 0.0
    with untouched(), mode(model, False), _differentiable(weights.values()):
        for sample in samples:
            sample = moved(sample, device)
            _check_alone(sample)
            if draw is not None:
                with torch.no_grad():
                    sample = draw(model, sample, generator)
            value, count = weighted(loss, model, sample, None, device)
            targets += count
            found = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
            for total, gradient in zip(sums.values(), found, strict=True):
                if gradient is not None:
                    total += gradient.to(total.dtype).square()
    if not targets:
        raise PeftlibError(
            "fisher() was given no samples. Pass what can be iterated, such as Batches(..., 1)."
        )
    for name, total in sums.items():
        total /= targets
        if not total.isfinite().all():
            raise PeftlibError(
                f"The squared gradients of {name!r} are not finite. Look at the model's loss on old data."
            )
    return Fisher(sums, targets, labels if isinstance(labels, str) else "model")


def base_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's own floating parameters by name, whatever tunings are on it."""
    added = {
        id(p) for tuning in tunings(model).values() for part in tuning.parts for p in part.delta.parameters()
    }
    return {name: p for name, p in model.named_parameters() if id(p) not in added and p.is_floating_point()}


def chosen_weights(model: nn.Module, globs: Sequence[str]) -> dict[str, nn.Parameter]:
    """Those of :func:`base_weights` that a glob matches; each has to match one."""
    weights = base_weights(model)
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in weights):
            raise PeftlibError(
                f"{glob!r} matches no weight of {type(model).__name__}; there are: {', '.join(list(weights)[:8])}, ..."
            )
    return {name: w for name, w in weights.items() if any(fnmatchcase(name, glob) for glob in globs)}


@contextlib.contextmanager
def _differentiable(weights: Iterable[nn.Parameter]) -> Iterator[None]:
    before = [(w, w.requires_grad) for w in weights]
    try:
        with torch.enable_grad():
            for w, _ in before:
                w.requires_grad_(True)
            yield
    finally:
        for w, flag in before:
            w.requires_grad_(flag)


def _check_alone(sample: Any) -> None:
    named = sample if isinstance(sample, Mapping) else {}
    labels, documents = named.get("labels"), named.get("documents")
    # what else is in a batch need not have a row per sample
    tensors = [labels] if isinstance(labels, Tensor) and labels.dim() else list(_tensors(sample))
    rows = max((len(tensor) for tensor in tensors if tensor.dim()), default=1)
    if isinstance(documents, Tensor):
        rows = max(rows, int(documents.max()) + 1)
    if rows != 1:
        raise PeftlibError(
            f"fisher() was given a batch of {rows} samples, and the square of their sum is not the sum of their "
            "squares. Give batches of one, tensors whose first axis is 1 and no packed rows: Batches(examples, 1, "
            "collate)."
        )


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (list, tuple, Mapping)):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(part)


def _draw(loss: Loss, labels: str | Draw) -> Draw | None:
    if labels == "data":
        return None
    if callable(labels):
        return labels
    if labels != "model":
        raise PeftlibError(
            f"labels={labels!r} is unknown: use 'data', 'model' or a function that draws them."
        )
    while isinstance(loss, partial):
        loss = loss.func
    known: dict[Any, Draw] = {
        causal_lm: partial(_drawn_labels, shift=1),
        classification: _drawn_labels,
        masked_lm: _drawn_labels,
        regression: _drawn_values,
    }
    if loss not in known:
        raise PeftlibError(
            "labels='model' draws for causal_lm, masked_lm, classification and regression; for another loss give a "
            "function (model, sample, generator) -> sample."
        )
    return known[loss]


def _drawn_labels(model: nn.Module, sample: Any, generator: torch.Generator, shift: int = 0) -> Any:
    logits, labels = forward(model, sample, causal=shift > 0), sample["labels"]
    logits = logits[:, : logits.shape[1] - shift] if shift else logits
    chances = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
    drawn = torch.multinomial(chances.reshape(-1, chances.shape[-1]), 1, generator=generator)
    wanted = labels[:, shift:] if shift else labels
    wanted = torch.where(wanted == IGNORE, IGNORE, drawn.view_as(wanted).to(labels.dtype))
    return {**sample, "labels": torch.cat([labels[:, :shift], wanted], 1) if shift else wanted}


def _drawn_values(model: nn.Module, sample: Any, generator: torch.Generator) -> Any:
    output, labels = forward(model, sample), sample["labels"]
    noise = torch.randn(labels.shape, generator=generator, device=labels.device, dtype=output.dtype)
    drawn = output.reshape(labels.shape) + noise * 0.5**0.5
    return {**sample, "labels": torch.where(labels.isnan(), labels, drawn.to(labels.dtype))}
