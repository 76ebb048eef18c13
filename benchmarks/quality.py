"""What every method learns on real tasks from real weights, at equal steps and at equal time.

    python -m benchmarks.quality
    python -m benchmarks.quality rotten-tomatoes --methods head,lora-qv,full --seeds 3

Each method's rate is the one of a small grid with the lowest loss on a validation part after a third of the steps,
with a seed of its own; the test part is never looked at for that. Then each seed trains every method, from the same
new head and on the same batches. The rate is constant after a short warm-up, so that a longer training begins with
the shorter one: the same run is judged after N steps (equal steps) and after as many steps as fit into the time of N
steps of full fine-tuning (equal time). How long a step takes, relative to full fine-tuning, is measured in turns.
What is finished stands in ledger.jsonl beside the results: a run that was killed goes on where it was.

Left out on purpose: what a step costs in memory (`benchmarks.savings`), and caching the frozen encoder's outputs for
head-only training, which would make its steps nearly free.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.entries import HEAD_RATE, METHODS, start
from benchmarks.inputs import InputError
from benchmarks.ledger import Ledger
from benchmarks.machine import about
from benchmarks.progress import Progress
from benchmarks.quality_report import draw, table
from benchmarks.tasks import TASKS, Task
from benchmarks.timing import clock_for
from benchmarks.trainings import (
    ROUNDS,
    SEARCH_SEED,
    WARMUP,
    At,
    marks,
    pace,
    scored,
    search,
    search_steps,
    train,
)
from peftlib import PeftlibError


def contest(
    task: Task,
    names: Sequence[str],
    *,
    seeds: int,
    equal: Sequence[str],
    rates: Mapping[str, float],
    ledger: Ledger,
    save: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Every named method on a task; `save` gets the results after each seed.

    Args:
        task: what is learned.
        names: of `METHODS`.
        seeds: how often.
        equal: "steps", "time" or both.
        rates: of methods whose grid is not searched.
        ledger: what is in it is not computed again.
        save: called with what there is.

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
    paces = ledger.get(["pace", sorted(able)], lambda: pace(task, able))
    grids = {name: (rates[name],) if name in rates else METHODS[name].rates(task) for name in able}
    searched: dict[str, dict[float, float]] = {name: {} for name in able}
    todo = [(name, rate) for name, grid in grids.items() if len(grid) > 1 for rate in grid]
    with Progress(len(todo), "choosing rates") as progress:
        for name, rate in todo:
            searched[name][rate] = ledger.get(["rate", name, rate], partial(search, name, task, rate))
            progress.step(f"{name} {rate:g}: {searched[name][rate]:.3f}")
    best = {name: min(grid, key=lambda rate: searched[name].get(rate, 0)) for name, grid in grids.items()}
    steps = task.size.steps
    as_long = {name: max(1, round(steps / paces[name]["relative"])) for name in able}
    ends = {"steps": dict.fromkeys(able, steps), "time": as_long}
    with torch.no_grad():
        before = scored(task, task.test, start(able[0], task, 0)[0].eval())
    rows: list[dict[str, Any]] = [
        {
            "method": name,
            "rate": best[name],
            "validation_loss": {f"{rate:g}": loss for rate, loss in searched[name].items()},
            "step_seconds": paces[name]["seconds"],
            "step_relative": paces[name]["relative"],
            "equal_time_steps": as_long[name],
            **{f"equal_{what}": [] for what in equal},
            "losses": [],
            "curves": [],
        }
        for name in able
    ]
    results = {
        "task": task.title,
        "metric": task.metric,
        "higher_is_better": task.higher_is_better,
        "parameters": sum(parameter.numel() for parameter in task.base.parameters()),
        "before": before,
        "size": dataclasses.asdict(task.size),
        "notes": task.notes,
        "refused": refused,
        "warmup": WARMUP,
        "head_rate": HEAD_RATE if task.head else None,
        "precision": precision(task),
        "rates_from": "of another task's results"
        if rates
        else f"of two, the lower validation loss after {search_steps(task)} steps with a seed of its own",
        "rounds": ROUNDS,
        "clock": clock_for(torch.get_num_threads(), "cpu"),
        "machine": about(torch.get_num_threads(), "cpu"),
        "rows": rows,
    }
    with Progress(seeds * len(able), "training") as progress:
        for seed in range(seeds):
            for row in rows:
                name = row["method"]
                asked = [ends[what][name] for what in equal]
                key = ["training", name, best[name], seed, asked]
                run = ledger.get(key, partial(trained, name, task, best[name], seed, asked))
                row["trained"] = run["trained"]
                for what in equal:
                    row[f"equal_{what}"].append(dict(run["curve"])[ends[what][name]])
                row["curves"].append(run["curve"])
                row["losses"].append([round(loss, 4) for loss in run["losses"]])
                progress.step(f"{name} {run['curve'][-1][1]:.3f}")
            save(results)
    return results


def trained(name: str, task: Task, rate: float, seed: int, asked: Sequence[int]) -> dict[str, Any]:
    """What is kept of a training that is judged after each of the steps that are asked for."""
    end = max(asked)
    test = At(partial(scored, task, task.test), [*marks(task.size.steps, end), *asked])
    history, parameters = train(name, task, rate, seed, end, test)
    return {
        "trained": parameters,
        "curve": [(step + 1, value) for step, value in history.column(f"eval_{task.metric}")],
        "losses": [loss for _, loss in history.column("loss")],
    }


def precision(task: Task) -> str:
    """What numbers the model computes in."""
    return "float32" if task.autocast is None else "bfloat16 autocast"


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
            task = dataclasses.replace(
                TASKS[name](args.quick), autocast=torch.bfloat16 if args.bf16 else None
            )
            settings = {
                "task": task.title,
                "size": dataclasses.asdict(task.size),
                "precision": precision(task),
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
            }
            results = contest(
                task,
                names,
                seeds=args.seeds,
                equal=[args.equal] if args.equal else ["steps", "time"],
                rates=rates,
                ledger=Ledger(args.out / "ledger.jsonl", settings),
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
