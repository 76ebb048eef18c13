"""LoRA: a frozen matrix W gets a trained low-rank update, ``y = W x + s B A x``.

One small delta class per kind of host (linear-like, convolution, embedding, raw parameter); :class:`LoRA` picks.
ΔW = B A is never formed in a forward, except for raw parameters, which have no forward of their own to add to.

Shape legend: R rank, I in features, O out features, G convolution groups, V vocabulary, E stacked matrices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftlib.errors import PeftlibError
from peftlib.kernels.low_rank import add_low_rank, low_rank_linear
from peftlib.kernels.shared_input import LowRankLinear
from peftlib.methods.base import (
    Delta,
    Method,
    Site,
    check_positive_int,
    check_probability,
    first_argument,
    map_first,
    map_nested,
    placement,
    plain_class,
)
from peftlib.methods.dora import Magnitude
from peftlib.methods.linear import CONVOLUTIONS, is_transposed, linear_shape
from peftlib.methods.rowwise import Rows, rowwise
from peftlib.methods.shared_input import WITH, Handing, with_shared_inputs
from peftlib.open_attention import Projection

if TYPE_CHECKING:
    from peftlib.probe import Probe
    from peftlib.targets import Tree


_OPEN_LINEARS = (nn.Linear.forward, Projection.forward)
"""Forwards known to be ``F.linear(x, self.weight, self.bias)`` and nothing else: there the update needs no base."""


class LowRank(Delta):
    """``a`` and ``b``, their scale, and the dropout on the input; subclasses know the host's shape."""

    def __init__(self, method: LoRA, host: nn.Module, a: Sequence[int], b: Sequence[int], **where: Any):
        super().__init__()
        self.scaling = method.scaling
        self.p = method.dropout
        # In a tuple: a reference, not a child. Deep copies and pickles of the model keep it right.
        self._host = (host,)
        # Not on the class: an attribute there would hide the module that DoRA puts here.
        self.magnitude: Magnitude | None = None
        self.a = nn.Parameter(torch.empty(*a, **where))
        self.b = nn.Parameter(torch.empty(*b, **where))
        if where["device"].type != "meta":
            with torch.no_grad():
                self.start(method.init)

    def start(self, init: str) -> None:
        if init == "gaussian":
            nn.init.normal_(self.a, std=1 / self.a.shape[-2])
        else:
            for a_RI in self.a.flatten(0, -3) if self.a.dim() > 2 else [self.a]:
                nn.init.kaiming_uniform_(a_RI, a=math.sqrt(5))
        nn.init.zeros_(self.b)

    def derive(self) -> None:
        if self.magnitude is not None:
            self.magnitude.derive(self.a)

    def extra_repr(self) -> str:
        return f"a={tuple(self.a.shape)}, b={tuple(self.b.shape)}, scaling={self.scaling:g}"

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        x = first_argument(args, kwargs)
        if self.magnitude is None:
            # A factor's dtype (dtype=) never becomes the model's.
            return map_first(base(*args, **kwargs), lambda y: y + self.update(x).to(y.dtype))
        scale, bias = self.magnitude(self.a, self.b, self.scaling)

        def rescaled(y: Tensor, update: Tensor) -> Tensor:
            return torch.addcmul(bias, scale, y - bias + update).to(y.dtype)

        return map_first(
            base(*args, **kwargs),
            # Nested tensors (a padded batch in an nn.TransformerEncoder) do not broadcast.
            lambda y: map_nested(rescaled, y, self.update(x)) if y.is_nested else rescaled(y, self.update(x)),
        )

    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p, self.training) if self.p else x

    def update(self, x: Tensor) -> Tensor:
        """``s B A x`` in the layout of the host's output."""
        raise NotImplementedError

    def delta_weight(self) -> Tensor:
        """``s B A`` in the layout of the host's weight, for merging; float32 or wider."""
        raise NotImplementedError

    def added(self, weight: Tensor) -> Tensor:
        """``W + s B A`` in new memory, W in float32 or wider."""
        return weight + self.delta_weight()

    def alike(self) -> Hashable:
        magnitude = None if self.magnitude is None else self.magnitude.m.dtype
        sizes = tuple((p.shape, p.dtype) for p in (self.a, self.b))
        return type(self), self.scaling, self.p, self.training, magnitude, sizes

    @classmethod
    def routed(cls, rows: Rows, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return rowwise(rows, base, args, kwargs)

    def merged(self) -> Any:
        host = self._host[0]
        owner, name, rows = host.owner() if isinstance(host, Projection) else (host, "weight", None)
        weight = owner._parameters.get(name)
        if weight is None or not weight.is_floating_point():
            raise PeftlibError(
                f"{type(host).__name__} has no floating-point parameter 'weight' to merge into (its base is opaque). "
                "Keep the tuning attached."
            )
        if not isinstance(host, Projection) and not applies_plainly(host):
            raise PeftlibError(
                f"{type(host).__name__} does more with its weight than apply it (its forward is its own), so a "
                "merged weight "
                "would not give what the tuning gives. Keep the tuning attached."
            )
        return [(owner, name, rows, self.update_weight)]

    def update_weight(self, old: Tensor) -> Tensor:
        new = self.added(_wide(old))
        magnitude: Any = self.magnitude
        if magnitude is None:
            return new
        # The norm is that of the weight as it reads, which is not what deltas before this one have made of it.
        read: Any = self._host[0].weight
        alone = read.data_ptr() == old.data_ptr()
        return magnitude.rescale(new, new if alone else self.added(_wide(read)))


class LinearLoRA(LowRank):
    """``a_RI``, ``b_OR`` beside any module that maps I features to O."""

    def __init__(self, method: LoRA, host: nn.Module, shape: tuple[int, int], **where: Any):
        self.rows = tuple(method.rows or ())
        covered = sum(stop - start for start, stop in self.rows) if self.rows else shape[1]
        super().__init__(
            method, host, (max(1, len(self.rows)) * method.rank, shape[0]), (covered, method.rank), **where
        )
        self.out_features = shape[1]
        # What waits for whom, and the deltas that are given the same tensor, this one among them.
        self.together: tuple[Any, ...] = ()

    def start(self, init: str) -> None:
        if self.rows:
            for part in self.a.chunk(len(self.rows)):
                nn.init.kaiming_uniform_(part, a=math.sqrt(5)) if init == "kaiming" else nn.init.normal_(
                    part, std=1 / part.shape[0]
                )
            nn.init.zeros_(self.b)
        else:
            super().start(init)

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.rows or self.magnitude is not None:
            return super().forward(base, *args, **kwargs)
        p = self.p if self.training else 0.0
        if type(base) is partial and base.func in _OPEN_LINEARS and len(args) == 1:
            if self.together and not p and not torch.compiler.is_compiling() and torch.is_grad_enabled():
                y = self.together[0].take(self.together[1:], self, args[0])
                if y is not None:
                    return y
            host: Any = self._host[0]
            return low_rank_linear(args[0], host.weight, host.bias, self.a, self.b, self.scaling, p)
        x = first_argument(args, kwargs)
        add: Callable[[Tensor], Tensor] = lambda y: add_low_rank(y, x, self.a, self.b, self.scaling, p)  # noqa: E731
        return map_first(base(*args, **kwargs), add)

    def linear(self) -> LowRankLinear:
        host: Any = self._host[0]
        return LowRankLinear(host.weight, host.bias, self.a, self.b)

    def ready_to_share(self) -> bool:
        """Whether a call of the host, as it is now, would begin with this delta and the host's own product."""
        host = self._host[0]
        first = next(iter(host.__dict__.get("_peft_active", ())), None)
        dropping = self.p and self.training
        return first is self and not dropping and plain_class(host).forward in _OPEN_LINEARS

    def update(self, x: Tensor) -> Tensor:
        s = F.linear(self.drop(x), self.a.to(x.dtype)) * self.scaling
        b = self.b.to(x.dtype)
        return F.linear(s, b) if not self.rows else self._spread(s, b, lambda s, b: F.linear(s, b), -1)

    def alike(self) -> Hashable:
        if self.rows or self.magnitude is not None:
            return super().alike(), self.rows
        # Ranks and scales may differ: see routed.
        return type(self), self.p, self.training, self.a.dtype

    @classmethod
    def routed(cls, rows: Rows, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``y_B += (x_B A_Bᵀ) B_Bᵀ`` with the matrices of each row, padded to the largest rank."""
        deltas: Any = rows.deltas
        first = deltas[0]
        if first.rows or first.magnitude is not None:
            return rowwise(rows, base, args, kwargs)
        x = first_argument(args, kwargs)
        at = rows.axis(x)
        a_BRI = rows.stacked("a", lambda d: d.a)
        b_BRO = rows.stacked("b", lambda d: d.b.T)
        scale = rows.scalars("scaling", x)
        output = base(*args, **kwargs)

        def add(y: Tensor) -> Tensor:
            dropped = first.drop(x)
            x_BNI = at.split(dropped, len(rows)).reshape(len(rows), -1, x.shape[-1])
            s_BNR = torch.bmm(x_BNI, a_BRI.to(x.dtype).mT) * scale
            y_B = at.split(y, len(rows))
            y_BNO = y_B.reshape(len(rows), -1, y.shape[-1])
            # The sum in the output's dtype, as without routing: a factor's dtype (dtype=) never becomes the model's.
            new_BNO = torch.baddbmm(y_BNO, s_BNR.to(y.dtype), b_BRO.to(y.dtype))
            return at.join(new_BNO.view(y_B.shape))

        return map_first(output, add)

    def _spread(self, s: Tensor, b: Tensor, product: Callable[[Tensor, Tensor], Tensor], axis: int) -> Tensor:
        """Each slice's product at its own output features, zeros between them."""
        sizes = [stop - start for start, stop in self.rows]
        pieces, at = [], 0
        for (start, stop), s_i, b_i in zip(
            self.rows, s.chunk(len(self.rows), axis), b.split(sizes), strict=True
        ):
            piece = product(s_i, b_i)
            if start > at:
                pieces.append(_zeros(piece, start - at, axis))
            pieces.append(piece)
            at = stop
        if at < self.out_features:
            pieces.append(_zeros(pieces[0], self.out_features - at, axis))
        return torch.cat(pieces, axis)

    def update_weight(self, old: Tensor) -> Tensor:
        if self.rows or self.magnitude is not None:
            return super().update_weight(old)
        wide = torch.promote_types(old.dtype, torch.float32)
        a, b = self.a.detach().to(wide), self.b.detach().to(wide)
        left, right = (a.T, b.T) if is_transposed(self._host[0]) else (b, a)
        if old.dtype == wide:
            return torch.addmm(old, left, right, alpha=self.scaling)
        # A narrow weight widens block by block in one small buffer, so that no wide copy of it is ever written.
        new, rows = torch.empty_like(old), max(1, _BLOCK // old.shape[1])
        buffer = old.new_empty((min(rows, old.shape[0]), old.shape[1]), dtype=wide)
        for old_part, new_part, left_part in zip(*(t.split(rows) for t in (old, new, left)), strict=True):
            part = buffer[: old_part.shape[0]].copy_(old_part)
            new_part.copy_(part.addmm_(left_part, right, alpha=self.scaling))
        return new

    def delta_weight(self) -> Tensor:
        a, b = _wide(self.a), _wide(self.b)
        dense_OI = self._spread(a, b, lambda a, b: b @ a, 0) if self.rows else b @ a
        return self.scaling * (dense_OI.T if is_transposed(self._host[0]) else dense_OI)


class ConvLoRA(LowRank):
    """``a`` is a convolution to R channels with the host's own geometry, ``b`` a 1x1 convolution, both grouped."""

    def __init__(self, method: LoRA, host: Any, **where: Any):
        kernel = host.weight.shape[2:]
        groups = host.groups
        ones = (1,) * len(kernel)
        a = (groups * method.rank, host.in_channels // groups, *kernel)
        super().__init__(method, host, a, (host.out_channels, method.rank, *ones), **where)

    def start(self, init: str) -> None:
        a = self.a.unflatten(0, (self._host[0].groups, -1))
        for part in a:
            nn.init.kaiming_uniform_(part, a=math.sqrt(5)) if init == "kaiming" else nn.init.normal_(
                part, std=1 / part.shape[0]
            )
        nn.init.zeros_(self.b)

    def update(self, x: Tensor) -> Tensor:
        host: Any = self._host[0]
        s = host._conv_forward(self.drop(x), self.a.to(x.dtype), None)
        convolve = (F.conv1d, F.conv2d, F.conv3d)[self.b.dim() - 3]
        return convolve(s, self.b.to(x.dtype), groups=host.groups) * self.scaling

    def delta_weight(self) -> Tensor:
        groups = self._host[0].groups
        a = _wide(self.a).unflatten(0, (groups, -1)).flatten(2)
        b = _wide(self.b).flatten(1).unflatten(0, (groups, -1))
        return self.scaling * (b @ a).flatten(0, 1).view_as(self._host[0].weight)


class EmbeddingLoRA(LowRank):
    """``a_VR`` (zeros) looked up by id, ``b_OR`` (normal): the start that loralib gives embeddings."""

    def __init__(self, method: LoRA, host: nn.Embedding, **where: Any):
        super().__init__(
            method, host, (host.num_embeddings, method.rank), (host.embedding_dim, method.rank), **where
        )

    def start(self, init: str) -> None:
        nn.init.zeros_(self.a)
        nn.init.normal_(self.b)

    def update(self, x: Tensor) -> Tensor:
        host: Any = self._host[0]
        # An id has no features to drop; those of its row of A are the first there are.
        return F.linear(self.drop(F.embedding(x, self.a, host.padding_idx)), self.b) * self.scaling

    def delta_weight(self) -> Tensor:
        return self.scaling * (_wide(self.a) @ _wide(self.b).T)


class ParameterLoRA(Delta):
    """A raw weight W (O, I) or a stack (E, O, I) reads as ``W + s B A``; ΔW is formed at each read."""

    def __init__(self, method: LoRA, host: nn.Module, name: str, **where: Any):
        super().__init__()
        shape = host._parameters[name].shape  # type: ignore[union-attr]
        *stack, out, _ = shape if len(shape) <= 3 else (*shape[:1], shape[1:].numel())
        width = shape[-1] if len(shape) <= 3 else shape[1:].numel()
        self.scaling, self._host, self.name = method.scaling, (host,), name
        self.a = nn.Parameter(torch.empty(*stack, method.rank, width, **where))
        self.b = nn.Parameter(torch.zeros(*stack, out, method.rank, **where))
        if self.a.device.type != "meta":
            LowRank.start(self, method.init)  # type: ignore[arg-type]

    def alike(self) -> Hashable:
        raise PeftlibError(
            "it changes a weight itself, which all rows of a batch share; target the module instead"
        )

    def effective(self, value: Tensor) -> Tensor:
        return value + self.scaling * (self.b @ self.a).view_as(value).to(value.dtype)

    def merged(self) -> Any:
        return [(self._host[0], self.name, None, self.update_weight)]

    def update_weight(self, old: Tensor) -> Tensor:
        return _wide(old) + self.scaling * (_wide(self.b) @ _wide(self.a)).view_as(old)


_BLOCK = 1 << 18
"""Elements of a weight that are widened at a time."""


@torch.no_grad()
def applies_plainly(host: Any) -> bool:
    """Whether a host's forward is its weight applied to its input: torch's own forwards, or one that shows it."""
    plain = plain_class(host)
    if isinstance(host, CONVOLUTIONS):
        own = next(c for c in CONVOLUTIONS if isinstance(host, c))
        return plain.forward is own.forward and plain._conv_forward is own._conv_forward
    if isinstance(host, nn.Embedding):
        # With max_norm the looked up rows are scaled first, by a norm that a merge would change.
        return plain.forward is nn.Embedding.forward and host.max_norm is None
    if plain.forward is nn.Linear.forward:
        return True
    weight = host.weight  # as its forward reads it: an update of the raw weight may be on
    weight_OI = weight.T if is_transposed(host) else weight
    x = torch.linspace(-1, 1, 3 * weight_OI.shape[1], device=weight.device).view(3, -1).to(weight.dtype)
    try:
        y = plain.forward(host, x)
    except (RuntimeError, TypeError, ValueError):
        return False  # it takes more than one tensor of features
    bias = getattr(host, "bias", None)
    expected = F.linear(x, weight_OI, bias if isinstance(bias, Tensor) else None)
    return (
        isinstance(y, Tensor)
        and y.shape == expected.shape
        and torch.allclose(y, expected, rtol=1e-2, atol=1e-3)
    )


def _zeros(like: Tensor, size: int, axis: int) -> Tensor:
    shape = list(like.shape)
    shape[axis] = size
    return like.new_zeros(shape)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


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
