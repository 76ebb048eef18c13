"""Two tables: where each method can go (``inspect``), and what is trained (``summary``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from peftlib.errors import PeftlibError
from peftlib.methods.adapter import Adapter
from peftlib.methods.base import CHILD, Method, plain_class
from peftlib.methods.linear import output_width
from peftlib.methods.lora import LoRA
from peftlib.probe import Probe
from peftlib.registry import tunings
from peftlib.report import Table
from peftlib.targets import Tree


def inspect(model: nn.Module, example: Any = None) -> Table:
    """List the modules of a model with their shapes and the methods each can carry.

    Args:
        model: any module, tunings on it or not.
        example: inputs of one forward; with it (fake tensors: free) the table shows shapes, what is executed, and
            attention sites, and names the output head.

    Returns:
        A table with one row per module: name, type, parameters, calls, input and output shapes, methods.

    Example:
        >>> import torch, peftlib
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> [row["methods"] for row in peftlib.inspect(model, torch.zeros(2, 8)).rows][3]
        'LoRA, Adapter, head'
    """
    if not isinstance(model, nn.Module):
        raise PeftlibError(f"inspect needs an nn.Module; got {type(model).__name__}.")
    tree = Tree(model)
    probe = Probe(model, example) if example is not None else None
    heads = tree.output_heads(probe)
    methods: tuple[Method, ...] = (LoRA(rank=1), Adapter(dim=1))
    rows = []
    for site in tree.sites():
        can = [type(m).__name__ for m in methods if m.refuses(site) is None]
        if probe is not None and site.name in probe.record.attention:
            can += ["PrefixTuning", "PTuningV2"]
        if isinstance(site.module, nn.Embedding):
            can += ["PromptTuning", "PTuningV1", "TokenRows"]
        if site.name in heads:
            can.append("head")
        row: dict[str, Any] = {
            "name": site.name or "(root)",
            "type": plain_class(site.module).__name__,
            "parameters": sum(p.numel() for p in site.module._parameters.values() if p is not None),
        }
        if probe is not None:
            trace = probe.trace(site)
            row |= {
                "calls": trace.calls if trace else 0,
                "input": _shape(trace.input if trace else None),
                "output": _shape(trace.output if trace else None),
            }
        rows.append(row | {"methods": ", ".join(can)})
        rows += [_raw(site.name, name, p) for name, p in _raw_weights(site.module)]
    notes = []
    if probe is not None:
        tree_names = set(probe.record.traces)
        idle = [s.name for s in tree.sites() if s.name not in tree_names and LoRA(rank=1).refuses(s) is None]
        if idle:
            notes.append(
                f"never executed by the example: {', '.join(idle[:8])}{' ...' if len(idle) > 8 else ''}"
            )
        if probe.record.foreign:
            notes.append(f"attention that no prefix can reach: {', '.join(sorted(probe.record.foreign))}")
    several = (
        [f"{n} ({a.calls} calls)" for n, a in probe.record.attention.items() if a.calls > 1] if probe else []
    )
    if several:
        notes.append(f"several attention calls, which would share one prefix: {', '.join(several[:8])}")
    # Names and methods are there to be copied: nothing is clipped.
    title = f"{plain_class(model).__name__}: where methods can go"
    return Table(title=title, rows=rows, notes=notes, width=10_000)


def _raw_weights(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Matrices that a module holds itself without being a layer: fused or stacked weights."""
    if output_width(module) is not None and all(k == CHILD for k in module._modules):
        return []
    return [(n, p) for n, p in module._parameters.items() if p is not None and p.dim() >= 2]


def _raw(owner: str, name: str, parameter: nn.Parameter) -> dict[str, Any]:
    kind = f"parameter {tuple(parameter.shape)}"
    return {
        "name": f"{owner}.{name}" if owner else name,
        "type": kind,
        "parameters": parameter.numel(),
        "methods": "LoRA",
    }


def summary(model: nn.Module) -> Table:
    """Parameters and bytes of the base and of each tuning on it.

    Returns:
        A table with one row for the base and one per tuning (trained parameters, their share of the base, bytes,
        sites, state), a total, and notes on sites that were left out or have not run yet.

    Example:
        >>> import torch, peftlib
        >>> model = torch.nn.Linear(8, 8)
        >>> _ = peftlib.attach(model, peftlib.LoRA(rank=2))
        >>> [row["trained"] for row in peftlib.summary(model).rows]
        [0, 32]
    """
    if not isinstance(model, nn.Module):
        raise PeftlibError(f"summary needs an nn.Module; got {type(model).__name__}.")
    tree = Tree(model)
    base = [p for _, _, _, p in tree.parameters()]
    total = sum(p.numel() for p in base)
    in_base = {id(p): p for p in base}
    have = tunings(model)
    owned = {id(p) for t in have.values() for p in t.parameters()}
    free = sum(p.numel() for p in base if p.requires_grad and id(p) not in owned)
    rows: list[dict[str, Any]] = [
        _row(
            "base",
            plain_class(model).__name__,
            free,
            total,
            _bytes(in_base),
            0,
            "trained" if free else "frozen",
        )
    ]
    notes = []
    for name, tuning in have.items():
        trained = {id(p): p for p in tuning.parameters()}
        state = "merged" if tuning.merged else "enabled" if tuning.enabled else "disabled"
        kinds = ", ".join(dict.fromkeys(type(m).__name__ for m in tuning.sites.values()))
        rows.append(
            _row(name, kinds, tuning.num_parameters, total, _bytes(trained), len(tuning.sites), state)
        )
        if tuning.skipped:
            shown = [f"{n} ({why})" for n, why in list(tuning.skipped.items())[:6]]
            notes.append(f"{name}: left out {', '.join(shown)}{' ...' if len(tuning.skipped) > 6 else ''}")
        if tuning.combination is not None:
            notes.append(f"{name}: {tuning.combination}")
        idle = tuning.idle_sites()
        if idle:
            idle = [n or "the root" for n in idle]
            notes.append(f"{name}: has not run yet at {', '.join(idle[:6])}{' ...' if len(idle) > 6 else ''}")
    everything = in_base | {id(p): p for t in have.values() for p in t.parameters()}
    training = sum(p.numel() for p in everything.values() if p.requires_grad)
    return Table(
        title=f"{plain_class(model).__name__}: {total:,} base parameters",
        rows=rows,
        formats={"bytes": "bytes", "share": "percent"},
        footer={
            "name": "training now",
            "trained": training,
            "share": training / total if total else 0.0,
            "bytes": sum(p.numel() * p.element_size() for p in everything.values() if p.requires_grad),
        },
        notes=notes,
    )


def _row(
    name: str, method: str, trained: int, total: int, size: int, sites: int, state: str
) -> dict[str, Any]:
    share = trained / total if total else 0.0
    return {
        "name": name,
        "method": method,
        "trained": trained,
        "share": share,
        "bytes": size,
        "sites": sites,
        "state": state,
    }


def _bytes(parameters: Mapping[int, Tensor]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters.values())


def _shape(shape: tuple[int, ...] | None) -> str:
    return "-" if shape is None else str(shape)
