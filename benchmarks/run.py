"""Measure peftlib beside the frozen floor and its peers: `python -m benchmarks.run CASE...`.

    python -m benchmarks.run                           # which cases there are
    python -m benchmarks.run step linear 'routed/*'    # families, names and globs; or all
    python -m benchmarks.run step --quick              # whether they work, on tiny sizes: the numbers mean nothing
    python -m benchmarks.run step --device cuda        # the same on a GPU

Contestants run in turns in one process; a number is the median over the rounds of each round's ratio to the floor, with
quartiles. Before anything is timed a case checks that its contestants compute the same. A family's results go to
FAMILY.json, FAMILY.txt and FAMILY.png in the folder; cases that were not run again stay as they were.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.contest import Disagreement, Unavailable
from benchmarks.machine import about
from benchmarks.peers import OURS, SHARED
from benchmarks.plots import draw
from benchmarks.registry import CASES, Case, UnknownCase, select
from benchmarks.results import merged, table
from benchmarks.timing import clock_for, in_turns, spread
from peftlib.storage import write_atomically

NOT_ON_GPU = "not yet measured on a GPU"


def measure(case: Case, *, rounds: int | None = None, quick: bool = False) -> dict[str, Any]:
    """Run one case.

    Returns:
        JSON-able: the conditions, a row for each contestant, who was missing, what was checked.

    Raises:
        Disagreement: contestants compute different things; nothing was timed.
    """
    result: dict[str, Any] = {"case": case.name, "metric": case.metric, "unit": case.unit, "rows": []}
    if case.at:
        result["at"] = list(case.at)
    if case.target:
        result["target"] = dataclasses.asdict(case.target)
    if case.device.startswith("cuda") and not torch.cuda.is_available():
        return result | {"unavailable": NOT_ON_GPU}
    parameters = {**case.parameters, **(case.quick if quick else {})}
    before, seed = torch.get_num_threads(), torch.random.get_rng_state()
    torch.set_num_threads(case.threads)
    try:
        torch.manual_seed(0)
        with torch.device(case.device):
            contest = case.make(**parameters)
        checked = contest.check()
        clock = case.clock or clock_for(case.threads, case.device)
        # bytes are the same every time
        once = quick or clock == "value"
        rounds = 1 if once else rounds or case.rounds
        samples = in_turns(
            contest.runs, rounds=rounds, clock=clock, warm_up=0 if once else 2, before=contest.before
        )
    except Unavailable as reason:
        return result | {"unavailable": str(reason)}
    finally:
        torch.set_num_threads(before)
        torch.random.set_rng_state(seed)
    floor = samples[next(iter(samples))]
    for name, values in samples.items():
        pairs = list(zip(values, floor, strict=True))
        per_round = {
            "ratio": [value / base for value, base in pairs],
            "extra": [1e6 * (value - base) / contest.count for value, base in pairs],
            "ms": [1e3 * value for value in values],
        }[case.metric]
        scale = 1e3 if case.unit == "ms" else 1
        row: dict[str, Any] = {
            "contestant": name,
            "run": scale * spread(values)["median"],
            **spread(per_round),
        }
        if case.unit == "ms" and contest.piece == "token":
            row["rate"] = contest.count / spread(values)["median"]
        if case.target and name in (OURS, SHARED):
            row["verdict"] = verdict(row, case.target.at_most)
        result["rows"].append(row)
    return result | {
        "parameters": parameters,
        "rounds": rounds,
        "clock": clock,
        "quick": quick,
        "checked": checked,
        "missing": dict(contest.missing),
        "about": about(case.threads, case.device),
    }


def verdict(row: dict[str, Any], at_most: float) -> str:
    """Whether a target is reached; "unclear" where it lies within the quartiles.

    >>> verdict({"low": 1.0, "high": 1.2}, 1.1)
    'unclear'
    """
    if row["high"] <= at_most:
        return "reached"
    return "missed" if row["low"] > at_most else "unclear"


def family_of(result: dict[str, Any]) -> str:
    return str(result["case"]).split("/")[0]


def save(result: dict[str, Any], folder: Path) -> None:
    """Write the files of the result's family, with what stood there of other cases."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{family_of(result)}.json"
    cases = merged(path, result, order=list(CASES))
    write_atomically(path, (json.dumps({"cases": cases}, indent=1) + "\n").encode())
    write_atomically(path.with_suffix(".txt"), (str(table(cases)) + "\n").encode())
    draw(family_of(result), cases, path.with_suffix(".png"))


def listing() -> str:
    """What there is."""
    lines = [f"{name:32} {_in_words(case)}" for name, case in CASES.items()]
    return "\n".join(["Give cases, families, globs, or all:", "", *lines])


def _in_words(case: Case) -> str:
    goal = f"target {case.target.at_most:g}" if case.target else ""
    how = f"{case.threads} thread{'s' * (case.threads > 1)}" if case.device == "cpu" else case.device
    return f"{case.metric:6} {how:10} {goal}".rstrip()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "cases", metavar="CASE", nargs="*", help="a name, a family, a glob, or all; none: a list"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, two rounds: shows that a case runs")
    parser.add_argument("--rounds", type=int, help="in place of each case's own number")
    parser.add_argument("--threads", type=int, help="of torch, in place of each case's own number")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="of the model and its input"
    )
    parser.add_argument("--device", help="where to run: cpu, cuda")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder (default: %(default)s)")
    args = parser.parse_args(argv)
    if not args.cases:
        print(listing())
        return 0
    for name in ("rounds", "threads"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name} {value}: at least 1")
    try:
        cases = [
            case.changed(threads=args.threads, dtype=args.dtype, device=args.device)
            for case in select(args.cases)
        ]
    except UnknownCase as error:
        parser.error(str(error))
    # peers talk while they inject; what they say is not about the numbers
    logging.getLogger("transformers").setLevel(logging.ERROR)
    results, failed = [], []
    for number, case in enumerate(cases, 1):
        print(f"[{number}/{len(cases)}] {case.name}", file=sys.stderr, flush=True)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = measure(case, rounds=args.rounds, quick=args.quick)
        except Disagreement as error:
            print(f"{case.name} is not timed: {error}", file=sys.stderr)
            failed.append(case.name)
            continue
        results.append(result)
        # after each case: a run that is stopped keeps what it has
        save(result, args.out)
    for family in dict.fromkeys(map(family_of, results)):
        print(table([result for result in results if family_of(result) == family]), end="\n\n")
    if results:
        print(f"saved in {args.out}, beside what was there of other cases")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
