"""What the tests of prompts share: a decoder that takes every kind of argument, and its twin written out by hand.

Shapes: B batch, P prompt, T tokens, L = P + T, D width, H heads, E head width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import peftlib
from tests.twin import randomize

F64 = torch.float64
V, D, H, CONTEXT = 23, 8, 2, 24


class Block(nn.Module):
    """Attention through SDPA, then an MLP; no norm, so that everything counts."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.mlp = nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))

    def forward(self, x: Tensor, bias: Tensor, angles: Tensor | None, past: Any = None) -> tuple[Tensor, Any]:
        B, T, _ = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, H, D // H).permute(2, 0, 3, 1, 4)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        if past:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, D))
        return x + self.mlp(x), (k, v)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary positions: (B, H, T, E) by (B, 1, T, E / 2)."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1)


class Decoder(nn.Module):
    """A plain model with its own conventions: ids under the name ``idx``, a tuple with targets, masks of every kind.

    Args:
        positions: ``"absolute"`` (a table), ``"rotary"`` or ``"alibi"`` (a bias that falls with the distance).
        causal: whether it masks the future itself where no ``attn_mask`` is given.
    """

    def __init__(self, positions: str = "absolute", causal: bool = True):
        super().__init__()
        self.positions, self.causal = positions, causal
        self.tok, self.types = nn.Embedding(V, D), nn.Embedding(3, D)
        self.pos = nn.Embedding(CONTEXT, D) if positions == "absolute" else None
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(D, V, bias=False)
        self.double()

    def forward(
        self,
        idx: Tensor | None = None,
        targets: Tensor | None = None,
        attn_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past: Any = None,
    ) -> Any:
        x = self.tok(idx) if inputs_embeds is None else inputs_embeds
        flat = x.dim() == 2
        x = x[None] if flat else x
        B, T, _ = x.shape
        before = past[0][0].shape[2] if past else 0
        where = torch.arange(before, before + T) if position_ids is None else position_ids
        if token_type_ids is not None:
            x = x + self.types(token_type_ids)
        if self.pos is not None:
            x = x + self.pos(where)
        S = before + T
        bias = torch.zeros(B, 1, T, S, dtype=x.dtype)
        if attn_mask is not None:
            bias = bias + (additive(attn_mask) if attn_mask.dtype == torch.bool else attn_mask)
        elif self.causal:
            bias = bias + additive(torch.ones(T, S, dtype=torch.bool).tril(before))
        if attention_mask is not None:
            bias = bias + additive(attention_mask.bool()[:, None, None])
        if key_padding_mask is not None:
            bias = bias + additive(~key_padding_mask[:, None, None])
        if self.positions == "alibi":
            bias = bias + slopes() * (torch.arange(S) - torch.arange(before, S)[:, None]).abs()
        new = []
        for i, block in enumerate(self.blocks):
            x, kv = block(x, bias, self.angles(where), past[i] if past else None)
            new.append(kv)
        logits = self.head(x[0] if flat else x)
        if targets is not None:
            return logits, F.cross_entropy(logits.flatten(0, -2), targets.flatten())
        return logits if past is None else (logits, new)

    def angles(self, where: Tensor) -> Tensor | None:
        if self.positions != "rotary":
            return None
        where = where.expand(1, -1) if where.dim() == 1 else where
        return (where[..., None] * 0.7 ** torch.arange(D // H // 2, dtype=F64))[:, None]


def additive(visible: Tensor) -> Tensor:
    return torch.zeros(visible.shape, dtype=F64).masked_fill(~visible, torch.finfo(F64).min)


def slopes() -> Tensor:
    return -torch.tensor([0.5, 0.125], dtype=F64).view(H, 1, 1)


def naive(
    model: Decoder, x_BLD: Tensor, visible_BLL: Tensor, where_BL: Tensor, types_BL: Tensor | None = None
) -> Tensor:
    """The logits of embeddings that hold the prompt already, under a mask and positions written by hand."""
    x = x_BLD
    B, L, _ = x.shape
    if types_BL is not None:
        x = x + model.types.weight[types_BL]
    if model.pos is not None:
        x = x + model.pos.weight[where_BL]
    steps = torch.arange(L)
    for block in model.blocks:
        q, k, v = (t.view(B, L, H, D // H).transpose(1, 2) for t in block.qkv(x).split(D, -1))
        angles = model.angles(where_BL)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        scores = q @ k.transpose(-1, -2) / (D // H) ** 0.5
        if model.positions == "alibi":
            scores = scores + slopes() * (steps[None] - steps[:, None]).abs()
        weights = scores.masked_fill(~visible_BLL[:, None], -torch.inf).softmax(-1)
        x = x + block.out((weights @ v).transpose(1, 2).reshape(B, L, D))
        x = x + block.mlp(x)
    return x @ model.head.weight.T


def rows_of(tuning: peftlib.Tuning, scale: float = 1.0) -> Tensor:
    """The trained rows of a prompt tuning, with random values that matter."""
    return next(iter(randomize(tuning, scale).values()))


def prepended(model: Decoder, rows_PD: Tensor, idx_BT: Tensor) -> Tensor:
    return torch.cat([rows_PD.expand(len(idx_BT), -1, -1), model.tok.weight[idx_BT]], 1)


def visible(real_BTT: Tensor, P: int, both_ways: bool, keys_BT: Tensor | None = None) -> Tensor:
    """Who sees whom with P virtual tokens in front, where the real tokens see each other as given."""
    B, T, _ = real_BTT.shape
    keys = torch.ones(B, T, dtype=torch.bool) if keys_BT is None else keys_BT
    prompt = torch.ones(P, P, dtype=torch.bool)
    top = torch.cat(
        [
            (prompt if both_ways else prompt.tril()).expand(B, P, P),
            (keys & both_ways)[:, None].expand(B, P, T),
        ],
        -1,
    )
    return torch.cat([top, torch.cat([torch.ones(B, T, P, dtype=torch.bool), real_BTT], -1)], 1)
