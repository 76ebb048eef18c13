"""The loop around what learns from its own completions: draw prompts, improve on them, write down, keep.

PPO and GRPO differ in one iteration (``ppo``, ``grpo``); all that surrounds it is here. Dropout is off throughout: a
ratio of two probabilities is about the policy, not about what was dropped.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from peftlib import PeftlibError, Tuning, tunings
from peftlib.train.batches import Batches
from peftlib.train.buffers import Buffers
from peftlib.train.evaluation import mode
from peftlib.train.generate import checked_stops
from peftlib.train.history import History
from peftlib.train.logs import progress_bar
from peftlib.train.loop import windows
from peftlib.train.parallel import Ranks, ranks_of
from peftlib.train.policy import AGGREGATES
from peftlib.train.reference import Reference
from peftlib.train.rng import seeded
from peftlib.train.rollouts import Rollout
from peftlib.train.saving import Place
from peftlib.train.schedules import Schedule, constant, scheduled
from peftlib.train.step import NonFiniteError

Made = TypeVar("Made")
Iteration = Callable[[list[Any], Mapping[str, Any] | None, Ranks], dict[str, Any]]
"""(prompts, the row before or None, the processes) -> a row of numbers, alike on all of them."""


def improve(
    model: nn.Module,
    prompts: Batches | Sequence[Any],
    iteration: Iteration,
    trained: Mapping[str, tuple[Tuning, torch.optim.Optimizer]],
    *,
    steps: int,
    settings: Mapping[str, Any],
    scheduler: Schedule = constant,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 1,
    resume: bool = False,
    callbacks: Sequence[Callable[[Mapping[str, Any]], Any]] = (),
    progress: bool | None = None,
    seed: int | None = 0,
    parallel: str | None = None,
) -> History:
    """Call ``iteration`` with batch after batch of prompts; killed and resumed equals never stopped, as in ``fit``."""
    if steps < 1 or checkpoint_every < 1:
        raise PeftlibError(f"steps={steps}, checkpoint_every={checkpoint_every}: give numbers from 1.")
    first = next(iter(trained.values()))[1]
    ranks = _ranks(parallel, prompts, first.param_groups[0]["params"][0].device, seed)
    folder = None if checkpoint_dir is None else Path(checkpoint_dir)
    optimizers = [optimizer for _, optimizer in trained.values()]
    base = None if folder is None else ranks.agreed(base_of(model))
    place = Place(folder, trained, {"seed": seed, **settings, "base": base}, prompts, ranks)
    ranks.engage(parallel, model, first)
    for optimizer in optimizers:
        optimizer.zero_grad()
    with seeded(seed), mode(model, False), scheduled(optimizers, scheduler, steps) as rate_at:
        state = place.open(resume, Buffers(model))
        source = windows(prompts, state, 1, ranks)
        with progress_bar(steps, state.step, progress if ranks.first else False) as show:
            while state.step < steps and not state.stopped:
                began = time.perf_counter()
                (batch,) = next(source)
                if not isinstance(batch, Sequence | Tensor):
                    raise PeftlibError(
                        "prompts= are batches of rows of ids, [[[1, 2], [3]]] or Batches(rows, 2); got "
                        f"{type(batch).__name__} for a batch."
                    )
                before = state.history.rows[-1] if state.history.rows else None
                rate = rate_at(state.step)
                with ranks.drawing(state.step):
                    try:
                        numbers = iteration(list(batch), before, ranks)
                    except NonFiniteError as error:
                        # who raises it knows the minibatch, not the iteration
                        error.step = state.step
                        raise
                row = {"step": state.step, "epoch": state.epoch, "rate": rate, **numbers}
                state.step += 1
                state.history.add(row, time.perf_counter() - began)
                show(row, state.history.seconds[-1])
                place.log(row)
                with mode(model, False):
                    state.stopped |= ranks.told(row, callbacks)
                ended = state.step == steps or state.stopped
                if folder is not None and (ended or state.step % checkpoint_every == 0):
                    place.save(state)
    return state.history


def _ranks(parallel: str | None, prompts: Any, device: torch.device, seed: int | None) -> Ranks:
    if parallel == "fsdp":
        raise PeftlibError(
            "parallel='fsdp' would gather every weight for every token that is drawn. Use parallel='ddp': of base, "
            "policy and value each process holds one copy."
        )
    ranks = ranks_of(parallel, device, seed)
    if ranks.world > 1:
        check_shares(prompts, ranks.world)
    return ranks


def check_shares(prompts: Any, world: int) -> None:
    """Raise unless every process has as many rows of every batch."""
    if not isinstance(prompts, Batches):
        raise PeftlibError(
            f"{world} processes share the rows of train.Batches; got {type(prompts).__name__}."
        )
    if prompts.size % world or prompts.draws % prompts.size % world:
        raise PeftlibError(
            f"Batches of {prompts.size} from {prompts.draws} prompts an epoch leave some of {world} processes with "
            "fewer rows than others. Give numbers that they divide."
        )


def together(ranks: Ranks, make: Callable[[], Made]) -> Made:
    """What this process makes; an error on one of them is one on all, who would wait for it otherwise."""
    done = False
    try:
        made = make()
        done = True
    finally:
        failed = ranks.total(not done)[0]
    if failed:
        raise PeftlibError(
            f"{failed:.0f} of {ranks.world} processes failed in a rollout; their own errors say why."
        )
    return made


def base_of(model: nn.Module) -> str:
    """A digest of some values of each parameter of the base: whether a training goes on with the one it began with."""
    own = {id(p) for tuning in tunings(model).values() for p in tuning.parameters()}
    digest = hashlib.blake2b(digest_size=8)
    for name, parameter in model.named_parameters():
        if id(parameter) not in own:
            flat = parameter.detach().reshape(-1)
            some = flat[:: max(1, flat.numel() // 16)].float().cpu()
            digest.update(f"{name} {tuple(parameter.shape)} {some.tolist()}".encode())
    return digest.hexdigest()


def stepped(
    optimizer: torch.optim.Optimizer, clip: float | None, what: str, done: Rollout, ranks: Ranks
) -> None:
    """Add the gradients up over the processes, clip, step, and forget them.

    Raises:
        NonFiniteError: their norm is no number; nothing was changed. :func:`improve` writes its step.
    """
    parameters = parameters_of(optimizer)
    ranks.add_up(parameters)
    norm = nn.utils.clip_grad_norm_(parameters, float("inf") if clip is None else clip)
    if not norm.isfinite():
        optimizer.zero_grad(set_to_none=True)
        raise NonFiniteError(
            f"The gradient of {what} is not finite (its norm is {norm.item()}). The values are those from before this "
            "minibatch; the rollout is in this error's .batches. Lower the rate or the KL's weight, or set clip_norm=.",
            -1,
            [done],
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("epochs", "minibatch", "rows"), (lambda x: x >= 1, "a number from 1")),
    "group_size": (lambda x: x >= 2, "a number from 2"),
    **dict.fromkeys(("missing_stop_penalty", "kl", "beta"), (lambda x: 0 <= x < math.inf, "a number from 0")),
    **dict.fromkeys(("gamma", "lam"), (lambda x: 0 <= x <= 1, "a factor from 0 to 1")),
    **dict.fromkeys(("clip", "clip_high", "value_clip", "clip_norm"), (lambda x: x > 0, "a number above 0")),
    "kl_kind": (("k1", "k3").__contains__, "'k1' or 'k3'"),
    "aggregate": (AGGREGATES.__contains__, f"one of {', '.join(map(repr, AGGREGATES))}"),
}
_NONE = ("minibatch", "rows", "clip_high", "clip_norm")


def check_settings(**settings: Any) -> None:
    """Raise unless each is in its range; at once, not after the first rollout."""
    for name, value in settings.items():
        fine, range_ = _RANGES[name]
        if not (value is None and name in _NONE) and not fine(value):
            raise PeftlibError(f"{name}={value!r}: give {range_}{' or None' * (name in _NONE)}.")


def kept(sampling: Mapping[str, Any], reference: Reference) -> dict[str, Any]:
    """What of these has to be the same when a training goes on, as JSON has it.

    Raises:
        PeftlibError: a generator, whose state no checkpoint keeps.
    """
    if sampling.get("generator") is not None:
        raise PeftlibError(
            "sampling has a generator of its own, whose state no checkpoint keeps. Leave it out; seed= decides what is "
            "drawn."
        )
    names = [type(reference).__name__] if isinstance(reference, nn.Module) else list(reference)
    plain = {name: value for name, value in sampling.items() if name != "generator"}
    stops = checked_stops(sampling.get("stop_ids", ()))
    return {"sampling": {**plain, "stop_ids": stops}, "reference": names}


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """What it holds: gradients go to these alone, not to other tunings that are enabled too."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def check_policy(policy: Tuning, optimizer: torch.optim.Optimizer, what: str) -> None:
    """Raise unless the optimizer trains this tuning's parameters and no others."""
    frozen = [name for name, p in policy.named_parameters() if not p.requires_grad]
    if frozen:
        raise PeftlibError(
            f"The tuning {policy.name!r} is frozen ({frozen[0]!r} takes no gradient), and {what} is trained. Load it "
            "with trainable=True."
        )
    own = {id(p) for p in policy.parameters()}
    held = {id(p) for p in parameters_of(optimizer)}
    if held - own or not held:
        raise PeftlibError(
            f"The optimizer of {what} holds {len(held - own)} parameter(s) that are not of its tuning {policy.name!r}. "
            f"Make it of that tuning's parameters()."
        )


def names_with(model: nn.Module, policy: Tuning, others: Sequence[Tuning] = ()) -> tuple[str, ...]:
    """The tunings that make the policy: those that are enabled now, itself among them, and no value or reward."""
    have = tunings(model)
    if have.get(policy.name) is not policy:
        raise PeftlibError(f"The policy {policy.name!r} is not a tuning of this {type(model).__name__}.")
    names = tuple(name for name, tuning in have.items() if tuning.enabled)
    wrong = [other.name for other in others if other.name in names]
    if not policy.enabled or wrong:
        raise PeftlibError(
            f"Enabled are {names or '(none)'}; the policy needs {policy.name!r} among them, and not "
            f"{wrong or 'others'}. Call peftlib.use(model, {policy.name!r}) first."
        )
    return names


def minibatches(rows: int, size: int, device: torch.device) -> Sequence[Tensor]:
    """All rows in a random order, in parts of a size."""
    return torch.randperm(rows).to(device).split(size)
