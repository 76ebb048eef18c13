"""The step that is estimated: micro-batches, a loss, autocast, blocks that are computed twice."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peftlib.errors import PeftlibError, TargetError
from peftlib.methods.adapter import repeated_blocks
from peftlib.methods.calls import tensors_of
from peftlib.targets import Tree, as_list, matches


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


@contextlib.contextmanager
def checkpointed(model: nn.Module, where: Any = True) -> Iterator[Sequence[str]]:
    """Within this context, the backward computes some modules' insides again instead of keeping them.

    Each of these modules runs under torch's non-reentrant ``checkpoint``; nothing else of the model changes, and
    attached tunings are computed again with their hosts.

    Args:
        model: the model that is trained; it is as it was at the end.
        where: True for the repeated blocks (the elements of its module lists), False or None for none; else a
            glob on names, a module type, a predicate ``(name, module) -> bool``, or a list of these.

    Yields:
        The modules' names.

    Raises:
        TargetError: nothing matches.

    Example:
        >>> model = nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), nn.Linear(8, 2))
        >>> with checkpointed(model, "0") as names:
        ...     model(torch.ones(1, 4)).sum().backward()
        >>> names
        ['0']

    Source: Chen et al. 2016, arXiv:1604.06174.
    """
    modules = chosen_modules(model, where)
    before = [module.__dict__.get("forward") for module in modules.values()]
    try:
        for module in modules.values():
            # in the instance: the class is shared with modules that are not to be computed twice
            module.__dict__["forward"] = functools.partial(_checkpoint, module, module.forward)
        yield list(modules)
    finally:
        for module, own in zip(modules.values(), before, strict=True):
            module.__dict__.pop("forward", None)
            module.__dict__.update({} if own is None else {"forward": own})


def _checkpoint(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run it, and in the backward again in the mode it was in: a loss may switch dropout off for its forward alone."""
    then = [(inside, inside.training) for inside in module.modules()]

    def run(*args: Any, **kwargs: Any) -> Any:
        now = [(inside, inside.training) for inside, _ in then]
        if now == then:
            return forward(*args, **kwargs)
        try:
            _set_modes(then)
            return forward(*args, **kwargs)
        finally:
            _set_modes(now)

    return checkpoint(run, *args, use_reentrant=False, **kwargs)


def _set_modes(modes: Sequence[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        module.training = training


def chosen_modules(model: nn.Module, where: Any) -> dict[str, nn.Module]:
    if where is None or where is False:
        return {}
    tree = Tree(model)
    if where is True:
        names = repeated_blocks(tree)
        if not names:
            raise TargetError(
                f"checkpointing=True takes the repeated blocks of a model, and {type(model).__name__} has none: no "
                "module list or sequence of two or more modules of one class that have layers inside. Name the "
                "modules to compute twice: checkpointing='encoder.*'."
            )
    else:
        names = []
        for target in as_list(where):
            found = [site.name for site in matches(target, tree) if site.parameter is None]
            if not found:
                raise TargetError(
                    tree.near_miss(target)
                    if isinstance(target, str)
                    else f"checkpointing={target!r} matches no module of {type(model).__name__}."
                )
            names += found
    # what lies inside another one is computed twice with it already
    outer = [
        n
        for n in dict.fromkeys(names)
        if not any(n != o and n.startswith(f"{o}." if o else "") for o in names)
    ]
    return {name: tree.modules[name] for name in outer}


def training_step(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    optimizer: torch.optim.Optimizer | None,
    loss: Callable[[Any], Tensor],
    accumulate: int,
    autocast: torch.dtype | None,
) -> Callable[[], None]:
    """The usual step, as a function; see :func:`estimate_memory`."""
    cast = contextlib.nullcontext if autocast is None else functools.partial(torch.autocast, "cpu", autocast)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step() -> None:
        # both results stay until they are made anew, as in most loops: dropping the output early would free its bytes
        for _ in range(accumulate):
            with cast():
                output = model(*args, **kwargs)
                result = loss_of(loss, output)
            backward(result if accumulate == 1 else result / accumulate)
        if optimizer is not None:
            optimizer.step()
        for parameter in trained:
            parameter.grad = None

    return step


def loss_of(loss: Callable[[Any], Tensor], output: Any) -> Tensor:
    """``loss(output)``; its frame tells that the loss is what runs."""
    return loss(output)


def backward(result: Tensor) -> None:
    """``result.backward()``, but a mode for torch's functions stays on in what the backward computes again."""
    if not isinstance(result, Tensor) or result.numel() != 1 or not result.requires_grad:
        given = type(result).__name__
        if isinstance(result, Tensor):
            given = f"{result.dtype} of shape {tuple(result.shape)}"
            given += "" if result.requires_grad else " without a gradient"
        raise PeftlibError(f"the loss is {given}: it has to be a scalar that depends on what is trained")
    torch.autograd.Variable._execution_engine.run_backward(
        (result,), (torch.ones_like(result),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )
