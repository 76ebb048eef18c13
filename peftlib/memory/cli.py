"""The planner from a shell: ``python -m peftlib.memory model.py:build --method lora --batch 4 --budget 24GiB``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftlib.commands import DTYPES, METHODS, Options, add_method_options, function_of
from peftlib.errors import PeftlibError
from peftlib.memory.plan import MemoryPlan, plan_memory

CHOICES: dict[str, Callable[[Options], Any]] = {"full": lambda o: None, **METHODS}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
}
EPILOG = """\
The file's function makes the model; it is called on the meta device, so size does not matter. The example is a batch
of token ids, (batch, length) integers, unless the file has a function example(batch, length), or example(batch) where
no --length is given, that makes the forward's arguments: a tensor, a tuple, or a dict of keywords.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    r"""Print the plan that the arguments ask for; see ``--help``.

    Returns:
        The exit status: 0, or 2 for a wrong argument or a model that cannot be followed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "model.py"
        ...     _ = path.write_text("from torch import nn\ndef build(): return nn.Embedding(50, 8)\n")
        ...     main([f"{path}:build", "--method", "full", "--batch", "2", "--budget", "1MiB", "--json"])
        {"title": ...
        0
    """
    options = _parser().parse_args(arguments)
    try:
        plan = _plan(options)
        written = _plot(plan, options.plot) if options.plot else []
    except PeftlibError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    if options.json:
        sys.stdout.write(json.dumps(plan.to_dict()) + "\n")
    else:
        sys.stdout.write(f"{plan}\n\n{plan.bars()}\n")
    if written:
        sys.stderr.write(f"wrote {', '.join(map(str, written))}\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m peftlib.memory",
        description="What a fine-tuning step needs, and what fits into a budget, before anything is allocated.",
        epilog=EPILOG,
    )
    parser.add_argument("model", help="path.py:function, which makes the model")
    add = parser.add_argument
    add("--method", action="append", choices=list(CHOICES), help="repeatable; default: full, lora and prefix")
    add_method_options(parser)
    add("--batch", type=int, nargs="+", default=[1], help="batch sizes (default 1)")
    add("--length", type=int, nargs="+", help="sequence lengths (default 512 for token ids)")
    add("--budget", default="24GiB", help="such as 24GiB or 80GB (default 24GiB)")
    add(
        "--checkpointing",
        choices=("both", "yes", "no"),
        default="both",
        help="of the repeated blocks (default both)",
    )
    add("--dtype", choices=list(DTYPES), help="cast the model to this type")
    add("--autocast", choices=list(DTYPES), help="run the forward under autocast to this type")
    add("--optimizer", choices=list(OPTIMIZERS), default="adamw", help="(default adamw)")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="(default cuda)")
    add("--plot", type=Path, metavar="FILE", help="draw the bars into FILE, and each method's step beside it")
    add("--json", action="store_true", help="print JSON instead of tables")
    return parser


def _plan(options: Options) -> MemoryPlan:
    factory, module = function_of(options.model)

    def build() -> nn.Module:
        model = factory()
        return model.to(DTYPES[options.dtype]) if options.dtype and isinstance(model, nn.Module) else model

    methods = {}
    for name in options.method or ("full", "lora", "prefix"):
        method = CHOICES[name](options)
        if options.targets and method is not None:
            method = dict.fromkeys(options.targets, method)
        methods[name] = method
    example = getattr(module, "example", None)
    if example is None:
        options.length = options.length or [512]
        example = _ids
    return plan_memory(
        build,
        example,
        methods,
        options.budget,
        batches=options.batch,
        lengths=options.length,
        checkpointing={"both": (None, True), "yes": (True,), "no": (None,)}[options.checkpointing],
        optimizer=OPTIMIZERS[options.optimizer],
        autocast=DTYPES[options.autocast] if options.autocast else None,
        device=options.device,
    )


def _ids(batch: int, length: int) -> torch.Tensor:
    return torch.empty(batch, length, dtype=torch.long, device="meta")


def _plot(plan: MemoryPlan, path: Path) -> list[Path]:
    plan.plot(path)
    written = [path]
    for choice in {choice.way.method: choice for choice in reversed(plan.choices)}.values():
        beside = path.with_name(f"{path.stem}-{choice.way.method}{path.suffix}")
        choice.report.plot_timeline(beside)
        written.append(beside)
    return written
