"""The models that cases run on: plain modules, and a small Llama of transformers where generation or HF peft needs one.

Legend: B batch, T positions, C width, H heads, K width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.contest import Unavailable

HEAD = 64
"""Width of an attention head."""


class Decoder(nn.Module):
    """A pre-norm decoder block: its linears are q, k, v, o, up and down."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x_BTC: Tensor) -> Tensor:
        h_BTC = self.norm1(x_BTC)
        q, k, v = (
            p(h_BTC).unflatten(-1, (-1, HEAD)).transpose(1, 2) for p in (self.q, self.k, self.v)
        )  # BHTK
        y_BHTK = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTC = x_BTC + self.o(y_BHTK.transpose(1, 2).flatten(2))
        return x_BTC + self.down(F.gelu(self.up(self.norm2(x_BTC))))


class QKV(nn.Module):
    """Three linears of one input, and next to nothing around them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x) + self.k(x) * self.v(x)


class GateUp(nn.Module):
    """Two linears of one input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(width, width, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(x) * self.up(x)


class Seven(nn.Module):
    """The seven linears of a Llama block without an attention: only the linears are of interest."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o, self.gate, self.up, self.down = (
            nn.Linear(width, width, bias=False) for _ in range(7)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.o(self.q(x) + self.k(x) + self.v(x))
        return x + self.down(self.gate(x) * self.up(x))


BLOCKS: Mapping[str, Callable[[int], nn.Module]] = {
    "decoder": Decoder,
    "qkv": QKV,
    "gate-up": GateUp,
    "linear": lambda width: nn.Linear(width, width, bias=False),
    "seven": Seven,
}


def stack(block: str, width: int, layers: int, dtype: str = "float32") -> nn.Module:
    """So many blocks in a row, the same values every time."""
    torch.manual_seed(0)
    return nn.Sequential(*(BLOCKS[block](width) for _ in range(layers))).to(getattr(torch, dtype))


def linears(model: nn.Module) -> list[str]:
    """The names that all linears go by: ["q", "k", ...], or positions in a plain stack."""
    names = [name.split(".") for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    return list(dict.fromkeys(parts[-1] for parts in names))


def llama(width: int, layers: int, vocabulary: int = 512) -> Any:
    """A Llama made from a configuration, with grouped heads and SDPA.

    Raises:
        Unavailable: transformers is not installed.
    """
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        raise Unavailable("transformers is not installed") from None
    heads = max(2, width // HEAD)
    config: Any = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=1024,
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    return LlamaForCausalLM(config)
