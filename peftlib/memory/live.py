"""The tracker: it sees every operator of a step, and follows the storages that they make.

What it leaves out is said in :mod:`peftlib.memory`.
"""

from __future__ import annotations

import bisect
import gc
import threading
import weakref
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from peftlib.errors import PeftlibError
from peftlib.memory.lives import BACKWARD, FORWARD, RECOMPUTATION, STEP, Life, peak, timeline
from peftlib.memory.report import MemoryReport
from peftlib.memory.storages import asks, storages_of, tensors_in, unwraps
from peftlib.methods.base import CHILD

OUTSIDE = "(outside the model)"


class LiveBytes(TorchDispatchMode):
    """Follows every storage from birth to release while it is entered; real and fake tensors alike.

    Time is the number of births, resizings and releases so far.

    Args:
        model: names the modules; its parameters and buffers count from the start.
        block: bytes in which an allocator gives out memory; sizes are rounded up to it.

    Raises:
        PeftlibError: ``model`` is no module.

    Example:
        >>> with LiveBytes() as live:
        ...     x = torch.zeros(256)
        ...     y = x.view(16, 16).add_(1)
        >>> live.report().peak_bytes
        1024
    """

    def __init__(self, model: nn.Module | None = None, *, block: int = 1):
        super().__init__()
        if model is not None and not isinstance(model, nn.Module):
            raise PeftlibError(
                f"model is {type(model).__name__}: give the nn.Module that the step trains, or None"
            )
        self._model = model
        self._block = block
        self._time = 0
        self._phases: list[tuple[int, str]] = []
        self._operations: Counter[Any] = Counter()
        self._asked: dict[str, None] = {}
        self._lives: list[Life] = []
        self._live: dict[int, tuple[Life, weakref.ref[Any]]] = {}
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
        if CHILD in name.split("."):
            for own in (*module._parameters.values(), *module._buffers.values()):
                for life in self._see(own, existing=True) if own is not None else ():
                    life.tuning = True

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
        if any(unwraps(kind) for kind in types):
            # let a wrapper subclass act first: its parts come by here one by one
            return NotImplemented
        if func.namespace in ("prim", "profiler"):  # questions of fake tensors, marks of a profiler
            return func(*args, **kwargs)
        self._operations[func] += 1
        if self._running and asks(func, args) and self._phase() != STEP:
            self._asked[self._running[-1]] = None
        if self._phase() == BACKWARD and func is not torch.ops.aten.detach.default:
            # detach: a checkpoint packs what it recomputed without gradients, that is no backward formula
            if not self._backward_times or self._backward_times[-1] != self._time:
                self._backward_times.append(self._time)
        if func is not torch.ops.aten.lift_fresh.default:  # its argument is the data of a new tensor
            for tensor in tensors_in((args, kwargs)):
                lives = self._see(tensor, existing=True)
                if isinstance(tensor, nn.Parameter) or (
                    tensor.requires_grad and tensor.is_leaf and any(life.born == 0 for life in lives)
                ):
                    self._see_weight(tensor)
        output = func(*args, **kwargs)
        for tensor in tensors_in(output):
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

    def _see(self, tensor: Tensor, *, existing: bool) -> list[Life]:
        """The lives of a tensor's storages; one not met before was there before the step, or is born now."""
        lives = []
        for storage in storages_of(tensor):
            key, size = storage._cdata, -(-storage.nbytes() // self._block) * self._block
            if key in self._live:
                life = self._live[key][0]
                if life.sizes[-1][1] != size:
                    self._resized(life, size)
            else:
                phase = FORWARD if existing else self._phase()
                if not existing and (not self._phases or self._phases[-1][1] != phase):
                    self._phases.append((self._time + 1, phase))
                life = Life(str(tensor.device), phase, None if existing else self._module(phase))
                self._lives.append(life)
                if existing:
                    life.sizes.append((0, size))
                else:
                    self._resized(life, size)
                self._live[key] = (life, weakref.ref(storage, lambda _, key=key: self._freed(key)))  # type: ignore[misc]
            lives.append(life)
        return lives

    def _resized(self, life: Life, size: int) -> None:
        self._time += 1
        life.sizes.append((self._time, size))

    def _freed(self, key: int) -> None:
        if key in self._live:
            self._resized(self._live.pop(key)[0], 0)

    def _mark(self, tensor: Tensor, part: str, *, existing: bool = True) -> None:
        for life in self._see(tensor, existing=existing):
            life.mark(part)

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
        devices: dict[str, list[Life]] = {}
        for life in self._lives:
            devices.setdefault(life.device, []).append(life)
        devices.pop("meta", None)
        peaks = {device: peak(lives) for device, lives in devices.items()}
        device = max(peaks, key=lambda name: (name != "cpu", peaks[name][0]), default="cpu")
        most, time = peaks.get(device, (0, 0))
        lives = devices.get(device, [])
        parts: Counter[str] = Counter()
        modules: Counter[str] = Counter()
        where = "start of the step"
        for life in lives:
            if time and any(change == time for change, _ in life.sizes):
                where = self._where(life)
            if size := life.size_at(time):
                part = life.settled(self._backward_times)
                parts[part] += size
                parts["tuning_bytes"] += size if life.tuning else 0
                if part == "activation_bytes" and self._model is not None:
                    modules[OUTSIDE if life.module is None else life.module] += size
        return MemoryReport(
            peak_bytes=most,
            peak_at=where,
            modules=dict(modules.most_common()),
            device=device,
            operations={str(op): n for op, n in self._operations.most_common()},
            asked=tuple(self._asked),
            timeline=timeline(lives, self._backward_times, self._phases),
            **dict[str, Any](parts),
        )

    def _where(self, life: Life) -> str:
        # only a running module tells a recomputation from a backward that keeps its graph
        phase = BACKWARD if life.phase == RECOMPUTATION and life.module is None else life.phase
        if phase == STEP or self._model is None:
            return phase
        return (
            f"{phase} outside the model" if life.module is None else f"{phase} of {life.module or '(root)'}"
        )
