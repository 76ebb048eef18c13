"""The handle of one named tuning: its parts, its switches, its tensors.

A tuning knows its own parts and nothing of the others on the same model, so enabling, saving or dropping the
thousandth costs what the first did.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from peftlib.errors import PeftlibError, StateError
from peftlib.freezing import restore_flags
from peftlib.merging import MERGED, Kept, check_unchanged, merge, put_back
from peftlib.methods.base import Delta, Method
from peftlib.part import Part, check_state
from peftlib.registry import AXES, ENABLED, enabled
from peftlib.site import TUNINGS, check_closable, check_no_route, close_host, deltas, set_active
from peftlib.storage import like

if TYPE_CHECKING:
    from peftlib.arithmetic import Combination


class Tuning:
    """One named tuning on one model; made by :func:`peftlib.attach` and :func:`peftlib.load`.

    Attributes:
        name: its name on the model.
        model: the module it was attached to.
        skipped: sites that a default left out, with the reason.
        merged: whether its updates are in the base weights at present.
        combination: what :func:`peftlib.combine` made it of and how closely, else ``None``; not saved.
    """

    def __init__(self, name: str, model: nn.Module, parts: list[Part], skipped: Mapping[str, str]):
        self.name = name
        self.model = model
        self.parts = parts
        self.skipped = dict(skipped)
        self.attached = True
        self.combination: Combination | None = None
        self._kept: list[Kept] = []

    def __repr__(self) -> str:
        if not self.attached:
            return f"Tuning({self.name!r}, detached)"
        state = "merged" if self.merged else "enabled" if self.enabled else "disabled"
        return f"Tuning({self.name!r}, {len(self.sites)} sites, {self.num_parameters:,} parameters, {state})"

    @property
    def enabled(self) -> bool:
        """Whether the tuning acts."""
        return self.attached and self.name in enabled(self.model)

    def _note(self, on: bool) -> None:
        names = self.model.__dict__.setdefault(ENABLED, {})
        if on:
            names[self.name] = None
        else:
            names.pop(self.name, None)
        if not names:
            del self.model.__dict__[ENABLED]

    @property
    def sites(self) -> dict[str, Method]:
        """Dotted site name -> method. Two methods at one site are listed under ``name`` and ``name (method)``."""
        found: dict[str, Method] = {}
        for part in self.parts:
            if part.built:
                found[part.name if part.name not in found else f"{part.name} ({part.delta.label})"] = (
                    part.method
                )
        return found

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The trained parameters by their names in :meth:`state_dict`."""
        self._check()
        for part in self.parts:
            for name, parameter in part.delta.trained():
                yield f"{part.prefix}.{name}", parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trained parameters, for an optimizer."""
        for _, parameter in self.named_parameters():
            yield parameter

    @property
    def num_parameters(self) -> int:
        """Number of trained scalars."""
        return sum(p.numel() for p in self.parameters())

    def idle_sites(self) -> list[str]:
        """Sites whose module has not run since the tuning came: a tuning there has had no effect so far."""
        return [
            p.name
            for p in self.parts
            if p.built and not p.delta.passive and p.parameter is None and not p.host.__dict__["_peft_ran"]
        ]

    def state_dict(self) -> dict[str, Tensor]:
        """The tuning's own tensors, detached but sharing memory, by ``site.method.name``."""
        self._check()
        return {
            f"{part.prefix}.{name}": t.detach() for part in self.parts for name, t in part.delta.tensors()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy values in; strict, and checked before anything is written.

        Raises:
            CheckpointError: keys are missing or unexpected, or shapes differ; each is named.
        """
        self._check()
        if self.merged:
            raise StateError(f"The tuning {self.name!r} is merged; unmerge() it before loading values.")
        own = self.state_dict()
        check_state(own, state, f"the tuning {self.name!r}")
        with torch.no_grad():
            for key, value in state.items():
                own[key].copy_(like(value, own[key]))

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        optimizer: torch.optim.Optimizer | None = None,
        hash_base: bool = False,
    ) -> None:
        """Write the tuning to one safetensors file: whole or not at all, whatever happens meanwhile.

        Args:
            path: an old file there is replaced at once.
            optimizer: of this tuning's parameters; its state is written beside them, for :meth:`load_optimizer`.
            hash_base: also write a hash of each base parameter, so that :func:`peftlib.load` refuses a base of other
                values. It takes time in proportion to the base, at both ends.

        Raises:
            CheckpointError: the file cannot be written, or something cannot be said in it, which is named.
        """
        from peftlib.checkpoint import save

        self._check()
        save(self, path, optimizer, hash_base)

    def load_optimizer(self, optimizer: torch.optim.Optimizer, path: str | os.PathLike[str]) -> None:
        """Give an optimizer the state that :meth:`save` wrote beside the tuning; training goes on where it stopped.

        Args:
            optimizer: new, of the same class and over the same parameters, which may stand in another order.
            path: the file that the tuning was loaded from.

        Raises:
            CheckpointError: there is no state in the file, or it is of another optimizer, of other parameters or of
                other groups. The optimizer is then unchanged.

        Example:
            >>> import tempfile, os, torch, peftlib
            >>> path = os.path.join(tempfile.mkdtemp(), "chat.safetensors")
            >>> model = torch.nn.Linear(4, 4)
            >>> tuning = peftlib.attach(model, peftlib.LoRA(rank=2))
            >>> optimizer = torch.optim.AdamW(tuning.parameters(), lr=0.1)
            >>> tuning.save(path, optimizer=optimizer)
            >>> tuning.detach()
            >>> tuning = peftlib.load(model, path)
            >>> optimizer = torch.optim.AdamW(tuning.parameters())
            >>> tuning.load_optimizer(optimizer, path)
            >>> optimizer.param_groups[0]["lr"]
            0.1
        """
        from peftlib.resume import load_optimizer

        self._check()
        load_optimizer(self, optimizer, path)

    def enable(self) -> Tuning:
        """Let the tuning act."""
        self._check()
        check_no_route(self.model)
        if not self.enabled and not self.merged:
            self._check_switch(True)
            self._switch(True)
        self._note(True)
        return self

    def disable(self) -> Tuning:
        """Keep the tuning attached without any effect: the model computes exactly what its base does."""
        self._check()
        check_no_route(self.model)
        if self.merged:
            raise StateError(
                f"The tuning {self.name!r} is merged into the weights; unmerge() it before disabling."
            )
        if self.enabled:
            self._check_switch(False)
            self._switch(False)
        self._note(False)
        return self

    def _check_switch(self, on: bool) -> None:
        """Raise if a part cannot be switched, before any is."""
        for part in self.parts:
            check_no_route(part.host)
            part.delta.check_switch(on)
            merged = part.host.__dict__.get(MERGED)
            if merged and part.delta.passive:
                for name, _ in part.delta.trained():
                    if merged.get(name, self.name) != self.name:
                        raise StateError(
                            f"The tuning {merged[name]!r} is merged into {part.name!r}, whose {name} {self.name!r} "
                            f"trains. unmerge() {merged[name]!r} first."
                        )

    def _switch(self, on: bool) -> None:
        for part in self.parts:
            part.delta.switch(on)
        self._act(on)

    def _act(self, on: bool) -> None:
        """Put the deltas into their hosts' chains, or take them out."""
        for part in self.parts:
            # What has no forward of its own has nothing to run.
            if part.parameter is not None or type(part.delta).forward is not Delta.forward:
                set_active(part.host, part.delta, part.parameter, on)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[Tuning]:
        """Within the context the model is the base; afterwards the tuning is as it was."""
        before = self.enabled
        self.disable()
        try:
            yield self
        finally:
            if before:
                self.enable()

    @property
    def merged(self) -> bool:
        return bool(self._kept)

    def merge(self, keep: str | torch.device | None = None) -> Tuning:
        """Write the tuning's update into the base weights; :meth:`unmerge` brings the base back bit for bit.

        ``W <- round(W + dW)``, computed in float32 or wider and rounded once. The original of each changed weight is
        kept (on ``keep``, e.g. ``"cpu"``, or where it is), which costs the bytes of those weights until ``unmerge``.

        Raises:
            PeftlibError: a method that is no change of a weight, a weight shared with a module outside the tuning,
                a weight that others are at, a disabled tuning, or a result that is not finite. The model is then
                unchanged.

        Example:
            >>> import torch, peftlib
            >>> model = torch.nn.Linear(4, 4)
            >>> tuning, before = peftlib.attach(model, peftlib.LoRA(rank=2)), model.weight.clone()
            >>> _ = torch.nn.init.ones_(tuning.state_dict()["lora.b"])
            >>> _ = tuning.merge()
            >>> torch.equal(model.weight, before), torch.equal(tuning.unmerge().model.weight, before)
            (False, True)
        """
        self._check()
        check_no_route(self.model)
        if self.merged:
            return self
        if not self.enabled:
            raise StateError(f"The tuning {self.name!r} is disabled; enable() it before merging.")
        self._kept = merge(self.model, self.name, [part.delta for part in self.parts], keep)
        self._act(False)
        return self

    def unmerge(self, *, overwrite: bool = False) -> Tuning:
        """Put the original weights back, bit for bit, and let the tuning act as before :meth:`merge`.

        Args:
            overwrite: also over values that were loaded into the merged weights meanwhile.

        Raises:
            StateError: a merged weight was changed meanwhile, and ``overwrite`` is not given.
        """
        self._check()
        if self.merged:
            if not overwrite:
                check_unchanged(self._kept, self.name)
            put_back(self._kept)
            self._kept = []
            self._act(True)
        return self

    def fold(self) -> Tuning:
        """Drop reparametrizations (a prefix MLP, a prompt encoder), keeping the values they produce.

        Raises:
            PeftlibError: nothing in the tuning is reparametrized.
        """
        self._check()
        check_no_route(self.model)
        done = [part.delta.fold() for part in self.parts]
        if not any(done):
            raise PeftlibError(f"The tuning {self.name!r} has no reparametrization to fold.")
        plain = {id(part.method): part.method.folded() for part in self.parts}
        for part in list(self.parts):
            part.method = plain[id(part.method)]
            if part.delta.passive and not part.built:
                self._remove(part)
                self.parts.remove(part)
        return self

    def detach(self) -> None:
        """Remove the tuning; with the last one gone the model is what it was, bit for bit."""
        self._check()
        check_no_route(self.model)
        self._check_switch(False)
        for part in self.parts:
            for host in (part.host, *part.opened):
                check_closable(host)
        if self.merged:
            self.unmerge()
        self.disable()
        for part in self.parts:
            self._remove(part)
        self.attached = False
        registry = self.model.__dict__[TUNINGS]
        del registry[self.name]
        if not registry:
            del self.model.__dict__[TUNINGS]
            self.model.__dict__.pop(AXES, None)
            restore_flags(self.model)

    def _remove(self, part: Part) -> None:
        part.delta.close()
        set_active(part.host, part.delta, part.parameter, False)
        del deltas(part.host)._modules[part.key]
        close_host(part.host, shadow=part.parameter)
        for host in part.opened:
            close_host(host)

    def _check(self) -> None:
        if not self.attached:
            raise StateError(
                f"The tuning {self.name!r} was detached from its model, so its handle does nothing any more. "
                "Attach or load it again."
            )
