"""What every fine-tuning method costs and buys, as one table measured in one run.

    python -m benchmarks.savings
    python -m benchmarks.savings --model model.py:build --data my.txt --general news.txt

A byte-level GPT is pretrained on the standard library's docstrings; copies of it are then fine-tuned on the library's
code, one per method, on the same batches for the same number of steps. The methods take turns: each batch is one
step of every method, so that a busy moment of the machine slows all of them. Everything in the table is measured:
bytes of the saved file, peak bytes of a real training step, median step time, held-out loss.

Left out on purpose: searching learning rates (`--rate` sets one) and repeating with several seeds (`--seed`).
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import datetime
import functools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import peftlib
from benchmarks.contestants import CONTESTANTS
from benchmarks.figure import draw
from benchmarks.gpt import GPTConfig
from benchmarks.inputs import InputError, check_language_model, load_factory, logits_of
from benchmarks.lm import held_out_losses, next_token_loss, pretrained
from benchmarks.progress import Progress
from benchmarks.text import Domain, batches, check_length, spread, standard_library, text_file
from peftlib.memory import MemoryReport, measure_memory
from peftlib.report import Table

UNTIMED_STEPS = 2
"""The first step creates the optimizer's state, the second runs under the memory tracker."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a run spends; the same for every method.

    Attributes:
        gpt: the bundled model.
        pretrain_steps: its pretraining.
        pretrain_rate: largest learning rate of the pretraining.
        steps: training steps of each method.
        batch: windows per step.
        context: tokens per window.
        windows: held-out windows per domain, at most.
    """

    gpt: GPTConfig = GPTConfig()  # noqa: RUF009 (frozen)
    pretrain_steps: int = 600
    pretrain_rate: float = 3e-3
    steps: int = 100
    batch: int = 8
    context: int = 128
    windows: int = 128


QUICK = Budget(
    gpt=GPTConfig(width=128, layers=3, heads=4), pretrain_steps=200, steps=40, context=96, windows=64
)


@dataclass(kw_only=True)
class Run:
    """One method on its own copy of the base model."""

    name: str
    rate: float
    model: nn.Module
    tuning: peftlib.Tuning
    optimizer: torch.optim.Optimizer
    memory: MemoryReport | None = None
    seconds: list[float] = field(default_factory=list)

    def step(self, window_BT1: Tensor) -> Tensor:
        """One training step; the loss, in nats per token."""
        loss = next_token_loss(self.model, window_BT1)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def start(name: str, base: nn.Module, example_BT: Tensor, *, rate: float, seed: int) -> Run:
    """The method on a copy of the base, tried on an example.

    Raises:
        InputError: the method cannot act on this module, with the reason.
    """
    # seeded here, so that a method starts the same whichever others take part
    torch.manual_seed(seed)
    model = copy.deepcopy(base)
    try:
        tuning = peftlib.attach(model, CONTESTANTS[name].build(model, example_BT), example=example_BT)
        with torch.no_grad():
            output = model(example_BT)
    except Exception as error:
        # not only PeftlibError: a user's module may fail in its own way on a longer input
        raise InputError(f"{type(error).__name__}: {error}") from error
    shape = tuple(logits_of(output).shape)
    if shape[:2] != example_BT.shape:
        raise InputError(f"ids of shape {tuple(example_BT.shape)} give logits of shape {shape}")
    optimizer = torch.optim.AdamW(tuning.parameters(), lr=rate)
    return Run(name=name, rate=rate, model=model.train(), tuning=tuning, optimizer=optimizer)


def train(runs: Sequence[Run], text: Domain, budget: Budget, *, seed: int) -> None:
    """Every run takes every batch, in turns; memory and time are measured on the way."""
    windows = batches(text.train, steps=budget.steps, batch=budget.batch, context=budget.context, seed=seed)
    with Progress(budget.steps * len(runs), f"fine-tuning on {text.name}") as progress:
        for number, window_BT1 in enumerate(windows):
            for run in runs:
                if number == UNTIMED_STEPS - 1:
                    run.memory = measure_memory(functools.partial(run.step, window_BT1), model=run.model)
                    progress.step(run.name)
                    continue
                started = time.perf_counter()
                loss = run.step(window_BT1)
                if loss.device.type != "cpu":
                    torch.accelerator.synchronize()
                if number >= UNTIMED_STEPS:
                    run.seconds.append(time.perf_counter() - started)
                progress.step(f"{run.name} {loss.item():.3f}")


def fell(before_N: Tensor, after_N: Tensor) -> bool:
    """Whether the loss fell by more than chance: the mean drop over windows exceeds twice its standard error.

    >>> fell(torch.tensor([2.0, 2.0, 2.0]), torch.tensor([1.9, 1.8, 1.9]))
    True
    >>> fell(torch.tensor([2.0, 2.0, 2.0]), torch.tensor([1.0, 2.9, 2.0]))
    False
    """
    drop_N = (before_N - after_N).double()
    error = drop_N.std().item() / len(drop_N) ** 0.5 if len(drop_N) > 1 else 0.0
    return bool(drop_N.mean().item() > 2 * error)


def table(results: dict[str, Any]) -> Table:
    """The results as they are printed."""
    losses = list(results["base"]["losses"])
    full = next((row for row in results["rows"] if row["method"] == "full"), None)

    def line(row: dict[str, Any]) -> dict[str, Any]:
        seconds = row.get("step_seconds")
        shown = {key: value for key, value in row.items() if key != "losses"}
        if seconds is not None:
            shown["step"] = seconds / full["step_seconds"] if full else 1000 * seconds
        for name, loss in row["losses"].items():
            was = results["base"]["losses"][name]
            shown[name] = f"{loss:.3f}" if row is results["base"] else f"{loss:.3f} ({loss - was:+.3f})"
        return shown

    budget, machine = results["budget"], results["machine"]
    return Table(
        title=f"{results['model']} ({results['base']['parameters']:,} parameters) fine-tuned on {losses[0]}",
        rows=[line(row) for row in (results["base"], *results["rows"])],
        columns={
            "method": "method",
            "trained": "trained",
            "share": "share",
            "file_bytes": "file",
            "peak_bytes": "peak memory",
            "optimizer_bytes": "optimizer",
            "step": "step/full" if full else "step (ms)",
            **{name: f"{name} loss" for name in losses},
        },
        formats={
            "share": "percent",
            "file_bytes": "bytes",
            "peak_bytes": "bytes",
            "optimizer_bytes": "bytes",
            "step": (lambda ratio: f"{ratio:.2f}") if full else (lambda ms: f"{ms:.1f}"),
        },
        notes=[
            "",
            f"Each method: {budget['steps']} steps of {budget['batch']} x {budget['context']} tokens, AdamW, the same "
            "batches.",
            "Loss: held out, nats per token, with its change from the base model; lower is better.",
            "Peak memory: weights, gradients, optimizer and activations of one real step.",
            *(
                [f"Step: median, in turns; full fine-tuning takes {1000 * full['step_seconds']:.0f} ms."]
                if full
                else []
            ),
            f"{machine['threads']} threads of {machine['cores']} cores, {machine['device']}, torch {machine['torch']}, "
            f"Python {machine['python']}, {machine['date']}.",
        ],
    )


def contest(
    base: nn.Module, domains: Sequence[Domain], names: Sequence[str], budget: Budget, args: argparse.Namespace
) -> dict[str, Any]:
    """Fine-tune a copy of the base with every named method on the first domain; score it on all of them.

    Returns:
        What is worth keeping, JSON-able: the base, a row per method, the refused ones with their reasons.
    """
    held_out = {
        domain.name: spread(domain.held_out, count=budget.windows, context=budget.context)
        for domain in domains
    }
    example_BT = next(iter(held_out.values()))[:1, :-1].to(next(base.parameters()).device)
    runs: list[Run] = []
    refused: dict[str, str] = {}
    for name in names:
        try:
            runs.append(
                start(
                    name, base, example_BT, rate=args.rate.get(name, CONTESTANTS[name].rate), seed=args.seed
                )
            )
        except InputError as error:
            refused[name] = str(error)
            print(f"{name} is left out: {error}", file=sys.stderr)
    if not runs:
        raise InputError(f"none of the methods can act on {type(base).__name__}")
    before = {name: held_out_losses(base, windows, batch=budget.batch) for name, windows in held_out.items()}
    train(runs, domains[0], budget, seed=args.seed)
    parameters = sum(parameter.numel() for parameter in base.parameters())
    rows = []
    with Progress(len(runs), "scoring") as progress:
        for run in runs:
            assert run.memory is not None
            file = args.out / f"{run.name}.safetensors"
            run.tuning.save(file)
            after = {
                name: held_out_losses(run.model, windows, batch=budget.batch)
                for name, windows in held_out.items()
            }
            rows.append(
                {
                    "method": run.name,
                    "configuration": str(next(iter(run.tuning.sites.values()))),
                    "learning_rate": run.rate,
                    "trained": run.tuning.num_parameters,
                    "share": run.tuning.num_parameters / parameters,
                    "file": file.name,
                    "file_bytes": file.stat().st_size,
                    "peak_bytes": run.memory.peak_bytes,
                    "optimizer_bytes": run.memory.optimizer_bytes,
                    "step_seconds": statistics.median(run.seconds),
                    "losses": {name: losses_N.mean().item() for name, losses_N in after.items()},
                    "fell": fell(before[domains[0].name], after[domains[0].name]),
                }
            )
            progress.step(run.name)
    return {
        "model": type(base).__name__,
        "base": {
            "method": "before",
            "parameters": parameters,
            "losses": {name: losses_N.mean().item() for name, losses_N in before.items()},
        },
        "rows": rows,
        "refused": refused,
        "seed": args.seed,
        "budget": dataclasses.asdict(budget),
        "machine": {
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "device": str(example_BT.device),
            "system": f"{platform.system()} {platform.machine()}",
            "torch": torch.__version__,
            "python": platform.python_version(),
            "date": datetime.date.today().isoformat(),
        },
    }


def parse(argv: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.savings", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--quick", action="store_true", help="a smaller model and fewer steps: under a minute"
    )
    parser.add_argument(
        "--model", metavar="FILE.py:FACTORY", help="your own module: (B, T) ids to (B, T, V) logits"
    )
    parser.add_argument("--data", type=Path, metavar="FILE", help="text to tune on, UTF-8")
    parser.add_argument(
        "--general", type=Path, metavar="FILE", help="other text, only scored: what is forgotten"
    )
    parser.add_argument("--methods", metavar="A,B,...", help=f"a selection of {', '.join(CONTESTANTS)}")
    parser.add_argument("--rate", action="append", default=[], metavar="METHOD=RATE", help="a learning rate")
    parser.add_argument("--steps", type=int, help="training steps of each method")
    parser.add_argument("--batch", type=int, help="windows per step")
    parser.add_argument("--context", type=int, help="tokens per window")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, default=Path("savings"), help="folder for results (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    args.asked = args.methods.split(",") if args.methods else []
    args.methods = args.asked or list(CONTESTANTS)
    rates: dict[str, float] = {}
    for given in args.rate:
        name, _, value = given.partition("=")
        try:
            rates[name] = float(value)
        except ValueError:
            parser.error(f"--rate {given}: expected METHOD=RATE, such as lora=1e-3")
    args.rate = rates
    if unknown := [name for name in (*args.methods, *rates) if name not in CONTESTANTS]:
        parser.error(f"unknown method {', '.join(unknown)}; choose among {', '.join(CONTESTANTS)}")
    if args.model and not args.data:
        parser.error("--model needs --data FILE, a text that the module is to be tuned on")
    for name, least in (("steps", UNTIMED_STEPS + 1), ("batch", 1), ("context", 2)):
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f"--{name} {value}: at least {least}")
    return parser, args


def main(argv: Sequence[str] | None = None) -> int:
    parser, args = parse(argv)
    chosen = {
        name: getattr(args, name) for name in ("steps", "batch", "context") if getattr(args, name) is not None
    }
    budget = dataclasses.replace(QUICK if args.quick else Budget(), **chosen)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        base, domains = prepare(budget, args)
        results = contest(base, domains, args.methods, budget, args)
    except (InputError, OSError) as error:
        parser.error(str(error))
    shown = str(table(results))
    print(shown)
    (args.out / "savings.txt").write_text(shown + "\n", encoding="utf-8")
    (args.out / "savings.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    figure = draw(results, args.out / "savings.png")
    print(f"saved: {args.out / 'savings.txt'}, savings.json, {figure}, and each tuning beside them")
    failed = [row["method"] for row in results["rows"] if not row["fell"]]
    if failed:
        print(f"held-out loss on {domains[0].name} did not fall with: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed or any(name in args.asked for name in results["refused"]) else 0


def prepare(budget: Budget, args: argparse.Namespace) -> tuple[nn.Module, list[Domain]]:
    """The base model, and the domains: the first to tune on, all of them to score.

    Raises:
        InputError: the module or a text cannot be used, and why.
    """
    base: nn.Module
    if args.model:
        base, encode = load_factory(args.model)
        domains = [text_file(file, encode) for file in (args.data, args.general) if file]
        check_length(domains, budget.context)
    else:
        prose, code = standard_library()
        domains = [
            text_file(args.data) if args.data else code,
            text_file(args.general) if args.general else prose,
        ]
        check_length([prose, *domains], budget.context)
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
    largest = max(int(part.max()) for domain in domains for part in (domain.train, domain.held_out))
    check_language_model(base, domains[0].train[None, : budget.context], largest)
    return base, domains


if __name__ == "__main__":
    sys.exit(main())
