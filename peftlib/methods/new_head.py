"""A fresh output layer in place of the model's own, trained and saved with the tuning.

``out = W h + b`` with W, b new; the layer that was there is neither called nor changed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftlib.errors import PeftlibError, TargetError
from peftlib.methods.base import Delta, Method, Site, check_positive_int, first_argument, placement
from peftlib.methods.linear import linear_shape
from peftlib.methods.rowwise import Rows

if TYPE_CHECKING:
    from peftlib.probe import Probe
    from peftlib.targets import Tree


class Head(Delta):
    """``F.linear(x, weight, bias)`` instead of the host's forward."""

    everywhere: ClassVar[bool] = True

    def __init__(self, in_features: int, out_features: int, bias: bool, **where: Any):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **where))
        self.bias = nn.Parameter(torch.zeros(out_features, **where)) if bias else None
        if self.weight.device.type != "meta":
            nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        x = first_argument(args, kwargs)
        weight = self.weight.to(x.dtype)
        return F.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))

    def alike(self) -> Hashable:
        return type(self), self.weight.shape, self.weight.dtype, self.bias is None

    @classmethod
    def routed(cls, rows: Rows, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        x = first_argument(args, kwargs)
        first: Any = rows.deltas[0]
        at = rows.axis(x)
        x_B = at.split(x, len(rows))
        x_BNI = x_B.reshape(len(rows), -1, x.shape[-1])
        y_BNO = torch.bmm(x_BNI, rows.stacked("weight", lambda d: d.weight.T).to(x.dtype))
        if first.bias is not None:
            y_BNO = y_BNO + rows.stacked("bias", lambda d: d.bias).to(x.dtype).unsqueeze(1)
        return at.join(y_BNO.view(*x_B.shape[:-1], -1))

    def merged(self) -> Any:
        raise PeftlibError(
            "NewHead cannot be merged: it replaces a layer of another shape. Keep the tuning attached, or set the "
            "layer yourself after detach()."
        )


@dataclass(frozen=True)
class NewHead(Method):
    """A fresh output layer: ``out = W h + b``.

    Args:
        out_features: size of the new output.
        bias: whether it has a bias (starting at 0). W starts kaiming-uniform(sqrt 5), as ``nn.Linear`` does.

    Raises:
        PeftlibError: ``out_features`` is not a positive integer, or the site is not linear-like.

    Example:
        >>> import torch, peftlib
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> tuning = peftlib.attach(model, {"0": peftlib.LoRA(rank=2), "2": peftlib.NewHead(5)})
        >>> model(torch.randn(3, 8)).shape
        torch.Size([3, 5])
    """

    out_features: int
    bias: bool = True

    def __post_init__(self) -> None:
        check_positive_int("NewHead", out_features=self.out_features)
        if self.head is not None:
            raise PeftlibError("NewHead is a head itself and takes none.")

    def refuses(self, site: Site) -> str | None:
        if site.parameter is not None or linear_shape(site.module) is None:
            return "a new head replaces a linear layer (a module with in_features and out_features)"
        return None

    def default_sites(self, tree: Tree, probe: Probe | None) -> list[Site]:
        names = sorted(tree.output_heads(probe))
        if len(names) != 1:
            found = f" ({', '.join(map(repr, names))})" if names else ""
            hint = "" if probe is not None else ", or pass example="
            raise TargetError(
                f"NewHead needs one output layer to replace, and {len(names)} were found{found}. Name it: "
                f"head={{'classifier': NewHead(...)}}{hint}."
            )
        return [tree.site(names[0])]

    def build(self, sites: Sequence[Site]) -> dict[str, Delta]:
        found: dict[str, Delta] = {}
        for site in sites:
            shape = linear_shape(site.module)
            assert shape is not None
            found[site.name] = Head(shape[0], self.out_features, self.bias, **placement(site, self.dtype))
        return found
