"""LoRA: a frozen matrix W gets a trained low-rank update, ``y = W x + s B A x``.

One small delta class per kind of host (``lora_deltas``, ``lora_linear``); :class:`LoRA` picks.

Shape legend: R rank, I in features, O out features, G convolution groups, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from peftlib.errors import PeftlibError
from peftlib.methods.base import (
    Delta,
    Method,
    Site,
    check_positive_int,
    check_probability,
    placement,
)
from peftlib.methods.dora import Magnitude
from peftlib.methods.linear import CONVOLUTIONS, linear_shape
from peftlib.methods.lora_deltas import ConvLoRA, EmbeddingLoRA, LowRank, ParameterLoRA
from peftlib.methods.lora_linear import LinearLoRA
from peftlib.methods.shared_input import WITH, Handing, with_shared_inputs

if TYPE_CHECKING:
    from peftlib.probe import Probe
    from peftlib.targets import Tree


@dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    r"""Low-rank adaptation: ``y = W x + b + s B A x`` with s = alpha / rank.

    Acts on linear-like modules (A (R, I), B (O, R): R (I + O) parameters), ``nn.Conv1d/2d/3d`` with groups
    (A (G R, I/G, *k), B (O, R, 1...)), ``nn.Embedding`` (A (V, R), B (O, R)), ``nn.MultiheadAttention`` (q, k, v and
    out separately, as ``q_proj`` ... ``out_proj``) and raw parameters of two or three axes.
    A starts kaiming-uniform(sqrt 5), B at zero, so attaching changes nothing; embeddings start with A zero and B
    normal.

    Args:
        rank: R, at most the smaller side of the matrix.
        alpha: numerator of the scale; ``None`` takes the rank (scale 1).
        dropout: probability of dropping an element of the update's input, in training.
        use_rslora: s = alpha / sqrt(rank) instead.
        use_dora: weight-decomposed form ``y = b + m / |W + s B A| (W + s B A) x`` with a trained magnitude m per
            output, the norm per output row taken as a constant in the backward. Linear-like and convolution sites.
        init: ``"kaiming"``, or ``"gaussian"`` for A normal with spread 1/R.
        rows: ranges (start, stop) of output features that get an update of their own each, for fused weights: q and v
            of a fused qkv of width d are ``rows=[(0, d), (2 * d, 3 * d)]``. ``None``: one update for all.

    Raises:
        PeftlibError: a field out of range; at attach, a rank larger than the matrix.

    Default sites: every linear-like module but the output head.

    Example:
        >>> import torch, peftlib
        >>> model = torch.nn.Linear(768, 768)
        >>> peftlib.attach(model, peftlib.LoRA(rank=8, alpha=16)).num_parameters  # 8 * (768 + 768)
        12288

    Source: Hu et al. 2021, arXiv:2106.09685, section 4.1; rsLoRA: Kalajdzievski 2023, arXiv:2312.03732;
    DoRA: Liu et al. 2024, arXiv:2402.09353, section 4 (4.3 for the constant norm).
    """

    follows_calls: ClassVar[bool] = True
    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    init: str = "kaiming"
    rows: Sequence[tuple[int, int]] | None = None

    def __post_init__(self) -> None:
        check_positive_int("LoRA", rank=self.rank)
        check_probability("LoRA", dropout=self.dropout)
        if self.alpha is not None and not (
            isinstance(self.alpha, (int, float)) and math.isfinite(self.alpha) and self.alpha
        ):
            raise PeftlibError(
                f"LoRA(alpha={self.alpha!r}): alpha must be a finite number other than 0, or None for the rank."
            )
        if self.init not in ("kaiming", "gaussian"):
            raise PeftlibError(f"LoRA(init={self.init!r}): init must be 'kaiming' or 'gaussian'.")
        if self.rows is not None:
            rows = tuple((int(start), int(stop)) for start, stop in self.rows)
            bounds = [0, *(edge for pair in rows for edge in pair)]
            if not rows or bounds != sorted(bounds) or any(start >= stop for start, stop in rows):
                raise PeftlibError(
                    f"LoRA(rows={self.rows!r}): rows must be ascending, disjoint, non-empty (start, stop) ranges."
                )
            if self.use_dora:
                raise PeftlibError(
                    "LoRA(rows=..., use_dora=True): DoRA rescales every output row; leave rows out."
                )
            object.__setattr__(self, "rows", rows)

    @property
    def scaling(self) -> float:
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def _matrix(self, site: Site) -> tuple[int, int] | None:
        """(in, out) of the matrix a site's update has, or ``None`` if it has none."""
        module: Any = site.module
        if site.parameter is not None:
            shape = module._parameters[site.parameter].shape
            if len(shape) < 2:
                return None
            return (shape[-1], shape[-2]) if len(shape) <= 3 else (shape[1:].numel(), shape[0])
        if isinstance(module, CONVOLUTIONS):
            return module.weight[0].numel(), module.out_channels // module.groups
        if isinstance(module, nn.Embedding):
            return module.num_embeddings, module.embedding_dim
        return linear_shape(module)

    def refuses(self, site: Site) -> str | None:
        if self._matrix(site) is None:
            return (
                "LoRA acts on linear-like modules, nn.Conv1d/2d/3d, nn.Embedding, nn.MultiheadAttention and parameters "
                "of two or more axes"
            )
        kind = (
            "an embedding"
            if isinstance(site.module, nn.Embedding)
            else "a raw parameter"
            if site.parameter
            else None
        )
        if self.use_dora and kind:
            return (
                f"DoRA needs the output features of a linear or convolution, not {kind}; leave use_dora out"
            )
        if self.rows and (kind or isinstance(site.module, CONVOLUTIONS)):
            return "rows= slices the output features of a linear-like module"
        return None

    def fits(self, site: Site) -> str | None:
        matrix = self._matrix(site)
        assert matrix is not None
        if self.rows and self.rows[-1][1] > matrix[1]:
            return f"rows reach to {self.rows[-1][1]}, the module has {matrix[1]} output features"
        return None

    def wasteful(self, site: Site) -> str | None:
        matrix = self._matrix(site)
        assert matrix is not None
        if self.rows:
            matrix = (matrix[0], min(stop - start for start, stop in self.rows))
        if self.rank > min(matrix):
            return f"rank {self.rank} is larger than its matrix of {matrix[0]} by {matrix[1]}"
        return None

    def default_sites(self, tree: Tree, probe: Probe | None) -> list[Site]:
        return list(linear_sites(tree, probe))

    def default_skips(self, tree: Tree, probe: Probe | None) -> dict[str, str]:
        heads = tree.output_heads(probe)
        return {n: "the output head" for n in sorted(heads) if linear_shape(tree.modules[n]) is not None}

    def survey(self, sites: Sequence[Site], tree: Tree, probe: Probe | None) -> list[Site]:
        return list(sites) if self.rows or self.use_dora else with_shared_inputs(sites, probe)

    def build(self, sites: Sequence[Site]) -> dict[str, Delta]:
        built = {site.name: self._delta(site) for site in sites}
        groups: dict[str, list[LinearLoRA]] = {}
        for site in sites:
            delta = built[site.name]
            if WITH in site.facts and isinstance(delta, LinearLoRA):
                groups.setdefault(site.facts[WITH], []).append(delta)
        for group in groups.values():
            together = (Handing(), *group)
            for delta in group:
                delta.together = together if len(group) > 1 else ()
        return built

    def _delta(self, site: Site) -> Delta:
        host: Any = site.module
        where = placement(site, self.dtype)
        if site.parameter is not None:
            if self.dropout:
                raise PeftlibError(
                    f"LoRA(dropout=...) needs an input to drop; {site.name!r} is a raw parameter."
                )
            return ParameterLoRA(self, host, site.parameter, **where)
        if isinstance(host, nn.Embedding):
            return EmbeddingLoRA(self, host, **where)
        if isinstance(host, CONVOLUTIONS):
            delta: LowRank = ConvLoRA(self, host, **where)
        else:
            shape = linear_shape(host)
            assert shape is not None
            delta = LinearLoRA(self, host, shape, **where)
        if self.use_dora:
            delta.magnitude = Magnitude(host, delta, **where)
        return delta

    def config(self) -> dict[str, Any]:
        return {"rank": self.rank, **super().config()}


def linear_sites(tree: Tree, probe: Probe | None) -> Iterator[Site]:
    """Every linear-like module but the output head; the root itself is never a head."""
    heads = tree.output_heads(probe)
    for site in tree.sites():
        if (
            linear_shape(site.module) is not None
            and site.name not in heads
            and not tree.is_bypassed(site.name)
        ):
            yield site
