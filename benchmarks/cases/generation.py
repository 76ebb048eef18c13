"""Greedy generation with a cache on a small Llama: the base, and LoRA merged and unmerged."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

import peftlib
from benchmarks.contest import Contest, agree, tolerance
from benchmarks.models import llama
from benchmarks.peers import BASE, HF, OURS, LoRASettings, factors, fill, frozen, hf, ours

MERGED = "peftlib, merged"


def greedy(*, width: int, layers: int, batch: int, prompt: int, new: int) -> Contest:
    """Tokens a second; a run is one call of `generate`."""
    base = llama(width, layers).eval()
    lora = LoRASettings(rank=8)
    models: dict[str, Any] = {BASE: frozen(base), MERGED: ours(base, lora), OURS: ours(base, lora)}
    missing = {}
    try:
        models[HF] = hf(base, lora)
    except ImportError:
        missing[HF] = "not installed"
    for name, model in models.items():
        model.eval()
        if name != BASE:
            fill(factors(model, "t0"))
    peftlib.tunings(models[MERGED])["t0"].merge()
    ids = torch.randint(3, 500, (batch, prompt))

    def run(model: Any) -> Tensor:
        # an end-of-sequence token would end some of them early
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
        )

    def checked() -> str:
        with torch.no_grad():
            logits = {name: model(ids).logits for name, model in models.items()}
        without = logits.pop(BASE)
        agree(logits, logits[MERGED], without, tolerance(without))
        assert all(run(model).shape == (batch, prompt + new) for model in models.values())
        return "logits agree with the merged model's"

    return Contest(
        runs={name: functools.partial(run, model) for name, model in models.items()},
        check=checked,
        missing=missing,
        count=batch * new,
        piece="token",
    )
