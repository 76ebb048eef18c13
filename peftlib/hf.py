"""HF peft's directories, both ways: ``adapter_config.json`` and ``adapter_model.safetensors``.

What a directory says is turned into this library's own methods (:class:`LoRA`, :class:`BitFit`,
:class:`FullFineTuning`, :class:`NewHead`, :class:`TokenRows`, :class:`PromptTuning`, :class:`PTuningV1`,
:class:`PrefixTuning`), so that a loaded tuning is like any other. The weights say which modules are meant, the
configuration has to agree with them. A field that means something and is not understood is refused by its name.

Left out on purpose: pickled weights, anything from the network, transformers itself. Names that HF's models and
configurations use are known here and nowhere else.

Shape legend: R rank, I in features, O out features, G convolution groups, V vocabulary, P prompt length, D width,
L attention sites, H key heads, E key size, T tokens.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from peftlib.attach import Plan, build_parts, check_name, install
from peftlib.container import write_atomically
from peftlib.errors import CheckpointError, PeftlibError, ProbeError
from peftlib.methods.base import (
    CHILD,
    Delta,
    Method,
    Site,
    check_positive_int,
    first_argument,
    first_tensor,
    plain_class,
    without_values,
)
from peftlib.methods.bitfit import BitFit
from peftlib.methods.full import FullFineTuning
from peftlib.methods.linear import CONVOLUTIONS, is_transposed, linear_shape
from peftlib.methods.lora import LoRA
from peftlib.methods.new_head import NewHead
from peftlib.methods.partial import PartialFineTuning
from peftlib.methods.prefix import DeepPrefix, PrefixTuning
from peftlib.methods.prompt import PromptTuning
from peftlib.methods.ptuning_v1 import PTuningV1
from peftlib.methods.soft_prompt import SoftPrompt
from peftlib.methods.token_rows import TokenRows
from peftlib.open_attention import Projection
from peftlib.probe import Probe
from peftlib.targets import Tree
from peftlib.tuning import Part, Tuning, check_state

if TYPE_CHECKING:
    from peftlib.probe import Probe as ProbeType

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_POSITIONS = ("position_embeddings", "wpe", "embed_positions")
"""Last parts of the names that HF's models give their tables of learned positions."""
_HEADS = ("classifier", "score")
"""Endings of the task heads that HF trains and saves with any tuning of a classification task."""
_ABOUT = {"peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"}
_ABOUT |= {"peft_version", "runtime_config"}
_LORA_FIELDS = {
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "bias"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
    *("trainable_token_indices", "init_lora_weights", "fan_in_fan_out"),
    # They say something only together with a field that is refused.
    *("megatron_core", "qalora_group_size", "loftq_config"),
}
_PROMPT_FIELDS = {
    *("num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers"),
    "modules_to_save",
    # How the rows came about; the file holds the rows themselves.
    *("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"),
    *("encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout"),
    *("prefix_projection", "init_weights"),
}
_KEEP_BASE = (True, False, "gaussian", "eva", "orthogonal")
"""Values of ``init_lora_weights`` that leave the base's weights as they are."""
_PROMPT_TASKS = ("CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION", "SEQ_2_SEQ_LM")
_FUSED = (
    "HF adapts the fused projection of nn.MultiheadAttention with one matrix, peftlib q, k and v separately"
)
_LORA_KEY = re.compile(
    r"base_model\.model\.(?P<module>.+)\.(?:(?P<role>lora_[AB])\.weight|(?P<bare>lora_embedding_[AB]|"
    r"lora_magnitude_vector)(?:\.weight)?)"
)
_TOKENS_KEY = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta")


# --- positions after a cached prefix -----------------------------------------------------------------------------


class Moved(Delta):
    """At the table of learned positions: row P + i instead of i."""

    def __init__(self, offset: int):
        super().__init__()
        self.offset = offset

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        positions = first_argument(args, kwargs)
        return base(positions + self.offset)

    def merged(self) -> Any:
        raise PeftlibError("A position offset cannot be merged: it is no change of a weight.")


class Shift(Delta):
    """At the model: real tokens stand at positions P, P + 1, ... instead of 0, 1, ..."""

    def __init__(self, host: nn.Module, offset: int):
        super().__init__()
        self.offset = offset
        self.names = tuple(inspect.signature(plain_class(host).forward).parameters)[1:]

    def extra_repr(self) -> str:
        return f"offset={self.offset}"

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = {**dict(zip(self.names, args, strict=False)), **kwargs}
        positions = call.get("position_ids")
        if positions is None:
            tokens = call.get("input_ids") if call.get("input_ids") is not None else call.get("inputs_embeds")
            if tokens is None:
                raise PeftlibError(
                    "The model was called without input_ids and inputs_embeds, so its positions are not known. Pass "
                    "position_ids."
                )
            cache = call.get("past_key_values")
            past = 0 if cache is None else cache.get_seq_length()
            positions = (torch.arange(tokens.shape[1], device=tokens.device) + past).unsqueeze(0)
        positions = positions + self.offset
        at = self.names.index("position_ids")
        if at < len(args):
            return base(*args[:at], positions, *args[at + 1 :], **kwargs)
        return base(*args, **{**kwargs, "position_ids": positions})

    def merged(self) -> Any:
        raise PeftlibError("A position offset cannot be merged: it is no change of a weight.")


@dataclass(frozen=True)
class PositionOffset(Method):
    """The positions of the real tokens start at ``offset``: ``position_ids + offset``. Nothing is trained.

    HF peft hands a prefix to the model as a filled cache of P positions, so that the first token stands at position
    P; :class:`PrefixTuning` alone leaves it at 0. Together they are HF's prefix tuning:
    ``{"model": PrefixTuning(length=8, hidden=None), "": PositionOffset(8)}``.

    Default site: the root. A model that counts its positions in its own way (RoBERTa does) takes it at its table of
    positions instead.

    Args:
        offset: P.

    Raises:
        PeftlibError: the offset is no positive integer, or the site is no ``nn.Embedding`` and its forward takes no
            ``position_ids``.

    Example:
        >>> import torch, peftlib
        >>> from peftlib.hf import PositionOffset
        >>> class Model(torch.nn.Module):
        ...     def forward(self, input_ids, position_ids=None):
        ...         return position_ids
        >>> model = Model()
        >>> _ = peftlib.attach(model, PositionOffset(4), targets="")
        >>> model(torch.tensor([[7, 8, 9]]))
        tensor([[4, 5, 6]])
    """

    offset: int

    def __post_init__(self) -> None:
        check_positive_int("PositionOffset", offset=self.offset)

    def refuses(self, site: Site) -> str | None:
        if site.parameter is not None or not (
            _is_table(site.module) or "position_ids" in _arguments(site.module)
        ):
            return "its forward takes no position_ids, so the positions cannot be moved from outside"
        return None

    def default_sites(self, tree: Tree, probe: ProbeType | None) -> list[Site]:
        return [tree.site("")]

    def build(self, sites: Sequence[Site]) -> dict[str, Delta]:
        return {
            s.name: Moved(self.offset) if _is_table(s.module) else Shift(s.module, self.offset) for s in sites
        }


def _is_table(module: nn.Module) -> bool:
    return plain_class(module) is nn.Embedding


# --- reading -----------------------------------------------------------------------------------------------------


class Config:
    """The fields of one ``adapter_config.json``; a wrong type is an error that names the field."""

    def __init__(self, values: Mapping[str, Any], path: Path):
        self.values, self.path = values, path
        self.weights = repr(str(path.parent / WEIGHTS))

    def error(self, name: str, why: str) -> CheckpointError:
        return CheckpointError(f"{str(self.path)!r}: {name}={self.values.get(name)!r}: {why}")

    def get(self, name: str, kinds: tuple[type, ...], default: Any = None) -> Any:
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise self.error(name, f"expected {' or '.join(k.__name__ for k in kinds)}.")
        return value

    def count(self, name: str) -> int:
        value = self.get(name, (int,), 0)
        if value < 1:
            raise self.error(name, "expected an integer of at least 1.")
        return int(value)

    def names(self, name: str) -> list[str]:
        value = self.get(name, (list,), [])
        if not all(isinstance(v, str) and v for v in value):
            raise self.error(name, "expected a list of module names.")
        return list(dict.fromkeys(value))

    def pattern(self, name: str) -> dict[str, Any]:
        value = self.get(name, (dict,), {})
        for key, number in value.items():
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                raise self.error(name, f"expected a number at {key!r}.")
            self.search(name, rf"(.*\.)?({key})$", "")
        return value

    def search(self, name: str, pattern: str, text: str, full: bool = False) -> bool:
        try:
            return bool(re.fullmatch(pattern, text) if full else re.match(pattern, text))
        except re.error as error:
            raise self.error(name, f"not a regular expression: {error}.") from error

    def refuse_unknown(self, known: set[str]) -> None:
        """Refuse what has a value and no meaning here; HF writes every field, most of them empty."""
        for name, value in self.values.items():
            if name not in known and value not in (None, False, 0, "", [], {}):
                raise self.error(
                    name,
                    "this changes what the tuning computes in a way that peftlib does not have. It is not read.",
                )


def load(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    name: str | None = None,
    trainable: bool = True,
    example: Any = None,
) -> Tuning:
    """Attach the tuning that HF peft saved in a directory.

    LoRA (linear, embedding and convolution layers, transformers' Conv1D, rank and alpha patterns, rsLoRA, DoRA, biases,
    saved modules, token rows), prompt tuning, p-tuning (the rows that its encoder made) and prefix tuning (with a
    :class:`PositionOffset`). The model computes what HF's computes; prompts are taken off the outputs again, where HF
    leaves them on.

    Args:
        model: the base, as HF's had it: same module names and shapes, without peft's wrapper.
        directory: holds ``adapter_config.json`` and ``adapter_model.safetensors``.
        name: the tuning's name on this model; ``None`` is ``"default"``.
        trainable: whether its parameters require gradients.
        example: for prompts and prefixes, as in :func:`peftlib.attach`; ``None`` takes the model's ``dummy_inputs``.

    Raises:
        CheckpointError: a file is missing, damaged or pickled, does not fit the model, or says what cannot be expressed
            here; the field or key is named. The model is then unchanged.

    Example:
        >>> import tempfile, torch, peftlib.hf
        >>> def make():
        ...     return torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> folder = tempfile.mkdtemp()
        >>> peftlib.hf.save(peftlib.attach(make(), peftlib.LoRA(rank=2), targets="0"), folder)
        >>> peftlib.hf.load(make(), folder)
        Tuning('default', 1 sites, 16 parameters, enabled)
    """
    config, tensors = read(directory)
    name = "default" if name is None else name
    check_name(model, name)
    tree = Tree(model)
    try:
        plan, state = _plan(config, tensors, tree, example)
        with without_values():
            # Sizes first: nothing is allocated for what a configuration says and the weights do not have.
            trial = build_parts(tree, plan, name)
    except PeftlibError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{str(config.path)!r} does not fit this model: {error}") from error
    own = {f"{part.prefix}.{key}": t for part in trial for key, t in part.delta.tensors()}
    check_state(own, state, f"what {str(config.path)!r} says of this model")
    if any(t.is_meta for t in model.parameters()):
        raise CheckpointError(
            "The model is on the meta device, where values cannot be loaded. Materialise it first."
        )
    tuning = install(model, tree, build_parts(tree, plan, name), name=name, freeze=True)
    tuning.load_state_dict(state)
    if not trainable:
        for parameter in tuning.parameters():
            parameter.requires_grad_(False)
    return tuning


def _plan(
    config: Config, tensors: Mapping[str, Tensor], tree: Tree, example: Any
) -> tuple[Plan, dict[str, Tensor]]:
    kind = config.get("peft_type", (str,), "")
    if kind == "LORA":
        return _read_lora(config, tensors, tree)
    if kind in ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"):
        return _read_virtual(config, tensors, tree, kind, example)
    raise config.error(
        "peft_type",
        "peftlib reads LORA, PROMPT_TUNING, P_TUNING and PREFIX_TUNING. Train and save one of those.",
    )


def read(directory: str | os.PathLike[str]) -> tuple[Config, dict[str, Tensor]]:
    """The configuration and the tensors of a directory, on the CPU."""
    folder = Path(directory)
    path, weights = folder / CONFIG, folder / WEIGHTS
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"There is no {CONFIG} in {str(folder)!r}.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{str(path)!r} is not readable JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{str(path)!r} holds no JSON object but {type(values).__name__}.")
    if not weights.exists():
        pickled = sorted(p.name for p in folder.glob("adapter_model.*"))
        raise CheckpointError(
            f"There is no {WEIGHTS} in {str(folder)!r}."
            + (
                f" {pickled[0]} may be a pickle, which can run code when it is opened, so it is not read. Convert it "
                "where you trust it: HF peft's save_pretrained(..., safe_serialization=True)."
                if pickled
                else ""
            )
        )
    try:
        with safetensors.safe_open(weights, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, safetensors.SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{str(weights)!r} is not a readable safetensors file: {error}") from error
    for key, tensor in tensors.items():
        if not tensor.is_floating_point() and not key.endswith("num_batches_tracked"):
            raise CheckpointError(
                f"{str(weights)!r}: {key!r} is {tensor.dtype}; adapters are floating point."
            )
    return Config(values, path), tensors


# --- LoRA in -----------------------------------------------------------------------------------------------------


def _read_lora(config: Config, tensors: Mapping[str, Tensor], tree: Tree) -> tuple[Plan, dict[str, Tensor]]:
    config.refuse_unknown(_ABOUT | _LORA_FIELDS)
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
            rest[_without_prefix(key, "base_model.model.")] = tensor
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
            "target_modules", f"{fused[0].partition('.base_layer.')[0]!r} cannot be read: {_FUSED}."
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
        state |= {_key(name, method, k): t for k, t in _lora_in(config, site, roles, method).items()}
    plan: Plan = list(groups.items())
    for add in (_tokens_in, _modules_in, _biases_in):
        add(config, rest, tree, plan, state)
    _check_rest(config, rest, tree)
    return plan, state


def _check_targets(config: Config, found: Iterable[str], tree: Tree) -> None:
    """The modules that the configuration means are those of the weights, by HF's own rule."""
    targets = config.get("target_modules", (list, str))
    if targets is None:
        return
    if isinstance(targets, str) and targets.lower() == "all-linear":
        targets = _all_linear(config, tree)
    meant = {
        n
        for n, m in tree.modules.items()
        if n and not isinstance(m, Projection) and _means(config, targets, n)
    }
    missing, extra = sorted(meant - set(found)), sorted(set(found) - meant)
    if missing or extra:
        names, what = (missing, "no weights") if missing else (extra, "weights")
        raise CheckpointError(
            f"{str(config.path)!r}: target_modules and the weights disagree: there are {what} for {names[0]!r}"
            f"{f' and {len(names) - 1} more' if len(names) > 1 else ''}. The model is another one, or a file was "
            "changed."
        )


def _means(config: Config, targets: list[str] | str, name: str) -> bool:
    """HF's rule: a string is a regular expression of the whole name, a list holds names or their trailing parts."""
    excluded = config.get("exclude_modules", (list, str), [])
    if isinstance(excluded, str):
        if config.search("exclude_modules", excluded, name, full=True):
            return False
    elif _ends(name, excluded):
        return False
    for saved in config.names("modules_to_save"):
        if config.search("modules_to_save", rf"(^|.*\.){saved}($|\..*)", name):
            return False
    if isinstance(targets, str):
        return config.search("target_modules", targets, name, full=True)
    if name in targets:
        return True
    layers = config.get("layers_to_transform", (list, int))
    if not _ends(name, targets) or layers is None or layers == []:
        return _ends(name, targets)
    patterns = config.get("layers_pattern", (list, str), [])
    patterns = [patterns] if isinstance(patterns, str) and patterns else patterns
    for pattern in [rf"(?:^|.*?\.){p}\.(?P<idx>\d+)\." for p in patterns] or [r".*?\.[^.]*\.(?P<idx>\d+)\."]:
        if config.search("layers_pattern", pattern, name):
            index = int(re.match(pattern, name)["idx"])  # type: ignore[index]
            return index in (layers if isinstance(layers, list) else [layers])
    return False


def _ends(name: str, ends: Iterable[str]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)


def _all_linear(config: Config, tree: Tree) -> list[str]:
    """Every linear layer but the output layer, or, without one, but the head of a sequence classifier."""
    model: Any = tree.model
    declared = getattr(model, "get_output_embeddings", None)
    head = declared() if callable(declared) else None
    if head is None and callable(declared) and config.values.get("task_type") == "SEQ_CLS":
        head = next((h for h in (getattr(model, n, None) for n in reversed(_HEADS)) if h is not None), None)
    return [
        n
        for n, m in tree.modules.items()
        if n and m is not head and (isinstance(m, nn.Linear) or (is_transposed(m) and linear_shape(m)))
    ]


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
        _FUSED
        if isinstance(host, nn.MultiheadAttention)
        else method.refuses(site) or _conv_refusal(site) or _scaled_refusal(site)
    )
    if why is not None:
        raise config.error("target_modules", f"{site.name!r} cannot be read: {why}.")
    return method


def _by_pattern(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    return next((v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", name)), default)


def _conv_refusal(site: Site) -> str | None:
    """What HF's LoRA of a convolution leaves out."""
    host: Any = site.module
    if not isinstance(host, CONVOLUTIONS):
        return None
    if set(host.dilation) != {1}:
        return "HF's LoRA of a convolution has no dilation, and this one has"
    if host.padding_mode != "zeros":
        return f"HF's LoRA of a convolution pads with zeros, and this one with {host.padding_mode!r}"
    return None


def _scaled_refusal(site: Site) -> str | None:
    for name in ("embed_scale", "scalar_embed_scale"):
        if isinstance(site.module, nn.Embedding) and getattr(site.module, name, None) is not None:
            return f"the embedding multiplies by its {name}, and HF its LoRA as well"
    return None


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


# --- what comes beside it ----------------------------------------------------------------------------------------


def _tokens_in(
    config: Config, rest: dict[str, Tensor], tree: Tree, plan: Plan, state: dict[str, Tensor]
) -> None:
    """Single rows of an embedding."""
    given = config.get("trainable_token_indices", (list, dict))
    keys = [k for k in rest if _TOKENS_KEY.fullmatch(k)]
    if given and not keys:
        raise config.error("trainable_token_indices", "there are no weights for them.")
    for key in keys:
        name = _TOKENS_KEY.fullmatch(key)["module"]  # type: ignore[index]
        ids = given
        if isinstance(given, dict):
            ids = next((v for k, v in given.items() if name.endswith(k)), None)
        if not isinstance(ids, list):
            raise config.error("trainable_token_indices", f"names no ids for the weights of {name!r}.")
        method = TokenRows(ids=ids)
        site = tree.site(name)
        why = method.refuses(site) or method.fits(site) or _scaled_refusal(site)
        if why is not None:
            raise config.error("trainable_token_indices", f"{name!r}: {why}.")
        plan.append((method, method.survey(method.resolve(site, tree, None), tree, None)))
        state[_key(site.name, method, "rows")] = rest.pop(key)


def _modules_in(
    config: Config, rest: dict[str, Tensor], tree: Tree, plan: Plan, state: dict[str, Tensor]
) -> None:
    """Modules that are trained and saved whole."""
    roots = _saved_roots(tree, config.names("modules_to_save"))
    full = FullFineTuning()
    copied: set[str] = set()
    surveyed: list[Site] = []
    for root in roots:
        values = {k[len(root) + 1 :]: k for k in rest if k.startswith(f"{root}.")}
        for own, key in values.items():
            # With bias="all" HF writes these beside the module's own.
            if own.startswith(("original_module.", "modules_to_save.")):
                rest.pop(key)
        values = {k: v for k, v in values.items() if v in rest}
        if not values:
            raise config.error("modules_to_save", f"there are no weights for {root!r}.")
        site = tree.site(root)
        if _is_shared(tree, root, copied):
            shape = linear_shape(site.module)
            if shape is None or is_transposed(site.module):
                raise config.error(
                    "modules_to_save",
                    f"{root!r} shares a weight with another module; HF trains a copy of it, which peftlib can do for a "
                    "linear layer only. Untie them first, or save both.",
                )
            # A copy of its own, and the shared weight stays.
            method: Method = NewHead(shape[1], bias=site.module._parameters.get("bias") is not None)
            plan.append((method, [site]))
            copied.add(root)
            for own, key in values.items():
                state[_key(root, method, own)] = rest.pop(key)
            continue
        inner = full.resolve(site, tree, None)
        surveyed += full.survey(inner, tree, None) if inner else []
        for own, key in values.items():
            owner, _, name = f"{root}.{own}".rpartition(".")
            state[_key(tree.aliases.get(owner, owner), full, name)] = rest.pop(key)
    if surveyed:
        plan.append((full, surveyed))


def _saved_roots(tree: Tree, ends: Sequence[str]) -> list[str]:
    """HF's rule for modules_to_save: every module whose name ends so; only the outermost."""
    hits = [
        n
        for n in tree.modules
        if n and n.endswith(tuple(ends)) and not isinstance(tree.modules[n], Projection)
    ]
    roots = [n for n in hits if not any(n.startswith(f"{o}.") for o in hits)]
    # Those with a tied weight first: their copies leave it to the others.
    return sorted(roots, key=lambda n: isinstance(tree.modules[n], nn.Embedding))


def _is_shared(tree: Tree, root: str, copied: Container[str]) -> bool:
    """Whether a module shares a parameter with one outside that has no copy of its own."""
    own = {id(p) for p in tree.modules[root].parameters()}
    return any(
        id(p) in own
        for n, m in tree.modules.items()
        if n != root and not n.startswith(f"{root}.") and n not in copied
        for p in m._parameters.values()
    )


def _biases_in(
    config: Config, rest: dict[str, Tensor], tree: Tree, plan: Plan, state: dict[str, Tensor]
) -> None:
    bias = config.get("bias", (str,), "none")
    if bias not in ("none", "all", "lora_only"):
        raise config.error("bias", "expected 'none', 'all' or 'lora_only'.")
    if bias == "none":
        return
    method, sites = BitFit(), {}
    taken: dict[int, str] = {}
    for key in [k for k in rest if k.endswith(".bias")]:
        owner = key.removesuffix(".bias").removesuffix(".base_layer")
        parameter = tree.modules[owner]._parameters.get("bias") if owner in tree.modules else None
        if parameter is None:
            continue
        first = taken.setdefault(id(parameter), owner)
        if first == owner:
            sites[owner] = replace(tree.site(owner), facts={"names": ["bias"]})
            state[_key(owner, method, "bias")] = rest.pop(key)
        elif torch.equal(rest[key], state[_key(first, method, "bias")]):
            rest.pop(key)
    if sites:
        plan.append((method, list(sites.values())))


def _check_rest(config: Config, rest: Mapping[str, Tensor], tree: Tree) -> None:
    """What is left may repeat the base (HF writes adapted embeddings again), not replace it."""
    for key, value in rest.items():
        owner, _, name = key.replace(".base_layer.", ".").rpartition(".")
        module = tree.modules.get(tree.aliases.get(owner, owner))
        own = None if module is None else module._parameters.get(name, module._buffers.get(name))
        if own is None:
            raise CheckpointError(f"{config.weights} has {key!r}, which is no part of what {CONFIG} says.")
        if own.shape != value.shape or not torch.equal(own.detach().to(value), value):
            raise CheckpointError(
                f"{config.weights} replaces the base's {key!r} of shape {tuple(own.shape)} by other values of shape "
                f"{tuple(value.shape)} (HF does that where a vocabulary was resized). Put them into the base first, "
                "then load."
            )


def _key(site: str, method: Method, tensor: str) -> str:
    return f"{site}.{method.label}.{tensor}" if site else f"{method.label}.{tensor}"


def _without_prefix(key: str, prefix: str) -> str:
    if not key.startswith(prefix):
        raise CheckpointError(
            f"The weights hold {key!r}; every key of such a directory begins with {prefix!r}."
        )
    return key.removeprefix(prefix)


# --- prompts and prefixes in -------------------------------------------------------------------------------------


def _read_virtual(
    config: Config, tensors: Mapping[str, Tensor], tree: Tree, kind: str, example: Any
) -> tuple[Plan, dict[str, Tensor]]:
    config.refuse_unknown(_ABOUT | _PROMPT_FIELDS)
    task = config.get("task_type", (str,), "")
    if task not in _PROMPT_TASKS:
        raise config.error(
            "task_type", f"HF puts prompts before the input for {', '.join(_PROMPT_TASKS)} only."
        )
    length = config.count("num_virtual_tokens")
    parts = config.get("num_transformer_submodules", (int,), 2 if task == "SEQ_2_SEQ_LM" else 1)
    rows = tensors.get("prompt_embeddings")
    if rows is None or rows.dim() != 2:
        raise CheckpointError(
            f"{config.weights} has no matrix 'prompt_embeddings'; it holds: "
            f"{', '.join(sorted(tensors)[:6]) or 'nothing'}."
        )
    rest = {_without_prefix(k, "base_model."): t for k, t in tensors.items() if k != "prompt_embeddings"}
    probe = Probe(tree.model, _one_row(tree.model, example))
    state: dict[str, Tensor] = {}
    if kind == "PREFIX_TUNING":
        plan = _prefix_in(config, rows, tree, probe, length, parts, state, example)
    else:
        if rows.shape[0] != length * parts:
            raise config.error(
                "num_virtual_tokens",
                f"with num_transformer_submodules={parts} there are {length * parts} rows; the weights have "
                f"{rows.shape[0]}.",
            )
        method: SoftPrompt = (
            PromptTuning(length=length, init="normal")
            if kind == "PROMPT_TUNING"
            else PTuningV1(length=length, encoder="none")
        )
        plan = [(method, method.survey([tree.site("")], tree, probe))]
        # For encoder-decoders HF keeps rows for both sides, and gives the encoder's alone to the model.
        state[_key("", method, "prompt.rows")] = rows[:length]
    _modules_in(config, rest, tree, plan, state)
    _check_rest(config, rest, tree)
    return plan, state


def _prefix_in(
    config: Config,
    rows: Tensor,
    tree: Tree,
    probe: Probe,
    length: int,
    parts: int,
    state: dict[str, Tensor],
    example: Any,
) -> Plan:
    if parts != 1:
        raise config.error(
            "num_transformer_submodules",
            "in an encoder-decoder HF's prefix is a cache of the decoder, whose positions (and, in T5, biases of the "
            "prefix itself) follow from it and cannot be given from outside.",
        )
    counted = _counted_at(config, tree, example)
    heads = config.count("num_attention_heads")
    method = PrefixTuning(length=length, hidden=None)
    sites = method.survey(method.default_sites(tree, probe), tree, probe)
    layers = config.count("num_layers")
    if len(sites) != layers:
        raise config.error("num_layers", f"the model has {len(sites)} attentions in the example.")
    width = config.count("token_dim")
    if rows.shape != (length, 2 * layers * width) or width % heads:
        raise config.error(
            "token_dim",
            f"prompt_embeddings has shape {tuple(rows.shape)}; expected ({length}, 2 * {layers} layers * {width}).",
        )
    size = width // heads
    for site in sites:
        own = {site.facts["key_size"], site.facts["value_size"]}
        if site.facts["heads"] != heads or own != {size}:
            raise config.error(
                "num_attention_heads",
                f"{heads} key heads of size {size}, and {site.name!r} has {site.facts['heads']} of "
                f"{site.facts['key_size']}.",
            )
    split = rows.view(length, layers, 2, heads, size)
    for i, site in enumerate(sites):
        state[_key(site.name, method, "key")] = split[:, i, 0]
        state[_key(site.name, method, "value")] = split[:, i, 1]
    return [(method, sites), (PositionOffset(length), [tree.site(counted)])]


def _counted_at(config: Config, tree: Tree, example: Any) -> str:
    """Where positions can be moved as HF's cached prefix moves them: the root, or a table of positions.

    Refuses models in which that prefix does something else.
    """
    model = tree.model
    settings = getattr(model, "config", None)
    if getattr(settings, "sliding_window", None) is not None:
        raise config.error("peft_type", "the model's sliding_window would move over a cached prefix.")
    wanted = {"position_ids", "attention_mask"}
    if not wanted <= set(_arguments(model)):
        raise config.error(
            "peft_type",
            f"HF's cached prefix moves the positions of the real tokens, and {type(model).__name__}.forward takes no "
            "position_ids by which to say so.",
        )
    row = _one_row(model, example)
    ids = row.get("input_ids", row.get("inputs_embeds")) if isinstance(row, Mapping) else row
    if not isinstance(ids, Tensor) or ids.dim() < 2:
        raise ProbeError("A prefix needs an example with input_ids, as a tensor or a dict.")
    if any(t.is_meta for t in model.parameters()):
        return ""
    mask = torch.ones(ids.shape[:2], dtype=torch.long, device=ids.device)
    mask[:, 0] = 0
    call: dict[str, Any] = {
        **(row if isinstance(row, Mapping) else {"input_ids": ids}),
        "attention_mask": mask,
    }
    order = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
    modes = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            plain, told = (first_tensor(model(**c)) for c in (call, {**call, "position_ids": order}))
    finally:
        for module, mode in modes:
            module.training = mode
    if (
        plain is not None
        and told is not None
        and torch.allclose(plain[:, -1], told[:, -1], rtol=1e-3, atol=1e-5)
    ):
        return ""
    tables = [n for n, m in tree.modules.items() if n.rpartition(".")[2] in _POSITIONS and _is_table(m)]
    if len(tables) == 1:
        return tables[0]
    raise config.error(
        "peft_type",
        f"HF's cached prefix moves the positions that {type(model).__name__} counts by itself, and these are not "
        "0, 1, 2, ... for a padded input, so that moving position_ids is not the same.",
    )


def _one_row(model: nn.Module, example: Any) -> Any:
    """One sequence to probe with: what was given, or the first of the model's own ``dummy_inputs``."""
    if example is not None:
        return example
    own = getattr(model, "dummy_inputs", None)
    if not isinstance(own, Mapping) or not own:
        raise ProbeError(
            f"{type(model).__name__} has no dummy_inputs to see one forward with: pass example=, as for peftlib.attach."
        )
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    # One row: several without a padding token are more than some classifiers take.
    return {k: v[:1].to(device) if isinstance(v, Tensor) else v for k, v in own.items()}


def _arguments(module: nn.Module) -> tuple[str, ...]:
    return tuple(inspect.signature(plain_class(module).forward).parameters)


# --- writing -----------------------------------------------------------------------------------------------------


def save(tuning: Tuning, directory: str | os.PathLike[str]) -> None:
    """Write a tuning as HF peft reads it: ``PeftModel.from_pretrained(base, directory)`` computes the same.

    LoRA with whatever stands beside it (biases, whole modules, new heads of the old size, token rows), or one prompt
    or prefix, with a task head if there is one. A prompt encoder or a prefix MLP is written as the values it makes.
    HF puts the tokens after a prefix at positions P, P + 1, ...; so it takes one with a :class:`PositionOffset`.

    Args:
        tuning: attached, in a model whose module names HF will find again.
        directory: made if it is missing; files of the same names are replaced, each at once.

    Raises:
        CheckpointError: the tuning holds what the format cannot say; the reason is named, and nothing is written.
    """
    tuning._check()
    parts = tuning.parts
    kinds = {type(p.method) for p in parts}
    tree = Tree(tuning.model)
    if LoRA in kinds:
        values, tensors = _lora_out(tuning, tree)
    elif any(issubclass(k, (SoftPrompt, DeepPrefix)) for k in kinds):
        values, tensors = _virtual_out(tuning, tree)
    else:
        raise CheckpointError(
            f"The tuning {tuning.name!r} holds {', '.join(sorted(k.__name__ for k in kinds))}, and HF's format needs "
            "LoRA, a prompt or a prefix in it. Use tuning.save(path) for this library's own."
        )
    empty = [k for k, t in tensors.items() if t.is_meta]
    if empty:
        raise CheckpointError(
            f"The tuning {tuning.name!r} has no values yet: {empty[0]!r} is on the meta device."
        )
    values |= {
        "base_model_name_or_path": getattr(tuning.model, "name_or_path", None) or None,
        "inference_mode": True,
        "revision": None,
    }
    config = json.dumps(values, indent=2, sort_keys=True).encode()
    kept = {k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()}
    _write(Path(directory), config, safetensors.torch.save(kept, {"format": "pt"}))


def _write(folder: Path, config: bytes, weights: bytes) -> None:
    """A new folder appears with both files in it; in an old one each file is replaced at once."""
    if folder.exists():
        if not folder.is_dir():
            raise CheckpointError(f"{str(folder)!r} is a file; name a directory.")
        write_atomically(folder / WEIGHTS, weights)
        write_atomically(folder / CONFIG, config)
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise CheckpointError(f"Cannot write to {str(folder.parent)!r}: {error}") from error
    try:
        write_atomically(temporary / WEIGHTS, weights)
        write_atomically(temporary / CONFIG, config)
        temporary.chmod(0o755)
        temporary.replace(folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise CheckpointError(f"Cannot write {str(folder)!r}: {error}") from error
        raise


def _refusal(part: Part, why: str) -> CheckpointError:
    return CheckpointError(
        f"{part.name or 'the root'!r} ({type(part.method).__name__}) has no place in HF's format: {why}. Use "
        "tuning.save(path) for this library's own."
    )


def _lora_out(tuning: Tuning, tree: Tree) -> tuple[dict[str, Any], dict[str, Tensor]]:
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
        raise _refusal(adapted[0], "use_dora holds for all its sites or none")
    if len(dropouts) > 1:
        raise _refusal(adapted[0], f"lora_dropout is one number, and here are {sorted(dropouts)}")
    rslora = all(p.method.use_rslora for p in adapted)  # type: ignore[attr-defined]
    alphas = {n: _exact(s * (math.sqrt(ranks[n]) if rslora else ranks[n])) for n, s in scales.items()}
    rank, alpha = _most(ranks.values()), _most(alphas.values())
    names = [p.name for p in adapted]
    task = _task(tuning.model)
    # A classification task makes HF look for its whole head in the directory, trained here or not.
    heads = _saved_roots(tree, _HEADS) if task not in ("CAUSAL_LM", "SEQ_2_SEQ_LM") else []
    trained = [
        p.name for p in tuning.parts if isinstance(p.method, (FullFineTuning, PartialFineTuning, NewHead))
    ]
    if not any(_within(n, heads) for n in trained) or any(_within(n, heads) for n in names):
        heads = []
    modules, saved = _modules_out(tuning, tree, "base_model.model.", heads)
    if task not in ("CAUSAL_LM", "SEQ_2_SEQ_LM") and not heads:
        task = None
    for name in names:
        if _within(name, modules):
            raise CheckpointError(
                f"{name!r} carries LoRA inside a module that is trained whole; HF's modules_to_save excludes that."
            )
    bias, biases = _biases_out(tuning, tree, names)
    tokens, rows = _tokens_out(tuning, tree)
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
        "target_modules": _target_names(tree, names, modules),
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
        raise _refusal(
            part, "it acts on a parameter, which HF does through target_parameters in a layout of its own"
        )
    if isinstance(host, Projection) or isinstance(
        part.opened[0] if part.opened else None, nn.MultiheadAttention
    ):
        raise _refusal(part, _FUSED)
    if not part.name:
        raise _refusal(part, "HF adapts the parts of a model, not its root")
    if method.rows:
        raise _refusal(part, "there is no field for rows=")
    site = Site(part.name, host)
    why = _conv_refusal(site) or _scaled_refusal(site)
    if why is not None:
        raise _refusal(part, why)
    own: dict[str, Tensor] = dict(delta.tensors())
    a, b = own["a"].detach(), own["b"].detach()
    if isinstance(host, nn.Embedding):
        return {"lora_embedding_A": a.mT, "lora_embedding_B": b}, method.rank
    rank = method.rank
    if isinstance(host, CONVOLUTIONS) and host.groups > 1:
        if method.use_dora:
            raise _refusal(part, "HF has no DoRA of convolutions with groups")
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


def _target_names(tree: Tree, names: Sequence[str], modules: Sequence[str]) -> list[str] | str:
    """Last parts of the names if these mean no other module, else the names, else an expression for exactly them."""
    config = Config({"modules_to_save": list(modules)}, Path(CONFIG))
    every = [n for n, m in tree.modules.items() if n and not isinstance(m, Projection)]
    for targets in (sorted({n.rpartition(".")[2] for n in names}), sorted(names)):
        if {n for n in every if _means(config, targets, n)} == set(names):
            return targets
    return "|".join(re.escape(n) for n in sorted(names))


def _within(name: str, roots: Iterable[str]) -> bool:
    return any(name == r or name.startswith(f"{r}.") for r in roots)


def _modules_out(
    tuning: Tuning, tree: Tree, prefix: str, also: Sequence[str]
) -> tuple[list[str], dict[str, Tensor]]:
    """Whole modules: full or partial fine-tuning, new heads of the old shape, and those that HF wants anyway."""
    tensors: dict[str, Tensor] = {}
    owners = set(also)
    heads: set[str] = set()
    for part in tuning.parts:
        method = part.method
        if isinstance(method, (FullFineTuning, PartialFineTuning)):
            owners.add(part.name)
        elif isinstance(method, NewHead):
            old, new = part.host._parameters, dict(part.delta.tensors())
            if {n: t.shape for n, t in new.items()} != {n: t.shape for n, t in old.items() if t is not None}:
                raise _refusal(
                    part, "its shape is not that of the layer it replaces, and HF loads it into that layer"
                )
            owners.add(part.name)
            heads.add(part.name)
        elif not isinstance(method, (LoRA, BitFit, TokenRows, SoftPrompt, DeepPrefix, PositionOffset)):
            raise _refusal(part, "peft has no such method, or none that computes the same")
    if "" in owners:
        raise CheckpointError(
            "The whole model is trained; that is a checkpoint of the model, not an adapter for HF peft."
        )
    roots = [n for n in tree.modules if n in owners and not any(n.startswith(f"{o}.") for o in owners)]
    for root in roots:
        if root not in heads and _is_shared(tree, root, heads):
            raise CheckpointError(
                f"{root!r} is trained whole and shares a weight with another module; HF would train a copy and leave "
                "the other as it was. Untie them first."
            )
        # What is not trained is written as it is.
        whole = {
            k: t
            for k, t in tree.modules[root].state_dict(keep_vars=True).items()
            if f".{CHILD}." not in f".{k}"
        }
        tensors |= {f"{prefix}{root}.{k}": t for k, t in whole.items()}
    current = tuning.state_dict()
    for part in tuning.parts:
        if part.name in owners and isinstance(part.method, (FullFineTuning, PartialFineTuning, NewHead)):
            for own, _ in part.delta.tensors():
                tensors[f"{prefix}{part.name}.{own}"] = current[f"{part.prefix}.{own}"]
    _check_endings(tree, roots, "modules_to_save")
    return roots, tensors


def _check_endings(tree: Tree, names: Sequence[str], field: str) -> None:
    """HF finds these modules by the ends of names, so an end must mean no other module."""
    if not names:
        return
    others = [n for n in tree.aliases if n and n.endswith(tuple(names)) and tree.aliases[n] not in names]
    others = [n for n in others if not any(n.startswith(f"{m}.") for m in names)]
    if others:
        raise CheckpointError(
            f"HF's {field} names modules by the ends of their names, and {others[0]!r} ends like one of "
            f"{', '.join(map(repr, names))}, so that HF would take it too."
        )


def _biases_out(tuning: Tuning, tree: Tree, adapted: Sequence[str]) -> tuple[str, dict[str, Tensor]]:
    trained: dict[str, Tensor] = {}
    for part in tuning.parts:
        if isinstance(part.method, BitFit):
            for name, value in part.delta.tensors():
                if name != "bias":
                    raise _refusal(part, f"HF saves biases that are called 'bias', not {name!r}")
                trained[part.name] = value
    if not trained:
        return "none", {}
    every = {
        n: m._parameters["bias"] for n, m in tree.modules.items() if m._parameters.get("bias") is not None
    }
    only = set(trained) == {n for n in adapted if n in every}
    written = {n: trained.get(n, every[n]) for n in every if not only or n in trained}
    taken = {id(every[n]): v for n, v in trained.items()}
    return ("lora_only" if only else "all"), {
        f"base_model.model.{n}{'.base_layer' if n in adapted else ''}.bias": taken.get(id(every[n]), v)
        for n, v in written.items()
        if v is not None
    }


def _tokens_out(tuning: Tuning, tree: Tree) -> tuple[dict[str, list[int]], dict[str, Tensor]]:
    ids: dict[str, list[int]] = {}
    tensors: dict[str, Tensor] = {}
    for part in tuning.parts:
        if isinstance(part.method, TokenRows) and part.built:
            why = _scaled_refusal(Site(part.name, part.host))
            if why is not None:
                raise _refusal(part, why)
            ids[part.name] = list(part.method.ids)
            tensors |= {
                f"base_model.model.{part.name}.token_adapter.trainable_tokens_delta": t
                for _, t in part.delta.tensors()
            }
    _check_endings(tree, list(ids), "trainable_token_indices")
    return ids, tensors


def _virtual_out(tuning: Tuning, tree: Tree) -> tuple[dict[str, Any], dict[str, Tensor]]:
    parts = [p for p in tuning.parts if p.built and isinstance(p.method, (SoftPrompt, DeepPrefix))]
    for part in tuning.parts:
        if isinstance(part.method, (BitFit, TokenRows)):
            raise _refusal(part, "beside a prompt or a prefix HF keeps whole modules only")
    if len({id(p.method) for p in parts}) != 1:
        raise CheckpointError("HF's format holds one prompt or one prefix; this tuning has several.")
    task = _task(tuning.model) or "FEATURE_EXTRACTION"
    # HF looks for the head of a classification task in the directory; an untrained one is written as it is.
    ends = {"SEQ_CLS": _HEADS, "TOKEN_CLS": _HEADS, "QUESTION_ANS": ("qa_outputs",)}.get(task)
    modules, tensors = _modules_out(tuning, tree, "base_model.", _saved_roots(tree, ends) if ends else [])
    method = parts[0].method
    with torch.no_grad():
        if isinstance(method, SoftPrompt):
            values, rows = _prompt_out(parts[0], method)
        else:
            assert isinstance(method, DeepPrefix)
            values, rows = _prefix_out(tuning, parts, method, task)
    values |= {
        "task_type": task,
        "num_virtual_tokens": method.length,
        "num_transformer_submodules": 1,
        "modules_to_save": modules or None,
    }
    return values, {"prompt_embeddings": rows, **tensors}


def _prompt_out(part: Part, method: SoftPrompt) -> tuple[dict[str, Any], Tensor]:
    if method.placeholder is not None:
        raise _refusal(part, "HF puts virtual tokens in front, not at placeholders in a template")
    if part.name:
        raise _refusal(part, "HF puts virtual tokens before the model's input, not that of a part")
    rows: Tensor = part.delta.prompt()  # type: ignore[operator]
    if isinstance(method, PTuningV1):
        kind = {
            "peft_type": "P_TUNING",
            "encoder_reparameterization_type": "MLP",
            "encoder_hidden_size": rows.shape[1],
        }
    else:
        kind = {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "RANDOM"}
    return {**kind, "token_dim": rows.shape[1]}, rows


def _prefix_out(
    tuning: Tuning, parts: Sequence[Part], method: DeepPrefix, task: str
) -> tuple[dict[str, Any], Tensor]:
    if task == "SEQ_2_SEQ_LM":
        raise _refusal(parts[0], "HF's prefix of an encoder-decoder is a cache of its decoder alone")
    offsets = [p.method.offset for p in tuning.parts if isinstance(p.method, PositionOffset)]
    if offsets != [method.length]:
        raise _refusal(
            parts[0],
            f"HF's prefix puts the first token at position {method.length}, and this one leaves it at "
            f"{offsets[0] if offsets else 0}. Train it with peftlib.hf.PositionOffset({method.length}) at the root",
        )
    layers = _layers(tuning.model)
    if layers is not None and layers != len(parts):
        raise _refusal(parts[0], f"HF's prefix stands in all {layers} layers, and this one in {len(parts)}")
    pairs = [p.delta.key_value() for p in parts]  # type: ignore[operator]
    if len({t.shape for pair in pairs for t in pair}) != 1:
        raise _refusal(parts[0], "HF's keys and values have one size in all layers")
    heads, size = pairs[0][0].shape[1:]
    values = {
        "peft_type": "PREFIX_TUNING",
        "prefix_projection": False,
        "num_layers": len(parts),
        "num_attention_heads": heads,
        "token_dim": heads * size,
    }
    return values, torch.cat([t.flatten(1) for pair in pairs for t in pair], 1)


def _layers(model: nn.Module) -> int | None:
    config: Any = getattr(model, "config", None)
    if callable(getattr(config, "get_text_config", None)):
        config = config.get_text_config()
    sizes: Iterator[Any] = (getattr(config, n, None) for n in ("num_hidden_layers", "num_layers", "n_layer"))
    return next((s for s in sizes if isinstance(s, int)), None)


def _task(model: nn.Module) -> str | None:
    """HF's task of a model, by the name that its class has there."""
    name = plain_class(model).__name__
    encoder_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    ends = {
        "ForSequenceClassification": "SEQ_CLS",
        "ForTokenClassification": "TOKEN_CLS",
        "ForQuestionAnswering": "QUESTION_ANS",
        "ForCausalLM": "CAUSAL_LM",
        "LMHeadModel": "CAUSAL_LM",
    }
    if encoder_decoder and name.endswith("ForConditionalGeneration"):
        return "SEQ_2_SEQ_LM"
    return next((task for end, task in ends.items() if name.endswith(end)), None)


def _auto_mapping(model: nn.Module) -> dict[str, str]:
    cls = plain_class(model)
    return {"base_model_class": cls.__name__, "parent_library": cls.__module__}
