"""The same LoRA by each library on copies of one model, with the same factors; and the frozen model that is the floor.

Peers take part when they are installed (the `bench` extra). They are called as the injected module, without the wrapper
that HF peft puts around it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import peftlib
from benchmarks.contest import Disagreement, agree, tolerance
from benchmarks.models import linears

BASE, OURS, SHARED, HF, LORALIB = "base", "peftlib", "peftlib, example=", "HF peft", "loralib"


@dataclass(frozen=True, kw_only=True)
class LoRASettings:
    """The LoRA that all of them make."""

    rank: int = 8
    dropout: float = 0.0
    tunings: int = 1
    """How many there are on the model; the first is the one that is on."""

    @property
    def alpha(self) -> int:
        return 2 * self.rank


@dataclass(frozen=True, kw_only=True)
class Entrants:
    """Models by name, the frozen one first, and who is missing."""

    models: dict[str, nn.Module]
    missing: dict[str, str] = field(default_factory=dict)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def factors(model: nn.Module, tuning: str) -> list[Tensor]:
    """A, B, A, B, ... of one tuning, in the order of the model's layers, whichever library made them."""
    if have := peftlib.tunings(model):
        return list(have[tuning].parameters())
    named = [(name, p) for name, p in model.named_parameters() if "lora_" in name]
    # loralib has no names
    return [p for name, p in named if f".{tuning}." in name or name.endswith(("lora_A", "lora_B"))]


def fill(parameters: Iterable[Tensor], seed: int = 0) -> None:
    """Trained values: a factor of zeros would let any mistake pass."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            # the same on every device
            values = torch.randn(parameter.shape, generator=generator, device="cpu").mul_(0.05)
            parameter.copy_(values)


def frozen(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).requires_grad_(False)


def ours(model: nn.Module, lora: LoRASettings, example: Tensor | None = None) -> nn.Module:
    model = copy.deepcopy(model)
    method = peftlib.LoRA(rank=lora.rank, alpha=lora.alpha, dropout=lora.dropout)
    for i in range(lora.tunings):
        peftlib.attach(model, method, targets=linears(model), example=example, name=f"t{i}")
    peftlib.use(model, "t0")
    return model


def hf_wrapped(model: nn.Module, lora: LoRASettings) -> Any:
    """HF peft's own wrapper around the injected model."""
    import peft

    config = peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=linears(model)
    )
    wrapped: Any = peft.get_peft_model(copy.deepcopy(model), config, adapter_name="t0")
    for i in range(1, lora.tunings):
        wrapped.add_adapter(f"t{i}", config)
    return wrapped


def hf(model: nn.Module, lora: LoRASettings) -> nn.Module:
    return hf_wrapped(model, lora).base_model.model


def loralib(model: nn.Module, lora: LoRASettings) -> nn.Module:
    import loralib as library

    model = copy.deepcopy(model)
    for name, host in list(model.named_modules()):
        if isinstance(host, nn.Linear):
            new = library.Linear(
                host.in_features,
                host.out_features,
                r=lora.rank,
                lora_alpha=lora.alpha,
                lora_dropout=lora.dropout,
                merge_weights=False,
                bias=host.bias is not None,
                dtype=host.weight.dtype,
            )
            new.load_state_dict(host.state_dict(), strict=False)
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, new)
    library.mark_only_lora_as_trainable(model)
    return model


PEERS: Mapping[str, Callable[[nn.Module, LoRASettings], nn.Module]] = {HF: hf, LORALIB: loralib}


def invite(
    base: nn.Module,
    lora: LoRASettings,
    example: Tensor | None = None,
    peers: Sequence[str] = (HF, LORALIB),
) -> Entrants:
    """The frozen base, peftlib (with ``example``, a second time with it), and the peers that are installed."""
    models = {BASE: frozen(base), OURS: ours(base, lora)}
    if example is not None:
        models[SHARED] = ours(base, lora, example)
    missing = {}
    for name in peers:
        try:
            models[name] = PEERS[name](base, lora)
        except ImportError:
            missing[name] = "not installed"
    for model in models.values():
        for i in range(lora.tunings):
            fill(factors(model, f"t{i}"), seed=i)
    return Entrants(models=models, missing=missing)


def output_and_gradient(model: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Y and dL/dx."""
    x = x.detach().requires_grad_()
    y = model(x)
    y.backward(dy)
    assert x.grad is not None
    return y.detach(), x.grad


def check(
    entrants: Entrants,
    x: Tensor,
    dy: Tensor,
    calls: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
) -> str:
    """All give the output and the gradient of the base with merged weights; without its tuning, ours is the base.

    Args:
        entrants: the models.
        x: an input.
        dy: the gradient of the output.
        calls: what is called in place of the models: compiled ones.

    Raises:
        Disagreement: one of them does not.
    """
    models = entrants.models
    merged = copy.deepcopy(models[BASE])
    merged.load_state_dict(peftlib.merged_state_dict(models[OURS]))
    merged, plain = merged.double(), copy.deepcopy(models[BASE]).double()
    modes = {model: model.training for model in models.values()}
    drops = any(getattr(m, "p", 0) for model in models.values() for m in model.modules()) or any(
        getattr(t, "dropout", 0) for t in peftlib.tunings(models[OURS])["t0"].sites.values()
    )
    for model in models.values() if drops else ():
        model.eval()
    expected = output_and_gradient(merged, x.double(), dy.double())
    without = output_and_gradient(plain, x.double(), dy.double())
    found = {name: output_and_gradient((calls or models)[name], x, dy) for name in models if name != BASE}
    for index in range(2):
        agree({n: f[index] for n, f in found.items()}, expected[index], without[index], tolerance(x))
    for name in (OURS, SHARED):
        if name in models:
            with peftlib.use(models[name]), torch.no_grad():
                if not torch.equal(models[name](x), models[BASE](x)):
                    raise Disagreement(f"{name} without its tuning is not the base")
    for model, mode in modes.items():
        model.train(mode)
        for parameter in trained(model):
            parameter.grad = None
    return "outputs and dX equal the merged base in float64" + (", dropout off" if drops else "")
