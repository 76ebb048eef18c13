"""Training steps of prompts, prefixes, p-tuning and adapters on a small Llama, against the frozen model's step.

The floor of a prompt or of p-tuning is the frozen model on as many more positions, since that is what they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import peftlib
from benchmarks.contest import Contest, Disagreement, agree, tolerance
from benchmarks.models import llama
from benchmarks.peers import BASE, HF, OURS, fill, frozen, trained


def _requires_grad(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output.requires_grad_()


def _peft(kind: str, length: int, hidden: int) -> Any:
    """HF peft's configuration of the method, or None where it has no such."""
    import peft

    common = {"task_type": "CAUSAL_LM", "num_virtual_tokens": length}
    if kind == "prompt":
        return peft.PromptTuningConfig(**common)  # type: ignore[arg-type]
    if kind == "ptuning-v1":
        return peft.PromptEncoderConfig(**common, encoder_hidden_size=hidden)  # type: ignore[arg-type]
    if kind == "ptuning-v2":
        return peft.PrefixTuningConfig(**common)  # type: ignore[arg-type]
    if kind == "prefix":
        return peft.PrefixTuningConfig(**common, prefix_projection=True, encoder_hidden_size=hidden)  # type: ignore[arg-type]
    return None


METHODS: dict[str, Callable[[int, int], Any]] = {
    "prompt": lambda length, hidden: peftlib.PromptTuning(length=length),
    "ptuning-v1": lambda length, hidden: peftlib.PTuningV1(length=length, encoder="mlp", hidden=hidden),
    "ptuning-v2": lambda length, hidden: peftlib.PTuningV2(length=length),
    "prefix": lambda length, hidden: peftlib.PrefixTuning(length=length, hidden=hidden),
    "adapter": lambda length, hidden: peftlib.Adapter(dim=hidden),
}


def time_of_step(
    *, kind: str, width: int, layers: int, batch: int, tokens: int, length: int = 16, hidden: int = 64
) -> Contest:
    """Forward and backward with so many virtual tokens, or a bottleneck of so many channels (`hidden`)."""
    base: Any = llama(width, layers)
    ids = torch.randint(3, 500, (batch, tokens))
    dy = torch.randn(batch, tokens, 512)
    models: dict[str, Any] = {BASE: frozen(base), OURS: frozen(base)}
    models[BASE].model.embed_tokens.register_forward_hook(_requires_grad)
    # adapters go where the paper puts them: after attention and after the MLP
    targets = ["self_attn", "mlp"] if kind == "adapter" else None
    tuning = peftlib.attach(models[OURS], METHODS[kind](length, hidden), targets=targets, example=ids)
    missing = {}
    try:
        config = _peft(kind, length, hidden)
    except ImportError:
        missing[HF] = "not installed"
    else:
        if config is None:
            missing[HF] = "has no such method"
        else:
            import peft

            models[HF] = peft.get_peft_model(frozen(base), config)
    fill(trained(models[OURS]))
    longer = (
        torch.cat([ids[:, :1].expand(-1, length), ids], dim=1) if kind in ("prompt", "ptuning-v1") else ids
    )

    def logits(name: str) -> Tensor:
        given = longer if name == BASE else ids
        output: Tensor = models[name](input_ids=given, use_cache=False).logits
        return output[:, -tokens:]

    def step(name: str, parameters: list[nn.Parameter]) -> None:
        logits(name).backward(dy)
        for parameter in parameters:
            parameter.grad = None

    def checked() -> str:
        with torch.no_grad():
            plain = frozen(base)(input_ids=ids, use_cache=False).logits
            with tuning.disabled():
                if not torch.equal(models[OURS](input_ids=ids, use_cache=False).logits, plain):
                    raise Disagreement(f"{OURS} without its tuning is not the base")
            if HF in models and kind == "prompt":
                fill(trained(models[HF]))
                agree({HF: logits(HF)}, logits(OURS), plain, tolerance(plain))
                return "logits agree with HF peft's; without the tuning they are the base's"
        step(OURS, [])
        for name, parameter in tuning.named_parameters():
            if parameter.grad is None or not parameter.grad.isfinite().all() or not parameter.grad.any():
                raise Disagreement(f"{OURS} gives {name} no gradient")
        return "without the tuning the logits are the base's; every tensor of it gets a gradient"

    return Contest(
        runs={name: functools.partial(step, name, trained(model)) for name, model in models.items()},
        check=checked,
        missing=missing,
    )
