"""Writing LoRA in HF peft's names and layouts.

Shape legend: R rank, I in features, O out features, G convolution groups.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from peftlib.errors import CheckpointError
from peftlib.hf.beside_out import write_biases, write_modules, write_tokens
from peftlib.hf.names import (
    FUSED,
    HEADS,
    conv_refusal,
    is_within,
    refusal,
    saved_roots,
    scaled_refusal,
    target_names,
    task_of,
)
from peftlib.methods.base import (
    Site,
    plain_class,
)
from peftlib.methods.full import FullFineTuning
from peftlib.methods.linear import CONVOLUTIONS, is_transposed
from peftlib.methods.lora import LoRA
from peftlib.methods.new_head import NewHead
from peftlib.methods.partial import PartialFineTuning
from peftlib.open_attention import Projection
from peftlib.part import Part
from peftlib.targets import Tree
from peftlib.tuning import Tuning


def write_lora(tuning: Tuning, tree: Tree) -> tuple[dict[str, Any], dict[str, Tensor]]:
    adapted = [p for p in tuning.parts if isinstance(p.method, LoRA)]
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    scales: dict[str, float] = {}
    dropouts = set()
    for part in adapted:
        found, rank = _lora_tensors(part)
        tensors |= {f"base_model.model.{part.name}.{k}": t for k, t in found.items()}
        ranks[part.name], scales[part.name] = rank, part.method.scaling  # type: ignore[attr-defined]
        if not isinstance(part.host, nn.Embedding):
            dropouts.add(part.method.dropout)  # type: ignore[attr-defined]
    uses_dora = {bool(p.method.use_dora) for p in adapted}  # type: ignore[attr-defined]
    if len(uses_dora) > 1:
        raise refusal(adapted[0], "use_dora holds for all its sites or none")
    if len(dropouts) > 1:
        raise refusal(adapted[0], f"lora_dropout is one number, and here are {sorted(dropouts)}")
    rslora = all(p.method.use_rslora for p in adapted)  # type: ignore[attr-defined]
    alphas = {n: _exact(s * (math.sqrt(ranks[n]) if rslora else ranks[n])) for n, s in scales.items()}
    rank, alpha = _most(ranks.values()), _most(alphas.values())
    names = [p.name for p in adapted]
    task = task_of(tuning.model)
    # A classification task makes HF look for its whole head in the directory, trained here or not.
    heads = saved_roots(tree, HEADS) if task not in ("CAUSAL_LM", "SEQ_2_SEQ_LM") else []
    trained = [
        p.name for p in tuning.parts if isinstance(p.method, (FullFineTuning, PartialFineTuning, NewHead))
    ]
    if not any(is_within(n, heads) for n in trained) or any(is_within(n, heads) for n in names):
        heads = []
    modules, saved = write_modules(tuning, tree, "base_model.model.", heads)
    if task not in ("CAUSAL_LM", "SEQ_2_SEQ_LM") and not heads:
        task = None
    for name in names:
        if is_within(name, modules):
            raise CheckpointError(
                f"{name!r} carries LoRA inside a module that is trained whole; HF's modules_to_save excludes that."
            )
    bias, biases = write_biases(tuning, tree, names)
    tokens, rows = write_tokens(tuning, tree)
    tensors |= saved | biases | rows
    values = {
        "peft_type": "LORA",
        "task_type": task,
        "auto_mapping": None if task else _auto_mapping(tuning.model),
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropouts.pop() if dropouts else 0.0,
        "rank_pattern": {f"^{re.escape(n)}": r for n, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{re.escape(n)}": a for n, a in alphas.items() if a != alpha},
        "target_modules": target_names(tree, names, modules),
        "fan_in_fan_out": any(is_transposed(p.host) for p in adapted),
        "use_rslora": rslora,
        "use_dora": uses_dora.pop(),
        "bias": bias,
        "modules_to_save": modules or None,
        "trainable_token_indices": tokens or None,
        "init_lora_weights": True,
    }
    return values, tensors


def _lora_tensors(part: Part) -> tuple[dict[str, Tensor], int]:
    """HF's tensors of one site, and the rank as HF counts it."""
    method, delta, host = part.method, part.delta, part.host
    assert isinstance(method, LoRA)
    if part.parameter is not None:
        raise refusal(
            part, "it acts on a parameter, which HF does through target_parameters in a layout of its own"
        )
    if isinstance(host, Projection) or isinstance(
        part.opened[0] if part.opened else None, nn.MultiheadAttention
    ):
        raise refusal(part, FUSED)
    if not part.name:
        raise refusal(part, "HF adapts the parts of a model, not its root")
    if method.rows:
        raise refusal(part, "there is no field for rows=")
    site = Site(part.name, host)
    why = conv_refusal(site) or scaled_refusal(site)
    if why is not None:
        raise refusal(part, why)
    own: dict[str, Tensor] = dict(delta.tensors())
    a, b = own["a"].detach(), own["b"].detach()
    if isinstance(host, nn.Embedding):
        return {"lora_embedding_A": a.mT, "lora_embedding_B": b}, method.rank
    rank = method.rank
    if isinstance(host, CONVOLUTIONS) and host.groups > 1:
        if method.use_dora:
            raise refusal(part, "HF has no DoRA of convolutions with groups")
        # HF's lora_A reads the channels of all groups; with zeros elsewhere it reads those of its own.
        width, rank = a.shape[1], rank * host.groups
        wide = a.new_zeros(a.shape[0], host.in_channels, *a.shape[2:])
        for g, (into, block) in enumerate(zip(wide.chunk(host.groups), a.chunk(host.groups), strict=True)):
            into[:, g * width : (g + 1) * width] = block
        a = wide
    found = {"lora_A.weight": a, "lora_B.weight": b}
    if method.use_dora:
        m = own["magnitude.m"].detach()
        found["lora_magnitude_vector"] = m.view(1, -1, *[1] * (b.dim() - 2)) if b.dim() > 2 else m
    return found, rank


def _exact(alpha: float) -> float:
    """The integer that is meant, if one is."""
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha


def _most(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def _auto_mapping(model: nn.Module) -> dict[str, str]:
    cls = plain_class(model)
    return {"base_model_class": cls.__name__, "parent_library": cls.__module__}
