"""The planner from a shell: ``python -m peftlib.memory model.py:build --method lora --batch 4 --budget 24GiB``."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftlib.charts import check_file
from peftlib.commands import DTYPES, METHODS, Options, add_method_options, function_of, positive
from peftlib.errors import PeftlibError, ProbeError, TargetError
from peftlib.memory.factory import prepared
from peftlib.memory.plan import MemoryPlan, plan_memory

CHOICES: dict[str, Callable[[Options], Any]] = {"full": lambda o: None, **METHODS}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
}
DEFAULT = ("full", "lora", "prefix")
EPILOG = """\
The file's function makes the model; it is called on the meta device, so size does not matter. What the model takes is
said by an example(batch) or example(batch, length) in the file, a function that makes the forward's arguments: a
tensor, a tuple, or a dict of keywords. Without one it is a batch of token ids, (batch, length) integers.
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
        if options.plot:
            check_file(options.plot)  # before the work
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
    add("--method", action="append", choices=list(CHOICES), help="repeatable; default: full, lora, prefix")
    add_method_options(parser)
    add("--batch", type=positive, nargs="+", default=[1], help="batch sizes (default 1)")
    add("--length", type=positive, nargs="+", help="sequence lengths (default 512 for token ids)")
    add("--budget", default="24GiB", help="such as 24GiB or 80GB (default 24GiB)")
    add(
        "--checkpointing",
        choices=("both", "yes", "no"),
        default="both",
        help="of the repeated blocks (default both)",
    )
    add("--dtype", choices=list(DTYPES), help="cast the model to this type")
    add("--autocast", choices=list(DTYPES), help="run the forward under autocast to this type")
    add("--hint", type=_hint, help="what a tensor says that is asked for its value: true, false, a number")
    add("--optimizer", choices=list(OPTIMIZERS), default="adamw", help="(default adamw)")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="(default cuda)")
    add("--plot", type=Path, metavar="FILE", help="draw the bars into FILE, and each method's step beside it")
    add("--json", action="store_true", help="print JSON instead of tables")
    return parser


def _hint(text: str) -> float:
    value = json.loads(text)
    if not isinstance(value, (bool, int, float)):
        raise argparse.ArgumentTypeError(f"{text} is neither true, false nor a number")
    return value


def _plan(options: Options) -> MemoryPlan:
    factory, module = function_of(options.model)

    def build() -> nn.Module:
        model = factory()
        return model.to(DTYPES[options.dtype]) if options.dtype and isinstance(model, nn.Module) else model

    example, lengths = _example(module, options)
    try:
        methods, left_out = _methods(options, build, lambda: example(options.batch[0], *(lengths or [])[:1]))
        plan = plan_memory(
            build,
            example,
            methods,
            options.budget,
            batches=options.batch,
            lengths=lengths,
            checkpointing={"both": (None, True), "yes": (True,), "no": (None,)}[options.checkpointing],
            optimizer=OPTIMIZERS[options.optimizer],
            autocast=DTYPES[options.autocast] if options.autocast else None,
            hint=options.hint,
            device=options.device,
        )
    except ProbeError as error:
        if example is not _ids:
            raise
        raise ProbeError(
            f"{error}\nThe model was given token ids, integers of shape (batch, length). If it takes something else, "
            f"define example(batch) in {module.__file__}: a function that returns the forward's arguments"
        ) from error
    return dataclasses.replace(plan, notes=[*plan.notes, *left_out])


def _methods(
    options: Options, build: Callable[[], nn.Module], example: Callable[[], Any]
) -> tuple[dict[str, Any], list[str]]:
    """The methods by name, and what to say of those that nobody asked for and the model has no place for."""
    methods, left_out = {}, []
    for name in options.method or DEFAULT:
        method = CHOICES[name](options)
        if options.targets and method is not None:
            method = dict.fromkeys(options.targets, method)
        elif not options.method and method is not None:
            try:
                prepared(build, method, None if options.hint is not None else example(), warn=False)
            except TargetError as error:
                left_out.append(f"without {name}: {str(error).partition('. ')[0]}")
                continue
        methods[name] = method
    return methods, left_out


def _example(module: Any, options: Options) -> tuple[Callable[..., Any], list[int] | None]:
    """The function that makes examples, and the lengths to call it with."""
    example = getattr(module, "example", _ids)
    if example is _ids:
        return _ids, options.length or [512]
    if not callable(example):
        raise PeftlibError(
            f"example in the file is {type(example).__name__}: make it a function, example(batch) or "
            "example(batch, length), that returns the forward's arguments"
        )
    signature = inspect.signature(example)
    try:
        signature.bind(*range(2 if options.length else 1))
    except TypeError as error:
        raise PeftlibError(
            f"example{signature} in the file cannot be called with "
            + (
                "a batch and a length: define example(batch, length), or leave out --length"
                if options.length
                else "a batch alone: give --length, or define example(batch)"
            )
        ) from error

    def made(*sizes: int) -> Any:
        try:
            return example(*sizes)
        except Exception as error:
            given = ", ".join(map(str, sizes))
            raise PeftlibError(
                f"example({given}) in the file raised {type(error).__name__}: {error}"
            ) from error

    return made, options.length


def _ids(batch: int, length: int) -> torch.Tensor:
    return torch.empty(batch, length, dtype=torch.long, device="meta")


def _plot(plan: MemoryPlan, path: Path) -> list[Path]:
    plan.plot(path)
    written = [path]
    for choice in {choice.way.method: choice for choice in reversed(plan.choices)}.values():
        beside = path.with_name(f"{path.stem}-{choice.way.method}{path.suffix}")
        choice.report.plot_timeline(beside, f"a step of {choice.way}")
        written.append(beside)
    return written
