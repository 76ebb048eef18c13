"""Training single rows of an embedding: new tokens learn, the rest of the vocabulary stays.

Where an output layer is tied to the embedding, its logits for these tokens follow the trained rows.

Shape legend: V vocabulary, D embedding width, N trained rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftlib.errors import PeftlibError, TargetError
from peftlib.methods.base import Delta, Method, Site, first_argument, map_first, placement
from peftlib.methods.linear import linear_shape

if TYPE_CHECKING:
    from peftlib.probe import Probe
    from peftlib.targets import Tree


class Rows(Delta):
    """At the embedding: rows of their own for some ids."""

    ids: Tensor
    which: Tensor

    def __init__(self, host: nn.Embedding, ids: Sequence[int], **where: Any):
        super().__init__()
        self._host = (host,)
        self.rows = nn.Parameter(torch.empty(len(ids), host.embedding_dim, **where))
        self.chosen = tuple(ids)
        self.derive()
        if self.rows.device.type != "meta":
            with torch.no_grad():
                self.rows.copy_(host.weight[self.ids])

    def derive(self) -> None:
        # Neither is part of a file: the ids are the method's. V integers, to find a row without a search.
        ids = torch.tensor(self.chosen)
        which = torch.full((self._host[0].num_embeddings,), -1)
        which[ids] = torch.arange(len(ids))
        self.register_buffer("ids", ids.to(self.rows.device), persistent=False)
        self.register_buffer("which", which.to(self.rows.device), persistent=False)

    def tensors(self) -> Any:
        yield "rows", self.rows

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        ids = first_argument(args, kwargs)
        out = base(*args, **kwargs)
        which = F.embedding(ids, self.which.unsqueeze(1)).squeeze(-1)
        return torch.where((which >= 0).unsqueeze(-1), self.rows[which.clamp_min(0)].to(out.dtype), out)

    def merged(self) -> Any:
        return [(self._host[0], "weight", None, self.update_weight)]

    def update_weight(self, old: Tensor) -> Tensor:
        return old.index_copy(0, self.ids, self.rows.to(old.dtype))


class TiedLogits(Delta):
    """At an output layer tied to the embedding: logits of the trained rows."""

    def __init__(self, rows: Rows, host: nn.Module):
        super().__init__()
        self._rows, self._host = (rows,), (host,)

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        x = first_argument(args, kwargs)
        source = self._rows[0]
        bias = getattr(self._host[0], "bias", None)
        new = F.linear(x, source.rows.to(x.dtype), None if bias is None else bias[source.ids])
        return map_first(base(*args, **kwargs), lambda y: y.index_copy(-1, source.ids, new.to(y.dtype)))

    def merged(self) -> Any:
        # The tied weight is the embedding's, so it is the same step.
        return [(self._host[0], "weight", None, self._rows[0].update_weight)]


@dataclass(frozen=True, kw_only=True)
class TokenRows(Method):
    r"""Train the embedding's rows of given tokens alone: ``e(i) = r_i`` for i in ids, the base's row otherwise.

    N D parameters, starting at the base's own rows, so attaching changes nothing. A tied output layer uses the same
    rows, ``logit_i = r_i . h + b_i``, by a product of their own: equal to rounding.

    Args:
        ids: token ids, distinct and inside the table (resize the embedding first if they are new to it).

    Raises:
        PeftlibError: no ids, repeated ids, or an id outside the table.

    Default sites: the token embedding (declared, or the only one).

    Example:
        >>> import torch, peftlib
        >>> model = torch.nn.Sequential(torch.nn.Embedding(50, 8), torch.nn.Linear(8, 50))
        >>> peftlib.attach(model, peftlib.TokenRows(ids=[48, 49])).num_parameters
        16
    """

    follows_calls: ClassVar[bool] = True
    ids: Sequence[int]

    def __post_init__(self) -> None:
        ids = self.ids.tolist() if isinstance(self.ids, Tensor) else list(self.ids)
        if not ids or len(set(ids)) != len(ids) or any(not isinstance(i, int) or i < 0 for i in ids):
            raise PeftlibError(
                f"TokenRows(ids={self.ids!r}): ids must be distinct token ids (integers >= 0), at least one."
            )
        object.__setattr__(self, "ids", tuple(ids))

    def refuses(self, site: Site) -> str | None:
        if isinstance(site.module, nn.Embedding) and site.parameter is None:
            return None
        return None if site.facts.get("tied") else "token rows are those of an nn.Embedding"

    def fits(self, site: Site) -> str | None:
        size = getattr(site.module, "num_embeddings", None)
        if size is not None and max(self.ids) >= size:
            return f"id {max(self.ids)} is outside its table of {size}; resize the embedding first"
        return None

    def default_sites(self, tree: Tree, probe: Probe | None) -> list[Site]:
        return [tree.token_embedding(probe)]

    def survey(self, sites: Sequence[Site], tree: Tree, probe: Probe | None) -> list[Site]:
        found = []
        for site in sites:
            weight = site.module._parameters["weight"]
            tied = [
                s.name
                for s in tree.sites()
                if s.module._parameters.get("weight") is weight and s.name != site.name
            ]
            for name in tied:
                if linear_shape(tree.modules[name]) is None:
                    raise TargetError(
                        f"{name!r} shares its weight with {site.name!r} and is no linear layer, so it would keep "
                        "the old rows. Untie it first."
                    )
            found.append(replace(site, facts={"tied": tied}))
        return found

    def build(self, sites: Sequence[Site]) -> dict[str, Delta]:
        found: dict[str, Delta] = {}
        for site in sites:
            host: Any = site.module
            rows = Rows(host, self.ids, **placement(site, self.dtype))
            found[site.name] = rows
            for name in site.facts["tied"]:
                assert site.model is not None
                found[name] = TiedLogits(rows, site.model.get_submodule(name))
        return found

    def config(self) -> dict[str, Any]:
        return {"ids": list(self.ids), **{k: v for k, v in super().config().items() if k != "ids"}}
