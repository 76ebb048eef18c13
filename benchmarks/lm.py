"""Next-token loss, its held-out value, and the pretraining of the bundled GPT.

Legend: N windows, B batch, T positions, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.gpt import GPT, GPTConfig
from benchmarks.inputs import logits_of
from benchmarks.progress import Progress
from benchmarks.text import Domain, batches


def next_token_loss(model: nn.Module, window_BT1: Tensor, *, reduction: str = "mean") -> Tensor:
    """Cross-entropy of each token given those before it, in nats.

    Args:
        model: maps ids (B, T) to logits (B, T, V).
        window_BT1: (B, T + 1) ids; the first T are the input, the last T the targets.
        reduction: "mean" gives a scalar, "none" one value per position, (B, T).
    """
    device = next(model.parameters()).device
    window_BT1 = window_BT1.to(device)
    logits_BTV = logits_of(model(window_BT1[:, :-1]))
    return F.cross_entropy(logits_BTV.transpose(1, 2).float(), window_BT1[:, 1:], reduction=reduction)


@torch.no_grad()
def held_out_losses(model: nn.Module, windows_NT1: Tensor, *, batch: int) -> Tensor:
    """Loss of every window in eval mode, (N,), in nats per token; the model is left in train mode."""
    model.eval()
    losses_N = torch.cat(
        [next_token_loss(model, part, reduction="none").mean(dim=1) for part in windows_NT1.split(batch)]
    )
    model.train()
    return losses_N.cpu()


def pretrained(
    config: GPTConfig,
    text: Domain,
    *,
    steps: int,
    batch: int,
    context: int,
    seed: int,
    rate: float,
    cache: Path,
) -> GPT:
    """The GPT trained from scratch on a text: AdamW, one warm-up and one cosine.

    The result is kept in `cache`, under a name made of everything it depends on.
    """
    recipe = json.dumps(
        [repr(config), steps, batch, context, seed, rate, torch.__version__, _digest(text.train)],
        sort_keys=True,
    )
    path = cache / f"pretrained-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}.safetensors"
    if path.is_file():
        try:
            model = GPT(config)
            model.load_state_dict(load_file(path))
            return model
        except (SafetensorError, RuntimeError, OSError):
            # a damaged cache costs the time to train again, no more
            path.unlink()
    torch.manual_seed(seed)
    model = GPT(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps + 1, pct_start=0.1)
    with Progress(steps, f"pretraining on {text.name}") as progress:
        for window_BT1 in batches(text.train, steps=steps, batch=batch, context=context, seed=seed):
            loss = next_token_loss(model, window_BT1)
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            progress.step(f"loss {loss.item():.3f}")
    unfinished = path.with_suffix(".part")
    save_file(model.state_dict(), unfinished)
    unfinished.replace(path)
    return model


def _digest(tokens: Tensor) -> str:
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
