"""Reading LoRA: a configuration and its weights as a plan of :class:`LoRA` with tensors.

The weights say which modules are meant; the configuration has to agree with them.

Shape legend: R rank, I in features, O out features, G convolution groups.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from peftlib.attach import Plan
from peftlib.errors import CheckpointError
from peftlib.hf.beside_in import check_rest, read_biases, read_modules, read_tokens
from peftlib.hf.directory import ABOUT, Config
from peftlib.hf.names import (
    FUSED,
    all_linear,
    conv_refusal,
    is_meant,
    scaled_refusal,
    state_key,
    without_prefix,
)
from peftlib.methods.base import (
    Site,
)
from peftlib.methods.linear import CONVOLUTIONS
from peftlib.methods.lora import LoRA
from peftlib.open_attention import Projection
from peftlib.targets import Tree

_LORA_FIELDS = {
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "bias"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
    *("trainable_token_indices", "init_lora_weights", "fan_in_fan_out"),
    # They say something only together with a field that is refused.
    *("megatron_core", "qalora_group_size", "loftq_config"),
}

_KEEP_BASE = (True, False, "gaussian", "eva", "orthogonal")
"""Values of ``init_lora_weights`` that leave the base's weights as they are."""

_LORA_KEY = re.compile(
    r"base_model\.model\.(?P<module>.+)\.(?:(?P<role>lora_[AB])\.weight|(?P<bare>lora_embedding_[AB]|"
    r"lora_magnitude_vector)(?:\.weight)?)"
)


def lora_plan(config: Config, tensors: Mapping[str, Tensor], tree: Tree) -> tuple[Plan, dict[str, Tensor]]:
    config.refuse_unknown(ABOUT | _LORA_FIELDS)
    init = config.values.get("init_lora_weights", True)
    if init not in _KEEP_BASE:
        raise config.error(
            "init_lora_weights",
            "such a start changes the base's weights (or what is trained), which is not in the directory. Save it with "
            "path_initial_model_for_weight_conversion, or start with True.",
        )
    found: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        hit = _LORA_KEY.fullmatch(key)
        if hit is None:
            rest[without_prefix(key, "base_model.model.")] = tensor
        else:
            found.setdefault(hit["module"], {})[hit["role"] or hit["bare"]] = tensor
    unknown = [n for n in found if n not in tree.modules]
    fused = [
        n
        for n in unknown
        if isinstance(tree.modules.get(n.partition(".base_layer.")[0]), nn.MultiheadAttention)
    ]
    if fused:
        raise config.error(
            "target_modules", f"{fused[0].partition('.base_layer.')[0]!r} cannot be read: {FUSED}."
        )
    if unknown:
        raise CheckpointError(
            f"{config.weights} has LoRA of {unknown[0]!r}, which {type(tree.model).__name__} does not have "
            f"({len(unknown)} such). Load it into the model that it was made for."
        )
    _check_targets(config, found, tree)
    groups: dict[LoRA, list[Site]] = {}
    state: dict[str, Tensor] = {}
    for name in (n for n in tree.modules if n in found):
        site, roles = tree.site(name), found[name]
        method = _lora_method(config, site, roles)
        groups.setdefault(method, []).append(site)
        state |= {state_key(name, method, k): t for k, t in _lora_in(config, site, roles, method).items()}
    plan: Plan = list(groups.items())
    for add in (read_tokens, read_modules, read_biases):
        add(config, rest, tree, plan, state)
    check_rest(config, rest, tree)
    return plan, state


def _check_targets(config: Config, found: Iterable[str], tree: Tree) -> None:
    """The modules that the configuration means are those of the weights, by HF's own rule."""
    targets = config.get("target_modules", (list, str))
    if targets is None:
        return
    if isinstance(targets, str) and targets.lower() == "all-linear":
        targets = all_linear(config, tree)
    meant = {
        n
        for n, m in tree.modules.items()
        if n and not isinstance(m, Projection) and is_meant(config, targets, n)
    }
    missing, extra = sorted(meant - set(found)), sorted(set(found) - meant)
    if missing or extra:
        names, what = (missing, "no weights") if missing else (extra, "weights")
        raise CheckpointError(
            f"{str(config.path)!r}: target_modules and the weights disagree: there are {what} for {names[0]!r}"
            f"{f' and {len(names) - 1} more' if len(names) > 1 else ''}. The model is another one, or a file was "
            "changed."
        )


def _lora_method(config: Config, site: Site, roles: Mapping[str, Tensor]) -> LoRA:
    host: Any = site.module
    rank = _by_pattern(config.pattern("rank_pattern"), site.name, config.values.get("r", 8))
    alpha = _by_pattern(config.pattern("alpha_pattern"), site.name, config.values.get("lora_alpha", 8))
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise config.error("r", f"the rank of {site.name!r} must be an integer of at least 1.")
    if (
        isinstance(alpha, bool)
        or not isinstance(alpha, (int, float))
        or not math.isfinite(alpha)
        or not alpha
    ):
        raise config.error("lora_alpha", f"the alpha of {site.name!r} must be a finite number other than 0.")
    method = LoRA(
        rank=rank,
        alpha=alpha,
        dropout=config.get("lora_dropout", (float, int), 0.0),
        use_rslora=config.get("use_rslora", (bool,), False),
        use_dora=config.get("use_dora", (bool,), False),
    )
    groups = getattr(host, "groups", 1)
    if isinstance(host, CONVOLUTIONS) and groups > 1:
        if rank % groups:
            raise config.error("r", f"{site.name!r} has {groups} groups, of which {rank} is no multiple.")
        # HF counts the ranks of all groups, this library those of one.
        own = rank // groups
        method = replace(method, rank=own, alpha=method.scaling * own, use_rslora=False)
    if isinstance(host, nn.Embedding):
        # HF drops nothing there.
        method = replace(method, dropout=0.0)
    own_dtype = getattr(getattr(host, "weight", None), "dtype", None)
    given = next(iter(roles.values())).dtype
    if own_dtype in (torch.float16, torch.bfloat16) and torch.promote_types(own_dtype, given) != own_dtype:
        method = replace(method, dtype=given)
    why = (
        FUSED
        if isinstance(host, nn.MultiheadAttention)
        else method.refuses(site) or conv_refusal(site) or scaled_refusal(site)
    )
    if why is not None:
        raise config.error("target_modules", f"{site.name!r} cannot be read: {why}.")
    return method


def _by_pattern(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    return next((v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", name)), default)


def _lora_in(config: Config, site: Site, roles: Mapping[str, Tensor], method: LoRA) -> dict[str, Tensor]:
    """HF's tensors of one module as ours."""
    host: Any = site.module
    table = isinstance(host, nn.Embedding)
    kind = "lora_embedding_" if table else "lora_"
    wanted = {f"{kind}A", f"{kind}B", *(["lora_magnitude_vector"] if method.use_dora else [])}
    if set(roles) != wanted:
        raise CheckpointError(
            f"{config.weights}: {site.name!r} has {', '.join(sorted(roles))}; expected "
            f"{', '.join(sorted(wanted))}."
        )
    a, b = roles[f"{kind}A"], roles[f"{kind}B"]
    if table:
        a = a.mT
    elif isinstance(host, CONVOLUTIONS) and host.groups > 1:
        a = _own_channels(config, site, a)
    found = {"a": a, "b": b}
    if method.use_dora:
        found["magnitude.m"] = roles["lora_magnitude_vector"].flatten()
    return found


def _own_channels(config: Config, site: Site, a: Tensor) -> Tensor:
    """Of HF's A (G R, I, *k), which reads every group's channels, the part that reads its own group's."""
    host: Any = site.module
    width = host.in_channels // host.groups
    if a.dim() < 2 or a.shape[0] % host.groups or a.shape[1] != host.in_channels:
        raise CheckpointError(
            f"lora_A of {site.name!r} has shape {tuple(a.shape)}, which does not fit the layer."
        )
    parts = a.chunk(host.groups)
    own = torch.cat([part[:, g * width : (g + 1) * width] for g, part in enumerate(parts)])
    if int(own.count_nonzero()) != int(a.count_nonzero()):
        raise config.error(
            "target_modules",
            f"{site.name!r} is a convolution of {host.groups} groups, and HF's lora_A reads the channels of all of "
            "them for each, which no update of its weight can.",
        )
    return own
