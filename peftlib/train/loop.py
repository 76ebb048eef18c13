"""The trainer: windows of batches, a pure loss, a step, a file now and then; read it top to bottom.

Who is killed at any moment and resumes ends with the bits of who never was, on the CPU: everything that a later step
depends on is in ``State``, the tuning, the optimizer, buffers or the random state, and those go into files together.

Left out on purpose: regularizers, weights and mining, which are made of losses and samplers.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftlib import PeftlibError, Tuning, tunings
from peftlib.memory import checkpointed
from peftlib.train.arguments import check, interval, steps_in_all
from peftlib.train.batches import Batches
from peftlib.train.buffers import Buffers
from peftlib.train.evaluation import EarlyStopping, consider, mode, run_evaluation
from peftlib.train.history import History
from peftlib.train.logs import progress_bar
from peftlib.train.parallel import Ranks, ranks_of
from peftlib.train.rng import capture, generators_of, restore, seeded
from peftlib.train.saving import Place
from peftlib.train.schedules import Schedule, constant, scheduled
from peftlib.train.state import State
from peftlib.train.step import Loss, NonFiniteError, train_step

SKIPS = 10
"""So many steps in succession that are not finite are no accident."""


def fit(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss,
    *,
    optimizer: torch.optim.Optimizer,
    steps: int | None = None,
    epochs: int | None = None,
    scheduler: Schedule = constant,
    accumulate: int = 1,
    clip: float | None = None,
    autocast: torch.dtype | None = None,
    checkpoint_activations: Any = False,
    evaluate: Iterable[Any] | Callable[[nn.Module], float | Mapping[str, float]] | None = None,
    evaluate_every: int | None = None,
    early_stopping: EarlyStopping | None = None,
    nonfinite: str = "stop",
    checkpoint_dir: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    callbacks: Sequence[Callable[[Mapping[str, Any]], Any]] = (),
    progress: bool | None = None,
    seed: int | None = 0,
    parallel: str | None = None,
) -> History:
    """Train what the optimizer holds: ``L = (sum of losses) / (number of targets)`` over each window of batches.

    Args:
        model: any module, with a tuning attached or not.
        batches: what can be iterated once per epoch: :class:`Batches`, a list, a DataLoader. Tensors in a batch
            are moved to the trained parameters' device.
        loss: (model, batch) -> (sum over the targets, number of targets), of the batch or one per sample; or a scalar
            that counts as one target.
        optimizer: of the parameters that are trained; the others get no gradients meanwhile. Afterwards each group has
            its own rate again.
        steps: optimizer steps in all, those before a resumption included.
        epochs: passes over ``batches`` instead, whose length has to be known.
        scheduler: (step, steps in all) -> factor of each group's own rate; ``functools.partial(cosine, warmup=100)``.
        accumulate: batches per step; the last step of an epoch may have fewer.
        clip: largest norm of all gradients together.
        autocast: dtype of the forward; float16 scales the loss.
        checkpoint_activations: True computes repeated blocks twice instead of keeping what is inside them; or a
            target: a glob on module names, a type, a predicate.
        evaluate: batches, whose loss becomes ``eval_loss``; or a function of the model that gives a number (which is
            taken for ``eval_loss``) or several by name, ``eval_`` put before them. In eval mode, without gradients, and
            whatever it draws at random, training goes on as if it had not.
        evaluate_every: steps between evaluations; None is once an epoch.
        early_stopping: when to end before ``steps``; the best values are put back at the end. Who goes on with more
            patience, or without, trains on from the last values.
        nonfinite: ``"stop"`` raises where a loss or gradient is no number, ``"skip"`` leaves out the step and keeps
            the batches in ``history.skipped``, up to 10 steps in succession.
        checkpoint_dir: folder for going on after a crash: ``tuning-<step>.safetensors`` and ``state.safetensors``, of
            the last checkpoint, and ``log.jsonl``; needs a tuning.
        checkpoint_every: steps between checkpoints; None is once an epoch.
        resume: go on from ``checkpoint_dir``, or begin where nothing is there. The model has to have the same base
            and tuning, the optimizer the same class, groups and rates, ``batches`` the same contents.
        callbacks: called with each step's row of the history; one that returns True ends the training, with a
            checkpoint. What they draw, and the modes they set, are not the training's.
        progress: a bar on stderr (needs tqdm) with loss, rate, targets per second (tokens, of a language model), time
            left and memory; None shows it in a terminal only.
        seed: of all generators during training, which are then as they were; None leaves them alone.
        parallel: under torchrun, ``"ddp"`` (each process holds all) or ``"fsdp"`` (shards; model and optimizer stay
            sharded afterwards). Each process takes its rows of the same :class:`Batches`; of anything else, whole
            batches are dealt out, so ``accumulate`` has to be at least the number of processes. ``evaluate`` runs on
            all, callbacks and logs on the first.

    Returns:
        The history, one row per step.

    Raises:
        NonFiniteError: see ``nonfinite``; it carries the batches.
        PeftlibError: arguments that contradict each other, a loss that depends on nothing trained, a folder that has
            another training in it.

    Example:
        >>> import peftlib
        >>> model = nn.Linear(2, 1)
        >>> tuning = peftlib.attach(model, peftlib.FullFineTuning())
        >>> data = [(torch.eye(2), torch.tensor([[1.0], [2.0]]))]
        >>> def loss(model, batch):
        ...     return (model(batch[0]) - batch[1]).square().sum(), len(batch[0])
        >>> optimizer = torch.optim.Adam(tuning.parameters(), lr=0.1)
        >>> fit(model, data, loss, optimizer=optimizer, steps=150).last("loss") < 0.01
        True
    """
    per_epoch, total = steps_in_all(batches, steps, epochs, accumulate)
    evaluate_every = interval("evaluate", evaluate_every, per_epoch, needed=evaluate is not None)
    checkpoint_every = interval("checkpoint", checkpoint_every, per_epoch, needed=checkpoint_dir is not None)
    check(optimizer, scheduler, clip, autocast, evaluate, early_stopping, nonfinite, callbacks)
    trained = what_is_trained(model, optimizer)
    device = next(iter(optimizer.param_groups[0]["params"])).device
    scaler = torch.amp.GradScaler(device.type, enabled=autocast is torch.float16)
    folder = None if checkpoint_dir is None else Path(checkpoint_dir)
    ranks = ranks_of(parallel, device, seed)
    ranks.check(batches, accumulate)
    settings = {"seed": seed, "accumulate": accumulate}
    place = Place(folder, {"tuning": (trained, optimizer)}, settings, batches, ranks, scaler)
    ranks.engage(parallel, model, optimizer)
    optimizer.zero_grad()
    buffers = Buffers(model)

    with (
        seeded(seed),
        mode(model, True),
        checkpointed(model, checkpoint_activations),
        training_alone(model, optimizer),
        scheduled([optimizer], scheduler, total) as rate_at,
    ):
        stepped = ranks.wrapped(parallel, model, loss)
        state = place.open(resume, buffers)
        # by the patience of now: who asks for more of it goes on
        state.stopped = early_stopping is not None and state.waited >= early_stopping.patience
        source = windows(batches, state, accumulate, ranks)
        with progress_bar(total, state.step, progress if ranks.first else False) as show:
            while state.step < total and not state.stopped:
                began = time.perf_counter()
                window = next(source)
                rate = rate_at(state.step)
                with ranks.drawing(state.step):
                    row = train_step(
                        model,
                        window,
                        stepped,
                        optimizer,
                        clip=clip,
                        autocast=autocast,
                        scaler=scaler,
                        ranks=ranks,
                    )
                row = {"step": state.step, "epoch": state.epoch, "rate": rate, **row}
                if not row["made"]:
                    _not_finite(row, window, state, nonfinite, scaler)
                else:
                    state.skips = 0
                state.step += 1
                state.history.add(row, time.perf_counter() - began)

                if evaluate is not None and (state.step % evaluate_every == 0 or state.step == total):
                    row |= run_evaluation(model, evaluate, loss, autocast, device, ranks)
                    if early_stopping is not None:
                        consider(early_stopping, row, state, trained, buffers)
                show(row, state.history.seconds[-1])
                place.log(row)
                with mode(model, True):
                    state.stopped |= ranks.told(row, callbacks)
                ended = state.step == total or state.stopped
                if folder is not None and (ended or state.step % checkpoint_every == 0):
                    place.save(state)
    if early_stopping is not None and state.best_values:
        buffers.put(state.best_buffers)
        trained.load_state_dict(state.best_values)
    return state.history


def windows(batches: Iterable[Any], state: State, accumulate: int, ranks: Ranks) -> Iterator[list[Any]]:
    """Lists of batches, epoch after epoch, from the state's place on, which it moves."""
    own = generators_of(batches)
    while True:
        now = capture()
        if state.position == 0:
            state.epoch_rng = capture(own)
        # a DataLoader draws its order when it begins: let it draw what it drew then
        restore(state.epoch_rng, own)
        if isinstance(batches, Batches):
            source = ranks.rows(batches, state.epoch, state.position)
        else:
            source = iter(batches)
            for _ in islice(source, state.position):
                pass
        if state.position:
            restore(now)
        while window := list(islice(source, accumulate)):
            state.position += len(window)
            yield window if isinstance(batches, Batches) else ranks.own(window)
        if state.position == 0:
            raise PeftlibError(
                f"Epoch {state.epoch} has no batch. Pass what can be iterated again and again (a list, Batches, a "
                "DataLoader), not an iterator that is used up."
            )
        state.epoch, state.position = state.epoch + 1, 0


def _not_finite(
    row: dict[str, Any], window: list[Any], state: State, what: str, scaler: torch.amp.GradScaler
) -> None:
    if scaler.is_enabled() and math.isfinite(row["loss"]):
        if scaler.get_scale() >= 1:
            return  # float16's scale was too high, and is lower now
        # with no scale left to blame, and below 1 gradients would vanish
        scaler.update(1.0)
    state.skips += 1
    state.history.skipped = [*state.history.skipped, (state.step, window)][-SKIPS:]
    if what == "stop" or state.skips > SKIPS:
        raise NonFiniteError(
            f"Step {state.step}: loss {row['loss']:g}, norm of the gradients {row['norm']:g}. The values are those "
            "from before it; the batches are in this error's .batches. Lower the rate, set clip=, or look for empty or "
            "extreme examples; nonfinite='skip' leaves such steps out.",
            state.step,
            window,
        )


def what_is_trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tuning | nn.Module:
    """The tuning whose parameters the optimizer has, or the model itself if they are in no tuning.

    Raises:
        PeftlibError: a parameter is not the model's.
    """
    # torch.compile's module has the user's model inside, and the tunings are that one's
    model = getattr(model, "_orig_mod", model)
    wanted = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for tuning in tunings(model).values():
        if wanted <= {id(p) for p in tuning.parameters()}:
            return tuning
    if not wanted <= {id(p) for p in model.parameters()}:
        raise PeftlibError(
            "The optimizer trains parameters that are not the model's. Make it of tuning.parameters(), after attaching."
        )
    return model


@contextlib.contextmanager
def training_alone(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """What the optimizer does not hold gets no gradients meanwhile: nobody would take them away again."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in held]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)
