"""Groups of an optimizer: rates and decay by what a parameter is and where it stands."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from peftlib import PeftlibError, Tuning

NORMS = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.modules.batchnorm._NormBase,
)
_B = re.compile(r"(?:^|\.)lora\.b$")


def groups(
    trained: Tuning | nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.0,
    lora_plus: float | None = None,
    layer_decay: float | None = None,
) -> list[dict[str, Any]]:
    """What is trained as groups for any optimizer: ``rate = lr x (lora_plus if it is a B) x layer_decay^(L - depth)``.

    Weights decay; vectors, biases and all of a normalization do not. L is the depth of the deepest of the repeated
    blocks (the like children of module lists and ``nn.Sequential``, outermost ones, counted through in the order of
    the model's modules); it and what comes after it have ``lr`` itself, the block before it ``lr layer_decay``, and so
    on; what comes before the first block, or belongs to the model as a whole (a prompt), has a depth of 0.

    Args:
        trained: a tuning, or a model whose ``requires_grad`` parameters are trained.
        lr: base rate; schedules multiply each group's own.
        weight_decay: of what decays.
        lora_plus: ratio of the rate of each LoRA's B to its A's; 16 is a good one for new skills.
        layer_decay: above 0, at most 1.

    Returns:
        Dicts with ``params``, ``lr`` and ``weight_decay``, one for each pair of rate and decay.

    Raises:
        PeftlibError: a number out of range, nothing trained, ``lora_plus`` without LoRA, or ``layer_decay`` without
            repeated blocks.

    Example:
        >>> import torch, peftlib
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        >>> tuning = peftlib.attach(model, peftlib.LoRA(rank=2), targets=["0", "1"])
        >>> found = groups(tuning, lr=1e-3, lora_plus=16, layer_decay=0.5)
        >>> [group["lr"] for group in found]
        [0.0005, 0.008, 0.001, 0.016]
        >>> optimizer = torch.optim.AdamW(found)

    Source: LoRA+: Hayou et al. 2024, arXiv:2402.12354, section 4; layer-wise rates: Howard and Ruder 2018,
    arXiv:1801.06146, section 3.2.
    """
    if not lr > 0 or weight_decay < 0:
        raise PeftlibError(f"groups takes lr > 0 and weight_decay >= 0; got {lr}, {weight_decay}.")
    model = trained.model if isinstance(trained, Tuning) else trained
    named = [(name, p) for name, p in trained.named_parameters() if p.requires_grad]
    if not named:
        raise PeftlibError(
            f"{type(model).__name__} has nothing that is trained: no parameter takes gradients."
        )
    factors = _b_factors(named, lora_plus)
    modules = dict(model.named_modules())
    depths = None if layer_decay is None else _below(model, layer_decay)
    found: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in named:
        owner = _owner(name, modules)
        rate = lr * factors.get(name, 1.0)
        if depths is not None and layer_decay is not None:
            rate *= layer_decay ** depths[owner]
        plain = parameter.dim() < 2 or name.endswith("bias") or isinstance(modules[owner], NORMS)
        decay = 0.0 if plain else weight_decay
        found.setdefault((rate, decay), {"params": [], "lr": rate, "weight_decay": decay})["params"].append(
            parameter
        )
    return list(found.values())


def _b_factors(named: list[tuple[str, nn.Parameter]], ratio: float | None) -> Mapping[str, float]:
    if ratio is None:
        return {}
    found = {name: ratio for name, _ in named if _B.search(name)}
    if not ratio > 0:
        raise PeftlibError(f"lora_plus={ratio}: give a ratio above 0, such as 16.")
    if not found:
        raise PeftlibError(
            "lora_plus= raises the rate of LoRA's B, and there is none among what is trained. Give the tuning of a "
            "LoRA, or leave it out."
        )
    return found


def _owner(name: str, modules: Mapping[str, nn.Module]) -> str:
    """The longest beginning of a parameter's name that is a module of the model's."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name


def _below(model: nn.Module, layer_decay: float) -> dict[str, int]:
    """Module -> how many blocks lie between it and the deepest."""
    if not 0 < layer_decay <= 1:
        raise PeftlibError(f"layer_decay={layer_decay}: give a factor above 0 and at most 1, such as 0.9.")
    found: dict[str, int] = {}
    deepest = _walk(model, "", 0, False, found)
    if not deepest:
        raise PeftlibError(
            f"layer_decay= needs repeated blocks, and {type(model).__name__} has no module list of like ones. Leave it "
            "out, or put the layers into an nn.ModuleList."
        )
    return {name: deepest - depth for name, depth in found.items()}


def _walk(module: nn.Module, name: str, depth: int, inside: bool, found: dict[str, int]) -> int:
    """Note how many blocks begin before each module or with it; the number after the last."""
    found[name] = depth
    blocks = [] if inside else _blocks(module)
    for key, child in module.named_children():
        depth += any(child is block for block in blocks)
        depth = _walk(child, f"{name}.{key}" if name else key, depth, inside or bool(blocks), found)
    return depth


def _blocks(module: nn.Module) -> list[nn.Module]:
    """The children of a list in which at least two are alike, but those without parameters; else nothing."""
    if not isinstance(module, (nn.ModuleList, nn.Sequential)):
        return []
    children = [child for child in module.children() if next(child.parameters(), None) is not None]
    # a tuning gives its hosts a subclass of their class
    alike = any(
        (isinstance(a, type(b)) or isinstance(b, type(a)))
        and not isinstance(a, (nn.ModuleList, nn.Sequential))
        for a, b in itertools.combinations(children, 2)
    )
    return children if alike else []
