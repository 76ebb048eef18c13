"""One file per method; ``base`` holds the signature they share. A method's file is imported at its first use."""

from __future__ import annotations

import importlib
from typing import Any

HOME = {  # public name -> file; a file that names a method may make it be imported, and nothing else
    "Adapter": "adapter",
    "BitFit": "bitfit",
    "FullFineTuning": "full",
    "LoRA": "lora",
    "NewHead": "new_head",
    "PTuningV1": "ptuning_v1",
    "PTuningV2": "ptuning_v2",
    "PartialFineTuning": "partial",
    "PositionOffset": "position_offset",
    "PrefixTuning": "prefix",
    "PromptTuning": "prompt",
    "TokenRows": "token_rows",
}


def __getattr__(name: str) -> Any:
    if name not in HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *HOME])
