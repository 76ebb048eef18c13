"""What fine-tuning gains against what it forgets: full fine-tuning, LoRA, and every remedy on both.

    python -m benchmarks.forgetting

It takes about 7 minutes of processor time, a third of them pretraining that is kept for the next time.

The byte-level GPT of `benchmarks.savings`, pretrained on docstrings, is fine-tuned on code; what it then knows less of
docstrings is what it forgot. Every run is seen at several steps, because a remedy that only slows learning down is a
shorter run: what counts is what is forgotten at the same gain.

Left out on purpose: searching strengths (one per remedy, set on seed 1) and repeating with several seeds (`--seed`).
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import datetime
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import peftlib
from benchmarks.lm import held_out_losses, pretrained
from benchmarks.progress import Progress
from benchmarks.savings import QUICK, Budget
from benchmarks.text import Domain, check_length, spread, standard_library
from peftlib import FullFineTuning, LoRA
from peftlib.report import Table
from peftlib.train import (
    Batches,
    Fisher,
    Replay,
    causal_lm,
    ewc,
    fisher,
    fit,
    groups,
    l2_sp,
    with_penalty,
)

METHODS: Mapping[str, tuple[Callable[[], peftlib.methods.base.Method], float]] = {
    "full": (FullFineTuning, 5e-4),
    "lora": (lambda: LoRA(rank=8, alpha=16), 3e-3),
}
"""Name -> the method and its rate, as in `benchmarks.contestants`."""


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """What is done against forgetting; nothing by default.

    Attributes:
        ewc: strength of elastic weight consolidation.
        l2_sp: strength of the pull to the starting values.
        replay: share of docstrings among the windows trained on.
        layer_decay: factor of the rate from block to block downwards.
        weight_decay: AdamW's.
        rate: factor of the learning rate.
    """

    ewc: float = 0.0
    l2_sp: float = 0.0
    replay: float = 0.0
    layer_decay: float | None = None
    weight_decay: float = 0.0
    rate: float = 1.0


REMEDIES: Mapping[str, Remedy] = {
    "nothing": Remedy(),
    "ewc": Remedy(ewc=100.0),
    "l2-sp": Remedy(l2_sp=0.1),
    "replay 1/4": Remedy(replay=0.25),
    "layer decay": Remedy(layer_decay=0.5),
    "weight decay": Remedy(weight_decay=0.1),
    "rate / 3": Remedy(rate=1 / 3),
}


@dataclass(frozen=True, kw_only=True)
class Data:
    """Windows of tokens: to train on, and held out, of the new and of the old domain."""

    new: Tensor
    old: Tensor
    held_out: Mapping[str, Tensor]


def collate(windows: Sequence[Tensor]) -> dict[str, Tensor]:
    ids = torch.stack(list(windows))
    return {"inputs": ids, "labels": ids}


def windows(domain: Domain, context: int) -> Tensor:
    """The training text cut into windows of ``context + 1`` tokens."""
    return domain.train.unfold(0, context + 1, context + 1)


def run(
    base: nn.Module, data: Data, known: Fisher, method: str, name: str, budget: Budget, every: int, seed: int
) -> list[dict[str, Any]]:
    """One fine-tuning; held-out losses of both domains every ``every`` steps."""
    build, rate = METHODS[method]
    remedy = REMEDIES[name]
    torch.manual_seed(seed)
    model = copy.deepcopy(base)
    tuning = peftlib.attach(model, build())
    loss: Callable[..., Any] = causal_lm
    if remedy.ewc:
        loss = with_penalty(loss, ewc(tuning, known, remedy.ewc))
    if remedy.l2_sp:
        loss = with_penalty(loss, l2_sp(tuning, remedy.l2_sp))
    examples, sampler = [*data.new], None
    if remedy.replay:
        sampler = Replay(len(data.new), len(data.old), remedy.replay, seed=seed)
        examples += [*data.old]
    batches = Batches(examples, budget.batch, collate, sampler=sampler, seed=seed)
    optimizer = torch.optim.AdamW(
        groups(
            tuning, lr=remedy.rate * rate, weight_decay=remedy.weight_decay, layer_decay=remedy.layer_decay
        )
    )
    points: list[dict[str, Any]] = []

    def look(row: Mapping[str, Any]) -> None:
        if (row["step"] + 1) % every == 0:
            losses = {
                domain: held_out_losses(model, part, batch=budget.batch).mean().item()
                for domain, part in data.held_out.items()
            }
            points.append({"step": row["step"] + 1, "losses": losses})

    fit(
        model, batches, loss, optimizer=optimizer, steps=budget.steps, callbacks=[look], progress=False,
        seed=seed,
    )  # fmt: skip
    return points


def forgotten_at(points: Sequence[tuple[float, float]], gain: float) -> float | None:
    """What is forgotten where a curve of (gain, forgotten) first reaches a gain, on straight lines from (0, 0).

    >>> forgotten_at([(0.1, 0.2), (0.3, 0.6)], 0.2)
    0.4
    >>> forgotten_at([(0.1, 0.2)], 0.2) is None
    True
    """
    before = (0.0, 0.0)
    for point in points:
        if point[0] >= gain:
            part = (gain - before[0]) / (point[0] - before[0])
            return round(before[1] + part * (point[1] - before[1]), 12)
        before = point
    return None


def curve(row: Mapping[str, Any], results: Mapping[str, Any]) -> list[tuple[float, float]]:
    """(gain, forgotten) of a run at each look, nats per token."""
    new, old = results["domains"]
    before = results["before"]
    return [
        (before[new] - point["losses"][new], point["losses"][old] - before[old]) for point in row["points"]
    ]


def table(results: Mapping[str, Any]) -> Table:
    """The results as they are printed."""
    new, old = results["domains"]
    gain, machine, budget = results["gain"], results["machine"], results["budget"]
    rows = []
    for row in results["rows"]:
        points = curve(row, results)
        at = forgotten_at(points, gain)
        rows.append(
            {
                "method": row["method"],
                "remedy": row["remedy"],
                "gained": f"{points[-1][0]:.3f}",
                "forgot": f"{points[-1][1]:+.3f}",
                "at": "-" if at is None else f"{at:+.3f}",
            }
        )
    return Table(
        title=f"GPT fine-tuned on {new} for {budget['steps']} steps: what it gains, what it forgets of {old}",
        rows=rows,
        columns={
            "method": "method",
            "remedy": "remedy",
            "gained": f"{new} gained",
            "forgot": f"{old} forgotten",
            "at": f"forgotten at {gain:.2f} gained",
        },
        notes=[
            "",
            f"Held-out loss, nats per token; before: {new} {results['before'][new]:.3f}, "
            f"{old} {results['before'][old]:.3f}.",
            "Last column: where the run first gains as much, between looks on a straight line; - is never.",
            'Early stopping has no row: stopped at that gain, a run has forgotten the last column of "nothing".',
            f"Each run: {budget['batch']} x {budget['context']} tokens a step, AdamW, the same seed "
            f"({results['seed']}).",
            f"{machine['threads']} threads of {machine['cores']} cores, torch {machine['torch']}, Python "
            f"{machine['python']}, {machine['date']}.",
        ],
    )


def draw(results: Mapping[str, Any], path: Path) -> str:
    """Gain against forgetting, a line of looks per run; the file's name, or why there is none."""
    try:
        # the figure class alone: pyplot would choose a window system
        from matplotlib.figure import Figure
    except ImportError:
        return "no figure (pip install 'peftlib[plot]')"
    new, old = results["domains"]
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    panels = figure.subplots(1, len(METHODS), sharex=True, sharey=True)
    colours = {name: f"C{i}" for i, name in enumerate(REMEDIES)}
    for panel, method in zip(panels, METHODS, strict=True):
        for row in results["rows"]:
            if row["method"] == method:
                x, y = zip((0.0, 0.0), *curve(row, results), strict=True)
                panel.plot(x, y, "-", color=colours[row["remedy"]], linewidth=1, alpha=0.7)
                panel.plot(x[1:-1], y[1:-1], ".", color=colours[row["remedy"]], markersize=4)
                # smaller and smaller, so that one is seen that lies upon another
                size = 10 - list(REMEDIES).index(row["remedy"])
                panel.plot(
                    x[-1:], y[-1:], "o", color=colours[row["remedy"]], label=row["remedy"], markersize=size
                )
        panel.set(title=method, xlabel=f"gained on {new} (nats per token; more is better)")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel(f"forgotten of {old} (nats per token)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize="small")
    figure.savefig(path, dpi=120)
    return path.name


def contest(base: nn.Module, domains: Sequence[Domain], budget: Budget, args: Any) -> dict[str, Any]:
    """Every remedy on every method; JSON-able."""
    old, new = domains
    data = Data(
        new=windows(new, budget.context),
        old=windows(old, budget.context),
        held_out={
            domain.name: spread(domain.held_out, count=budget.windows, context=budget.context)
            for domain in (new, old)
        },
    )
    chosen = torch.randperm(len(data.old), generator=torch.Generator().manual_seed(args.seed))[: args.samples]
    samples = Batches([*data.old[chosen]], 1, collate, shuffle=False)
    known = fisher(base, samples, causal_lm, labels="model", seed=args.seed)
    before = {
        name: held_out_losses(base, part, batch=budget.batch).mean().item()
        for name, part in data.held_out.items()
    }
    rows = []
    every = max(1, budget.steps // args.looks)
    with Progress(len(METHODS) * len(REMEDIES), f"fine-tuning on {new.name}") as progress:
        for method in METHODS:
            for name in REMEDIES:
                points = run(base, data, known, method, name, budget, every, args.seed)
                rows.append({"method": method, "remedy": name, "points": points})
                progress.step(f"{method}, {name}")
    results = {
        "domains": [new.name, old.name],
        "before": before,
        "rows": rows,
        "remedies": {name: dataclasses.asdict(remedy) for name, remedy in REMEDIES.items()},
        "seed": args.seed,
        "samples": len(chosen),
        "budget": dataclasses.asdict(budget),
        "machine": {
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "date": datetime.date.today().isoformat(),
        },
    }
    # what all of the runs reach
    reached = min(max(gained for gained, _ in curve(row, results)) for row in rows)
    results["gain"] = max(0.01, int(100 * reached) / 100)
    return results


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.forgetting", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--quick", action="store_true", help="a smaller model and fewer steps")
    parser.add_argument("--steps", type=int, help="training steps of each run")
    parser.add_argument(
        "--looks", type=int, default=5, help="how often a run is scored (default: %(default)s)"
    )
    parser.add_argument(
        "--samples", type=int, default=256, help="windows of old text for the Fisher information"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("forgetting"), help="folder (default: %(default)s)")
    args = parser.parse_args(argv)
    budget = QUICK if args.quick else Budget(steps=75, windows=64)
    budget = dataclasses.replace(budget, steps=args.steps or budget.steps)
    args.out.mkdir(parents=True, exist_ok=True)
    prose, code = standard_library()
    check_length([prose, code], budget.context)
    base = pretrained(
        budget.gpt,
        prose,
        steps=budget.pretrain_steps,
        batch=budget.batch,
        context=budget.context,
        seed=args.seed,
        rate=budget.pretrain_rate,
        cache=args.out,
    )
    results = contest(base, (prose, code), budget, args)
    shown = str(table(results))
    print(shown)
    (args.out / "forgetting.txt").write_text(shown + "\n", encoding="utf-8")
    (args.out / "forgetting.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(
        f"saved: {args.out / 'forgetting.txt'}, forgetting.json, {draw(results, args.out / 'forgetting.png')}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
