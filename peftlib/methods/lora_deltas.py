"""The low-rank updates of LoRA: what they share, and those of all hosts but linears (``lora_linear``).

ΔW = B A is never formed in a forward, except for raw parameters, which have no forward of their own to add to.

Shape legend: R rank, I in features, O out features, G convolution groups, V vocabulary, E stacked matrices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftlib.errors import PeftlibError
from peftlib.methods.base import (
    Delta,
    first_argument,
    map_first,
    map_nested,
    plain_class,
)
from peftlib.methods.dora import Magnitude
from peftlib.methods.linear import CONVOLUTIONS, is_transposed
from peftlib.methods.rowwise import Rows, rowwise
from peftlib.open_attention import Projection

if TYPE_CHECKING:
    from peftlib.methods.lora import LoRA


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
        new = self.added(wide(old))
        magnitude: Any = self.magnitude
        if magnitude is None:
            return new
        # The norm is that of the weight as it reads, which is not what deltas before this one have made of it.
        read: Any = self._host[0].weight
        alone = read.data_ptr() == old.data_ptr()
        return magnitude.rescale(new, new if alone else self.added(wide(read)))


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
        a = wide(self.a).unflatten(0, (groups, -1)).flatten(2)
        b = wide(self.b).flatten(1).unflatten(0, (groups, -1))
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
        return self.scaling * (wide(self.a) @ wide(self.b).T)


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
        return wide(old) + self.scaling * (wide(self.b) @ wide(self.a)).view_as(old)


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


def zeros_along(like: Tensor, size: int, axis: int) -> Tensor:
    shape = list(like.shape)
    shape[axis] = size
    return like.new_zeros(shape)


def wide(tensor: Tensor) -> Tensor:
    """The values in float32 or wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
