"""The RLHF run as tables, samples and curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.quality_report import spread
from benchmarks.savings import fell
from peftlib.report import Table

NAMES = {"sft": "SFT", "dpo": "DPO", "ppo": "PPO", "grpo": "GRPO"}
FOLLOWS = {"sft": "-", "dpo": "pairs", "ppo": "learned reward", "grpo": "true score"}
SAMPLES = 6


def rose(before: Sequence[float], after: Sequence[float]) -> bool:
    """Whether scores of the same prompts rose by more than twice the standard error of the mean.

    >>> rose([0.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]), rose([0.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0])
    (True, False)
    """
    return fell(-torch.tensor(before), -torch.tensor(after))


def report(results: dict[str, Any]) -> str:
    """All of it, as it is printed."""
    return "\n\n".join(map(str, (scores(results), samples(results), memory(results))))


def scores(results: dict[str, Any]) -> Table:
    """Mean and standard deviation over the seeds, by policy."""
    seeds, budget, machine = results["seeds"], results["budget"], results["machine"]
    rows = []
    for name, label in NAMES.items():
        mine = [one["rows"][name] for one in seeds]
        pairs = [
            list(zip(row["true"], one["rows"]["sft"]["true"], strict=True))
            for row, one in zip(mine, seeds, strict=True)
        ]
        rows.append(
            {
                "policy": label,
                "follows": FOLLOWS[name],
                "true": spread([fmean(row["true"]) for row in mine]),
                "learned": spread([row["learned"] for row in mine]),
                "kl": spread([row["kl"] for row in mine]),
                "wins": "-"
                if name == "sft"
                else f"{fmean(fmean(a > b for a, b in p) for p in pairs):.0%} / "
                f"{fmean(fmean(a < b for a, b in p) for p in pairs):.0%}",
                "rate": "-"
                if name == "sft"
                else spread([fmean((1 + a - b) / 2 for a, b in p) for p in pairs]),
                "bytes": spread([row["bytes"] for row in mine]),
            }
        )
    accuracy = fmean(one["reward_model"]["accuracy"] for one in seeds)
    return Table(
        title="Lines of Python completed so that they parse: before and after",
        rows=rows,
        columns={
            "policy": "policy",
            "follows": "follows",
            "true": "true score",
            "learned": "learned reward",
            "kl": "KL to SFT",
            "wins": "won / lost",
            "rate": "win rate",
            "bytes": "bytes",
        },
        notes=[
            "",
            f"{results['held_out']} held-out prompts, one completion of each at temperature 1; {len(seeds)} "
            f"seed{'s' * (len(seeds) > 1)}{', ± their standard deviation' * (len(seeds) > 1)}.",
            "True score: the share that parses, by ast. Learned reward: 0 is the SFT model's on its training prompts.",
            "KL: nats per completion. Won / lost: against SFT's completion of the same prompt by the true score; win",
            "rate: ties count a half. Bytes: of a completion.",
            f"SFT: {budget['sft_steps']} steps. Reward model: {round(fmean(one['pairs'] for one in seeds))} pairs, "
            f"right about {accuracy:.0%} of those kept apart.",
            f"DPO: {budget['dpo_steps']} steps; PPO: {budget['ppo_steps']} iterations, GRPO: {budget['grpo_steps']}, "
            f"of {budget['completions']} completions.",
            f"All in {machine['seconds']:.0f} s, {machine['cpu_seconds']:.0f} s of work on {machine['threads']} "
            f"thread{'s' * (machine['threads'] > 1)} of {machine['cores']} cores, torch {machine['torch']},",
            f"Python {machine['python']}, {machine['date']}.",
        ],
    )


def samples(results: dict[str, Any]) -> Table:
    """What the first held-out prompts are completed to, before and after."""
    first = results["seeds"][0]

    def shown(name: str, i: int) -> str:
        row = first["rows"][name]
        text = row["completions"][i]
        text = text[:-1] if text.endswith("\n") else text + "..."
        printable = "".join(c if c.isprintable() else "?" for c in text)
        return f"{'+' if row['true'][i] else '-'} {printable}"

    return Table(
        title=f"The first of them with seed {first['seed']}: + parses, - does not",
        rows=[
            {"prompt": results["prompts"][i], **{name: shown(name, i) for name in NAMES}}
            for i in range(len(results["prompts"]))
        ],
        columns={"prompt": "prompt", **NAMES},
    )


def memory(results: dict[str, Any]) -> Table:
    """Bytes of one PPO update."""
    kinds = ("weights", "gradients", "optimizer", "activations", "peak")
    return Table(
        title="One PPO update with policy, value, reward and reference",
        rows=[{"way": way, **row} for way, row in results["memory"].items()],
        columns={"way": "held as", **{kind: kind for kind in kinds}},
        formats=dict.fromkeys(kinds, "bytes"),
        notes=["", "Measured by peftlib.measure_memory, at the peak of the second update."],
    )


def draw(results: dict[str, Any], path: Path) -> str:
    """True score and KL over iterations, and the one against the other; the file's name, or why there is none."""
    try:
        # the figure class alone: pyplot would choose a window system
        from matplotlib.figure import Figure
    except ImportError:
        return "no figure (pip install 'peftlib[plot]')"
    figure = Figure(figsize=(12, 4), layout="constrained")
    true, kl, both = figure.subplots(1, 3)
    colours = {name: f"C{i}" for i, name in enumerate(NAMES)}
    for number, one in enumerate(results["seeds"]):
        for name, rows in one["curves"].items():
            # a name once in the legend
            label = {} if number or not rows else {"label": NAMES[name]}
            for panel, key in ((true, "true"), (kl, "kl")):
                values = [row[key] for row in rows]
                panel.plot(range(1, len(rows) + 1), values, color=colours[name], alpha=0.7, **label)
        for name, row in one["rows"].items():
            label = {} if number else {"label": NAMES[name]}
            both.plot(row["kl"], fmean(row["true"]), "o", color=colours[name], **label)
    true.set(title="while training", xlabel="iteration", ylabel="true score of the rollout")
    kl.set(title="while training", xlabel="iteration", ylabel="KL to SFT (nats per completion)")
    both.set(title="held-out prompts", xlabel="KL to SFT (nats per completion)", ylabel="true score")
    for panel in (true, kl, both):
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    return path.name
