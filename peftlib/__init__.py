"""Parameter-efficient fine-tuning of any ``nn.Module``."""

from peftlib.attach import attach
from peftlib.checkpoint import load
from peftlib.errors import PeftlibError
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
)
from peftlib.overview import inspect, summary
from peftlib.tuning import Tuning, tunings, use

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "BitFit",
    "FullFineTuning",
    "LoRA",
    "NewHead",
    "PTuningV1",
    "PTuningV2",
    "PartialFineTuning",
    "PeftlibError",
    "PrefixTuning",
    "PromptTuning",
    "Tuning",
    "attach",
    "inspect",
    "load",
    "summary",
    "tunings",
    "use",
]
