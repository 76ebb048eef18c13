"""Learning from an example how a module takes sequences: which argument, along which axis, what grows with it.

Two fake forwards, one of them P positions longer, tell most of it: the outputs that grew, the embedding that saw more
ids, and whether attention, recurrence or convolution ran over more positions (if only the batch grew, the sequence
comes first).

Left out on purpose: what to do with it (``sequence``, ``outputs``, ``virtual``).

Shape legend: B batch, P prompt length, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peftlib.errors import PeftlibError, ProbeError, TargetError
from peftlib.methods.arguments import DECODER, Layout
from peftlib.methods.base import Site
from peftlib.methods.outputs import learn_outputs
from peftlib.methods.sequence import Longer
from peftlib.methods.trial import Example, is_handed_on
from peftlib.methods.virtual import prompts_within

if TYPE_CHECKING:
    from peftlib.observe import Record
    from peftlib.probe import Probe
    from peftlib.targets import Tree


def learn(
    site: Site, table: str | None, length: int, given: Mapping[str, str], tree: Tree, probe: Probe
) -> dict[str, Any]:
    """What a prompt of a length has to know of its site; JSON-able.

    Args:
        site: the module that takes the sequence.
        table: name of the embedding that looks the ids up, or ``None`` to find it.
        length: P.
        given: kinds of arguments that the user named.
        tree: the model.
        probe: its example.

    Raises:
        TargetError: there is no sequence, or its positions cannot be followed to the embedding or the outputs.
        ProbeError: the module does not take P positions more.
    """
    example = Example(site, tree, probe)
    main, table = example.sequence(table)
    if table is not None and tree.modules[table] is site.module:
        raise TargetError(
            "An embedding alone lets no position see another, so a prompt before it would be seen by none. Attach it "
            "to the model around."
        )
    value = example.call[main]
    paired = not main.startswith(DECODER) and any(n.startswith(DECODER) for n in example.signature)
    layout = Layout(main, "embeds" if table is None else "ids", paired=paired, given=dict(given))
    # Only a named kind overrules what nn.MultiheadAttention means by True.
    layout.hides = any(isinstance(m, nn.MultiheadAttention) for m in site.module.modules())
    before = example.run()
    layout.ignored = before.ignored
    example.check_names(layout, before)
    longer, after = example.lengthen(layout, length, before)
    _note_squares(layout, example.call, longer, length)
    facts: dict[str, Any] = {"width": value.shape[-1], "table": table}
    if table is not None:
        module: Any = tree.modules[table]
        facts |= {"width": module.embedding_dim, "placeholder": _ordinary_id(module, tree.model)}
        seen = longer.shape[layout.axis] + prompts_within(site.module, module)
        facts |= _lookups(table, before.record, after.record, seen, main)
    _check_positions(table, length, before.record, after.record, tree)
    short = tuple(
        n - length if i == layout.axis % len(longer.shape) else n for i, n in enumerate(longer.shape)
    )
    learn_outputs(layout, before.record.output, after.record.output, short, longer.shape)
    example.try_labels(layout, length)
    facts["layout"] = vars(layout)
    if table is not None and paired:
        facts["relays"] = _learn_relays(site, table, value, length, tree, probe)
    return facts


def token_table(site: Site, tree: Tree, probe: Probe) -> str | None:
    """Name of the embedding that looks up a module's ids, or ``None`` where there is none."""
    try:
        return Example(site, tree, probe).sequence(None)[1]
    except TargetError:
        return None


def _learn_relays(
    site: Site, table: str, ids: Tensor, length: int, tree: Tree, probe: Probe
) -> dict[str, dict[str, Any]]:
    """The modules inside an encoder-decoder that get its ids, and may be called by themselves: the encoder."""
    found = {}
    for inner in tree.inside(site.name):
        trace = probe.trace(inner)
        others = prompts_within(site.module, tree.modules[table]) - prompts_within(
            inner.module, tree.modules[table]
        )
        if inner.name == site.name or trace is None or isinstance(inner.module, nn.Embedding):
            continue
        if any(is_handed_on(v, ids, others) for v in (*trace.call[0], *trace.call[1].values())):
            try:
                facts = learn(inner, table, length, {}, tree, probe)
            except PeftlibError:
                # Called by itself, it will be refused at the embedding.
                continue
            found[inner.name] = {key: facts[key] for key in ("layout", "calls", "at")}
    return found


def _note_squares(layout: Layout, call: Mapping[str, Any], longer: Longer, length: int) -> None:
    """Which masks are (T, T), where their shape leaves no doubt."""
    axis = layout.axis % len(longer.shape)
    shape = tuple(n - length if i == axis else n for i, n in enumerate(longer.shape))
    for name, value in call.items():
        if name in longer.changed and layout.kind_of(name, value, shape) in ("mask", "padding_mask"):
            if (
                value.dim() >= 2
                and shape[axis] > 1
                and (value.dim() > 2 or value.shape != shape or len(set(shape)) > 1)
            ):
                layout.square[name] = layout.is_square(name, value, "mask", shape)


def _lookups(table: str, before: Record, after: Record, length: int, main: str) -> dict[str, Any]:
    """Which lookups of the embedding are of the sequence, and their ids' axis of positions (from the last)."""
    short, long = before.traces[table].inputs, after.traces[table].inputs
    calls: list[int] = []
    axes: set[int] = set()
    for i, (a, b) in enumerate(zip(short, long, strict=False)):
        if a != b and a is not None and b is not None:
            calls.append(i)
            axes |= {k - len(b) for k in range(len(b)) if len(a) == len(b) and a[k] != b[k] == length}
    if not calls:
        raise TargetError(
            f"The embedding {table!r} does not look up {main!r} as one sequence (it sees ids of shape {short[0]}), so "
            "a prompt's rows have no place there. Look up all ids at once, or target the module that takes their "
            "vectors: attach(model, {'encoder': PromptTuning(...)})."
        )
    if len(axes) != 1:
        raise TargetError(
            f"The embedding {table!r} sees ids of shape {long[calls[0]]} where the model takes {length} positions of "
            f"{main!r}, so the prompt's rows have no certain place there. Look the ids up as they come, or target the "
            "module that takes their vectors: attach(model, {'encoder': PromptTuning(...)})."
        )
    return {"calls": calls, "at": axes.pop()}


def _check_positions(table: str | None, extra: int, before: Record, after: Record, tree: Tree) -> None:
    """Refuse a prompt that a table of positions has no room for: fake ids do not show what is out of range."""
    for name, trace in after.traces.items():
        module = tree.modules.get(name)
        if not isinstance(module, nn.Embedding) or name == table or name not in before.traces:
            continue
        leaf = name.rpartition(".")[2].lower()
        for a, b in zip(before.traces[name].inputs, trace.inputs, strict=False):
            if not a or not b or len(a) != len(b):
                continue
            grown = [n for n, m in zip(a, b, strict=True) if m == n + extra]
            if len(grown) != 1 or not grown[0] <= module.num_embeddings < grown[0] + extra:
                continue
            alone = torch.Size(a).numel() == grown[0] and "type" not in leaf and "segment" not in leaf
            if "pos" in leaf or alone:
                raise ProbeError(
                    f"The prompt is longer than the context: {name!r} has {module.num_embeddings} positions, the "
                    f"example takes {grown[0]} of them, and the prompt {extra} more."
                )


def _ordinary_id(table: nn.Embedding, model: nn.Module) -> int:
    """An id in the middle of the vocabulary that means nothing special to the model."""
    special: set[Any] = {table.padding_idx}
    for key, value in vars(getattr(model, "config", None) or object).items():
        if key.endswith(("token_id", "token_index")):
            special |= set(value) if isinstance(value, (list, tuple)) else {value}
    start = table.num_embeddings // 2
    return next((i for i in range(start, table.num_embeddings) if i not in special), 0)
