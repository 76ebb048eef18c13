"""Parameter-efficient fine-tuning of any ``nn.Module``."""

from peftlib.attach import attach
from peftlib.checkpoint import load
from peftlib.errors import PeftlibError
from peftlib.memory import MemoryReport, estimate_memory, measure_memory
from peftlib.methods import (
    Adapter,
    BitFit,
    FullFineTuning,
    LoRA,
    NewHead,
    PartialFineTuning,
    PrefixTuning,
    PromptTuning,
    PTuningV1,
    PTuningV2,
    TokenRows,
)
from peftlib.overview import inspect, summary
from peftlib.tuning import Tuning, tunings, use

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "BitFit",
    "FullFineTuning",
    "LoRA",
    "MemoryReport",
    "NewHead",
    "PTuningV1",
    "PTuningV2",
    "PartialFineTuning",
    "PeftlibError",
    "PrefixTuning",
    "PromptTuning",
    "TokenRows",
    "Tuning",
    "attach",
    "estimate_memory",
    "inspect",
    "load",
    "measure_memory",
    "summary",
    "tunings",
    "use",
]
