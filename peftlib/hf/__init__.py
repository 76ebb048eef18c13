"""HF peft's directories, both ways: ``adapter_config.json`` and ``adapter_model.safetensors``.

What a directory says is turned into this library's own methods (:class:`LoRA`, :class:`BitFit`,
:class:`FullFineTuning`, :class:`NewHead`, :class:`TokenRows`, :class:`PromptTuning`, :class:`PTuningV1`,
:class:`PrefixTuning`), so that a loaded tuning is like any other. The weights say which modules are meant, the
configuration has to agree with them. A field that means something and is not understood is refused by its name.

Left out on purpose: pickled weights, anything from the network, transformers itself. Names that HF's models and
configurations use are known in this package and nowhere else.
"""

from __future__ import annotations

from peftlib.hf.reading import load
from peftlib.hf.writing import save
from peftlib.methods.position_offset import PositionOffset

__all__ = ["PositionOffset", "load", "save"]
