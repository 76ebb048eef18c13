"""The one signature behind every method: ``Method.build(sites) -> {site name: Delta}``.

A *method* is a frozen configuration, a *site* a place in a model, a *delta* the module a method builds for one
site. A delta gets the forward it wraps as an opaque callable, so a quantized or exotic host needs no branch.

Left out on purpose: anything about names, files or several tunings. That is ``attach``, ``checkpoint``, ``tuning``.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import dataclasses
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from peftlib.errors import PeftlibError

if TYPE_CHECKING:
    from peftlib.methods.rowwise import Rows
    from peftlib.probe import Probe
    from peftlib.targets import Tree

CHILD = "_peft"
"""Name of an open host's child that holds its deltas."""

_PLAIN = frozenset((bool, int, float, str, tuple))

_WITHOUT_VALUES: contextvars.ContextVar[bool] = contextvars.ContextVar("without_values", default=False)

METHODS: dict[str, type[Method]] = {}
"""Every method by class name; files name methods by it."""


@dataclasses.dataclass(frozen=True)
class Site:
    """One place in a model that a delta can act on.

    Attributes:
        name: dotted name of the module, or of the parameter for a raw-weight site; ``""`` is the root.
        module: the host; for a raw-weight site, the module that owns the parameter.
        parameter: own name of the parameter for a raw-weight site, else ``None``.
        model: the root that ``attach`` was given.
        facts: what the probe learned that the method needs, JSON-able, so that loading needs no example.
        start: values that the method found for the site to begin with; not part of any file.
    """

    name: str
    module: nn.Module
    parameter: str | None = None
    model: nn.Module | None = None
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    start: Any = None


class Delta(nn.Module):
    """What a method adds at one site; ``forward(base, *args, **kwargs)`` stands in for the host's forward."""

    everywhere: ClassVar[bool] = False
    """True where all rows of a batch must have such a delta if one has."""
    passive: ClassVar[bool] = False
    """True where the delta holds tensors (shared parts, kept values) and changes nothing that its host computes."""

    label: str = ""
    """Set by ``attach``: what tells this delta from others of the same tuning at the same host."""
    order: int = 0
    """Set by ``attach``: deltas of one host run in the order in which they came."""

    def __setattr__(self, name: str, value: Any) -> None:
        # What nn.Module checks at each assignment would cost more than all the rest of building a delta.
        kind = type(value)
        if kind in _PLAIN:
            object.__setattr__(self, name, value)
        elif kind is nn.Parameter and name not in self.__dict__ and name not in self._buffers:
            self._parameters[name] = value
        else:
            super().__setattr__(name, value)

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return base(*args, **kwargs)

    def effective(self, value: Tensor) -> Tensor:
        """What a raw parameter reads as (raw-weight sites only)."""
        raise AssertionError(f"{type(self).__name__} does not act on raw parameters")

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters an optimizer gets, by name."""
        yield from self.named_parameters()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors a file holds, by name."""
        yield from self.named_parameters()
        for path, module in self.named_modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and name not in module._non_persistent_buffers_set:
                    yield (f"{path}.{name}" if path else name), buffer

    def derive(self) -> None:
        """Compute what is neither trained nor saved, once the tensors have come from a file."""

    def switch(self, on: bool) -> None:
        """Called when the tuning is enabled or disabled, before the host's chain changes."""

    def check_switch(self, on: bool) -> None:
        """Raise if :meth:`switch` could not be done; called for every part before any is switched."""

    def close(self) -> None:
        """Called once when the delta leaves its host for good."""

    def merged(self) -> Sequence[tuple[nn.Module, str, slice | None, Callable[[Tensor], Tensor]]]:
        """Weight updates equal to this delta, as (owner, parameter, rows, old -> new); raises where none is.

        Each maps the weight, or those rows of it, to a new tensor, in any dtype at least as wide; it is rounded once,
        after the last. Modules that share a weight have to give equal updates. Of a weight in float32 or wider the new
        one can be differentiated by what is trained: penalties on the update are made of it.
        """
        raise PeftlibError(
            f"{type(self).__name__} cannot be merged: it is no change of a weight. Keep the tuning attached."
        )

    def fold(self) -> bool:
        """Replace a reparametrization by the values it produces; True if there was one."""
        return False

    def alike(self) -> Hashable:
        """What deltas of several tunings must share to run as one, each for its own rows of a batch.

        Raises where single rows cannot take the delta.
        """
        raise PeftlibError("it changes what all rows of a batch share")

    def for_rows(self, rows: Rows) -> Any:
        """What stands in a host's chain for the deltas of ``rows``, of which this is the first."""
        return rows

    @classmethod
    def routed(cls, rows: Rows, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """:meth:`forward` for a batch whose rows take different deltas, which are alike."""
        raise AssertionError(f"{cls.__name__} runs for whole batches")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """Configuration of one fine-tuning method.

    Args:
        head: a task head trained with the tuning: a target (trained fully), a :class:`NewHead`, or a mapping
            ``{target: method}``.
        dtype: dtype of the added parameters; ``None`` takes the host's.
    """

    head: Any = None
    dtype: torch.dtype | None = None

    follows_calls: ClassVar[bool] = False
    """True if it changes a module's weight in effect, but only in the module's own calls."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        METHODS[cls.__name__] = cls

    @property
    def needs_probe(self) -> bool:
        """True if the method cannot find or size its sites by attributes alone."""
        return False

    @abstractmethod
    def refuses(self, site: Site) -> str | None:
        """Why this method cannot act on a site, or ``None`` if it can."""

    @abstractmethod
    def build(self, sites: Sequence[Site]) -> dict[str, Delta]:
        """One delta per site name; names beyond the given sites (``""``: the root) hold shared parts."""

    def default_sites(self, tree: Tree, probe: Probe | None) -> list[Site]:
        """The sites taken when no target is given."""
        raise PeftlibError(f"{type(self).__name__} has no default place: name one with targets=[...].")

    def default_skips(self, tree: Tree, probe: Probe | None) -> dict[str, str]:
        """Places the default passes over that a reader might look for there, with the reason."""
        return {}

    def resolve(self, site: Site, tree: Tree, probe: Probe | None) -> list[Site]:
        """The sites that a target's match stands for: itself, or the projections of an attention."""
        if self.refuses(site) is None:
            return [site]
        if isinstance(site.module, nn.MultiheadAttention) and site.parameter is None:
            return [s for s in tree.projections(site.name) if self.refuses(s) is None]
        return []

    def why_unresolved(self, site: Site, probe: Probe | None) -> str:
        """What is wrong with a match that :meth:`resolve` finds nothing in."""
        return self.refuses(site) or "it has no place for the method"

    def folded(self) -> Method:
        """The method that its deltas are of after :meth:`Delta.fold`."""
        return self

    def survey(self, sites: Sequence[Site], tree: Tree, probe: Probe | None) -> list[Site]:
        """The same sites with the facts that :meth:`build` needs; may raise, leave out or add."""
        return list(sites)

    def fits(self, site: Site) -> str | None:
        """Why a site that the method takes has the wrong size; a default lists it, an explicit target raises."""
        return None

    def wasteful(self, site: Site) -> str | None:
        """As :meth:`fits`, where it would work without being of use; what a file holds is taken all the same."""
        return None

    @property
    def label(self) -> str:
        return type(self).__name__.lower()

    @property
    def own_targets(self) -> Sequence[Any] | None:
        """Targets that the method itself carries (partial fine-tuning)."""
        return None

    def config(self) -> dict[str, Any]:
        """The fields that differ from their defaults, for files and tables."""
        return {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if not (f.default is not dataclasses.MISSING and _same(getattr(self, f.name), f.default))
        }

    def __str__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.config().items())})"


def _same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and not isinstance(a, Tensor) and a == b)


def check_positive_int(owner: str, **values: Any) -> None:
    """Refuse anything but integers >= 1, naming the field."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise PeftlibError(f"{owner}({name}={value!r}): {name} must be an integer of at least 1.")


def check_probability(owner: str, **values: Any) -> None:
    """Refuse anything but a number in [0, 1)."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
            raise PeftlibError(f"{owner}({name}={value!r}): {name} must be a number in [0, 1).")


def plain_class(module: nn.Module) -> type[Any]:
    """The class a module has, or had before it was opened."""
    cls = type(module)
    return cls.__dict__.get("_peft_plain", cls)


def first_argument(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The tensor a module is applied to: its first positional argument, else its first keyword tensor."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    raise PeftlibError(
        "A site was called without a tensor argument, so there is nothing for its delta to act on."
    )


def first_tensor(output: Any) -> Tensor | None:
    """The first tensor of a module's output (tensor, tuple, mapping or dataclass), or ``None``."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        items: Any = output.values()
    elif isinstance(output, (tuple, list)):
        items = output
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        items = [getattr(output, f.name) for f in dataclasses.fields(output)]
    else:
        return None
    for item in items:
        found = first_tensor(item)
        if found is not None:
            return found
    return None


def map_first(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The output with its first tensor changed; the container keeps its type and is not mutated."""
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, Mapping):
        for key, value in output.items():
            if first_tensor(value) is not None:
                changed = {**output, key: map_first(value, change)}
                if hasattr(output, "__dataclass_fields__"):  # transformers' ModelOutput
                    return type(output)(**changed)
                if type(output) is not dict and isinstance(output, dict):
                    copied = copy.copy(
                        output
                    )  # keeps what a subclass holds besides, such as a default factory
                    copied[key] = changed[key]
                    return copied
                return changed if type(output) is dict else type(output)(changed)  # type: ignore[call-arg]
    elif isinstance(output, (tuple, list)):
        for i, value in enumerate(output):
            if first_tensor(value) is not None:
                items = [*output[:i], map_first(value, change), *output[i + 1 :]]
                return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        for f in dataclasses.fields(output):
            if first_tensor(getattr(output, f.name)) is not None:
                return dataclasses.replace(output, **{f.name: map_first(getattr(output, f.name), change)})
    raise PeftlibError(
        f"A site returned {type(output).__name__} without a tensor in it, so its delta has nothing to add to. "
        "Target a module whose output (or first output) is a tensor."
    )


@contextlib.contextmanager
def without_values() -> Iterator[None]:
    """Build deltas on the meta device: their shapes can be checked before a byte is allocated for them."""
    token = _WITHOUT_VALUES.set(True)
    try:
        yield
    finally:
        _WITHOUT_VALUES.reset(token)


def map_nested(change: Callable[..., Tensor], *nested: Tensor) -> Tensor:
    """``change`` on the rows of nested tensors, each of them plain."""
    rows = [change(*row) for row in zip(*(t.unbind() for t in nested), strict=True)]
    return torch.nested.as_nested_tensor(rows)


def placement(site: Site, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """``{"device": ..., "dtype": ...}`` for the new parameters of a site: those of its host.

    Falls back to the host's descendants, then the model's first floating parameter, then torch's default.
    Raises if the host's own tensors lie on several devices.
    """
    host = site.module
    own = host.__dict__.get("_mha", (host,))[0]  # a virtual projection has its attention's tensors
    tensors = [t for t in (*own._parameters.values(), *own._buffers.values()) if t is not None]
    for source in (own, site.model):
        if not tensors and source is not None:
            tensors = list(itertools.islice(itertools.chain(source.parameters(), source.buffers()), 1))
    devices = {t.device for t in tensors}
    if len(devices) > 1:
        raise PeftlibError(
            f"The site {site.name!r} has tensors on mixed devices ({', '.join(sorted(map(str, devices)))}); "
            "a tuning follows its host. Move the module to one device first."
        )
    device = devices.pop() if devices else torch.get_default_device()
    if _WITHOUT_VALUES.get():
        device = torch.device("meta")
    if dtype is None:
        floats = [
            t.dtype
            for t in tensors
            if t.dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16)
        ]
        dtype = floats[0] if floats else torch.get_default_dtype()
    return {"device": device, "dtype": dtype}
