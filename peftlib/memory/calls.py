"""The calls of modules within a context: which are outermost, and of what shapes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils import _pytree as pytree

from peftlib.errors import PeftlibError
from peftlib.probe import Call


class Calls:
    """Watches the modules that are called from outside of any other, and remembers the shapes of their last call.

    Args:
        model: watched wherever it is called from; None chooses the largest module.
        idle: watch nothing. A copy of a watched model has an idle copy of this in its hooks.
    """

    def __init__(self, model: nn.Module | None = None, idle: bool = False):
        self._asked = model
        self._calls: dict[nn.Module, Call] = {}
        self._inside: set[int] = set()  # the ids of what lies in a watched module
        self._running: nn.Module | None = None
        self._since_step: set[nn.Module] = set()
        self._accumulating: set[nn.Module] = set()
        self._watched: dict[nn.Module, Any] = {}
        self._handles: list[Any] = []
        if idle:
            return
        self._handles += [
            register_module_forward_pre_hook(self._enter),
            register_optimizer_step_post_hook(lambda *_: self._since_step.clear()),
        ]
        if model is not None:
            self._watched[model] = model.register_forward_hook(
                self._leave, with_kwargs=True, always_call=True
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return Calls, (None, True)

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if isinstance(next(module.parameters(), None), FakeTensor):
            return  # somebody estimates
        # a part that is called from outside is computed again in the backward
        if self._running is None and (module in self._watched or id(module) not in self._inside):
            self._running = module
            if module not in self._watched:
                # only a module's own hook sees keywords, and after a call that failed as well
                handle = module.register_forward_hook(self._leave, with_kwargs=True, always_call=True)
                self._watched[module] = handle
            self._inside |= {id(part) for part in module.modules()}

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if module is not self._running and module is not self._asked:
            return
        if module is self._running:
            self._running = None
        self._calls[module] = pytree.tree_map_only(Tensor, _shape, Call(args, kwargs))
        if torch.is_grad_enabled():
            if module in self._since_step and any(p.grad is not None for p in module.parameters()):
                self._accumulating.add(module)
            self._since_step.add(module)

    def model(self) -> nn.Module:
        """The module whose step is to be explained.

        Raises:
            PeftlibError: it was not called.
        """
        if self._asked is None:
            if not self._calls:
                raise PeftlibError("no model was called in explain_oom(): there is no step to split")
            return max(self._calls, key=_size)
        if self._asked in self._calls:
            return self._asked
        name = type(self._asked).__name__
        if not self._calls:
            raise PeftlibError(f"{name} was not called in explain_oom(): there is no step to split")
        raise PeftlibError(
            f"{name} itself was not called in explain_oom(), only {self._names()}: a method such as {name}.encode() "
            "does not show what it was called with. Give explain_oom a module whose forward calls it"
        )

    def call(self) -> Call:
        """What the model was last called with; tensors lie on meta."""
        return self._calls[self.model()]

    def accumulates(self) -> bool:
        """Whether it was called again with gradients of a call before, and no optimizer's step between."""
        return self.model() in self._accumulating

    def remarks(self) -> list[str]:
        """What else was called, which the model's step leaves out."""
        parts = set(self.model().modules())
        if self._asked is not None or all(m in parts or not _size(m) for m in self._calls):
            return []
        return [
            f"Only the largest of several modules that were called one by one ({self._names()}) is in these figures, "
            "as when a method other than forward is called: give explain_oom a module whose forward calls them all."
        ]

    def _names(self) -> str:
        return ", ".join(dict.fromkeys(type(module).__name__ for module in self._calls if _size(module)))

    def release(self) -> None:
        """Take every hook away."""
        for handle in (*self._handles, *self._watched.values()):
            handle.remove()  # a second time does nothing


def _shape(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta", requires_grad=tensor.requires_grad)


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
