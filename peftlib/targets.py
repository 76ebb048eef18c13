"""Which modules a target means: globs on dotted names or any trailing part, types, predicates; near-miss errors.

A :class:`Tree` lists a model's modules once, under every name they have (tied modules have several), without
what peftlib added, and with the virtual ``q_proj``/``k_proj``/``v_proj`` of each ``nn.MultiheadAttention``.
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
import itertools
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from peftlib.errors import TargetError
from peftlib.methods.base import CHILD, Site
from peftlib.open_attention import Projection
from peftlib.site import can_open_attention

if TYPE_CHECKING:
    from peftlib.probe import Probe

M = TypeVar("M", bound=nn.Module)

ATTENTION_CHILDREN = ("q_proj", "k_proj", "v_proj", "out_proj")


class Tree:
    """The modules of a model by name, as they were before peftlib.

    Attributes:
        model: the root.
        modules: first dotted name -> module.
        aliases: every dotted name -> first dotted name.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.modules: dict[str, nn.Module] = {}
        self.aliases: dict[str, str] = {}
        self._names: dict[int, str] = {}
        self._has: dict[type[nn.Module], bool] = {}
        self._visit(model, "", frozenset())
        self._places = {name: i for i, name in enumerate(self.aliases)}
        lazy = [n for n, _, _, p in self.parameters() if isinstance(p, UninitializedParameter)]
        if lazy:
            raise TargetError(
                f"{lazy[0]!r} is not initialised yet (a lazy module learns its shape in its first forward). Run "
                "the model "
                "once, then attach."
            )

    def _visit(self, module: nn.Module, name: str, ancestors: frozenset[int]) -> None:
        first = self._names.setdefault(id(module), name)
        self.aliases[name] = first
        if first == name:
            self.modules[name] = module
        if id(module) in ancestors:
            return  # a module that holds itself
        prefix = f"{name}." if name else ""
        children = dict(module._modules)
        children.pop(CHILD, None)
        if isinstance(module, nn.MultiheadAttention) and first == name and can_open_attention(module):
            for which in "qkv":
                if f"{which}_proj" not in children:
                    children[f"{which}_proj"] = Projection(module, which)
        if children:
            inside = ancestors | {id(module)}
            for key, child in children.items():
                if child is not None:
                    self._visit(child, prefix + key, inside)

    def site(self, name: str) -> Site:
        """The site of a module name or a parameter name."""
        name = self.aliases.get(name, name)
        if name in self.modules:
            return Site(name, self.modules[name], None, self.model)
        owner, _, parameter = name.rpartition(".")
        owner = self.aliases.get(owner, owner)
        if owner in self.modules and parameter in self.modules[owner]._parameters:
            return Site(name, self.modules[owner], parameter, self.model)
        raise TargetError(self.near_miss(name))

    def place(self, site: Site) -> int:
        """Where a site stands in the order of the modules; a parameter, at its owner."""
        name = site.name if site.parameter is None else site.name.rpartition(".")[0]
        return self._places[self.aliases[name]]

    def sites(self) -> Iterator[Site]:
        for name, module in self.modules.items():
            yield Site(name, module, None, self.model)

    def inside(self, name: str) -> Iterator[Site]:
        """The sites below a module, itself included, each once; what is shared with another module, too."""
        prefix = f"{name}." if name else ""
        found: dict[str, None] = {}
        # Names stand in the order of a walk from the root, so those below one name stand together.
        for own in itertools.islice(self.aliases, self._places[name], None):
            if own != name and not own.startswith(prefix):
                break
            found[self.aliases[own]] = None
        for first in found:
            yield Site(first, self.modules[first], None, self.model)

    def projections(self, name: str) -> list[Site]:
        """The linears of an ``nn.MultiheadAttention``: q, k, v (virtual) and out."""
        names = (f"{name}.{c}" if name else c for c in ATTENTION_CHILDREN)
        return [self.site(n) for n in names if n in self.aliases and not self.is_bypassed(n)]

    def name_of(self, module: nn.Module) -> str | None:
        return self._names.get(id(module))

    def is_bypassed(self, name: str) -> bool:
        """Whether a layer is the out_proj of an attention that reads its weight and cannot be opened."""
        parent = self.parent(name)
        return isinstance(parent, nn.MultiheadAttention) and not can_open_attention(parent)

    def parent(self, name: str) -> nn.Module | None:
        return self.modules.get(self.aliases.get(name.rpartition(".")[0], "")) if name else None

    def ancestors(self, name: str) -> Iterator[tuple[str, nn.Module]]:
        while name:
            name = name.rpartition(".")[0]
            yield name, self.modules[self.aliases[name]]

    def around(self, name: str, kind: type[M]) -> list[M]:
        """The modules of a kind that hold a module, the innermost first."""
        if kind not in self._has:
            self._has[kind] = any(isinstance(m, kind) for m in self.modules.values())
        return [m for _, m in self.ancestors(name) if isinstance(m, kind)] if self._has[kind] else []

    def parameters(self) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
        """Each base parameter once: (dotted name, owner, own name, parameter)."""
        seen: set[int] = set()
        for name, module in self.modules.items():
            for own, parameter in module._parameters.items():
                if parameter is not None and id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield (f"{name}.{own}" if name else own), module, own, parameter

    def token_embedding(self, probe: Probe | None) -> Site:
        """The embedding that looks up tokens: declared, or the only one there is (with a probe: that runs)."""
        declared = getattr(self.model, "get_input_embeddings", None)
        module = declared() if callable(declared) else None
        name = self.name_of(module) if isinstance(module, nn.Module) else None
        if name is not None:
            return self.site(name)
        tables = [s for s in self.sites() if isinstance(s.module, nn.Embedding)]
        if probe is not None:
            # The one that is given ids of the example as they are: a table of positions is not.
            ids = {tuple(t.shape) for t in (*probe.args, *probe.kwargs.values()) if _is_ids(t)}
            tables = [s for s in tables if probe.executed(s)]
            tables = [s for s in tables if probe.record.traces[s.name].input in ids] or tables
        if len(tables) != 1:
            named = f": {', '.join(repr(s.name) for s in tables)}" if tables else ""
            raise TargetError(
                f"{type(self.model).__name__} has {len(tables)} embeddings{named}; name the one that looks up tokens "
                "with targets=[...]."
            )
        return tables[0]

    def output_heads(self, probe: Probe | None) -> set[str]:
        """Names of the output layers: declared, tied to an embedding, or producing the root's output."""
        heads: set[str] = set()
        declared = getattr(self.model, "get_output_embeddings", None)
        if callable(declared):
            head = declared()
            heads |= {name for name in [self.name_of(head)] if name} if isinstance(head, nn.Module) else set()
        tables = {
            id(m._parameters.get("weight")) for m in self.modules.values() if isinstance(m, nn.Embedding)
        }
        for name, module in self.modules.items():
            weight = module._parameters.get("weight")
            if weight is not None and id(weight) in tables and not isinstance(module, nn.Embedding):
                heads.add(name)
        return (heads | set(probe.heads if probe is not None else ())) - {""}

    def near_miss(self, pattern: str) -> str:
        names = [*(n for n in self.aliases if n), *(n for n, _, _, _ in self.parameters())]
        tails = dict.fromkeys(
            ".".join(parts[i:]) for parts in (n.split(".") for n in names) for i in range(len(parts))
        )
        close = difflib.get_close_matches(pattern, tails, n=4, cutoff=0.5)
        leaves = dict.fromkeys(n.rpartition(".")[2] for n in names)
        shown = [n for n in leaves if not n.isdigit()] or list(leaves)
        if close:
            hint = f"Closest names: {', '.join(repr(c) for c in close)}."
        elif shown:
            hint = f"Names in it end in: {', '.join(shown[:12])}{', ...' if len(shown) > 12 else ''}."
        else:
            hint = "It has no parts."
        return (
            f"The target {pattern!r} matches nothing in {type(self.model).__name__}. {hint} "
            "A target is a glob on a dotted name or any trailing part of it, a module type, or a predicate "
            "(name, module) -> bool."
        )


def _is_ids(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_floating_point() and value.dtype != torch.bool


@functools.lru_cache(maxsize=256)
def _glob(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(?:.*\.)?{fnmatch.translate(pattern)}", re.DOTALL)


def matches(target: Any, tree: Tree) -> list[Site]:
    """The modules a target means, or, if a glob means none, the parameters."""
    if isinstance(target, str):
        if target == "":
            return [tree.site("")]
        match = _glob(target).fullmatch
        names = dict.fromkeys(first for name, first in tree.aliases.items() if name and match(name))
        if names:
            return [tree.site(name) for name in names]
        return [
            Site(f"{name}.{own}" if name else own, module, own, tree.model)
            for name, module in tree.modules.items()
            for own, parameter in module._parameters.items()
            if parameter is not None and match(f"{name}.{own}" if name else own)
        ]
    if isinstance(target, type):
        return [s for s in tree.sites() if isinstance(s.module, target)]
    if isinstance(target, nn.Module):
        name = tree.name_of(target)
        return [] if name is None else [tree.site(name)]
    if callable(target):
        return [s for s in tree.sites() if target(s.name, s.module)]
    raise TargetError(
        f"A target must be a glob, a module type or a predicate (name, module) -> bool; got {target!r} "
        f"of type {type(target).__name__}."
    )


def describe(target: Any) -> str:
    return repr(target) if isinstance(target, str) else getattr(target, "__name__", type(target).__name__)


def as_list(targets: Any) -> list[Any]:
    if targets is None:
        return []
    if isinstance(targets, (str, type)) or callable(targets):
        return [targets]
    if isinstance(targets, Iterable):
        return list(targets)
    return [targets]
