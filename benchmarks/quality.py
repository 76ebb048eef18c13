"""What every method learns on real tasks from real weights, at equal steps and at equal time.

    python -m benchmarks.quality
    python -m benchmarks.quality rotten-tomatoes --methods head,lora-qv,full --seeds 3

Each method's rate is the one of a small grid with the lowest loss on a validation part after a third of the steps,
with a seed of its own; the test part is never looked at for that. Then each seed trains every method, from the same
new head and on the same batches. The rate is constant after a short warm-up, so that a longer training begins with
the shorter one: the same run is judged after N steps (equal steps) and after as many steps as fit into the time of N
steps of full fine-tuning (equal time). How long a step takes, relative to full fine-tuning, is measured in turns.

Left out on purpose: what a step costs in memory (`benchmarks.savings`), and caching the frozen encoder's outputs for
head-only training, which would make its steps nearly free.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.entries import METHODS, start
from benchmarks.inputs import InputError
from benchmarks.machine import about
from benchmarks.progress import Progress
from benchmarks.quality_report import draw, table
from benchmarks.tasks import TASKS, Score, Task
from benchmarks.timing import clock_for, in_turns
from peftlib import PeftlibError
from peftlib.train import History, NonFiniteError, constant, fit, train_step

WARMUP = 5
SEARCH_SEED = 100
"""Rates are chosen with a seed that the results don't use."""
ROUNDS = 5
"""How often the methods take turns to be timed."""


def train(
    name: str, task: Task, rate: float, seed: int, steps: int, evaluate: Any = None
) -> tuple[nn.Module, History, int]:
    """The model, its history, and how many parameters were trained."""
    model, tuning = start(name, task, seed)
    optimizer = torch.optim.AdamW(tuning.parameters(), lr=rate)
    history = fit(
        model,
        task.batches(seed),
        task.loss,
        optimizer=optimizer,
        steps=steps,
        scheduler=partial(constant, warmup=WARMUP),
        autocast=task.autocast,
        evaluate=evaluate,
        evaluate_every=1,
        progress=False,
        seed=seed,
    )
    return model, history, tuning.num_parameters


def scored(task: Task, score: Score, model: nn.Module) -> dict[str, float]:
    """A score, in the precision of the training."""
    with torch.autocast("cpu", task.autocast, enabled=task.autocast is not None):
        return score(model)


class At:
    """A test that `fit` asks for after every step, and that is only made after the steps which are marked."""

    def __init__(self, score: Score, marks: Sequence[int]) -> None:
        self.score, self.marks, self.step = score, set(marks), 0

    def __call__(self, model: nn.Module) -> dict[str, float]:
        self.step += 1
        return self.score(model) if self.step in self.marks else {}


def pace(task: Task, names: Sequence[str]) -> dict[str, list[float]]:
    """Seconds of a step of each method; they take turns on the same batches."""
    few = list(islice(task.batches(SEARCH_SEED), ROUNDS))
    runs = {}
    for name in names:
        model, tuning = start(name, task, SEARCH_SEED)
        optimizer = torch.optim.AdamW(tuning.parameters(), lr=1e-5)
        runs[name] = partial(step, model.train(), cycle(few), task, optimizer)
    return in_turns(runs, rounds=ROUNDS, clock=clock_for(torch.get_num_threads(), "cpu"))


def step(model: nn.Module, batches: Iterator[Any], task: Task, optimizer: torch.optim.Optimizer) -> None:
    """One step as `fit` makes it."""
    train_step(model, [next(batches)], task.loss, optimizer, autocast=task.autocast)


def search_steps(task: Task) -> int:
    """A third of the steps, but not the warm-up alone."""
    return min(task.size.steps, max(task.size.steps // 3, 2 * WARMUP))


def search(task: Task, names: Sequence[str], given: Mapping[str, float]) -> dict[str, dict[float, float]]:
    """Validation loss at every rate of each method's grid; a grid of a given rate is not searched."""
    found: dict[str, dict[float, float]] = {name: {} for name in names}
    steps = search_steps(task)
    todo = [(name, rate) for name in names if name not in given for rate in METHODS[name].rates(task)]
    with Progress(len(todo), "choosing rates") as progress:
        for name, rate in todo:
            try:
                history = train(
                    name, task, rate, SEARCH_SEED, steps, At(partial(scored, task, task.validation), [steps])
                )[1]
                found[name][rate] = history.last("eval_loss")
            except NonFiniteError:
                found[name][rate] = math.inf
            progress.step(f"{name} {rate:g}: {found[name][rate]:.3f}")
    return found


def marks(steps: int, end: int) -> list[int]:
    """The steps after which a model is tested: thirds of ``steps`` while it goes on, and the end.

    >>> marks(75, 75), marks(75, 60), marks(75, 160)
    ([25, 50, 75], [25, 50, 60], [25, 50, 75, 150, 160])
    """
    thirds = {max(1, steps * i // 3) for i in (1, 2, 3)}
    return sorted({mark for mark in thirds if mark < end} | {end} | set(range(2 * steps, end, steps)))


def contest(
    task: Task,
    names: Sequence[str],
    *,
    seeds: int,
    equal: Sequence[str],
    rates: Mapping[str, float],
    save: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Every named method on a task; `save` gets the results after each seed.

    Returns:
        What is worth keeping, JSON-able.
    """
    able, refused = [], {}
    for name in names:
        try:
            start(name, task, SEARCH_SEED)
            able.append(name)
        except PeftlibError as error:
            refused[name] = str(error)
    if not able:
        raise InputError(f"no method can act: {refused}")
    seconds = pace(task, [*able, *({"full"} - set(able))])
    # how many times full fine-tuning's step: of each turn, then the middle
    relative = {
        name: statistics.median(a / b for a, b in zip(own, seconds["full"], strict=True))
        for name, own in seconds.items()
    }
    searched = search(task, able, rates)
    best = {
        name: rates[name] if name in rates else min(grid, key=lambda rate: grid[rate])
        for name, grid in searched.items()
    }
    steps = task.size.steps
    as_long = {name: max(1, round(steps / relative[name])) for name in able}
    ends = {"steps": dict.fromkeys(able, steps), "time": as_long}
    with torch.no_grad():
        before = scored(task, task.test, start(able[0], task, 0)[0].eval())
    results: dict[str, Any] = {
        "task": task.title,
        "metric": task.metric,
        "higher_is_better": task.higher_is_better,
        "parameters": sum(parameter.numel() for parameter in task.base.parameters()),
        "before": before,
        "size": dataclasses.asdict(task.size),
        "notes": task.notes,
        "refused": refused,
        "warmup": WARMUP,
        "precision": "float32" if task.autocast is None else "bfloat16 autocast",
        "rates_from": "of another task's results"
        if rates
        else f"of two, the lowest validation loss after {search_steps(task)} steps with a seed of its own",
        "machine": about(torch.get_num_threads(), "cpu"),
        "rows": [
            {
                "method": name,
                "rate": best[name],
                "validation_loss": {f"{rate:g}": loss for rate, loss in searched[name].items()},
                "step_seconds": statistics.median(seconds[name]),
                "step_relative": relative[name],
                "equal_time_steps": as_long[name],
                **{f"equal_{what}": [] for what in equal},
                "losses": [],
                "curves": [],
            }
            for name in able
        ],
    }
    with Progress(seeds * len(able), "training") as progress:
        for seed in range(seeds):
            for row in results["rows"]:
                name = row["method"]
                asked = [ends[what][name] for what in equal]
                end = max(asked)
                test = At(partial(scored, task, task.test), [*marks(steps, end), *asked])
                _, history, row["trained"] = train(name, task, best[name], seed, end, test)
                curve = [(step + 1, value) for step, value in history.column(f"eval_{task.metric}")]
                for what in equal:
                    row[f"equal_{what}"].append(dict(curve)[ends[what][name]])
                row["curves"].append(curve)
                row["losses"].append([loss for _, loss in history.column("loss")])
                progress.step(f"{name} {curve[-1][1]:.3f}")
            save(results)
    return results


def write(results: dict[str, Any], out: Path, name: str) -> None:
    """The table, its numbers and its curves as files ``quality-<task>``."""
    (out / f"quality-{name}.txt").write_text(f"{table(results)}\n", encoding="utf-8")
    (out / f"quality-{name}.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    draw(results, out / f"quality-{name}.png")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"of {', '.join(TASKS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="a few steps on little data: whether it runs")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each method (default: 3)")
    parser.add_argument("--equal", choices=("steps", "time"), help="judge at one of the two (default: both)")
    parser.add_argument("--methods", metavar="A,B,...", help=f"a selection of {', '.join(METHODS)}")
    parser.add_argument(
        "--rates",
        type=Path,
        metavar="FILE",
        help="take the rates that another task's quality-….json chose, and search none",
    )
    parser.add_argument(
        "--bf16", action="store_true", help="compute in bfloat16: quicker where the processor has it"
    )
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--out", type=Path, default=Path("quality"), help="folder (default: %(default)s)")
    args = parser.parse_args(argv)
    names = args.methods.split(",") if args.methods else list(METHODS)
    for what, given, known in (("task", args.tasks, TASKS), ("method", names, METHODS)):
        if unknown := [name for name in given if name not in known]:
            parser.error(f"unknown {what} {', '.join(unknown)}; choose among {', '.join(known)}")
    if args.seeds < 1:
        parser.error(f"--seeds {args.seeds}: at least 1")
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        rates = chosen(args.rates) if args.rates else {}
        args.out.mkdir(parents=True, exist_ok=True)
        for name in args.tasks or TASKS:
            task = TASKS[name](args.quick)
            results = contest(
                dataclasses.replace(task, autocast=torch.bfloat16 if args.bf16 else None),
                names,
                seeds=args.seeds,
                equal=[args.equal] if args.equal else ["steps", "time"],
                rates=rates,
                save=partial(write, out=args.out, name=name),
            )
            print(table(results))
    except (InputError, OSError) as error:
        parser.error(str(error))
    return 0


def chosen(file: Path) -> dict[str, float]:
    """The rates in the results of another run.

    Raises:
        InputError: it is no such file.
    """
    try:
        return {row["method"]: row["rate"] for row in json.loads(file.read_text(encoding="utf-8"))["rows"]}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"--rates {file}: expected a quality-….json of an earlier run; {error}") from error


if __name__ == "__main__":
    sys.exit(main())
