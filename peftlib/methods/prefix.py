"""Prefix tuning: trained keys and values in front of every attention's own, inside SDPA.

:class:`PTuningV2` (deep prompts) builds on the same deltas without the reparametrizing MLP.

Shape legend: P prefix length, H key/value heads, E key size, V value size per head, D model width, M hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftlib.attention import PrefixScope
from peftlib.errors import PeftlibError, ProbeError, TargetError
from peftlib.methods.base import Delta, Method, Site, check_positive_int, check_probability, placement
from peftlib.methods.rows import FrozenCache
from peftlib.methods.rowwise import Rows
from peftlib.methods.shared_prefix import Shared, SharedPrefix

if TYPE_CHECKING:
    from peftlib.probe import Probe
    from peftlib.targets import Tree

STD = 0.02
"""Spread of directly trained keys and values at the start: small against real ones."""


class Prefix(Delta):
    """Trained keys and values for the SDPA calls inside one module's forward."""

    start_key: Tensor
    start_value: Tensor
    key: nn.Parameter
    value: nn.Parameter

    def __init__(
        self, facts: Mapping[str, Any], length: int, dropout: float, shared: SharedPrefix | None, **where: Any
    ):
        super().__init__()
        self.length, self.p = length, dropout
        self.shape = (facts["heads"], facts["key_size"], facts["value_size"])
        heads, key_size, value_size = self.shape
        self._shared: tuple[SharedPrefix, ...] = () if shared is None else (shared,)
        self._cache = FrozenCache()
        started = bool(facts.get("started"))
        if shared is not None:
            self.project = nn.Linear(shared.down.out_features, heads * (key_size + value_size), **where)
            if started:
                # With values to start from, the MLP adds to them and begins at zero.
                self.register_buffer("start_key", torch.zeros(length, heads, key_size, **where))
                self.register_buffer("start_value", torch.zeros(length, heads, value_size, **where))
                if self.start_key.device.type != "meta":
                    nn.init.zeros_(self.project.weight)
                    nn.init.zeros_(self.project.bias)
        else:
            self.key = nn.Parameter(torch.empty(length, heads, key_size, **where))
            self.value = nn.Parameter(torch.empty(length, heads, value_size, **where))
            if self.key.device.type != "meta":
                nn.init.normal_(self.key, std=STD)
                nn.init.normal_(self.value, std=STD)

    def extra_repr(self) -> str:
        return f"length={self.length}, heads={self.shape[0]}, sizes={self.shape[1:]}"

    @torch.no_grad()
    def start(self, key: Tensor, value: Tensor) -> None:
        """Begin at real keys and values, (P, H, E) and (P, H, V)."""
        own = (self.start_key, self.start_value) if self._shared else (self.key, self.value)
        for parameter, given in zip(own, (key, value), strict=True):
            parameter.copy_(given)

    def key_value(self) -> tuple[Tensor, Tensor]:
        """The prefix as the attention sees it, before dropout."""
        if not self._shared:
            return self.key, self.value
        return self._cache((*self._shared[0].parameters(), *self.project.parameters()), self._compute)

    def split(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """(..., P, H E + H V) as (..., P, H, E) and (..., P, H, V)."""
        heads, key_size, value_size = self.shape
        key, value = flat.split((heads * key_size, heads * value_size), dim=-1)
        return key.unflatten(-1, (heads, key_size)), value.unflatten(-1, (heads, value_size))

    def _compute(self) -> tuple[Tensor, Tensor]:
        key, value = self.split(self.project(self._shared[0].hidden()))
        if "start_key" in self._buffers:
            key, value = key + self.start_key, value + self.start_value
        return key, value

    def alike(self) -> Hashable:
        middle = self._shared[0].down.weight.shape if self._shared else None
        return type(self), self.shape, self.p, self.training, middle, "start_key" in self._buffers

    @classmethod
    def routed(cls, rows: Rows, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """One prefix a row; the shorter ones are filled up with columns that nothing sees."""
        deltas: Any = rows.deltas
        lengths = [d.length for d in deltas]
        longest = max(lengths)

        def sources(delta: Any) -> list[Tensor]:
            shared = (p for mlp in delta._shared for p in mlp.parameters())
            return [*delta.parameters(), *delta.buffers(), *shared]

        def make() -> tuple[Tensor, ...]:
            return tuple(rows.by_row(t) for t in cls._together(rows))

        key_BPHE, value_BPHV = rows.kept("prefix", make, sources)
        visible_BP = None
        if rows.partial or min(lengths) < longest:
            own_B = rows.constant([[*lengths, 0][i] for i in rows.which], key_BPHE.device)
            visible_BP = torch.arange(longest, device=own_B.device) < own_B[:, None]
        if not rows.known().keys:
            raise PeftlibError(
                f"The attention in {rows.name or 'the root'!r} has the rows of the batch not on the first axis of its "
                "queries, (B, H, T, E), so that they cannot have a prefix each."
            )
        return deltas[0]._run(key_BPHE, value_BPHV, visible_BP, base, args, kwargs)

    @staticmethod
    def _together(rows: Rows) -> tuple[Tensor, Tensor]:
        """:meth:`key_value` of several: (U, P, H, E) and (U, P, H, V)."""
        first: Any = rows.deltas[0]
        if not first._shared:
            return rows.together(lambda d: d.key), rows.together(lambda d: d.value)
        table_UPD = rows.together(lambda d: d._shared[0].table)
        h_UPM = torch.tanh(_each_linear(rows, lambda d: d._shared[0].down, table_UPD))
        key, value = first.split(_each_linear(rows, lambda d: d.project, h_UPM))
        if "start_key" in first._buffers:
            key, value = (
                key + rows.together(lambda d: d.start_key),
                value + rows.together(lambda d: d.start_value),
            )
        return key, value

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self._run(*self.key_value(), None, base, args, kwargs)

    def _run(
        self,
        key: Tensor,
        value: Tensor,
        visible: Tensor | None,
        base: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        if self.p and self.training:
            key, value = F.dropout(key, self.p), F.dropout(value, self.p)
        scope = PrefixScope(key, value, visible)
        with scope:
            output = base(*args, **kwargs)
        if not scope.met:
            raise PeftlibError(
                "An attention ran this time without F.scaled_dot_product_attention (a branch that the example "
                "did not take, "
                "such as one that returns its weights), so its prefix would silently be lost. Call it as in the "
                "example, or "
                "let that branch call SDPA too."
            )
        return output

    def merged(self) -> Any:
        raise PeftlibError(
            "A prefix cannot be merged: it adds keys and values, not a change of a weight. Keep the tuning attached."
        )

    @torch.no_grad()
    def fold(self) -> bool:
        if not self._shared:
            return False
        key, value = self._compute()
        trains = self.project.weight.requires_grad
        self.key, self.value = (nn.Parameter(t.detach().clone(), requires_grad=trains) for t in (key, value))
        for name in ("start_key", "start_value"):
            self._buffers.pop(name, None)
        del self.project
        self._modules.pop("mlp", None)  # held here where the root is an attention itself
        self._shared = ()
        return True


def _each_linear(rows: Rows, which: Callable[[Any], Any], x_UPI: Tensor) -> Tensor:
    """(U, P, O): each delta's linear on its own rows."""
    weight_UOI = rows.together(lambda d: which(d).weight)
    bias_UO = rows.together(lambda d: which(d).bias)
    return torch.baddbmm(bias_UO.unsqueeze(1), x_UPI, weight_UOI.mT)


@dataclass(frozen=True, kw_only=True)
class DeepPrefix(Method):
    """What prefix tuning and P-Tuning v2 share: trained keys and values at every attention site."""

    length: int
    dropout: float = 0.0
    init: Any = None

    @property
    def needs_probe(self) -> bool:
        return True

    def __post_init__(self) -> None:
        owner = type(self).__name__
        check_positive_int(owner, length=self.length)
        check_probability(owner, dropout=self.dropout)

    @property
    def middle(self) -> int | None:
        """Hidden width of the reparametrizing MLP, or ``None`` for directly trained keys and values."""
        raise NotImplementedError

    def folded(self) -> Method:
        raise NotImplementedError

    def refuses(self, site: Site) -> str | None:
        if site.parameter is not None:
            return "a prefix acts on an attention, not on a parameter"
        if site.facts and not all(
            isinstance(site.facts.get(k), int) for k in ("heads", "key_size", "value_size", "width")
        ):
            return "the sizes of its attention are missing"
        return None

    def resolve(self, site: Site, tree: Tree, probe: Probe | None) -> list[Site]:
        """The attention sites in a module: the innermost modules whose forward calls SDPA."""
        if probe is None or site.parameter is not None:
            return []
        return [s for s in tree.inside(site.name) if s.name in probe.record.attention]

    def why_unresolved(self, site: Site, probe: Probe | None) -> str:
        return _no_attention(probe)

    def default_sites(self, tree: Tree, probe: Probe | None) -> list[Site]:
        found = [s for s in tree.sites() if probe is not None and s.name in probe.record.attention]
        if not found:
            raise TargetError(
                f"{type(tree.model).__name__} has no place for {type(self).__name__}: {_no_attention(probe)}."
            )
        return found

    def survey(self, sites: Sequence[Site], tree: Tree, probe: Probe | None) -> list[Site]:
        assert probe is not None
        started = self.init is not None
        surveyed = []
        values = probe.activations(tree.model, _inputs(self.init, self.length, probe)) if started else {}
        for site in sites:
            seen = probe.record.attention[site.name]
            if seen.mixed:
                raise TargetError(
                    f"{site.name or 'the root'!r} makes attention calls whose heads differ in size, so no one prefix "
                    "fits "
                    "them. Put each call into a module of its own, or exclude this one."
                )
            # Models may repeat their heads for some calls only (with a mask, say), so the fewest seen are its own.
            real = [t.shape[-3] if t.dim() > 3 else 1 for t in values.get(site.name, ())]
            facts: dict[str, Any] = {
                "heads": min([seen.heads, *real]),
                "key_size": seen.key_size,
                "value_size": seen.value_size,
                "width": seen.width,
            }
            start = None
            if started:
                facts["started"] = True
                start = self._rows(site, values, facts["heads"])
            surveyed.append(replace(site, facts=facts, start=start))
        return surveyed

    def _rows(
        self, site: Site, values: Mapping[str, tuple[Tensor, Tensor]], heads: int
    ) -> tuple[Tensor, ...]:
        found = []
        for tensor in values[site.name]:
            tensor = tensor.flatten(0, -4)[0] if tensor.dim() > 3 else tensor[:1]
            if tensor.shape[-2] < self.length:
                raise PeftlibError(
                    f"init= gives {tensor.shape[-2]} keys at {site.name!r}, and a prefix of length {self.length} needs "
                    "as many. Pass at least that many tokens."
                )
            # A model that repeats its heads for each group of queries shows every one several times.
            found.append(tensor[:: tensor.shape[0] // heads, : self.length].transpose(0, 1))
        return tuple(found)

    def build(self, sites: Sequence[Site]) -> dict[str, Delta]:
        widths = {site.facts["width"] for site in sites}
        shared = None
        first = sites[0]
        if self.middle is not None:
            width = widths.pop() if len(widths) == 1 else self.middle
            root = first if first.model is None else Site("", first.model, None, first.model)
            shared = SharedPrefix(
                self.length,
                width,
                self.middle,
                **{**placement(first, self.dtype), "device": placement(root)["device"]},
            )
        found: dict[str, Delta] = {}
        for site in sites:
            delta = Prefix(site.facts, self.length, self.dropout, shared, **placement(site, self.dtype))
            if site.start is not None and delta.length and not any(t.is_meta for t in delta.parameters()):
                delta.start(*site.start)
            found[site.name] = delta
        if shared is not None:
            if "" in found:
                found[""].add_module("mlp", shared)  # the root is an attention itself
            else:
                found = {"": Shared(shared), **found}
        return found

    def config(self) -> dict[str, Any]:
        # What it started from is in the tensors.
        return {"length": self.length, **{k: v for k, v in super().config().items() if k != "init"}}


@dataclass(frozen=True, kw_only=True)
class PrefixTuning(DeepPrefix):
    r"""Prefix tuning: P trained keys and values before those of every attention, from one reparametrizing MLP.

    ``[k_l; v_l] = W2_l tanh(W1 e + b1) + b2_l`` for each layer l, with e the trained table (P, D); keys and values get
    P more columns, visible to every query. Parameters: P D + D M + M in the shared part and (M + 1) H (E + V) per site:
    2 L kv (M + 1) for L layers. ``tuning.fold()`` drops the MLP and leaves 2 P L kv values.

    Args:
        length: P.
        hidden: M, width of the MLP (512 in the paper); ``None`` trains the keys and values themselves.
        dropout: on the prefix's keys and values, in training.
        init: start at the real keys and values that P token ids (a list) or the inputs of one forward (a tensor, tuple
            or dict) produce: the paper's low-data start. ``None``: random.

    Needs ``example=``. Where widths differ between sites, D is ``hidden``.

    Raises:
        PeftlibError: a field out of range; ``TargetError`` where no module calls ``F.scaled_dot_product_attention``.

    Default sites: every attention (self, cross, encoder and decoder): the innermost modules that call SDPA.

    Example:
        >>> import torch, peftlib
        >>> model = torch.nn.MultiheadAttention(8, 2, batch_first=True)
        >>> x = torch.randn(1, 3, 8)
        >>> tuning = peftlib.attach(model, peftlib.PrefixTuning(length=4, hidden=16), example=(x, x, x))
        >>> tuning.num_parameters  # 4*8 + (8+1)*16 + (16+1)*2*8
        448
        >>> tuning.fold().num_parameters  # 2 * 4 * 8
        64

    Source: Li and Liang 2021, arXiv:2101.00190, section 4 (4.3 for the reparametrization).
    """

    hidden: int | None = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden is not None:
            check_positive_int("PrefixTuning", hidden=self.hidden)

    @property
    def middle(self) -> int | None:
        return self.hidden

    def folded(self) -> Method:
        return replace(self, hidden=None)


def _no_attention(probe: Probe | None) -> str:
    foreign = sorted(probe.record.foreign) if probe is not None else []
    if foreign:
        return (
            f"{', '.join(map(repr, foreign[:3]))} calls F.multi_head_attention_forward itself, whose inside cannot be "
            "reached. Use nn.MultiheadAttention, or call F.scaled_dot_product_attention"
        )
    return (
        "the example shows no call of F.scaled_dot_product_attention in it. A hand-written softmax(q @ k.T) @ v cannot "
        "be seen: call F.scaled_dot_product_attention instead (in transformers: attn_implementation='sdpa')"
    )


def _inputs(init: Any, length: int, probe: Probe) -> Any:
    """``init`` as the inputs of one forward; a list of ids takes the place of the example's first integer tensor."""
    if not (isinstance(init, (list, range)) and init and isinstance(init[0], int)):
        return init
    if len(init) < length:
        raise PeftlibError(
            f"init= has {len(init)} token ids; a prefix of length {length} starts from as many."
        )
    ids = torch.tensor([list(init)[:length]])
    for key, value in probe.kwargs.items():
        if isinstance(value, Tensor) and not value.is_floating_point():
            return {key: ids.to(value.device)}
    for i, value in enumerate(probe.args):
        if isinstance(value, Tensor) and not value.is_floating_point():
            return (*probe.args[:i], ids.to(value.device))
    raise ProbeError(
        "init= gives token ids, but the example has no integer tensor in whose place they could go."
    )
