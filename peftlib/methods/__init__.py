"""One file per method; ``base`` holds the signature they share."""

from peftlib.methods.adapter import Adapter
from peftlib.methods.bitfit import BitFit
from peftlib.methods.full import FullFineTuning
from peftlib.methods.lora import LoRA
from peftlib.methods.new_head import NewHead
from peftlib.methods.partial import PartialFineTuning
from peftlib.methods.prefix import PrefixTuning
from peftlib.methods.prompt import PromptTuning
from peftlib.methods.ptuning_v1 import PTuningV1
from peftlib.methods.ptuning_v2 import PTuningV2
from peftlib.methods.token_rows import TokenRows

__all__ = [
    "Adapter",
    "BitFit",
    "FullFineTuning",
    "LoRA",
    "NewHead",
    "PTuningV1",
    "PTuningV2",
    "PartialFineTuning",
    "PrefixTuning",
    "PromptTuning",
    "TokenRows",
]
