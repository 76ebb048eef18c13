"""Peak bytes of one training step and what they consist of: measured on real tensors, estimated on fake ones.

:class:`LiveBytes` sees every ATen operator of the step and follows the storages, not the tensors: a view or an
in-place result is no new memory, and a storage leaves the count at the moment it is freed. What a storage was
*for* is settled afterwards, from its whole life. Each storage counts under the first line that holds:

- frozen, trained: a parameter's, by ``requires_grad``; with ``model`` also its buffers (frozen)
- gradient: once held by a ``.grad``, from the moment it was made
- optimizer: in the state of an optimizer that stepped, or made in its step and still there afterwards
- input: existed before the step
- activation: made by a forward (or a checkpoint's recomputation) and alive when a later backward formula ran
- temporary: the rest

The activation rule needs no saved-tensor hooks, so it also sees what a custom function keeps on ``ctx`` and what a
checkpoint recomputes, and ``torch.vmap`` and autograd's in-place checks keep working. A result that the step itself
holds through the backward (its output, its loss) is an activation too.

Left out on purpose: workspace inside one kernel, and what an allocator adds (rounding, fragments, caches), so that
the same step gives the same bytes anywhere; compiled code, which runs as its eager self here; what ``torch.func.grad``
saves, which reads as temporary; a storage resized by itself is noticed at its next use.
"""

from __future__ import annotations

import bisect
import dataclasses
import gc
import math
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from peftlib.errors import PeftlibError, ProbeError
from peftlib.methods.calls import tensors_of
from peftlib.probe import as_call, structural_copy
from peftlib.report import Table, bar_chart, format_bytes

PARTS = {
    "frozen_bytes": "frozen weights",
    "trained_bytes": "trained weights",
    "gradient_bytes": "gradients",
    "optimizer_bytes": "optimizer state",
    "activation_bytes": "activations",
    "temporary_bytes": "temporaries",
    "input_bytes": "inputs",
}
OUTSIDE = "(outside the model)"
MODULES_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class MemoryReport:
    """The largest number of bytes alive at once, and what they were.

    Attributes:
        peak_bytes: the peak; the seven parts below add up to it.
        frozen_bytes, trained_bytes: parameters by ``requires_grad``; buffers are frozen.
        gradient_bytes, optimizer_bytes, activation_bytes, temporary_bytes, input_bytes: see the module's text.
        peak_at: where the peak was first reached, such as "backward of layers.3.mlp" or "optimizer step".
        modules: module name -> activation bytes at the peak that its own forward made (not its children's), most
            first; they add up to ``activation_bytes``. Empty where no model was given.
        device: the device the bytes lie on: the busiest accelerator, else the CPU.
        cuda_peak_bytes: what CUDA's allocator gave out at its own peak, or None.

    Example:
        >>> from torch import nn
        >>> layer, x = nn.Linear(4, 4), torch.ones(2, 4)
        >>> report = measure_memory(lambda: layer(x).sum().backward(), model=layer)
        >>> report.trained_bytes, report.gradient_bytes, report.input_bytes
        (80, 80, 32)
    """

    peak_bytes: int
    frozen_bytes: int = 0
    trained_bytes: int = 0
    gradient_bytes: int = 0
    optimizer_bytes: int = 0
    activation_bytes: int = 0
    temporary_bytes: int = 0
    input_bytes: int = 0
    peak_at: str
    modules: Mapping[str, int] = field(default_factory=dict)
    device: str = "cpu"
    cuda_peak_bytes: int | None = field(default=None, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Every field by name, as JSON can hold it."""
        return dataclasses.asdict(self)

    def plot(self, path: str | Path) -> None:
        """Draw the parts of the peak as one stacked bar into a file (.png, .svg, .pdf).

        Raises:
            PeftlibError: matplotlib is missing.
        """
        series = {label: [getattr(self, name)] for name, label in PARTS.items()}
        bar_chart(path, [self.device], series, f"peak of one step: {self.peak_at}", "bytes")

    def tables(self) -> list[Table]:
        """The parts of the peak, and the modules that hold most activations."""
        rows = [
            {
                "part": label,
                "bytes": getattr(self, name),
                "share": getattr(self, name) / max(self.peak_bytes, 1),
            }
            for name, label in PARTS.items()
        ]
        notes = [f"reached in: {self.peak_at}"]
        if self.cuda_peak_bytes is not None:
            notes.append(f"CUDA's allocator at its own peak: {format_bytes(self.cuda_peak_bytes)}")
        formats = {"bytes": "bytes", "share": "percent"}
        footer = {"part": "peak", "bytes": self.peak_bytes}
        title = f"Peak memory of one step ({self.device})"
        tables = [Table(title=title, rows=rows, formats=formats, footer=footer, notes=notes)]
        if self.modules:
            shown = list(self.modules.items())[:MODULES_SHOWN]
            rows = [{"activations of": name or "(root)", "bytes": size} for name, size in shown]
            left_out = len(self.modules) - len(shown)
            notes = [f"and {left_out} more"] if left_out else []
            tables.append(Table(rows=rows, formats=formats, notes=notes))
        return tables

    def __str__(self) -> str:
        return "\n\n".join(map(str, self.tables()))

    def _repr_html_(self) -> str:
        return "".join(table._repr_html_() for table in self.tables())


def measure_memory(step: Callable[[], Any], *, model: nn.Module | None = None) -> MemoryReport:
    """Run one real training step and report its peak of live bytes.

    Run the step once before, if the first step is not the one that counts: an optimizer makes its state there.

    Args:
        step: does forward, backward and optimizer step; called once, without arguments.
        model: names the modules, and counts parameters and buffers that the step never touches.

    Raises:
        PeftlibError: ``step`` cannot be called, or ``model`` is no module.
        Exception: whatever ``step`` raises; every hook is gone then.

    Example:
        >>> from torch import nn
        >>> model, x = nn.Linear(8, 8), torch.ones(4, 8)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> def step():
        ...     model(x).square().mean().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> measure_memory(step, model=model).optimizer_bytes  # two moments of 72 floats, two step counts
        584
    """
    if not callable(step):
        raise PeftlibError(
            f"measure_memory got {type(step).__name__}: give a function that runs one training step, "
            "as in measure_memory(lambda: train_step(batch))"
        )
    cuda = torch.cuda.is_available()
    for index in range(torch.cuda.device_count() if cuda and torch.cuda.is_initialized() else 0):
        torch.cuda.reset_peak_memory_stats(index)
    with LiveBytes(model) as live:
        step()
    report = live.report()
    if cuda and report.device.startswith("cuda"):
        report = dataclasses.replace(report, cuda_peak_bytes=torch.cuda.max_memory_allocated(report.device))
    return report


def estimate_memory(
    model: nn.Module,
    example: Any,
    *,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = torch.optim.AdamW,
    loss: Callable[[Any], Tensor] | None = None,
) -> MemoryReport:
    """The report that :func:`measure_memory` would give for a step of training, without running one.

    The step runs on a structural copy of fake CPU tensors: it needs neither the memory nor the values, and the
    weights may lie on meta. It is the usual one::

        output = model(*example)
        result = loss(output)
        result.backward()
        optimizer.step()
        optimizer.zero_grad()

    and its second run counts, since the optimizer's state is there from then on. Operators are those of the CPU: a
    GPU may choose others, and oneDNN's LSTM hides its workspace from fake tensors.

    Args:
        model: any module; what has ``requires_grad`` is trained.
        example: the batch: positional arguments (a tensor, a tuple) or keyword arguments (a dict) of one forward.
        optimizer: makes the optimizer of a list of parameters; None leaves the step out.
        loss: the forward's output -> a scalar; None takes its ``.loss``, else the mean square of its first
            floating tensor.

    Raises:
        PeftlibError: nothing in the model is trained.
        ProbeError: the model or the loss cannot run on fake tensors.

    Example:
        >>> from torch import nn
        >>> model = nn.Linear(65536, 65536, device="meta")
        >>> estimate_memory(model, torch.ones(1, 65536)).trained_bytes
        17180131328
    """
    args, kwargs = as_call(example)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake = _Fake(mode)
    copy = structural_copy(model, fake)
    args, kwargs = pytree.tree_map_only(Tensor, fake, (args, kwargs))
    trained = [parameter for parameter in copy.parameters() if parameter.requires_grad]
    if not trained:
        raise PeftlibError(
            f"no parameter of {type(model).__name__} has requires_grad: attach a method first, or unfreeze what "
            "is to be trained"
        )

    def step() -> None:
        # both results stay to the end, as in most loops: dropping the output early would free its bytes
        output = copy(*args, **kwargs)
        result = default_loss(output) if loss is None else loss(output)
        result.backward()
        if chosen is not None:
            chosen.step()
        for parameter in trained:
            parameter.grad = None

    try:
        with mode, torch.enable_grad():
            chosen = None if optimizer is None else optimizer(trained)
            step()
            with LiveBytes(copy) as live:
                step()
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ProbeError(
            f"a training step of {type(model).__name__} cannot run on fake tensors ({type(error).__name__}: {reason}). "
            "Check example= and loss=; where the model asks a tensor for its values, use measure_memory on a real step"
        ) from error
    return live.report()


def default_loss(output: Any) -> Tensor:
    """The output's own ``.loss``, else the mean square of its first floating tensor.

    Raises:
        PeftlibError: the output holds no floating tensor.

    Example:
        >>> default_loss((torch.tensor([1]), torch.tensor([1.0, 3.0])))
        tensor(5.)
    """
    own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(own, Tensor):
        return own
    for tensor in tensors_of(output):
        if tensor.is_floating_point():
            return tensor.square().mean()
    raise PeftlibError(f"the forward gave {type(output).__name__} without a floating tensor: pass loss=")


class _Fake:
    """Gives each tensor a fake CPU twin; twins share storage where the originals do, at the same size in bytes."""

    def __init__(self, mode: FakeTensorMode):
        self._mode = mode
        self._bases: dict[tuple[int, torch.dtype], Tensor] = {}

    def __call__(self, tensor: Tensor) -> Tensor:
        with self._mode, torch.no_grad():
            if tensor.layout is not torch.strided or is_traceable_wrapper_subclass(tensor):
                return self._mode.from_tensor(tensor)
            storage = tensor.untyped_storage()
            key = (storage._cdata, tensor.dtype)
            if key not in self._bases:
                size = storage.nbytes() // tensor.element_size()
                self._bases[key] = torch.empty(size, dtype=tensor.dtype, device="cpu")
            fake = self._bases[key].as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        return fake.requires_grad_(tensor.requires_grad)


@dataclass(eq=False, slots=True)
class _Life:
    """What one storage was: its size over time, and where it was made."""

    device: str
    phase: str
    module: str | None
    sizes: list[tuple[int, int]] = field(default_factory=list)
    """(time, bytes) at birth (0: before the step) and at every change; 0 bytes once freed."""
    part: str | None = None

    @property
    def born(self) -> int:
        return self.sizes[0][0]

    @property
    def freed(self) -> float:
        time, size = self.sizes[-1]
        return math.inf if size else time

    def size_at(self, time: int) -> int:
        index = bisect.bisect_right(self.sizes, time, key=lambda change: change[0])
        return self.sizes[index - 1][1] if index else 0


FORWARD, RECOMPUTATION, BACKWARD, STEP = "forward", "recomputation", "backward", "optimizer step"
# what a storage is known to be wins in this order: a flat buffer with one trained parameter is trained
KNOWN = ("trained_bytes", "frozen_bytes", "gradient_bytes", "optimizer_bytes")


class LiveBytes(TorchDispatchMode):
    """Follows every storage from birth to release while it is entered; real and fake tensors alike.

    Time is the number of births, resizings and releases so far.

    Args:
        model: names the modules; its parameters and buffers count from the start.

    Raises:
        PeftlibError: ``model`` is no module.

    Example:
        >>> with LiveBytes() as live:
        ...     x = torch.zeros(256)
        ...     y = x.view(16, 16).add_(1)
        >>> live.report().peak_bytes
        1024
    """

    def __init__(self, model: nn.Module | None = None):
        super().__init__()
        if model is not None and not isinstance(model, nn.Module):
            raise PeftlibError(
                f"model is {type(model).__name__}: give the nn.Module that the step trains, or None"
            )
        self._model = model
        self._time = 0
        self._lives: list[_Life] = []
        self._live: dict[int, tuple[_Life, weakref.ref[Any]]] = {}
        self._backward_times: list[int] = []
        self._leaves: dict[int, weakref.ref[Tensor]] = {}
        self._owners: dict[int, str] = {}
        self._running: list[str] = []
        # autograd numbers its nodes as it makes them: the number at each change of module says whose a node is
        self._node_starts: list[int] = []
        self._node_modules: list[str | None] = []
        self._thread = threading.get_ident()
        self._steps: list[int] = []  # the graph task that each running optimizer step is in
        self._collects = False
        self._handles: list[Any] = []

    def __enter__(self) -> LiveBytes:
        # cycles would be freed whenever the collector happens to run
        self._collects = gc.isenabled()
        gc.disable()
        try:
            self._handles += [
                register_optimizer_step_pre_hook(self._before_step),
                register_optimizer_step_post_hook(self._after_step),
            ]
            for name, module in self._model.named_modules() if self._model is not None else ():
                self._watch_module(name, module)
            super().__enter__()
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(self, *exception: Any) -> None:
        try:
            super().__exit__(*exception)
        finally:
            self._release()

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._live.clear()  # and with it the weak references' callbacks
        self._leaves.clear()
        if self._collects:
            gc.enable()

    def _watch_module(self, name: str, module: nn.Module) -> None:
        for parameter in module._parameters.values():
            if parameter is not None:
                self._owners.setdefault(id(parameter), name)
                self._see_weight(parameter)
        for buffer in module._buffers.values():
            if buffer is not None:
                self._mark(buffer, "frozen_bytes")

        def enter(*_: Any) -> None:
            self._running.append(name)
            self._note_nodes()

        def leave(*_: Any) -> None:
            if self._running and self._running[-1] == name:
                self._running.pop()
            self._note_nodes()

        if not isinstance(module, torch.jit.ScriptModule):
            self._handles.append(module.register_forward_pre_hook(enter, prepend=True))
            self._handles.append(module.register_forward_hook(leave, always_call=True))

    def _note_nodes(self) -> None:
        # a device's backward thread counts its own nodes
        if threading.get_ident() == self._thread:
            self._node_starts.append(torch._C._autograd._get_sequence_nr())
            self._node_modules.append(self._running[-1] if self._running else None)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(_unwraps(kind) for kind in types):
            # let a wrapper subclass act first: its parts come by here one by one
            return NotImplemented
        if func.namespace == "prim":  # questions that only fake tensors ask
            return func(*args, **kwargs)
        if self._phase() == BACKWARD and func is not torch.ops.aten.detach.default:
            # detach: a checkpoint packs what it recomputed without gradients, that is no backward formula
            if not self._backward_times or self._backward_times[-1] != self._time:
                self._backward_times.append(self._time)
        if func is not torch.ops.aten.lift_fresh.default:  # its argument is the data of a new tensor
            for tensor in _tensors((args, kwargs)):
                lives = self._see(tensor, existing=True)
                if isinstance(tensor, nn.Parameter) or (
                    tensor.requires_grad and tensor.is_leaf and any(life.born == 0 for life in lives)
                ):
                    self._see_weight(tensor)
        output = func(*args, **kwargs)
        for tensor in _tensors(output):
            self._see(tensor, existing=False)
        return output

    def _phase(self) -> str:
        task = torch._C._current_graph_task_id()
        if torch.is_grad_enabled():
            return FORWARD if task == -1 else RECOMPUTATION
        if self._steps and self._steps[-1] == task:
            return STEP
        # no_grad code of a forward is forward; a closure's backward inside the step is backward
        return FORWARD if task == -1 else BACKWARD

    def _module(self, phase: str) -> str | None:
        if phase == BACKWARD:
            node = torch._C._current_autograd_node()
            if node is None:
                return None
            if "AccumulateGrad" in node.name():
                return self._owners.get(id(node.variable))  # type: ignore[attr-defined]
            index = bisect.bisect_right(self._node_starts, node._sequence_nr())
            return self._node_modules[index - 1] if index else None
        return self._running[-1] if self._running else None

    def _see(self, tensor: Tensor, *, existing: bool) -> list[_Life]:
        """The lives of a tensor's storages; one not met before was there before the step, or is born now."""
        lives = []
        for storage in _storages(tensor):
            key, size = storage._cdata, storage.nbytes()
            if key in self._live:
                life = self._live[key][0]
                if life.sizes[-1][1] != size:
                    self._resized(life, size)
            else:
                phase = FORWARD if existing else self._phase()
                life = _Life(str(tensor.device), phase, None if existing else self._module(phase))
                self._lives.append(life)
                if existing:
                    life.sizes.append((0, size))
                else:
                    self._resized(life, size)
                self._live[key] = (life, weakref.ref(storage, lambda _, key=key: self._freed(key)))  # type: ignore[misc]
            lives.append(life)
        return lives

    def _resized(self, life: _Life, size: int) -> None:
        self._time += 1
        life.sizes.append((self._time, size))

    def _freed(self, key: int) -> None:
        if key in self._live:
            self._resized(self._live.pop(key)[0], 0)

    def _mark(self, tensor: Tensor, part: str, *, existing: bool = True) -> None:
        for life in self._see(tensor, existing=existing):
            if life.part is None or KNOWN.index(part) < KNOWN.index(life.part):
                life.part = part

    def _see_weight(self, weight: Tensor) -> None:
        # every time, since a weight's .data may have been exchanged
        self._mark(weight, "trained_bytes" if weight.requires_grad else "frozen_bytes")
        known = self._leaves.get(id(weight))
        if known is not None and known() is weight:
            return
        self._leaves[id(weight)] = weakref.ref(weight)
        if weight.requires_grad and weight.is_leaf:
            self._see_gradient(weight, existing=True)
            self._handles.append(weight.register_post_accumulate_grad_hook(self._see_gradient))

    def _see_gradient(self, weight: Tensor, *, existing: bool = False) -> None:
        if weight.grad is not None:
            self._mark(weight.grad, "gradient_bytes", existing=existing)

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for weight in group["params"]:
                self._see_weight(weight)
                self._see_gradient(weight)
        self._mark_state(optimizer, existing=True)
        self._steps.append(torch._C._current_graph_task_id())

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._steps.pop()
        self._mark_state(optimizer, existing=False)
        for life, _ref in self._live.values():
            if life.part is None and life.phase == STEP and life.born:
                life.part = "optimizer_bytes"

    def _mark_state(self, optimizer: torch.optim.Optimizer, *, existing: bool) -> None:
        for value in pytree.tree_leaves(list(optimizer.state.values())):
            if isinstance(value, Tensor):
                self._mark(value, "optimizer_bytes", existing=existing)

    def report(self) -> MemoryReport:
        """The peak over everything seen so far, on the busiest accelerator or else the CPU."""
        devices: dict[str, list[_Life]] = {}
        for life in self._lives:
            devices.setdefault(life.device, []).append(life)
        devices.pop("meta", None)
        peaks = {device: _peak(lives) for device, lives in devices.items()}
        device = max(peaks, key=lambda name: (name != "cpu", peaks[name][0]), default="cpu")
        peak, time = peaks.get(device, (0, 0))
        parts: Counter[str] = Counter()
        modules: Counter[str] = Counter()
        where = "start of the step"
        for life in devices.get(device, ()):
            if time and any(change == time for change, _ in life.sizes):
                where = self._where(life)
            if size := life.size_at(time):
                part = self._part(life)
                parts[part] += size
                if part == "activation_bytes" and self._model is not None:
                    modules[OUTSIDE if life.module is None else life.module] += size
        return MemoryReport(
            peak_bytes=peak, peak_at=where, modules=dict(modules.most_common()), device=device, **parts
        )

    def _part(self, life: _Life) -> str:
        if life.part is not None:
            return life.part
        if life.born == 0:
            return "input_bytes"
        if life.phase in (FORWARD, RECOMPUTATION):
            later = bisect.bisect_left(self._backward_times, life.born)
            if later < len(self._backward_times) and self._backward_times[later] < life.freed:
                return "activation_bytes"
        return "temporary_bytes"

    def _where(self, life: _Life) -> str:
        # only a running module tells a recomputation from a backward that keeps its graph
        phase = BACKWARD if life.phase == RECOMPUTATION and life.module is None else life.phase
        if phase == STEP or self._model is None:
            return phase
        return (
            f"{phase} outside the model" if life.module is None else f"{phase} of {life.module or '(root)'}"
        )


def _peak(lives: Iterable[_Life]) -> tuple[int, int]:
    """The largest sum of sizes, and the first time it was reached."""
    changes = []
    for life in lives:
        before = 0
        for time, size in life.sizes:
            changes.append((time, size - before))
            before = size
    total = peak = at = 0
    for time, change in sorted(changes):
        total += change
        if total > peak:
            peak, at = total, time
    return peak, at


def _unwraps(kind: type) -> bool:
    """Whether a tensor type computes by calling operators on other tensors."""
    return kind.__torch_dispatch__ is not Tensor.__torch_dispatch__ and not issubclass(kind, FakeTensor)  # type: ignore[attr-defined]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))


def _storages(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    """What holds a tensor's bytes: several storages for a wrapper or a sparse tensor, none for opaque layouts."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _storages(getattr(tensor, name))
    elif tensor.layout is torch.strided:
        yield tensor.untyped_storage()
    elif tensor.layout is torch.sparse_coo:
        yield from _storages(tensor._indices())
        yield from _storages(tensor._values())
