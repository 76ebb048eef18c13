"""Parameter-efficient fine-tuning of any ``nn.Module``."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# What attaching LoRA needs is imported at once, so that the first attach costs what the next does; the rest at its
# first use, so that the import costs little beside torch's own.
from peftlib.attach import attach
from peftlib.errors import PeftlibError
from peftlib.merging import merged_state_dict
from peftlib.methods.full import FullFineTuning
from peftlib.methods.lora import LoRA
from peftlib.methods.new_head import NewHead
from peftlib.registry import tunings, use
from peftlib.tuning import Tuning

if TYPE_CHECKING:
    from peftlib.arithmetic import combine
    from peftlib.checkpoint import load
    from peftlib.memory import (
        MemoryPlan,
        MemoryReport,
        OutOfMemory,
        ShardedOver,
        estimate_memory,
        explain_oom,
        measure_memory,
        plan_memory,
    )
    from peftlib.methods.adapter import Adapter
    from peftlib.methods.bitfit import BitFit
    from peftlib.methods.partial import PartialFineTuning
    from peftlib.methods.prefix import PrefixTuning
    from peftlib.methods.prompt import PromptTuning
    from peftlib.methods.ptuning_v1 import PTuningV1
    from peftlib.methods.ptuning_v2 import PTuningV2
    from peftlib.methods.token_rows import TokenRows
    from peftlib.overview import inspect, summary
    from peftlib.routing import route

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "BitFit",
    "FullFineTuning",
    "LoRA",
    "MemoryPlan",
    "MemoryReport",
    "NewHead",
    "OutOfMemory",
    "PTuningV1",
    "PTuningV2",
    "PartialFineTuning",
    "PeftlibError",
    "PrefixTuning",
    "PromptTuning",
    "ShardedOver",
    "TokenRows",
    "Tuning",
    "attach",
    "combine",
    "estimate_memory",
    "explain_oom",
    "inspect",
    "load",
    "measure_memory",
    "merged_state_dict",
    "plan_memory",
    "route",
    "summary",
    "tunings",
    "use",
]

_LATER = {
    "combine": "arithmetic",
    "load": "checkpoint",
    "route": "routing",
    "MemoryPlan": "memory",
    "MemoryReport": "memory",
    "OutOfMemory": "memory",
    "ShardedOver": "memory",
    "estimate_memory": "memory",
    "explain_oom": "memory",
    "measure_memory": "memory",
    "plan_memory": "memory",
    "inspect": "overview",
    "summary": "overview",
}

_PARTS = ("hf", "train")


def __getattr__(name: str) -> Any:
    if name in _PARTS:
        return importlib.import_module(f"{__name__}.{name}")
    home = _LATER.get(name, "methods" if name in __all__ else None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
