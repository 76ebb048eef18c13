"""The loop around what learns from its own completions: draw prompts, improve on them, write down, keep.

PPO and GRPO differ in one iteration (``ppo``, ``grpo``); all that surrounds it is here. Dropout is off throughout: a
ratio of two probabilities is about the policy, not about what was dropped.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftlib import PeftlibError, Tuning, tunings
from peftlib.train.advantages import masked_mean
from peftlib.train.batches import Batches
from peftlib.train.evaluation import mode
from peftlib.train.history import History
from peftlib.train.logs import progress_bar
from peftlib.train.loop import windows
from peftlib.train.parallel import Ranks, ranks_of
from peftlib.train.rng import seeded
from peftlib.train.rollouts import Rollout
from peftlib.train.saving import Place
from peftlib.train.schedules import Schedule, constant
from peftlib.train.step import NonFiniteError

Iteration = Callable[[list[Any], Mapping[str, Any] | None, Ranks], dict[str, Any]]
"""(prompts, the row before or None, the processes) -> a row of numbers, alike on all of them."""


@dataclass(frozen=True)
class AdaptiveKL:
    """The weight of a KL penalty that keeps the KL near a target: ``b (1 + clip(kl / target - 1, +-0.2) n / horizon)``.

    Args:
        start: weight of the first iteration.
        target: KL to the reference, in nats per completion.
        horizon: completions after which the weight may have changed by a factor of about 1.2.

    Example:
        >>> AdaptiveKL(start=0.1, target=1.0, horizon=10).after(0.1, kl=3.0, completions=5)
        0.11000000000000001

    Source: Ziegler et al. 2019, arXiv:1909.08593, section 2.2.
    """

    start: float = 0.1
    target: float = 6.0
    horizon: int = 10_000

    def __post_init__(self) -> None:
        if not (self.start > 0 and self.target > 0 and self.horizon > 0):
            raise PeftlibError(f"{self}: start, target and horizon are numbers above 0.")

    def after(self, weight: float, kl: float, completions: int) -> float:
        """The weight for the next iteration."""
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        return weight * (1 + error * completions / self.horizon)


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
    place = Place(folder, trained, {"seed": seed, **settings}, prompts, ranks)
    ranks.engage(parallel, model, first)
    groups = [group for _, optimizer in trained.values() for group in optimizer.param_groups]
    for _, optimizer in trained.values():
        optimizer.zero_grad()
    for group in groups:
        group.setdefault("initial_lr", group["lr"])
    with seeded(seed), mode(model, False):
        state = place.open(resume)
        source = windows(prompts, state, 1, ranks)
        with progress_bar(steps, state.step, progress if ranks.first else False) as show:
            while state.step < steps and not state.stopped:
                began = time.perf_counter()
                (batch,) = next(source)
                before = state.history.rows[-1] if state.history.rows else None
                for group in groups:
                    group["lr"] = group["initial_lr"] * scheduler(state.step, steps)
                with ranks.drawing(state.step):
                    try:
                        numbers = iteration(batch, before, ranks)
                    except NonFiniteError as error:
                        # who raises it knows the minibatch, not the iteration
                        error.step = state.step
                        raise
                row = {"step": state.step, "epoch": state.epoch, "rate": groups[0]["lr"], **numbers}
                state.step += 1
                state.history.add(row, time.perf_counter() - began)
                show(row, state.history.seconds[-1])
                place.log(row)
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
    if prompts.size % world or len(prompts.examples) % prompts.size % world:
        raise PeftlibError(
            f"Batches of {prompts.size} from {len(prompts.examples)} prompts leave some of {world} processes with "
            "fewer rows than others. Give numbers that they divide."
        )


def stepped(
    optimizer: torch.optim.Optimizer, clip: float | None, what: str, done: Rollout, ranks: Ranks
) -> None:
    """Add the gradients up over the processes, clip, step, and forget them.

    Raises:
        NonFiniteError: their norm is no number; nothing was changed. :func:`improve` writes its step.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
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


class Tally:
    """Means over the minibatches of an iteration, and what the first of them showed."""

    def __init__(self) -> None:
        self.rows: list[tuple[float, dict[str, float]]] = []

    def add(
        self, share: float, logps: Tensor, done: Rollout, clip: float, losses: Mapping[str, Tensor]
    ) -> None:
        """Note a part that is this share of its minibatch.

        Raises:
            PeftlibError: nothing was trained yet, and the policy is not the one that drew the tokens.
        """
        moved = torch.where(done.mask, logps.detach() - done.logps, 0)
        if not self.rows and (off := masked_mean(moved.abs(), done.mask).item()) > 0.1:
            raise PeftlibError(
                f"Before the first update the policy's log-probabilities differ from the rollout's by {off:.3g} per "
                "token, though values and tokens are the same. Something in the model changes between two forwards: "
                "dropout that eval mode does not turn off, or a state that it keeps."
            )
        ratio = moved.exp()
        numbers = {
            "policy/approxkl": masked_mean(moved.square() / 2, done.mask),
            "policy/clipfrac": masked_mean(((ratio - 1).abs() > clip).to(ratio), done.mask),
            "val/ratio": masked_mean(ratio, done.mask),
            **losses,
        }
        self.rows.append((share, {name: n.detach().item() for name, n in numbers.items()}))

    def means(self) -> dict[str, float]:
        """By name; ``val/first_ratio`` is that of the first part."""
        total = sum(share for share, _ in self.rows)
        first = self.rows[0][1]
        means = {name: sum(share * row[name] for share, row in self.rows) / total for name in first}
        return {**means, "val/first_ratio": first["val/ratio"]}


def check_policy(policy: Tuning, optimizer: torch.optim.Optimizer, what: str) -> None:
    """Raise unless the optimizer trains this tuning's parameters and no others."""
    own = {id(p) for p in policy.parameters()}
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
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
