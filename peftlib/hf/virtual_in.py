"""Reading prompts and prefixes: the rows, keys and values that HF's encoders made.

Shape legend: P prompt length, D width, L attention sites, H key heads, E key size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftlib.attach import Plan
from peftlib.errors import CheckpointError, ProbeError
from peftlib.hf.beside_in import check_rest, read_modules
from peftlib.hf.directory import ABOUT, Config
from peftlib.hf.names import state_key, without_prefix
from peftlib.methods.base import (
    first_tensor,
)
from peftlib.methods.position_offset import PositionOffset, argument_names, is_table
from peftlib.methods.prefix import PrefixTuning
from peftlib.methods.prompt import PromptTuning
from peftlib.methods.ptuning_v1 import PTuningV1
from peftlib.methods.soft_prompt import SoftPrompt
from peftlib.probe import Probe
from peftlib.targets import Tree

_POSITIONS = ("position_embeddings", "wpe", "embed_positions")
"""Last parts of the names that HF's models give their tables of learned positions."""

_PROMPT_FIELDS = {
    *("num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers"),
    "modules_to_save",
    # How the rows came about; the file holds the rows themselves.
    *("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"),
    *("encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout"),
    *("prefix_projection", "init_weights"),
}

_PROMPT_TASKS = ("CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION", "SEQ_2_SEQ_LM")


def virtual_plan(
    config: Config, tensors: Mapping[str, Tensor], tree: Tree, kind: str, example: Any
) -> tuple[Plan, dict[str, Tensor]]:
    config.refuse_unknown(ABOUT | _PROMPT_FIELDS)
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
    rest = {without_prefix(k, "base_model."): t for k, t in tensors.items() if k != "prompt_embeddings"}
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
        state[state_key("", method, "prompt.rows")] = rows[:length]
    read_modules(config, rest, tree, plan, state)
    check_rest(config, rest, tree)
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
        state[state_key(site.name, method, "key")] = split[:, i, 0]
        state[state_key(site.name, method, "value")] = split[:, i, 1]
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
    if not wanted <= set(argument_names(model)):
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
        raise config.error(
            "peft_type",
            "how the model counts positions shows in what it computes, and it is on the meta device. Give it its "
            "values first, then load the prefix.",
        )
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
    tables = [n for n, m in tree.modules.items() if n.rpartition(".")[2] in _POSITIONS and is_table(m)]
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
