"""Staying near what was known: penalties on how far the weights have gone, added to a loss once per step.

A penalty is any function without arguments that gives a scalar. Those here are on the *effective* weight
``W + dW``, whatever is trained: full fine-tuning moves W itself; for LoRA the factors say little (B starts at zero, so
A has a Fisher information of zero there; A and B can be scaled against each other), their product is what the model
computes with. That product is formed, one weight at a time, and formed again in the backward: the Fisher information
has the weight's own size in any case.

Left out on purpose: penalties on prompts, prefixes and adapters, which change no weight (use replay), and on sharded
weights, which are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peftlib import PeftlibError, Tuning
from peftlib.train.fisher import Fisher, base_weights
from peftlib.train.step import Loss, counted

Penalty = Callable[[], Tensor]
"""() -> scalar, of the parameters as they are."""
Step = tuple["slice | None", Callable[[Tensor], Tensor]]


def with_penalty(loss: Loss, penalty: Penalty) -> Loss:
    """The loss with a penalty: ``L = (sum of losses) / (number of targets) + penalty``, once per step.

    A batch of n targets gets n times the penalty, so that a step's mean over all its targets has it once, however the
    targets lie in batches (``accumulate``) or processes. Where no gradients are taken (``evaluate=``) the loss is as it
    was; a history's ``loss`` has the penalty in it. Wrap again for a second penalty.

    Args:
        loss: of the batch, or one per sample.
        penalty: :func:`ewc`, :func:`l2_sp`, or any function of your own, ``lambda: 0.01 * model.gate.abs().sum()``.

    Example:
        >>> from peftlib.train import regression
        >>> model = nn.Linear(1, 1)
        >>> batch = {"inputs": torch.ones(3, 1), "labels": torch.zeros(3)}
        >>> plain, count = regression(model, batch)
        >>> total, _ = with_penalty(regression, lambda: torch.tensor(2.0))(model, batch)
        >>> torch.allclose(total / count, plain / count + 2), count
        (True, 3)
    """

    def penalized(model: nn.Module, batch: Any) -> Any:
        result = loss(model, batch)
        if not torch.is_grad_enabled():
            return result
        value, count = counted(result)
        return value + count * penalty(), count

    return penalized


def l2_sp(trained: Tuning | nn.Module, strength: float, *, free: Sequence[str] = ()) -> Penalty:
    """``(strength / 2) sum_i (w_i - w0_i)^2`` over every effective weight that is trained.

    ``w0`` are the effective weights when this is called: of a new tuning those of the base, so it is
    ``(strength / 2) |s B A|^2`` for LoRA. Weight decay pulls to 0 instead.

    Args:
        trained: a tuning, or a model whose parameters are trained without one.
        strength: above 0.
        free: globs on names of weights or sites that are left alone, such as a new head.

    Raises:
        PeftlibError: a part of the tuning changes no weight, nothing is left to penalize, or the tuning is disabled
            or merged.

    Example:
        >>> import peftlib
        >>> model = nn.Linear(4, 4)
        >>> tuning = peftlib.attach(model, peftlib.LoRA(rank=2))
        >>> penalty = l2_sp(tuning, 0.1)
        >>> penalty().item()
        0.0
        >>> _ = nn.init.ones_(tuning.state_dict()["lora.b"])
        >>> change = peftlib.merged_state_dict(model)["weight"] - model.weight
        >>> torch.allclose(penalty(), 0.05 * change.square().sum(), rtol=1e-4)
        True

    Source: Li et al. 2018, arXiv:1802.01483, eq. 2.
    """
    weights = _effective(trained, free)
    return _Squares(trained, weights, [None] * len(weights), strength)


def ewc(trained: Tuning | nn.Module, fisher: Fisher, strength: float, *, free: Sequence[str] = ()) -> Penalty:
    """``(strength / 2) sum_i F_i (w_i - w0_i)^2``: weights that old data depends on move less.

    Elastic weight consolidation on effective weights; ``w0`` are those when this is called.

    Args:
        trained: a tuning, or a model whose parameters are trained without one.
        fisher: of the old data, see :func:`peftlib.train.fisher`; weights in it that are not trained do not matter.
        strength: targets of old data over targets of new, by Bayes' rule; more in practice, as a diagonal sees little
            of what the old data needs.
        free: globs on names of weights or sites that are left alone, such as a new head.

    Raises:
        PeftlibError: as :func:`l2_sp`; or the Fisher information is of other weights, or lacks one that is trained and
            not ``free``.

    Example:
        >>> import peftlib
        >>> from peftlib.train import fisher, regression
        >>> model = nn.Linear(2, 1)
        >>> old = [{"inputs": torch.tensor([[1.0, 0.0]]), "labels": torch.tensor([1.0])}]
        >>> known = fisher(model, old, regression)
        >>> tuning = peftlib.attach(model, peftlib.FullFineTuning())
        >>> penalty = ewc(tuning, known, 1.0)
        >>> with torch.no_grad():
        ...     _ = model.weight[0, 1].add_(5)  # the old data says nothing of this one
        >>> penalty().item()
        0.0

    Source: Kirkpatrick et al. 2017, arXiv:1612.00796, eq. 3.
    """
    weights = _effective(trained, free)
    known = base_weights(trained.model if isinstance(trained, Tuning) else trained)
    for name, values in fisher.values.items():
        if name not in known or known[name].shape != values.shape:
            there = f"it is {tuple(known[name].shape)}" if name in known else "there is none"
            raise PeftlibError(
                f"The Fisher information has {name!r} of shape {tuple(values.shape)}; in this model {there}. Estimate "
                "it on this model."
            )
    if missing := [w.name for w in weights if w.name not in fisher.values]:
        raise PeftlibError(
            f"The Fisher information has nothing of {', '.join(missing[:5])}{', ...' if missing[5:] else ''}, which is "
            "trained. Estimate it with these in names=, or let them go with free=."
        )
    factors = [fisher.values[w.name].to(w.parameter.device) for w in weights]
    return _Squares(trained, weights, factors, strength)


class _Weight:
    """One parameter of the model, what is done to it, and where it stood."""

    def __init__(self, name: str, parameter: nn.Parameter, steps: list[Step], moves: bool):
        self.name, self.parameter, self.steps, self.moves = name, parameter, steps, moves
        with torch.no_grad():
            now = self.effective()
            # a frozen weight without an update yet is its own start, and takes no memory
            same = not moves and torch.equal(now, self._wide())
            self.start = None if same else now.clone()

    def _wide(self) -> Tensor:
        value = self.parameter if self.moves else self.parameter.detach()
        return value.to(torch.promote_types(value.dtype, torch.float32))

    def effective(self) -> Tensor:
        new = self._wide()
        for rows, step in self.steps:
            # not in place: the old value is needed in the backward
            new = (
                step(new)
                if rows is None
                else torch.cat([new[: rows.start], step(new[rows]), new[rows.stop :]])
            )
        return new

    def change(self) -> Tensor:
        return self.effective() - (self._wide() if self.start is None else self.start)


class _Squares:
    """``(strength / 2) sum_w factor_w . change_w^2``, in float32 or wider also under autocast."""

    def __init__(
        self,
        trained: Tuning | nn.Module,
        weights: list[_Weight],
        factors: Sequence[Tensor | None],
        strength: float,
    ):
        if not strength > 0:
            raise PeftlibError(f"strength={strength}: a penalty needs a number above 0.")
        self.trained, self.weights, self.factors, self.strength = trained, weights, factors, strength
        self.known = {id(p) for p in trained.parameters()}

    def __call__(self) -> Tensor:
        if any(id(p) not in self.known for p in self.trained.parameters()):
            raise PeftlibError(
                "The parameters are not those that the penalty was made of: the model was sharded since, and a penalty "
                "on a part of a weight is none on the whole. Use parallel='ddp', or replay."
            )
        total: Any = 0.0
        for weight, factor in zip(self.weights, self.factors, strict=True):
            # of all changed weights one is there at a time, in the backward too
            total = total + checkpoint(
                self._one, weight, factor, use_reentrant=False, preserve_rng_state=False
            )
        return 0.5 * self.strength * total

    @staticmethod
    def _one(weight: _Weight, factor: Tensor | None) -> Tensor:
        with torch.autocast(weight.parameter.device.type, enabled=False):
            squares = weight.change().square()
            return squares.sum() if factor is None else (factor * squares).sum()


def _effective(trained: Tuning | nn.Module, free: Sequence[str]) -> list[_Weight]:
    """Every weight that is trained, or changed by what is trained."""
    model = trained.model if isinstance(trained, Tuning) else trained
    names = {id(w): name for name, w in base_weights(model).items()}
    found: dict[int, tuple[nn.Parameter, list[Step]]] = {}
    used: set[str] = set()

    def left_out(name: str) -> bool:
        hits = {glob for glob in free if fnmatchcase(name, glob)}
        used.update(hits)
        return bool(hits)

    if isinstance(trained, Tuning):
        if trained.merged or not trained.enabled:
            raise PeftlibError(
                f"{trained!r} does not act as it will in training. unmerge() or enable() it before penalizing it."
            )
        moving = {id(p) for p in trained.parameters()}
        for part in trained.parts:
            # what sites share (an MLP of prefixes) is theirs: each of them is looked at
            if left_out(part.name) or (part.delta.passive and not part.built):
                continue
            own = [p for _, p in part.delta.trained() if id(p) in names]
            for p in own:
                found.setdefault(id(p), (p, []))
            for owner, name, rows, step in () if own else _updates(part):
                parameter: Any = owner._parameters[name]
                steps = found.setdefault(id(parameter), (parameter, []))[1]
                # modules that share a weight give the same update
                if (rows, step) not in steps:
                    steps.append((rows, step))
    else:
        moving = {id(p) for p in model.parameters() if p.requires_grad}
        found = {id(p): (p, []) for p in model.parameters() if id(p) in moving and id(p) in names}
    weights = [
        _Weight(names[key], p, steps, key in moving)
        for key, (p, steps) in found.items()
        if not left_out(names[key])
    ]
    if unused := [glob for glob in free if glob not in used]:
        raise PeftlibError(
            f"free={unused[0]!r} names nothing that is trained; there are: {', '.join(w.name for w in weights[:8])}."
        )
    if not weights:
        raise PeftlibError("No weight is left that a penalty could hold: train something, or free less.")
    return weights


def _updates(part: Any) -> Any:
    try:
        return part.delta.merged()
    except PeftlibError as error:
        raise PeftlibError(
            f"The site {part.name!r} changes no weight that a penalty could hold: {error} Name it in free= to leave it "
            "alone."
        ) from error
