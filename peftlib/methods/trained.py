"""Training base tensors themselves, exactly undoable: full, partial and bias-only fine-tuning share this.

The host's own parameters are trained, so optimizers and state dicts see what they always saw. The base values wait
in the delta; enabling and disabling exchanges the two by pointer, so the base comes back bit for bit.

A frozen base also keeps its running statistics, in training too: otherwise one forward in train mode would change
what ``disabled()``, ``detach()`` and a saved tuning stand for. Only a tuning that trains a normalization moves them.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from peftlib.errors import PeftlibError, StateError
from peftlib.methods.base import CHILD, Delta, Method, Site, placement, plain_class

if TYPE_CHECKING:
    from peftlib.probe import Probe
    from peftlib.targets import Tree

HELD = "_peft_statistics"
TRAINED = "_peft_trained"
"""Attribute of a module some of whose tensors are a tuning's at present: own name -> the delta they belong to."""


def hold_statistics(module: nn.Module) -> None:
    """Keep the running statistics of a normalization as they are; the output in training does not depend on them."""
    if not isinstance(module, nn.modules.batchnorm._NormBase) or not module.track_running_stats:
        return
    kept: dict[str, Tensor] = {}
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        # Without tracking it would not use them in eval either; but it averages them over the batch at every step,
        # which rounds, so the exact ones are put back at the end.
        name, still = "momentum", 0.0
        kept = {k: b.detach().clone() for k, b in module._buffers.items() if b is not None}
    else:
        # Its forward then hands on no statistics in training, so that even a batch with NaN leaves no mark.
        name, still = "track_running_stats", False
    module.__dict__[HELD] = (name, getattr(module, name), still, kept)
    let_statistics_move(module, False)


def let_statistics_move(module: nn.Module, on: bool) -> None:
    """Let a module's held statistics follow the data again, or hold them still; nothing where none are held."""
    if HELD in module.__dict__:
        name, moving, still, _ = module.__dict__[HELD]
        setattr(module, name, moving if on else still)


def release_statistics(module: nn.Module) -> None:
    """Undo :func:`hold_statistics`."""
    let_statistics_move(module, True)
    *_, kept = module.__dict__.pop(HELD, [{}])
    for name, value in kept.items():
        module._buffers[name].copy_(value)  # type: ignore[union-attr]


class Trained(Delta):
    """Parameters (and running statistics) of one module, trained in place.

    Args:
        host: the owner.
        names: its own parameters to train.
        statistics: its own buffers that training changes (batch-norm statistics).
        keep_base: keep the base values, at the cost of a second copy, so that disabling and detaching are exact.
        sharing: other modules that own one of these parameters as well.
    """

    passive: ClassVar[bool] = True

    def alike(self) -> Hashable:
        raise PeftlibError("it exchanges values of the base, which all rows of a batch share")

    def __init__(
        self,
        host: nn.Module,
        names: Sequence[str],
        statistics: Sequence[str],
        keep_base: bool,
        sharing: Sequence[nn.Module] = (),
    ):
        super().__init__()
        self._host, self._sharing = (host,), tuple(sharing)
        self.names, self.statistics, self.keep_base = tuple(names), tuple(statistics), keep_base
        self.on = False
        self._flags: dict[str, bool] = {}
        self.other = nn.Module()
        """While the tuning is on: the base values. While it is off: the tuned ones."""
        if keep_base:
            for name, tensor in self._own():
                copied = tensor.detach().clone(memory_format=torch.preserve_format)
                if name in self.names:
                    # A frozen parameter rather than a buffer, so that sharding treats it like its twin.
                    self.other._parameters[name] = nn.Parameter(copied, requires_grad=False)
                else:
                    self.other._buffers[name] = copied

    def _own(self) -> Iterator[tuple[str, Tensor]]:
        host = self._host[0]
        for name in self.names:
            yield name, host._parameters[name]  # type: ignore[misc]
        for name in self.statistics:
            yield name, host._buffers[name]  # type: ignore[misc]

    def _others(self) -> Iterator[tuple[str, Tensor]]:
        for name in self.names:
            yield name, self.other._parameters[name]  # type: ignore[misc]
        for name in self.statistics:
            yield name, self.other._buffers[name]  # type: ignore[misc]

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name in self.names:
            yield name, self._host[0]._parameters[name]  # type: ignore[misc]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._own() if self.on or not self.keep_base else self._others()

    def base(self, name: str) -> Tensor:
        """The base's value of one of the host's tensors, whichever tuning has put its own there.

        Raises:
            StateError: that tuning did not keep it.
        """
        mine = _tensor(self._host[0], name)
        for owner in (*self._host, *self._sharing):
            for other, delta in owner.__dict__.get(TRAINED, {}).items():
                if _tensor(owner, other) is mine:
                    if not delta.keep_base:
                        raise StateError(
                            f"{name!r} is trained with keep_base=False, so the base's value is gone. Attach with "
                            "keep_base=True to have it."
                        )
                    return dict(delta._others())[other]
        return mine

    def check_switch(self, on: bool) -> None:
        if not on and self.on and not self.keep_base:
            raise StateError(
                "This tuning trains base weights in place with keep_base=False, so the base is gone: it can be "
                "neither disabled nor detached. Attach with keep_base=True to be able to."
            )
        if not on or self.on:
            return
        mine = {id(p): name for name, p in self.trained()}
        for host in (*self._host, *self._sharing):
            taken = [n for n in host.__dict__.get(TRAINED, ()) if id(host._parameters.get(n)) in mine]
            if taken:
                raise StateError(
                    f"{plain_class(host).__name__}'s {', '.join(taken)} is trained by another enabled tuning; two "
                    "cannot own one weight at a time. Disable that one first (peftlib.use enables exactly one)."
                )

    @torch.no_grad()
    def switch(self, on: bool) -> None:
        if on == self.on:
            return
        if self.keep_base:
            for (_, own), (_, other) in zip(self._own(), self._others(), strict=True):
                own.data, other.data = other.data, own.data
        for name, parameter in self.trained():
            if on:
                self._flags[name] = parameter.requires_grad
            parameter.requires_grad_(True if on else self._flags[name])
        if self.statistics:
            let_statistics_move(self._host[0], on)
        self._mark(on)
        self.on = on

    def _mark(self, on: bool) -> None:
        host = self._host[0]
        marks = {n: d for n, d in host.__dict__.pop(TRAINED, {}).items() if d is not self}
        marks |= dict.fromkeys((*self.names, *self.statistics), self) if on else {}
        if marks:
            host.__dict__[TRAINED] = marks

    def close(self) -> None:
        for _, parameter in self.trained():
            if not parameter.requires_grad:
                parameter.grad = None

    def merged(self) -> list[object]:  # type: ignore[override]
        return []  # its values are in the weights already


@dataclass(frozen=True, kw_only=True)
class BaseTraining(Method):
    """What full, partial and bias-only fine-tuning share: which base tensors of a site are trained.

    Args:
        keep_base: keep the base values (a second copy of what is trained), so that ``disable`` and ``detach`` are
            exact; with ``False`` those two raise.
    """

    keep_base: bool = True

    moves_statistics: ClassVar[bool] = True
    """Whether a normalization that is wholly trained also moves its running statistics."""

    def wanted(self, site: Site) -> list[str]:
        """Own parameters of the site's module that this method trains."""
        names = [n for n, p in site.module._parameters.items() if p is not None and p.is_floating_point()]
        return [n for n in names if site.parameter in (None, n)]

    def refuses(self, site: Site) -> str | None:
        inside = (Site(site.name, m) for _, m in _descend(site.module))
        if site.parameter is None and not any(self.wanted(s) or self._only_statistics(s) for s in inside):
            return "there is no parameter inside that it could train"
        if site.parameter is not None and not self.wanted(site):
            return "it is no floating-point parameter that it could train"
        return None

    def _only_statistics(self, site: Site) -> bool:
        """Whether a module has nothing to train but running statistics (a norm with affine=False)."""
        module = site.module
        return (
            self.moves_statistics
            and isinstance(module, nn.modules.batchnorm._NormBase)
            and module.running_mean is not None
            and all(p is None for p in module._parameters.values())
        )

    def default_sites(self, tree: Tree, probe: Probe | None) -> list[Site]:
        return self.resolve(tree.site(""), tree, probe)

    def resolve(self, site: Site, tree: Tree, probe: Probe | None) -> list[Site]:
        """Each tensor inside as a site of its own, so that an exclusion can take out any of them."""
        found = []
        for inner in tree.inside(site.name) if site.parameter is None else [site]:
            if inner.parameter is not None:
                found += [inner] if self.wanted(inner) else []
            else:
                prefix = f"{inner.name}." if inner.name else ""
                found += [Site(prefix + n, inner.module, n, tree.model) for n in self.wanted(inner)]
                found += [inner] if self._only_statistics(inner) else []
        return found

    def survey(self, sites: Sequence[Site], tree: Tree, probe: Probe | None) -> list[Site]:
        """One site per module that owns trained tensors; a shared parameter goes to its first owner."""
        seen: set[int] = set()
        names: dict[str, list[str]] = {}
        for site in sites:
            owned = names.setdefault(
                site.name if site.parameter is None else site.name.rpartition(".")[0], []
            )
            if site.parameter is not None:
                parameter = site.module._parameters[site.parameter]
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    owned.append(site.parameter)
        surveyed = [replace(tree.site(owner), facts={"names": owned}) for owner, owned in names.items()]
        return [s for s in surveyed if s.facts["names"] or self._only_statistics(s)]

    def statistics(self, module: nn.Module, names: Sequence[str]) -> list[str]:
        """The buffers that go with some trained parameters: all persistent ones if all of the module is trained."""
        if not self.moves_statistics or set(names) != {
            n for n, p in module._parameters.items() if p is not None
        }:
            return []
        return [n for n, b in module._buffers.items() if b is not None and n not in _volatile(module)]

    def build(self, sites: Sequence[Site]) -> dict[str, Delta]:
        found: dict[str, Delta] = {}
        owners: dict[int, list[nn.Module]] = {}
        for module in sites[0].model.modules() if sites[0].model is not None else ():
            for parameter in module._parameters.values():
                owners.setdefault(id(parameter), []).append(module)
        for site in sites:
            if self.dtype is not None:
                raise PeftlibError(
                    f"{type(self).__name__} trains the base's own tensors; dtype= does not apply."
                )
            placement(site)
            names = site.facts["names"]
            sharing = {
                id(m): m
                for n in names
                for m in owners.get(id(site.module._parameters[n]), ())
                if m is not site.module
            }
            found[site.name] = Trained(
                site.module,
                names,
                self.statistics(site.module, names),
                self.keep_base,
                list(sharing.values()),
            )
        return found


def _tensor(module: nn.Module, name: str) -> Tensor:
    return module._parameters[name] if name in module._parameters else module._buffers[name]  # type: ignore[return-value]


def _volatile(module: nn.Module) -> set[str]:
    return module._non_persistent_buffers_set


def _descend(module: nn.Module, key: str = "") -> Iterator[tuple[str, nn.Module]]:
    yield key, module
    for key, child in module._modules.items():
        if child is not None and key != CHILD:
            yield from _descend(child, key)
