"""Positions as a cached prefix has them: the first real token stands at P instead of 0."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peftlib.errors import PeftlibError
from peftlib.methods.base import (
    Delta,
    Method,
    Site,
    check_positive_int,
    first_argument,
    plain_class,
)
from peftlib.methods.rowwise import Rows

if TYPE_CHECKING:
    from peftlib.probe import Probe
    from peftlib.targets import Tree


class Moved(Delta):
    """At the table of learned positions: row P + i instead of i."""

    def __init__(self, offset: int):
        super().__init__()
        self.offset = offset

    def alike(self) -> Hashable:
        raise PeftlibError("it moves the positions of a table, which all rows of a batch share")

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        positions = first_argument(args, kwargs)
        return base(positions + self.offset)

    def merged(self) -> Any:
        raise PeftlibError("A position offset cannot be merged: it is no change of a weight.")


class Shift(Delta):
    """At the model: real tokens stand at positions P, P + 1, ... instead of 0, 1, ..."""

    def __init__(self, host: nn.Module, offset: int):
        super().__init__()
        self.offset = offset
        self.names = tuple(inspect.signature(plain_class(host).forward).parameters)[1:]

    def extra_repr(self) -> str:
        return f"offset={self.offset}"

    def alike(self) -> Hashable:
        return type(self).__name__

    @classmethod
    def routed(cls, rows: Rows, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        first: Any = rows.deltas[0]
        return first._run(rows.numbers("offset"), base, args, kwargs)

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self._run([self.offset], base, args, kwargs)

    def _run(
        self, offsets: Sequence[int], base: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """One offset for all rows of the batch, or one for each."""
        call = {**dict(zip(self.names, args, strict=False)), **kwargs}
        positions = call.get("position_ids")
        if positions is None:
            tokens = call.get("input_ids") if call.get("input_ids") is not None else call.get("inputs_embeds")
            if tokens is None:
                raise PeftlibError(
                    "The model was called without input_ids and inputs_embeds, so its positions are not known. Pass "
                    "position_ids."
                )
            cache = call.get("past_key_values")
            past = 0 if cache is None else cache.get_seq_length()
            positions = (torch.arange(tokens.shape[1], device=tokens.device) + past).unsqueeze(0)
        positions = positions + torch.tensor(offsets, device=positions.device)[:, None]
        at = self.names.index("position_ids")
        if at < len(args):
            return base(*args[:at], positions, *args[at + 1 :], **kwargs)
        return base(*args, **{**kwargs, "position_ids": positions})

    def merged(self) -> Any:
        raise PeftlibError("A position offset cannot be merged: it is no change of a weight.")


@dataclass(frozen=True)
class PositionOffset(Method):
    """The positions of the real tokens start at ``offset``: ``position_ids + offset``. Nothing is trained.

    HF peft hands a prefix to the model as a filled cache of P positions, so that the first token stands at position
    P; :class:`PrefixTuning` alone leaves it at 0. Together they are HF's prefix tuning:
    ``{"model": PrefixTuning(length=8, hidden=None), "": PositionOffset(8)}``.

    Default site: the root. A model that counts its positions in its own way (RoBERTa does) takes it at its table of
    positions instead.

    Args:
        offset: P.

    Raises:
        PeftlibError: the offset is no positive integer, or the site is no ``nn.Embedding`` and its forward takes no
            ``position_ids``.

    Example:
        >>> import torch, peftlib
        >>> from peftlib.hf import PositionOffset
        >>> class Model(torch.nn.Module):
        ...     def forward(self, input_ids, position_ids=None):
        ...         return position_ids
        >>> model = Model()
        >>> _ = peftlib.attach(model, PositionOffset(4), targets="")
        >>> model(torch.tensor([[7, 8, 9]]))
        tensor([[4, 5, 6]])
    """

    offset: int

    def __post_init__(self) -> None:
        check_positive_int("PositionOffset", offset=self.offset)

    def refuses(self, site: Site) -> str | None:
        if site.parameter is not None or not (
            is_table(site.module) or "position_ids" in argument_names(site.module)
        ):
            return "its forward takes no position_ids, so the positions cannot be moved from outside"
        return None

    def default_sites(self, tree: Tree, probe: Probe | None) -> list[Site]:
        return [tree.site("")]

    def build(self, sites: Sequence[Site]) -> dict[str, Delta]:
        return {
            s.name: Moved(self.offset) if is_table(s.module) else Shift(s.module, self.offset) for s in sites
        }


def is_table(module: nn.Module) -> bool:
    return plain_class(module) is nn.Embedding


def argument_names(module: nn.Module) -> tuple[str, ...]:
    return tuple(inspect.signature(plain_class(module).forward).parameters)
