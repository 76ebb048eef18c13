"""The planner from a shell: ``python -m peftlib.memory model.py:build --method lora --batch 4 --budget 24GiB``."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftlib.errors import PeftlibError
from peftlib.memory.plan import MemoryPlan, plan_memory
from peftlib.methods.adapter import Adapter
from peftlib.methods.bitfit import BitFit
from peftlib.methods.lora import LoRA
from peftlib.methods.prefix import PrefixTuning
from peftlib.methods.prompt import PromptTuning
from peftlib.methods.ptuning_v1 import PTuningV1
from peftlib.methods.ptuning_v2 import PTuningV2

Options = argparse.Namespace
METHODS: dict[str, Callable[[Options], Any]] = {
    "full": lambda o: None,
    "lora": lambda o: LoRA(rank=o.rank),
    "dora": lambda o: LoRA(rank=o.rank, use_dora=True),
    "adapter": lambda o: Adapter(dim=o.dim),
    "prefix": lambda o: PrefixTuning(length=o.virtual),
    "ptuning-v2": lambda o: PTuningV2(length=o.virtual),
    "prompt": lambda o: PromptTuning(length=o.virtual),
    "ptuning-v1": lambda o: PTuningV1(length=o.virtual),
    "bitfit": lambda o: BitFit(),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
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
    add("--method", action="append", choices=list(METHODS), help="repeatable; default: full, lora and prefix")
    add("--targets", nargs="+", metavar="GLOB", help="where the methods go; default: each method's own")
    add("--rank", type=int, default=8, help="of lora and dora (default 8)")
    add("--dim", type=int, default=64, help="bottleneck of the adapter (default 64)")
    add("--virtual", type=int, default=20, help="length of prefixes and prompts (default 20)")
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
    path, _, function = options.model.rpartition(":")
    module = _load(path, options.model)
    factory = getattr(module, function, None)
    if not callable(factory):
        raise PeftlibError(f"{path} has no function {function!r}")

    def build() -> nn.Module:
        model = factory()
        return model.to(DTYPES[options.dtype]) if options.dtype and isinstance(model, nn.Module) else model

    methods = {}
    for name in options.method or ("full", "lora", "prefix"):
        method = METHODS[name](options)
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


def _load(path: str, given: str) -> Any:
    if not path or not Path(path).is_file():
        raise PeftlibError(f"{given!r}: give an existing file and a function in it, path.py:function")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # what the file imports from beside it is found, and its classes can be looked up by name
    sys.path.insert(0, str(Path(path).resolve().parent))
    sys.modules.setdefault(spec.name, module)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise PeftlibError(f"{path} cannot be imported ({type(error).__name__}: {error})") from error
    return module


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
