"""What the commands share: a model from a function in a file, and methods by name."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from peftlib.errors import PeftlibError
from peftlib.methods.adapter import Adapter
from peftlib.methods.bitfit import BitFit
from peftlib.methods.lora import LoRA
from peftlib.methods.prefix import PrefixTuning
from peftlib.methods.prompt import PromptTuning
from peftlib.methods.ptuning_v1 import PTuningV1
from peftlib.methods.ptuning_v2 import PTuningV2

Options = argparse.Namespace
METHODS: dict[str, Callable[[Options], Any]] = {
    "lora": lambda o: LoRA(rank=o.rank),
    "dora": lambda o: LoRA(rank=o.rank, use_dora=True),
    "adapter": lambda o: Adapter(dim=o.dim),
    "prefix": lambda o: PrefixTuning(length=o.virtual),
    "ptuning-v2": lambda o: PTuningV2(length=o.virtual),
    "prompt": lambda o: PromptTuning(length=o.virtual),
    "ptuning-v1": lambda o: PTuningV1(length=o.virtual),
    "bitfit": lambda o: BitFit(),
}
"""Name of a method -> the method that the options describe."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def positive(text: str) -> int:
    """An option's whole number of 1 or more."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return number


def add_method_options(parser: argparse.ArgumentParser) -> None:
    """The options that ``METHODS`` reads."""
    add = parser.add_argument
    add("--targets", nargs="+", metavar="GLOB", help="where the method goes; default: its own")
    add("--rank", type=positive, default=8, help="of lora and dora (default 8)")
    add("--dim", type=positive, default=64, help="bottleneck of the adapter (default 64)")
    add("--virtual", type=positive, default=20, help="length of prefixes and prompts (default 20)")


def function_of(given: str) -> tuple[Callable[..., Any], Any]:
    """The function that ``path.py:function`` names, and the file as a module.

    Raises:
        PeftlibError: no such file or function, or the file cannot be imported.
    """
    path, _, name = given.rpartition(":")
    if not path or not Path(path).is_file():
        raise PeftlibError(f"{given!r}: give an existing file and a function in it, path.py:function")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise PeftlibError(f"{given!r}: {path} is no Python file; give path.py:function")
    module = importlib.util.module_from_spec(spec)
    # what the file imports from beside it is found, and its classes can be looked up by name
    sys.path.insert(0, str(Path(path).resolve().parent))
    sys.modules.setdefault(spec.name, module)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise PeftlibError(f"{path} cannot be imported ({type(error).__name__}: {error})") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise PeftlibError(f"{path} has no function {name!r}")
    return function, module
