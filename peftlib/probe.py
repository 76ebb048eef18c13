"""One fake forward: shapes, attention sites, executed modules, output heads.

The forward runs on a structural copy whose parameters are fake CPU tensors (also where the model lies on a GPU or
on meta), so it costs no memory, and a module that caches tensors in its first call does so in the copy. Where a
model asks a tensor for its value, fake tensors cannot follow; then the copy is a whole one and runs for real.

Left out on purpose: tracing. Only module calls and SDPA calls are seen; a hand-written softmax(q @ k.T) is not.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from peftlib.attention import attention_with_weights
from peftlib.errors import ProbeError
from peftlib.methods.base import CHILD, Site, first_tensor
from peftlib.methods.calls import tensors_of
from peftlib.methods.linear import linear_shape
from peftlib.site import TUNINGS, Deltas, can_open_attention, close_host, deltas, is_open, open_host


@dataclass
class Trace:
    """What the example showed of one module.

    Attributes:
        calls: how often its forward ran.
        input: shape of its first tensor argument in the first call, or ``None``.
        output: shape of its first output tensor in the first call, or ``None``.
        is_floating: whether that input was floating point (an embedding's is not).
        inputs: shape of the first tensor argument of every call.
        outputs: shape of the first output tensor of every call.
        call: positional and keyword arguments of the first call.
    """

    calls: int = 0
    input: tuple[int, ...] | None = None
    output: tuple[int, ...] | None = None
    is_floating: bool = True
    inputs: list[tuple[int, ...] | None] = field(default_factory=list)
    outputs: list[tuple[int, ...] | None] = field(default_factory=list)
    call: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})


@dataclass
class Attention:
    """Geometry of the SDPA calls made by one module, which is an attention site.

    Attributes:
        heads: key/value heads of the call (the smallest seen), each counted once where a model repeats it for its
            group of queries.
        key_size, value_size: features per head.
        width: query heads times features per head.
        calls: SDPA calls in the example.
        mixed: whether calls differ in the size of a head, so that no one prefix fits them.
        queries: shape of the query of every call.
    """

    heads: int
    key_size: int
    value_size: int
    width: int
    calls: int = 1
    mixed: bool = False
    queries: list[tuple[int, ...]] = field(default_factory=list, compare=False)


@dataclass
class Record:
    """Everything one forward showed."""

    traces: dict[str, Trace] = field(default_factory=dict)
    attention: dict[str, Attention] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    """Leaves in the order in which they ran; ``"name!"`` marks an SDPA call in the module ``name``."""
    heads: list[str] = field(default_factory=list)
    foreign: set[str] = field(default_factory=set)
    """Modules that call F.multi_head_attention_forward themselves, whose SDPA cannot be reached."""
    output: Any = None
    values: dict[str, tuple[Tensor, Tensor]] | None = None
    """Keys and values of each attention's first call, where a real forward was asked for them."""


class Probe:
    """The record of one example forward, and the means to run another on the same copy.

    Args:
        model: any module, tunings on it or not.
        example: positional arguments (a tensor, a tuple or list) or keyword arguments (a mapping).

    Raises:
        ProbeError: the model cannot be copied, or refuses the example.
    """

    def __init__(self, model: nn.Module, example: Any):
        self.args, self.kwargs = as_call(example)
        self.fake = True
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._copy = structural_copy(model, self._faked)
        try:
            self.record = self.run(self.args, self.kwargs)
        except Exception as error:
            if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
                raise ProbeError(_why(model, error)) from error
            # A whole copy: a forward that writes to its own weights must not write to the user's.
            self.fake = False
            self._copy = structural_copy(model, _cloned)
            try:
                self.record = self.run(self.args, self.kwargs)
            except Exception as second:
                raise ProbeError(_why(model, second)) from second
        self.heads = self.record.heads

    def trace(self, site: Site) -> Trace | None:
        return self.record.traces.get(site.name)

    def executed(self, site: Site) -> bool:
        """Whether the site ran; a raw parameter counts as read, and the passage through a module as a run."""
        if site.parameter is not None:
            return True
        return site.name in self.record.traces

    def part(self, name: str) -> nn.Module:
        """The copy's module of a name."""
        return self._copy.get_submodule(name)

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str = "") -> Record:
        """Run the copy, or the named part of it, on inputs whose shapes count, and record what happens."""
        record = Record()
        part = self.part(name)
        args, kwargs = _unused((args, dict(kwargs)))
        with torch.random.fork_rng(devices=[], enabled=not self.fake), torch.enable_grad():
            if self.fake:
                with self._mode, _quiet():
                    args, kwargs = pytree.tree_map_only(Tensor, self._faked, (args, dict(kwargs)))
                    record.output = _observe(part, args, kwargs, record, name)
            else:
                with torch.no_grad():
                    record.output = _observe(part, args, kwargs, record, name)
        return record

    def activations(self, model: nn.Module, inputs: Any) -> dict[str, tuple[Tensor, Tensor]]:
        """Keys and values of the first SDPA call in each attention, from a real forward without gradients.

        Raises:
            ProbeError: the model is on meta, or refuses the inputs.
        """
        if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
            raise ProbeError(
                "A start at real activations needs a model with values; this one is on the meta device."
            )
        record = Record(values={})
        args, kwargs = as_call(inputs)
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                _observe(structural_copy(model, _cloned), args, kwargs, record)
        except Exception as error:
            raise ProbeError(_why(model, error)) from error
        assert record.values is not None
        return record.values

    def _faked(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor) and tensor.fake_mode is self._mode:
            return tensor
        with self._mode:
            # Always on the CPU: fake CUDA tensors abort the process in SDPA, meta ones fail in several models.
            fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
        return fake.requires_grad_(tensor.requires_grad) if fake.is_floating_point() else fake


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's own log of a failing fake operator: the error that is raised says it."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _unused(call: Any, seen: dict[int, Any] | None = None) -> Any:
    """A call whose lists, dicts and caches are not the given ones, so that a forward that fills them spares those.

    Tensors stay the same: a deep copy of a fake one has no memory behind it.
    """
    seen = {} if seen is None else seen
    if isinstance(call, _PLAIN) or callable(call) or id(call) in seen:
        return seen.get(id(call), call)
    if isinstance(call, (list, tuple, dict)):
        # Flattened once, for its leaves may be containers of a kind that pytree does not know.
        return pytree.tree_map(lambda leaf: _unused(leaf, seen), call, is_leaf=lambda x: not _is_container(x))
    if not hasattr(call, "__dict__"):
        return call
    seen[id(call)] = made = copy.copy(call)
    vars(made).update({key: _unused(value, seen) for key, value in vars(call).items()})
    return made


def _is_container(value: Any) -> bool:
    return isinstance(value, (list, tuple, dict))


class Call(NamedTuple):
    """The arguments of one forward; an example that has both kinds."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def as_call(example: Any) -> Call:
    """``example`` as positional and keyword arguments."""
    if isinstance(example, Call):
        return example
    if isinstance(example, Mapping):
        return Call((), dict(example))
    if isinstance(example, (tuple, list)):
        return Call(tuple(example), {})
    return Call((example,), {})


def _cloned(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def structural_copy(model: nn.Module, tensor: Callable[[Tensor], Tensor], *, idle: bool = False) -> nn.Module:
    """A deep copy whose parameters and buffers are replaced by ``tensor(original)``.

    Without ``idle`` the tunings that are off are left out, so that it costs the same however many there are.
    """
    memo: dict[int, Any] = {}
    keep = []  # the originals' ids must not be reused while the memo lives
    modules = list(model.modules() if idle else _awake(model, set()))
    emptied: list[tuple[nn.Module, Deltas]] = []
    for module in modules:
        if is_open(module) and not idle:
            emptied.append((module, Deltas()))
            memo[id(deltas(module))] = emptied[-1][1]
        if TUNINGS in module.__dict__:
            memo[id(module.__dict__[TUNINGS])] = {}
    for module in modules:
        for own in (*module._parameters.values(), *module._buffers.values()):
            if own is None or id(own) in memo:
                continue
            keep.append(own)
            made = tensor(own)
            if isinstance(own, nn.Parameter) and not isinstance(made, nn.Parameter):
                made = nn.Parameter(made.detach(), requires_grad=own.requires_grad)
            memo[id(own)] = made
        for value in module.__dict__.values():
            # Tensors kept as plain attributes (rotary tables, masks).
            for item in pytree.tree_leaves(value) if isinstance(value, (Tensor, list, tuple, dict)) else ():
                if isinstance(item, Tensor) and id(item) not in memo:
                    keep.append(item)
                    memo[id(item)] = tensor(item.detach())
    for module in modules:
        for key, value in module.__dict__.items():
            if key not in ("_modules", "_parameters", "_buffers") and id(value) not in memo:
                if not isinstance(value, _PLAIN):
                    # What cannot be copied (locks, generators, open files) is shared with the original.
                    trial = dict(memo)
                    try:
                        if not _holds_module(value):
                            copy.deepcopy(value, trial)
                    except Exception:  # noqa: BLE001 (whatever its __deepcopy__ raises)
                        keep.append(value)
                        memo[id(value)] = value
    try:
        copied = copy.deepcopy(model, memo)
        for host, stand_in in emptied:
            stand_in._modules.update(
                {key: copy.deepcopy(delta, memo) for key, delta in _running(host).items()}
            )
        return copied
    except Exception as error:
        raise ProbeError(
            f"{type(model).__name__} cannot be copied for the fake forward ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''}). Attach before wrapping the model for "
            "several processes; "
            "else give it a working __deepcopy__, or leave example= out and name the targets."
        ) from error


def _running(host: nn.Module) -> dict[str, nn.Module]:
    """The deltas at an open host that are on, and those that only hold tensors, which others may need."""
    chains = (host.__dict__["_peft_active"], *host.__dict__["_peft_weights"].values())
    on = {id(delta) for chain in chains for delta in chain}
    own: dict[str, Any] = deltas(host)._modules
    return {key: delta for key, delta in own.items() if id(delta) in on or delta.passive}


def _awake(module: nn.Module, seen: set[int]) -> Iterator[nn.Module]:
    """All modules inside but the deltas that are off."""
    seen.add(id(module))
    yield module
    own: dict[str, Any] = module._modules
    if is_open(module):
        own = {key: child for key, child in own.items() if key != CHILD} | _running(module)
    for child in own.values():
        if child is not None and id(child) not in seen:
            yield from _awake(child, seen)


_PLAIN = (
    bool,
    int,
    float,
    str,
    bytes,
    type(None),
    type,
    torch.dtype,
    torch.device,
    torch.Size,
    Tensor,
    nn.Module,
)


def _holds_module(value: Any) -> bool:
    return isinstance(value, (list, tuple, dict, set)) and any(
        isinstance(v, nn.Module) or _holds_module(v)
        for v in (value.values() if isinstance(value, dict) else value)
    )


def _observe(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], record: Record, prefix: str = ""
) -> Any:
    opened = []
    for module in list(model.modules()):
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # asks the mask for its values
        if can_open_attention(module) and not is_open(module):
            open_host(module)
            opened.append(module)
    stack: list[str] = []
    produced: dict[Any, tuple[str, Tensor]] = {}
    handles = []

    def before(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            stack.append(name)
            trace = record.traces.setdefault(name, Trace())
            trace.calls += 1
            given = first_tensor([*args, *kwargs.values()])
            trace.inputs.append(None if given is None else tuple(given.shape))
            if trace.calls == 1:
                trace.call = _unused((args, kwargs))
                if given is not None:
                    trace.input, trace.is_floating = tuple(given.shape), given.is_floating_point()

        return hook

    def after(name: str, leaf: bool, linear: bool) -> Callable[..., None]:
        def hook(_: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
            if stack and stack[-1] == name:
                stack.pop()
            result = first_tensor(output)
            trace = record.traces[name]
            trace.outputs.append(None if result is None else tuple(result.shape))
            if result is not None and trace.output is None:
                trace.output = tuple(result.shape)
            if leaf:
                record.order.append(name)
            if linear and result is not None:
                produced[_storage(result)] = (name, result)

        return hook

    for name, module in _named(model, prefix):
        leaf = not any(k != CHILD for k in module._modules)
        handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True, prepend=True))
        handles.append(
            module.register_forward_hook(
                after(name, leaf, linear_shape(module) is not None), with_kwargs=True
            )
        )
    try:
        with _Watch(stack, record):
            output = model(*args, **kwargs)
    except Exception as error:
        error.peft_where = stack[-1] if stack else ""  # type: ignore[attr-defined]
        raise
    finally:
        for handle in handles:
            handle.remove()
        for module in opened:
            close_host(module)
    for leaf_value in tensors_of(output):
        name, whole = produced.get(_storage(leaf_value), ("", leaf_value))
        # Keys and values returned for a cache are views with an axis more, of heads.
        if name and name not in record.heads and leaf_value.dim() <= whole.dim():
            record.heads.append(name)
    return output


def _storage(tensor: Tensor) -> Any:
    return tensor.untyped_storage()._cdata


def _named(
    module: nn.Module, prefix: str = "", seen: set[int] | None = None
) -> Iterator[tuple[str, nn.Module]]:
    seen = set() if seen is None else seen
    if id(module) in seen:
        return
    seen.add(id(module))
    yield prefix, module
    for key, child in module._modules.items():
        if child is not None and key != CHILD:
            yield from _named(child, f"{prefix}.{key}" if prefix else key, seen)


_RESHAPES = (Tensor.reshape, torch.reshape, Tensor.flatten, torch.flatten)
_REPEATS = (Tensor.repeat_interleave, torch.repeat_interleave)


def _repeats(source: Any, result: Any) -> int:
    """How often in a row ``result`` (..., H, S, E) holds each head of ``source``."""
    if not isinstance(source, Tensor) or not isinstance(result, Tensor) or result.dim() < 4:
        return 1
    rows = result.shape[:-2].numel()
    if source.shape[:-3] == result.shape[:-3] and source.shape[-2:] == result.shape[-2:]:
        return result.shape[-3] // source.shape[-3]
    for axis, (size, stride) in enumerate(zip(source.shape, source.stride(), strict=True)):
        if stride == 0 and size > 1 and source.shape[:axis].numel() * size == rows:
            return size
    return 1


class _Watch(TorchFunctionMode):
    """Note which module makes each SDPA call, and how many heads its keys had before they were repeated."""

    def __init__(self, stack: list[str], record: Record):
        self._stack = stack
        self._record = record
        self._repeated: dict[Any, tuple[int, Tensor]] = {}
        """Storage of a tensor of repeated heads -> how often, and the tensor, so that the storage is not used again."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention or func is attention_with_weights:
            self._note(
                *(args[i] if i < len(args) else kwargs[n] for i, n in enumerate(("query", "key", "value")))
            )
        elif func is F.multi_head_attention_forward and self._stack:
            self._record.foreign.add(self._stack[-1])
        result = func(*args, **kwargs)
        if func in _RESHAPES or func in _REPEATS:
            times = _repeats(args[0] if args else kwargs.get("input"), result)
            if times > 1:
                self._repeated[_storage(result)] = (times, result)
        return result

    def _heads(self, tensor: Tensor) -> int:
        """The heads that differ in a call's key or value."""
        if tensor.dim() < 4 or tensor.stride(-3) == 0:
            return 1
        return tensor.shape[-3] // self._repeated.get(_storage(tensor), (1,))[0]

    def _note(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        name = self._stack[-1] if self._stack else ""
        heads = max(self._heads(key), self._heads(value))
        query_heads = query.shape[-3] if query.dim() >= 4 else 1
        if self._record.values is not None:
            self._record.values.setdefault(name, (key, value))
        known = self._record.attention.get(name)
        if known is None:
            self._record.attention[name] = Attention(
                heads, key.shape[-1], value.shape[-1], query_heads * key.shape[-1]
            )
            self._record.order.append(f"{name}!")
        else:
            known.calls += 1
            if (key.shape[-1], value.shape[-1]) == (known.key_size, known.value_size):
                known.heads = min(known.heads, heads)
            else:
                known.mixed = True
        self._record.attention[name].queries.append(tuple(query.shape))


def _why(model: nn.Module, error: Exception) -> str:
    where = getattr(error, "peft_where", "")
    lines = str(error).strip().splitlines()
    return (
        f"The example could not be run through {type(model).__name__}"
        f"{f', in {where!r}' if where else ''}: {type(error).__name__}: {lines[0] if lines else ''} -- "
        "Pass the inputs of one forward: a tensor, a tuple of positional arguments, or a dict of keyword arguments (a "
        "forward that takes one tuple or dict gets it as (x,))."
    )
