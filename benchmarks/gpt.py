"""A plain byte-level GPT: the "module of your own" of the savings run, with nothing of peftlib inside.

Pre-norm blocks, rotary positions (no table whose length a prompt could overrun), biases, untied head.

Legend: B batch, T positions, C width, H heads, K width of a head, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    vocabulary: int = 256
    width: int = 192
    layers: int = 4
    heads: int = 6

    def __post_init__(self) -> None:
        if self.width % (2 * self.heads):
            raise ValueError(f"width {self.width} does not split into {self.heads} heads of even width")


def rotate(x_BHTK: Tensor) -> Tensor:
    """Rotary positions: turns channel pair j at position t by the angle t·10000^(-2j/K)."""
    T, K = x_BHTK.shape[-2:]
    t_T = torch.arange(T, device=x_BHTK.device)
    frequency_K2 = 10000 ** -(torch.arange(0, K, 2, device=x_BHTK.device) / K)
    angle_TK2 = t_T[:, None] * frequency_K2
    cos_TK2, sin_TK2 = angle_TK2.cos().to(x_BHTK.dtype), angle_TK2.sin().to(x_BHTK.dtype)
    a, b = x_BHTK.chunk(2, dim=-1)
    return torch.cat([a * cos_TK2 - b * sin_TK2, b * cos_TK2 + a * sin_TK2], dim=-1)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q_proj = nn.Linear(config.width, config.width)
        self.k_proj = nn.Linear(config.width, config.width)
        self.v_proj = nn.Linear(config.width, config.width)
        self.o_proj = nn.Linear(config.width, config.width)

    def forward(self, x_BTC: Tensor) -> Tensor:
        q_BHTK, k_BHTK, v_BHTK = (
            rearrange(proj(x_BTC), "b t (h k) -> b h t k", h=self.heads)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        y_BHTK = F.scaled_dot_product_attention(rotate(q_BHTK), rotate(k_BHTK), v_BHTK, is_causal=True)
        return self.o_proj(rearrange(y_BHTK, "b h t k -> b t (h k)"))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.fc = nn.Linear(config.width, 4 * config.width)
        self.proj = nn.Linear(4 * config.width, config.width)

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.proj(F.gelu(self.fc(x_BTC)))


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.width)
        self.mlp = MLP(config)

    def forward(self, x_BTC: Tensor) -> Tensor:
        x_BTC = x_BTC + self.attn(self.norm1(x_BTC))
        return x_BTC + self.mlp(self.norm2(x_BTC))


class GPT(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.embed = nn.Embedding(config.vocabulary, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 2:
                # what is added to the residual stream starts smaller, as deep as the stream is long (GPT-2)
                residual = name.endswith((".o_proj.weight", ".proj.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * config.layers) ** 0.5 if residual else 0.02)

    def forward(self, ids_BT: Tensor) -> Tensor:
        x_BTC = self.embed(ids_BT)
        for block in self.blocks:
            x_BTC = block(x_BTC)
        return self.head(self.norm(x_BTC))
