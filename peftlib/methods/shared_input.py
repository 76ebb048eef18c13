"""Sites that are called with the same tensor compute together, whatever they and their parents are called.

The first of them that is called with a tensor computes for all and hands the others theirs, once each, when they come
with the same tensor in the same version. Nobody's parent is touched and no name is fixed. Which sites belong together
is settled when the tuning is attached, from its example, and stands in its file: learned in the first forward, later
ones would round differently from it, and a resumed run from one that was never interrupted.

A site computes by itself whenever something differs: another tensor, one changed in between, no gradients, dropout,
autocast, a compiler, another delta before it, weights that are trained or sharded apart. A group whose results are not
asked for gives up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from peftlib.kernels.low_rank import pays
from peftlib.kernels.shared_input import LowRankLinear, can_share, low_rank_linears
from peftlib.methods.base import Site, first_tensor

if TYPE_CHECKING:
    from peftlib.probe import Probe

WITH = "with"
"""A site's fact: the name of the first site that is given the same tensor."""
_PATIENCE = 2


def with_shared_inputs(sites: Sequence[Site], probe: Probe | None) -> list[Site]:
    """The sites, each with the name of the first one that the example calls with the same tensor, once."""
    if probe is None:
        return list(sites)
    given: dict[int, list[str]] = {}
    for site in sites:
        trace = probe.trace(site) if site.parameter is None else None
        x = first_tensor(trace.call) if trace is not None and trace.calls == 1 else None
        if x is not None and x.is_floating_point():
            given.setdefault(id(x), []).append(
                site.name
            )  # the traces keep it alive: an id stands for one tensor
    first = {name: names[0] for names in given.values() if len(names) > 1 for name in names}
    return [
        replace(site, facts={**site.facts, WITH: first[site.name]}) if site.name in first else site
        for site in sites
    ]


class Handing:
    """The results that wait for their sites, for the deltas of one group."""

    def __init__(self) -> None:
        self.ready: dict[int, tuple[Tensor, Tensor, int, list[int]]] = {}
        self.missed = 0

    def __getstate__(self) -> dict[str, Any]:
        return {"ready": {}, "missed": self.missed}  # a copy of the model waits for nothing

    def take(self, group: Sequence[Any], own: Any, x: Tensor) -> Tensor | None:
        """The output of ``own`` for ``x``: waiting, or computed with that of the others; ``None``: not together."""
        # A replica of the model has the original's group, and is not in it.
        if x.is_inference() or not pays(x, own.a) or own not in group:
            return None
        mine = group.index(own)
        if mine in self.ready:
            y, given, version, versions = self.ready.pop(mine)
            if given is x and version == x._version and versions == _versions(own.linear()):
                return y
        if self.ready:
            self.ready.clear()
            self.missed += 1
        if self.missed >= _PATIENCE:
            return None
        members = [i for i, delta in enumerate(group) if delta is own or delta.ready_to_share()]
        linears = [group[i].linear() for i in members]
        if len(members) < 2 or not can_share(x, linears):
            return None
        outputs = dict(zip(members, low_rank_linears(x, linears, own.scaling), strict=True))
        y = outputs.pop(mine)
        for i, one in zip(members, linears, strict=True):
            if i != mine:
                self.ready[i] = outputs[i], x, x._version, _versions(one)
        return y


def _versions(linear: LowRankLinear) -> list[int]:
    """What tells that a weight was changed in between; views have that of their base."""
    return [t._version for t in linear if t is not None]
