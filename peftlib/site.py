"""Opening and closing a place in a model: swap the host's class, fold its deltas, restore it exactly.

``open_host`` sets ``module.__class__`` to a cached subclass of the host's own class, as ``fully_shard`` does. The
subclass's ``forward`` folds the host's own forward through the active deltas. Deltas live in one child module of
the host, so they move, save and shard with it, and the base's state-dict keys do not change. ``close_host`` undoes
all of it: class, children, attributes and hooks.

Left out on purpose: which deltas there are and why (``tuning``), and where they go (``targets``).
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from peftlib.errors import PeftlibError, StateError
from peftlib.methods.base import CHILD, Delta, plain_class
from peftlib.open_attention import close_projections, mha_forward, open_projections

ROUTE = "_peft_route"
"""Attribute of a model within ``route`` and of the hosts that take part: nothing else may change what runs there."""
TUNINGS = "_peft_tunings"
"""Attribute of a root: its tunings by name."""
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_BASE_ALONE: contextvars.ContextVar[bool] = contextvars.ContextVar("base_alone", default=False)
_CLASSES: weakref.WeakValueDictionary[tuple[type, frozenset[str]], type] = weakref.WeakValueDictionary()


class Deltas(nn.Module):
    """The deltas of one host, of every tuning, by ``"tuning:label"``."""

    count: int = 0
    """How many deltas were ever added: the next one's place in the order."""

    def forward(self, x: Any = None, *args: Any, **kwargs: Any) -> Any:
        # A host that runs over its own children (a loop over self.children()) must not notice this one.
        return x

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return kwargs.get("destination") if _BASE_ALONE.get() else super().state_dict(*args, **kwargs)

    def add(self, key: str, delta: Delta) -> None:
        delta.order = self.count
        self.__dict__["count"] = self.count + 1
        # Past add_module's checks: ":" keeps every key apart from nn.Module's own attributes.
        self._modules[key] = delta


@contextlib.contextmanager
def base_alone() -> Iterator[None]:
    """Within it, state dicts hold the base alone, at no cost for the tunings there are."""
    token = _BASE_ALONE.set(True)
    try:
        yield
    finally:
        _BASE_ALONE.reset(token)


def open_host(host: nn.Module, *, shadow: str | None = None, hook: bool = False) -> Deltas:
    """Open a host, once more if it is open already; each call needs one :func:`close_host`.

    Args:
        host: any module with a forward of its own class.
        shadow: a parameter that reads of ``host.<shadow>`` shall see through its raw-weight deltas.
        hook: register a no-op forward hook, which turns off fused paths that would not call the host.

    Raises:
        PeftlibError: the host cannot be opened; it is then unchanged.
    """
    state = host.__dict__.get("_peft_open")
    if state is None:
        _check(host)
        state = host.__dict__["_peft_open"] = {"holds": 0, "shadows": {}, "hook": None}
        host.__dict__["_peft_active"] = ()
        host.__dict__["_peft_weights"] = {}
        host.__dict__["_peft_ran"] = False
        try:
            host.__class__ = _open_class(type(host), frozenset())
        except TypeError as error:
            _forget(host)
            raise PeftlibError(
                f"{type(host).__name__} cannot be opened: Python refuses to change its class ({error}). "
                "Wrap it in a plain nn.Module and target that."
            ) from error
        host._modules[CHILD] = Deltas()
        if isinstance(host, nn.MultiheadAttention) and can_open_attention(host):
            open_projections(host)
    state["holds"] += 1
    if shadow is not None:
        state["shadows"][shadow] = state["shadows"].get(shadow, 0) + 1
        host.__class__ = _open_class(plain_class(host), frozenset(state["shadows"]))
    if hook and state["hook"] is None:
        state["hook"] = host.register_forward_hook(_no_op)
    return host._modules[CHILD]  # type: ignore[return-value]


def close_host(host: nn.Module, *, shadow: str | None = None) -> None:
    """Take back one :func:`open_host`; the last one leaves the host exactly as it was."""
    state = host.__dict__["_peft_open"]
    check_closable(host)
    state["holds"] -= 1
    if shadow is not None:
        state["shadows"][shadow] -= 1
        if not state["shadows"][shadow]:
            del state["shadows"][shadow]
        host.__class__ = _open_class(plain_class(host), frozenset(state["shadows"]))
    if state["holds"]:
        return
    if state["hook"] is not None:
        state["hook"].remove()
    if isinstance(host, nn.MultiheadAttention) and can_open_attention(host):
        close_projections(host)
    del host._modules[CHILD]
    host.__class__ = plain_class(host)
    _forget(host)


def check_closable(host: nn.Module) -> None:
    """Raise if somebody changed the host's class after it was opened."""
    if "_peft_plain" not in type(host).__dict__:
        raise PeftlibError(
            f"{type(host).__name__} changed its class after the tuning was attached (fully_shard and parametrize do "
            "that), so it cannot be closed exactly. Undo that change first, or keep the tuning attached."
        )


def is_open(module: nn.Module) -> bool:
    return "_peft_open" in module.__dict__


def deltas(host: nn.Module) -> Deltas:
    return host._modules[CHILD]  # type: ignore[return-value]


def set_active(host: nn.Module, delta: Delta, parameter: str | None, on: bool) -> None:
    """Put a delta into the chain that the host's forward runs (or its parameter reads), or take it out."""
    if parameter is None:
        chain = host.__dict__["_peft_active"]
        host.__dict__["_peft_active"] = (
            _with(chain, delta) if on else tuple(d for d in chain if d is not delta)
        )
    else:
        weights = dict(host.__dict__["_peft_weights"])
        chain = weights.get(parameter, ())
        weights[parameter] = _with(chain, delta) if on else tuple(d for d in chain if d is not delta)
        host.__dict__["_peft_weights"] = weights


def set_chain(host: nn.Module, chain: tuple[Any, ...]) -> None:
    """Let the host's forward run these in place of what it ran."""
    host.__dict__["_peft_active"] = chain


def check_no_route(model: nn.Module) -> None:
    """Raise where the model is within a ``route`` context."""
    if ROUTE in model.__dict__:
        raise StateError(
            "The model is within peftlib.route(...), which decides what runs. Leave that context first."
        )


def can_open_attention(module: nn.Module) -> bool:
    """Whether the module's forward is nn.MultiheadAttention's own, which an open one replaces."""
    return (
        isinstance(module, nn.MultiheadAttention)
        and plain_class(module).forward is nn.MultiheadAttention.forward
    )


def _with(chain: tuple[Delta, ...], delta: Delta) -> tuple[Delta, ...]:
    if not chain or chain[-1].order < delta.order:
        return (*chain, delta)
    return tuple(sorted((*chain, delta), key=lambda d: d.order))


def _forget(host: nn.Module) -> None:
    for name in ("_peft_open", "_peft_active", "_peft_weights", "_peft_ran"):
        host.__dict__.pop(name, None)


def _check(host: nn.Module) -> None:
    name = type(host).__name__
    if "forward" in host.__dict__:
        raise PeftlibError(
            f"{name} has a forward of its own in the instance (somebody assigned module.forward = ...), which a class "
            "swap would not reach. Remove that assignment, or attach first and wrap after."
        )
    if isinstance(host, torch.jit.ScriptModule):
        raise PeftlibError(
            f"{name} is a ScriptModule, whose compiled forward cannot be wrapped. Attach before scripting."
        )
    if CHILD in host._modules or CHILD in host.__dict__:
        raise PeftlibError(f"{name} has an attribute {CHILD!r} already, which peftlib needs. Rename it.")
    for parameter in host._parameters.values():
        if parameter is not None and type(parameter.data).__name__ == "DTensor":
            raise PeftlibError(
                f"{name} is sharded already (its parameters are DTensors). Attach before fully_shard."
            )


def _check_checkpoint(plain: type) -> None:
    """Raise inside a reentrant checkpoint through which no gradient will come.

    Such a checkpoint runs its function again in the backward only if one of its inputs requires a gradient. With a
    frozen base before it none does, and the tuning inside would silently not be trained.
    """
    module = sys.modules.get("torch.utils.checkpoint")
    if module is None:
        return
    code = module.CheckpointFunction.forward.__code__
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code is code:
            if any(isinstance(a, torch.Tensor) and a.requires_grad for a in frame.f_locals["args"]):
                return
            raise PeftlibError(
                f"{plain.__name__} runs in a reentrant checkpoint none of whose inputs requires a gradient, so "
                "the tuning in "
                "it would silently not be trained. Use checkpoint(..., use_reentrant=False), or let the input "
                "require one, "
                "for instance embedding.register_forward_hook(lambda m, i, out: out.requires_grad_())."
            )
        frame = frame.f_back  # type: ignore[assignment]


def _no_op(module: nn.Module, args: Any, output: Any) -> None:
    return None


def _open_class(plain: Any, shadows: frozenset[str]) -> type:
    """The subclass whose instances are open; cached, so that a thousand linears share one class."""
    cached = _CLASSES.get((plain, shadows))
    if cached is not None:
        return cached
    run: Callable[..., Any] = plain.forward
    if issubclass(plain, nn.MultiheadAttention) and run is nn.MultiheadAttention.forward:
        run = mha_forward

    @functools.wraps(plain.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            if not self._peft_ran:
                self.__dict__["_peft_ran"] = True
            if self.training and not torch.is_grad_enabled():
                _check_checkpoint(plain)
        call = functools.partial(run, self)
        chain: Any = self._peft_active
        if not chain:
            return call(*args, **kwargs)
        for delta in chain[:-1]:
            call = functools.partial(delta.forward, call)
        return chain[-1].forward(call, *args, **kwargs)

    def reduce_ex(self: nn.Module, protocol: Any) -> Any:
        make, args, *rest = plain.__reduce_ex__(self, protocol)
        here = type(self)
        args = tuple(plain if a is here else a for a in args)
        return (_reopen, (make, args, plain, shadows), *rest)

    namespace: dict[str, Any] = {
        "__module__": plain.__module__,
        "__qualname__": plain.__qualname__,
        "__doc__": plain.__doc__,
        "__reduce_ex__": reduce_ex,
        "forward": forward,
        "_peft_plain": plain,
        **{name: _shadow(name) for name in shadows},
    }
    if issubclass(plain, _CONTAINERS):
        namespace |= _container_view(plain)
    cls = type(plain)(plain.__name__, (plain,), namespace)
    _CLASSES[plain, shadows] = cls
    return cls


def _reopen(make: Callable[..., Any], args: tuple[Any, ...], plain: type, shadows: frozenset[str]) -> Any:
    obj = make(*args)
    obj.__class__ = _open_class(plain, shadows)
    return obj


def _shadow(name: str) -> property:
    """Reads of ``host.<name>`` see the parameter through its active raw-weight deltas."""

    def read(self: nn.Module) -> Any:
        value = self._parameters[name]
        if value is not None and value.is_meta:
            # There is a shape and no more, and deltas keep it; theirs may have values already.
            return value
        for delta in self.__dict__["_peft_weights"].get(name, ()):
            value = delta.effective(value)
        return value

    return property(read)


def _container_view(plain: Any) -> dict[str, Any]:
    """Methods that hide the deltas from iteration, ``len`` and indexing, and refuse structural changes."""

    def own(self: nn.Module) -> dict[str, nn.Module]:
        return {k: m for k, m in self._modules.items() if k != CHILD}  # type: ignore[misc]

    def closed(self: nn.Module) -> Any:
        return (
            nn.ModuleDict(own(self))
            if issubclass(plain, nn.ModuleDict)
            else plain_like(self)(own(self).values())
        )

    def plain_like(self: nn.Module) -> Callable[..., Any]:
        return nn.ModuleList if issubclass(plain, nn.ModuleList) else lambda modules: nn.Sequential(*modules)

    def get(self: nn.Module, index: Any) -> Any:
        if issubclass(plain, nn.ModuleDict):
            return own(self)[index]
        found = list(own(self).values())[index]
        return plain_like(self)(found) if isinstance(index, slice) else found

    def iterate(self: nn.Module) -> Iterator[Any]:
        return iter(own(self) if issubclass(plain, nn.ModuleDict) else own(self).values())

    def refuse(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        raise PeftlibError(
            f"{plain.__name__} carries a tuning: detach it before changing the container's modules."
        )

    view: dict[str, Any] = {
        "__iter__": iterate,
        "__len__": lambda self: len(self._modules) - 1,
        "__getitem__": get,
        "__contains__": lambda self, item: item in list(iterate(self)),
        "__reversed__": lambda self: reversed(list(iterate(self))),
        "__dir__": lambda self: [k for k in plain.__dir__(self) if k != CHILD],
        "__add__": lambda self, other: closed(self) + other,
        "keys": lambda self: own(self).keys(),
        "values": lambda self: own(self).values(),
        "items": lambda self: own(self).items(),
    }
    changes = (
        "__setitem__",
        "__delitem__",
        "__iadd__",
        "__imul__",
        "append",
        "extend",
        "insert",
        "pop",
        "clear",
        "update",
    )
    view = {k: v for k, v in view.items() if hasattr(plain, k)}
    return view | {k: refuse for k in changes if hasattr(plain, k)}
