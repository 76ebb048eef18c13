"""Many tunings in one batch: row i of the batch runs through the tuning of the i-th name.

At each host the deltas of the named tunings are put together by kind, and each kind runs once for all rows
(``methods.rowwise``). Which axis of a site's tensors holds the rows is learned once for a model from two fake forwards
(``batch_axes``), at the first call or from ``example``.

Left out on purpose: tunings that change what all rows share (full, partial and bias tuning, token rows, raw weights).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from peftlib.batch_axes import Learned, kind_of_call, learn_axes, rows_differ
from peftlib.errors import PeftlibError, ProbeError, StateError
from peftlib.methods.base import Delta
from peftlib.methods.rowwise import Axes, Rows
from peftlib.probe import Call, as_call
from peftlib.registry import AXES, enabled, registry, use
from peftlib.site import ROUTE, set_chain
from peftlib.tuning import Tuning


class route:
    """Within the context, row i of every batch runs through the tuning ``names[i]``, or the base alone for ``None``.

    One forward serves all rows, and its backward gives each tuning the gradients of its own rows. Tunings of different
    methods may meet in one batch, LoRAs of different rank, prefixes of different length. Prompts lengthen the whole
    batch, so that every row needs one, of one length.

    Args:
        model: a model with tunings.
        names: a tuning's name or ``None`` for each row.
        batch_dim: the axis of the model's inputs along which the rows lie.
        example: inputs of one forward, as in :func:`peftlib.attach`, of any batch size, to learn where the rows lie at
            every site; ``None`` takes the first call of each kind within the context. A compiled model needs it, or one
            call before it is compiled; so does one whose parts are called by themselves.

    Raises:
        StateError: an unknown name, a merged tuning, or a route inside a route.
        PeftlibError: a tuning that cannot act on single rows, prompts of different length; during the forward, a batch
            of another size than ``names``, or a site where the rows have no axis of their own. The model is then as it
            was before.

    Without gradients the factors are kept in the order of the rows from one call to the next: as many bytes as the
    named tunings have, once for each row.

    Example:
        >>> import torch, peftlib
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> for name in ("a", "b"):
        ...     tuning = peftlib.attach(model, peftlib.LoRA(rank=2), targets=["0"], name=name)
        ...     _ = torch.nn.init.normal_(tuning.state_dict()["0.lora.b"])
        >>> x = torch.randn(3, 4)
        >>> with peftlib.route(model, ["a", None, "b"]):
        ...     y = model(x)
        >>> with peftlib.use(model, "b"):
        ...     torch.allclose(model(x[2]), y[2], atol=1e-6)
        True
    """

    def __init__(
        self, model: nn.Module, names: Sequence[str | None], *, batch_dim: int = 0, example: Any = None
    ):
        self._model, self._batch_dim, self._example = model, batch_dim, example
        if isinstance(names, str) or not isinstance(names, Sequence) or not names:
            raise PeftlibError(
                f"route needs a name or None for each row of the batch, as a list; got {names!r}."
            )
        have = registry(model)
        for name in names:
            if name is not None and name not in have:
                raise StateError(
                    f"The model has no tuning {name!r}; it has: {', '.join(map(repr, have)) or 'none'}."
                )
        self._names = tuple(names)
        self._hosts: dict[str, nn.Module] = {}
        self._deltas: dict[str, list[Delta]] = {}
        self._axes: dict[str, Axes] = {}
        self._sure = False
        self._hook: Any = None

    def __enter__(self) -> route:
        model = self._model
        have = registry(model)
        if ROUTE in model.__dict__:
            raise StateError("The model is in a route already; leave that context first.")
        merged = [n for n in enabled(model) if have[n].merged]
        if merged:
            raise StateError(
                f"The tuning {merged[0]!r} is merged into the weights, which all rows share; unmerge() it first."
            )
        chains = self._chains({n: have[n] for n in dict.fromkeys(self._names) if n is not None})
        # What is not named acts on no row, and what is acts on its own rows alone.
        self._before = use(model)
        # Tunings of a part of the model, which is a root of its own, are part of the base here.
        self._others = {name: host.__dict__["_peft_active"] for name, host in self._hosts.items()}
        model.__dict__[ROUTE] = True
        try:
            self._placed = {name: self._beside(name, chain) for name, chain in chains.items()}
            for host in self._hosts.values():
                host.__dict__[ROUTE] = True
            if self._example is not None:
                self._learn(as_call(self._example), sure=True)
            for (batch_dim, _), learned in self._known().items():
                if batch_dim == self._batch_dim:
                    self._take(learned)
            self._watch()
            self._set(self._placed)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._set(self._others)
        for host in self._hosts.values():
            host.__dict__.pop(ROUTE, None)
        if self._hook is not None:
            self._hook.remove()
        self._model.__dict__.pop(ROUTE, None)
        self._before.__exit__()

    def _set(self, chains: Mapping[str, tuple[Any, ...]]) -> None:
        for name, chain in chains.items():
            set_chain(self._hosts[name], chain)

    def _watch(self) -> None:
        self._hook = self._model.register_forward_pre_hook(self._at_call, with_kwargs=True, prepend=True)

    def _at_call(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        call = Call(args, kwargs)
        self._check_size(call)
        if self._example is not None and (self._sure or not rows_differ(call, self._batch_dim)):
            return
        kind = (self._batch_dim, kind_of_call(call))
        learned = self._known().get(kind)
        if learned is not None and learned.axes.keys() >= self._hosts.keys():
            if learned.verified or not rows_differ(call, self._batch_dim):
                self._take(learned)
                return
        # Off, for the copies that run would have it as well.
        self._hook.remove()
        try:
            self._learn(call, sure=self._example is not None)
        except ProbeError:
            # A call that cannot be tried with another row (a filled cache): what others showed, if it has the axes.
            if not self._axes:
                raise
        finally:
            self._watch()

    def _check_size(self, call: Call) -> None:
        sizes = {
            leaf.shape[self._batch_dim]
            for leaf in pytree.tree_leaves(tuple(call))
            if isinstance(leaf, Tensor) and -leaf.dim() <= self._batch_dim < leaf.dim()
        }
        if sizes and len(self._names) not in sizes:
            raise PeftlibError(
                f"route has {len(self._names)} names, and the inputs have {', '.join(map(str, sorted(sizes)))} rows on "
                f"axis {self._batch_dim}. Give one name for each row of the batch."
            )

    def _known(self) -> dict[Any, Learned]:
        """What was learned of the model's calls, by batch axis and kind of call."""
        return self._model.__dict__.setdefault(AXES, {})

    def _take(self, learned: Learned) -> None:
        self._axes.update({name: axes for name, axes in learned.axes.items() if axes is not None})

    def _learn(self, call: Call, sure: bool = False) -> None:
        """Learn where the hosts have their rows in this kind of call."""
        self._set(self._others)
        try:
            learned = learn_axes(self._model, self._hosts, call, self._batch_dim, sure=sure)
        finally:
            self._set(self._placed)
        self._known()[self._batch_dim, kind_of_call(call)] = learned
        self._sure = learned.verified
        self._take(learned)

    def _beside(self, name: str, chain: tuple[Any, ...]) -> tuple[Any, ...]:
        """The chain together with what a root further in has at the host, in the order in which they came."""
        own = [delta.order for delta in self._deltas[name]]
        before = tuple(d for d in self._others[name] if d.order < min(own))
        after = tuple(d for d in self._others[name] if d.order > max(own))
        if len(before) + len(after) != len(self._others[name]):
            raise StateError(
                f"{name or 'the root'!r} carries a tuning that was attached to a part of the model, between the named "
                "ones, so that they cannot run together. Disable that one."
            )
        return (*before, *chain, *after)

    def _chains(self, tunings: Mapping[str, Tuning]) -> dict[str, tuple[Any, ...]]:
        """What each host shall run: its deltas in each tuning's order, like ones together."""
        at: dict[str, dict[str, list[Delta]]] = {}
        for name, tuning in tunings.items():
            for part in tuning.parts:
                try:
                    part.delta.alike()
                except PeftlibError as error:
                    raise PeftlibError(
                        f"The tuning {name!r} cannot be routed: {type(part.method).__name__} at {part.name!r}: {error}."
                    ) from error
                if not part.delta.passive:
                    self._hosts[part.name] = part.host
                    self._deltas.setdefault(part.name, []).append(part.delta)
                    at.setdefault(part.name, {}).setdefault(name, []).append(part.delta)
        shared: dict[int, Any] = {}
        return {
            name: tuple(
                self._groups(name, {k: sorted(ds, key=lambda d: d.order) for k, ds in queues.items()}, shared)
            )
            for name, queues in at.items()
        }

    def _groups(self, name: str, queues: dict[str, list[Delta]], shared: dict[int, Any]) -> Iterator[Any]:
        while any(queues.values()):
            heads = {k: queue[0] for k, queue in queues.items() if queue}
            # What all rows must have waits until all have come to it.
            kinds = sorted(
                {d.alike(): d.everywhere for d in heads.values()}.items(), key=lambda kind: kind[1]
            )
            kind, everywhere = kinds[0]
            group = {k: queues[k].pop(0) for k, delta in heads.items() if delta.alike() == kind}
            without = [n for n in self._names if n not in group]
            if everywhere and without:
                raise PeftlibError(
                    f"The tuning {next(iter(group))!r} changes the whole batch (its length, or the size of its "
                    f"output), and {without[0]!r} does not do the same at {name or 'the root'!r}. Give every row a "
                    "tuning of that kind and length."
                )
            if len(group) == 1 and not without:
                yield next(iter(group.values()))
                continue
            index = {k: i for i, k in enumerate(group)}
            which = [None if n is None else index.get(n) for n in self._names]
            rows = Rows(name, list(group.values()), which, self._axes, shared)
            yield rows.deltas[0].for_rows(rows)
