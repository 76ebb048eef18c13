"""Tunings added up: a new tuning whose update is a weighted sum of theirs, on what they do and not on what they store.

The product B A is linear in neither of its factors: averaging them separately is not the average of the updates. Here
an update is always s B A (or the change of a trained weight), exactly; what is then lost to a lower rank, and to the
dtype, is measured and stated.

Left out on purpose: whatever is no change of a weight. A weighted sum of two adapters' weights, or of two prompts, is
not the weighted sum of what they do. DoRA's update rescales whole rows of the weight, which no low rank holds.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftlib.attach import Plan, check_name
from peftlib.errors import PeftlibError, StateError
from peftlib.merging import MERGED, plainly
from peftlib.methods.base import Method, Site
from peftlib.methods.factors import is_low_rank, read
from peftlib.methods.lora import LoRA
from peftlib.methods.trained import Trained
from peftlib.part import Part
from peftlib.registry import registry
from peftlib.restore import restore
from peftlib.storage import is_sharded
from peftlib.summed import Terms, low_rank, values
from peftlib.sums import HOWS, chosen
from peftlib.targets import Tree
from peftlib.tuning import Tuning


@dataclass(frozen=True)
class Combination:
    """What a tuning was made of, and how closely.

    Attributes:
        how: as given to :func:`combine`.
        weights: as given to :func:`combine`.
        errors: site -> ``|dW' - dW|_F / |dW|_F``, dW' being what is stored and dW the exact result of ``how``.
        error: the same over all sites together.
    """

    how: str
    weights: Mapping[str, float]
    errors: Mapping[str, float]
    error: float

    def __str__(self) -> str:
        terms = " + ".join(f"{weight:g} {name}" for name, weight in self.weights.items())
        worst = max(self.errors, key=self.errors.__getitem__)
        return (
            f"{self.how} of {terms}, relative error {self.error:.2g} "
            f"(largest {self.errors[worst]:.2g} at {worst or 'the root'})"
        )


def combine(
    model: nn.Module,
    weights: Mapping[str, float],
    *,
    how: str = "linear",
    rank: int | None = None,
    name: str = "combined",
    density: float | None = None,
    generator: torch.Generator | None = None,
) -> Tuning:
    r"""Make a tuning of a weighted sum of others, ``dW = sum_t w_t dW_t`` with ``dW_t = s_t B_t A_t``.

    Args:
        model: a model with the tunings on it.
        weights: tuning name -> weight, of any sign. The tunings may differ in sites, ranks and scales; a site that only
            some have counts as zero in the others.
        how: ``"linear"``: the sum; exact without ``rank``, else its best approximation of that rank. ``"concat"``: the
            sum, always exact. ``"svd"``: the best approximation of the sum. ``"ties"``: each update trimmed to its
            largest elements, a sign elected per element by ``sum_t w_t dW_t``, and the mean of ``w_t dW_t`` over those
            that agree (weights of 1 are the paper's). ``"dare"``: each element kept with probability ``density`` and
            divided by it, then summed.
        rank: of the result, less where a matrix has less or the sum needs less. ``None``: for ``"linear"`` and
            ``"concat"`` the sum of the ranks, for the others the largest of them. For full, partial and bias tunings
            there is no rank: their weights are combined as they are.
        name: the new tuning's name.
        density: share of the elements kept, for ``"ties"`` (default 0.2, per weight) and ``"dare"`` (0.5).
        generator: draws what ``"dare"`` drops; ``None``: torch's own.

    Returns:
        The new tuning, attached but disabled, so that nothing the model computes changes: ``use(model, name)`` switches
        to it. Its ``combination`` states the error ``|dW' - dW|_F / |dW|_F`` per site and in total, dW being the exact
        result of ``how``, in float64; ``summary`` prints it. It has no dropout, scale 1, and the tunings' dtype.

    Raises:
        StateError: a tuning that the model does not have, or a name that is taken.
        PeftlibError: anything but finite weights, a rank below 1 or above every matrix, an unknown ``how``, or a tuning
            that is no sum of weights (adapters, prefixes, prompts, new heads, DoRA). The model is then unchanged.

    Example:
        >>> import torch, peftlib
        >>> model, x = torch.nn.Linear(6, 6), torch.randn(2, 6)
        >>> base = model(x)
        >>> for name in "ab":
        ...     tuning = peftlib.attach(model, peftlib.LoRA(rank=2), name=name)
        ...     _ = torch.nn.init.normal_(tuning.state_dict()["lora.b"])
        >>> both = peftlib.combine(model, {"a": 0.5, "b": -1.5})
        >>> updates = {}
        >>> for name in ("a", "b", "combined"):
        ...     _ = peftlib.use(model, name)
        ...     updates[name] = model(x) - base
        >>> torch.allclose(updates["combined"], 0.5 * updates["a"] - 1.5 * updates["b"], atol=1e-5)
        True
        >>> both.sites[""].rank, both.combination.error < 1e-6
        (4, True)

    Source: TIES: Yadav et al. 2023, arXiv:2306.01708, algorithm 1, per weight; DARE: Yu et al. 2024, arXiv:2311.03099,
    section 3.2.
    """
    tunings = _check(model, weights, how, rank, name)
    add = chosen(how, density, generator)
    tree = Tree(model)
    with plainly(tree):
        found = _gather(weights, tunings)
        _check_rank(rank, found)
        plan: dict[Method, list[Site]] = {}
        state: dict[str, Tensor] = {}
        apart: dict[str, tuple[float, float]] = {}
        for (site_name, kind), terms in found.items():
            part = terms[0][1]
            summed = low_rank(terms, how, rank, add) if kind == "lora" else values(terms, add)
            site = Site(site_name, part.host, part.parameter, model, summed.facts)
            plan.setdefault(summed.method, []).append(site)
            prefix = f"{site_name}.{summed.method.label}" if site_name else summed.method.label
            for key, tensor in summed.tensors.items():
                if not (tensor.isfinite().all() and math.isfinite(summed.size)):
                    raise PeftlibError(
                        f"Combining {' and '.join(map(repr, weights))} at {site_name or 'the root'!r} gives values "
                        f"that are not finite in {tensor.dtype}. Scale the weights down."
                    )
                state[f"{prefix}.{key}"] = tensor
            apart[prefix] = (summed.residual, summed.size)
        given: Plan = list(plan.items())
        tuning = restore(
            tree, given, state, name=name, trainable=True, enabled=False, source="The sum", what="the sum"
        )
    built = [part.prefix for part in tuning.parts if part.built]
    errors = {site: _ratio(*apart[prefix]) for site, prefix in zip(tuning.sites, built, strict=True)}
    total = _ratio(*(math.hypot(*column) for column in zip(*apart.values(), strict=True)))
    tuning.combination = Combination(how, {n: float(w) for n, w in weights.items()}, errors, total)
    return tuning


def _gather(weights: Mapping[str, float], tunings: Mapping[str, Tuning]) -> dict[tuple[str, str], Terms]:
    """What each tuning has at each site, by site name and kind of update."""
    found: dict[tuple[str, str], Terms] = {}
    for name, weight in weights.items():
        for part in tunings[name].parts:
            kind = "lora" if is_low_rank(part.delta) else "values"
            why = _why_not(part)
            if why is not None:
                raise PeftlibError(
                    f"The tuning {name!r} cannot be combined: at {part.name or 'the root'!r} it has {part.method}, "
                    f"{why}"
                )
            if weight:
                found.setdefault((part.name, kind), []).append((float(weight), part))
    return found


def _why_not(part: Part) -> str | None:
    """Why a part's update is not what a weighted sum of its values would be a weighted sum of."""
    delta = part.delta
    tensors = [t for _, t in delta.tensors()]
    if any(is_sharded(t) for t in tensors):
        return "which is sharded. Combine before fully_shard."
    if any(t.is_meta for t in tensors):
        return "which is on the meta device and has no values yet."
    if not all(t.isfinite().all() for t in tensors):
        return "which has values that are not finite. Look for NaN in its training."
    if is_low_rank(delta):
        return None
    if isinstance(part.method, LoRA):
        return (
            "which rescales whole rows of the weight (DoRA), so that its update has no low rank. merge() it, or "
            "combine tunings without use_dora."
        )
    if not isinstance(delta, Trained):
        return (
            "which is no sum with a weight, so that a weighted sum of its values is not the weighted sum of what it "
            "does. Combine tunings of LoRA, or of base weights (full, partial, bias)."
        )
    if delta.on and not delta.keep_base:
        return (
            "with keep_base=False, so that its difference to the base is unknown. Attach with keep_base=True."
        )
    for owner in (*delta._host, *delta._sharing):
        merged = owner.__dict__.get(MERGED)
        if merged:
            return f"where {next(iter(merged.values()))!r} is merged into the base. unmerge() that one first."
    own = dict(delta.tensors())
    if any(not torch.equal(own[n], delta.base(n)) for n in delta.statistics):
        return (
            "which has moved the running statistics of a normalization, and a weighted sum of variances is no "
            "variance. Train with the normalizations left out, for instance targets=[..., '!*norm*']."
        )
    return None


def _check(
    model: nn.Module, weights: Mapping[str, float], how: str, rank: int | None, name: str
) -> Mapping[str, Tuning]:
    if not isinstance(model, nn.Module):
        raise PeftlibError(f"combine needs an nn.Module; got {type(model).__name__}.")
    have = registry(model)
    if not isinstance(weights, Mapping) or not weights:
        raise PeftlibError(f"combine needs weights {{tuning name: weight}}, at least one; got {weights!r}.")
    for key, weight in weights.items():
        if key not in have:
            raise StateError(
                f"The model has no tuning {key!r}; it has: {', '.join(map(repr, have)) or 'none'}. A tuning to combine "
                "has to be on the model; load() it first."
            )
        if isinstance(weight, bool) or not isinstance(weight, numbers.Real) or not math.isfinite(weight):
            raise PeftlibError(f"The weight of {key!r} must be a finite number; got {weight!r}.")
    if not any(weights.values()):
        raise PeftlibError(
            "All weights are 0, so there is nothing to combine. Give at least one another value."
        )
    if how not in HOWS:
        raise PeftlibError(f"combine(how={how!r}): how must be one of {', '.join(map(repr, HOWS))}.")
    if rank is not None:
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise PeftlibError(f"combine(rank={rank!r}): rank must be an integer of at least 1, or None.")
        if how == "concat":
            raise PeftlibError(
                "combine(how='concat', rank=...): concat keeps all of the sum, so its rank is the sum of the ranks. "
                "Leave rank out, or use how='svd'."
            )
    check_name(model, name)
    return have


def _check_rank(rank: int | None, found: Mapping[tuple[str, str], Terms]) -> None:
    if rank is None:
        return
    low = [read(terms[0][1].delta).largest_rank for (_, kind), terms in found.items() if kind == "lora"]
    if not low:
        raise PeftlibError(
            f"combine(rank={rank}): none of the tunings has an update of low rank. Leave rank out."
        )
    if rank > max(low):
        raise PeftlibError(
            f"combine(rank={rank}): the largest matrix has rank {max(low)}. Take that or less."
        )


def _ratio(residual: float, size: float) -> float:
    return residual / size if size else 0.0 if not residual else math.inf
