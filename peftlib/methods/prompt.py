"""Prompt tuning: trained vectors in front of a model's input, where placeholder positions make room for them.

The module that takes the sequence (the root, or a named part) is made to see P more positions: its ids, masks,
positions, types and labels grow, its outputs shrink again. The embedding writes the trained rows over the
placeholders. A module of hidden states gets the rows directly. So no length changes inside the model, and
absolute positions, rotary, masks and losses stay consistent in models nobody here wrote.

Shape legend: P prompt length, D embedding width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peftlib.errors import PeftlibError, ProbeError, TargetError
from peftlib.methods.base import Delta, Method, Site, check_positive_int, first_argument, placement
from peftlib.methods.sequence import (
    KINDS,
    Layout,
    argument_names,
    back,
    by_name,
    lengthen,
    sequence_axis,
    shorten,
)

if TYPE_CHECKING:
    from peftlib.probe import Probe
    from peftlib.targets import Tree

STD = 0.02
"""Spread of randomly started rows where there is no vocabulary to take it from."""


class Table(nn.Module):
    """The trained rows themselves, (P, D)."""

    def __init__(self, length: int, width: int, **where: Any):
        super().__init__()
        self.rows = nn.Parameter(torch.empty(length, width, **where))

    def forward(self) -> Tensor:
        return self.rows


class Prepend(Delta):
    """At the module that takes the sequence: P more positions in front, taken off the outputs again."""

    def __init__(self, prompt: nn.Module, length: int, host: nn.Module, facts: Mapping[str, Any]):
        super().__init__()
        self.prompt, self.length = prompt, length
        self.layout = Layout(**facts["layout"])
        self.names = argument_names(_plain_forward(host))
        self.placeholder, self.calls = facts.get("placeholder", 0), tuple(facts.get("calls", ()))
        self.pending: int | None = None
        """Length of the lengthened ids that the embedding will see; 0: none this time; ``None``: not in a forward."""
        self.seen = self.written = 0

    def extra_repr(self) -> str:
        return f"length={self.length}, at {self.layout.main!r}"

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = by_name(self.names, args, kwargs)
        changed, length, batch = lengthen(
            self.layout, call, self.length, placeholder=self.placeholder, rows=self._rows
        )
        args, kwargs = back(self.names, args, kwargs, changed)
        self.pending = length if self.layout.kind == "ids" and self.layout.main in changed else 0
        self.seen = self.written = 0
        try:
            output = base(*args, **kwargs)
            missed = self.pending and not self.written
        finally:
            self.pending = None
        if missed:
            raise PeftlibError(
                "The model ran without looking up its ids in the embedding that holds the prompt, so the prompt would "
                "silently be lost. Attach with an example that shows this way of calling it."
            )
        return shorten(self.layout, output, self.length, length, batch) if length else output

    def _rows(self, embeds: Tensor) -> Tensor:
        rows_PD = self.prompt().to(embeds.dtype)
        if self.layout.kind == "embeds" and self.layout.axis == 0:
            return rows_PD.unsqueeze(1).expand(-1, embeds.shape[1], -1)
        return rows_PD.expand(*embeds.shape[:-2], -1, -1)

    def merged(self) -> Any:
        raise PeftlibError(
            "A prompt cannot be merged: it adds positions, not a change of a weight. Keep the tuning attached."
        )

    def fold(self) -> bool:
        return _fold(self)


class Overwrite(Delta):
    """At the embedding: the trained rows in the placeholder positions of the lengthened ids."""

    def __init__(self, anchor: Prepend):
        super().__init__()
        self._anchor = (anchor,)

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        anchor = self._anchor[0]
        ids = first_argument(args, kwargs)
        out = base(*args, **kwargs)
        if anchor.pending is None:
            raise PeftlibError(
                "The embedding ran while the module that holds the prompt was not running (an encoder called directly, or "
                "recomputed in a checkpoint), so the prompt would silently be lost. Call the model that the prompt is "
                "attached to, or put the prompt on the part that is called: attach(model, {'encoder': PromptTuning(...)})."
            )
        index, anchor.seen = anchor.seen, anchor.seen + 1
        if not anchor.pending or index not in anchor.calls or ids.shape[-1] != anchor.pending:
            return out
        anchor.written += 1
        rows_PD = anchor.prompt().to(out.dtype)
        return torch.cat([rows_PD.expand(*out.shape[:-2], -1, -1), out[..., anchor.length :, :]], -2)

    def merged(self) -> Any:
        return []  # the prompt itself refuses


class Placeholder(Delta):
    """At the embedding: the k-th occurrence of the placeholder id in a sequence takes the k-th trained row."""

    def __init__(self, prompt: nn.Module, length: int, placeholder_id: int):
        super().__init__()
        self.prompt, self.length, self.placeholder_id = prompt, length, placeholder_id

    def extra_repr(self) -> str:
        return f"length={self.length}, placeholder_id={self.placeholder_id}"

    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        ids = first_argument(args, kwargs)
        there = ids == self.placeholder_id
        if not torch.compiler.is_compiling() and not ids.is_meta:
            counts = there.sum(-1)
            wrong = (counts != 0) & (counts != self.length)
            if wrong.any():
                raise PeftlibError(
                    f"A sequence holds the placeholder id {self.placeholder_id} {int(counts[wrong][0])} times; the prompt has "
                    f"{self.length} rows. Write it exactly {self.length} times into each template (or not at all)."
                )
        # The placeholder may be an id that the table does not have.
        safe = ids.masked_fill(there, 0)
        args = tuple(safe if a is ids else a for a in args)
        kwargs = {k: safe if v is ids else v for k, v in kwargs.items()}
        out = base(*args, **kwargs)
        rows_PD = self.prompt().to(out.dtype)
        which = (there.cumsum(-1) - 1).clamp(0, self.length - 1)
        return torch.where(there.unsqueeze(-1), rows_PD[which], out)

    def merged(self) -> Any:
        raise PeftlibError(
            "A prompt cannot be merged: it adds positions, not a change of a weight. Keep the tuning attached."
        )

    def fold(self) -> bool:
        return _fold(self)


def _fold(delta: Any) -> bool:
    if isinstance(delta.prompt, Table):
        return False
    with torch.no_grad():
        rows = delta.prompt().detach().clone()
    trains = next(delta.prompt.parameters()).requires_grad
    delta.prompt = Table(*rows.shape, dtype=rows.dtype, device=rows.device)
    delta.prompt.rows = nn.Parameter(rows, requires_grad=trains)
    return True


@dataclass(frozen=True, kw_only=True)
class SoftPrompt(Method):
    """What prompt tuning and P-Tuning v1 share: where the rows go; subclasses say what makes them."""

    length: int
    sequence_args: Mapping[str, str] | None = None

    @property
    def needs_probe(self) -> bool:
        return True

    @property
    def placeholder(self) -> int | None:
        """Id in the user's own templates that marks the prompt's positions, or ``None`` to prepend them."""
        return None

    def __post_init__(self) -> None:
        owner = type(self).__name__
        check_positive_int(owner, length=self.length)
        for name, kind in (self.sequence_args or {}).items():
            if kind not in KINDS:
                raise PeftlibError(
                    f"{owner}(sequence_args={{{name!r}: {kind!r}}}): the kind must be one of {', '.join(map(repr, KINDS))}."
                )

    def prompt(self, width: int, table: nn.Module | None, **where: Any) -> nn.Module:
        """The module that makes the (P, D) rows; ``table`` is the embedding they go into, if there is one."""
        raise NotImplementedError

    def refuses(self, site: Site) -> str | None:
        if site.parameter is not None:
            return "a prompt acts on a module's input, not on a parameter"
        if type(site.module).forward is nn.Module.forward:
            return "it has no forward (a container), so nothing can be put before its input"
        return None

    def default_sites(self, tree: Tree, probe: Probe | None) -> list[Site]:
        if self.placeholder is not None:
            return [tree.token_embedding(probe)]
        return [tree.site("")]

    def survey(self, sites: Sequence[Site], tree: Tree, probe: Probe | None) -> list[Site]:
        found = []
        for site in sites:
            if self.placeholder is not None:
                if not isinstance(site.module, nn.Embedding):
                    raise TargetError(
                        f"{type(self).__name__}(placeholder_id=...) acts on an nn.Embedding; {site.name!r} is "
                        f"{type(site.module).__name__}."
                    )
                found.append(replace(site, facts={"mode": "placeholder"}))
                continue
            assert probe is not None
            if isinstance(site.module, nn.Embedding):
                anchor, table = tree.site(""), site.name
            else:
                anchor, table = site, None
            facts = self._layout(anchor, table, tree, probe)
            found.append(replace(anchor, facts=facts))
        return found

    def _layout(self, site: Site, table: str | None, tree: Tree, probe: Probe) -> dict[str, Any]:
        """How the site takes its sequence, from the example's call of it and one lengthened call."""
        trace = probe.trace(site)
        assert trace is not None
        names = argument_names(_plain_forward(site.module))
        call = by_name(names, *trace.call)
        if table is None:
            table = self._table_of(site, tree, probe, call)
        main, value = self._main(site, call, table, probe)
        axis = sequence_axis(site.module, value)
        if value.is_floating_point() and value.dim() != 3:
            raise TargetError(
                f"A prompt goes before a sequence of vectors (B, T, D); {site.name or 'the root'!r} takes {main!r} of shape "
                f"{tuple(value.shape)}. Target the module that takes the sequence."
            )
        kind = "embeds" if value.is_floating_point() else "ids"
        signature = set(names) | set(call)
        layout = Layout(main, kind, axis, not any(n.startswith(("decoder_", "tgt")) for n in signature))
        layout.given = dict(self.sequence_args or {})
        missing = set(layout.given) - signature
        if missing:
            raise PeftlibError(
                f"sequence_args names {', '.join(map(repr, sorted(missing)))}, which {type(site.module).__name__}.forward "
                f"does not have; it takes {', '.join(map(repr, names))}."
            )
        facts: dict[str, Any] = {"mode": kind, "width": value.shape[-1]}
        if kind == "ids":
            assert table is not None
            module: Any = tree.modules[table]
            facts |= {
                "table": table,
                "width": module.embedding_dim,
                "placeholder": _ordinary_id(module, tree.model),
            }
        self._watch_growth(site, layout, names, trace, table, probe, facts)
        facts["layout"] = vars(layout)
        return facts

    def _watch_growth(
        self,
        site: Site,
        layout: Layout,
        names: list[str],
        trace: Any,
        table: str | None,
        probe: Probe,
        facts: dict[str, Any],
    ) -> None:
        from peftlib.probe import named_tensors

        args, kwargs = trace.call
        changed, *_ = lengthen(layout, by_name(names, args, kwargs), self.length)
        before = probe.run(args, kwargs, site.name)
        try:
            after = probe.run(*back(names, args, kwargs, changed), site.name)
        except Exception as error:
            lines = str(error).strip().splitlines()
            raise ProbeError(
                f"{type(site.module).__name__} does not take {self.length} more positions than the example has: "
                f"{type(error).__name__}: {lines[0] if lines else ''} The prompt may be longer than the context; if an "
                "argument was mistaken, name its kind with sequence_args={...}."
            ) from error
        old = dict(named_tensors(before.output))
        for path, tensor in named_tensors(after.output):
            if path in old and old[path].dim() == tensor.dim():
                sizes = zip(old[path].shape, tensor.shape, strict=True)
                layout.outputs[path] = [i for i, (a, b) in enumerate(sizes) if b == a + self.length]
                layout.ranks[path] = tensor.dim()
        if table is not None and layout.kind == "ids":
            inner = table[len(site.name) + 1 :] if site.name and table.startswith(f"{site.name}.") else table
            short, long = (r.traces[k].inputs for r, k in ((before, table), (after, table)) if k in r.traces)
            facts["calls"] = [i for i, (a, b) in enumerate(zip(short, long, strict=False)) if a != b]
            if not facts["calls"]:
                raise TargetError(f"The embedding {inner!r} does not see the argument {layout.main!r}.")

    def _table_of(self, site: Site, tree: Tree, probe: Probe, call: Mapping[str, Any]) -> str | None:
        """The embedding that looks up the ids among the arguments, if the call has ids."""
        shapes = {
            tuple(v.shape) for v in call.values() if isinstance(v, Tensor) and not v.is_floating_point()
        }
        inside = [s.name for s in tree.inside(site.name)] if site.name else list(tree.modules)
        declared = getattr(site.module, "get_input_embeddings", None)
        if callable(declared):
            try:
                module = declared()
            except (NotImplementedError, AttributeError):
                module = None
            name = tree.name_of(module) if isinstance(module, nn.Module) else None
            if name is not None and isinstance(module, nn.Embedding) and name in probe.record.traces:
                return name
        tables = [
            n
            for n in (*inside, *tree.modules)
            if isinstance(tree.modules[n], nn.Embedding)
            and n in probe.record.traces
            and probe.record.traces[n].input in shapes
        ]
        return max(dict.fromkeys(tables), key=lambda n: tree.modules[n].num_embeddings, default=None)  # type: ignore[arg-type,return-value]

    @staticmethod
    def _main(site: Site, call: Mapping[str, Any], table: str | None, probe: Probe) -> tuple[str, Tensor]:
        tensors = {n: v for n, v in call.items() if isinstance(v, Tensor)}
        if table is not None:
            looked_up = probe.record.traces[table].input
            for name, value in tensors.items():
                known = ("mask", "type", "label", "pos", "target", "segment", "decoder_")
                if (
                    not value.is_floating_point()
                    and tuple(value.shape) == looked_up
                    and not any(k in name for k in known)
                ):
                    return name, value
        for name, value in tensors.items():
            if value.is_floating_point() and (site.name or value.dim() == 3):
                return name, value
        raise TargetError(
            f"{type(site.module).__name__} shows no sequence that a prompt could go before: no ids that an nn.Embedding looks "
            "up, no (B, T, D) tensor. Target the module that takes the sequence: attach(model, {'encoder': PromptTuning(...)})."
        )

    def build(self, sites: Sequence[Site]) -> dict[str, Delta]:
        found: dict[str, Delta] = {}
        for site in sites:
            facts = site.facts
            if facts["mode"] == "placeholder":
                host: Any = site.module
                prompt = self.prompt(host.embedding_dim, host, **placement(site, self.dtype))
                assert self.placeholder is not None
                found[site.name] = Placeholder(prompt, self.length, self.placeholder)
                continue
            table = (
                site.model.get_submodule(facts["table"])
                if facts.get("table") and site.model is not None
                else None
            )
            where = placement(site if table is None else replace(site, module=table), self.dtype)
            anchor = Prepend(self.prompt(facts["width"], table, **where), self.length, site.module, facts)
            found[site.name] = anchor
            if table is not None:
                if facts["table"] in found:
                    raise TargetError(
                        f"Two prompts would write into the embedding {facts['table']!r}; give them tunings of their own."
                    )
                found[facts["table"]] = Overwrite(anchor)
        return found

    def config(self) -> dict[str, Any]:
        return {
            "length": self.length,
            **{k: v for k, v in super().config().items() if k not in ("init", "sequence_args")},
        }


@dataclass(frozen=True, kw_only=True)
class PromptTuning(SoftPrompt):
    r"""Prompt tuning: P trained vectors before the embedded input, ``[p_1 ... p_P; e(x_1) ... e(x_T)]``.

    P D parameters. The model sees P placeholder positions more in every sequence-aligned input (ids, masks, positions,
    token types, labels with -100) and its outputs come back without them; key/value caches keep them. In an
    encoder-decoder the prompt goes before the encoder's input. Targeting a module of hidden states,
    ``{"encoder": PromptTuning(length=10)}``, prepends at its input and strips at its output.

    Args:
        length: P.
        init: ``"vocab"`` (rows of random vocabulary entries), ``"normal"`` (the vocabulary's spread, or 0.02), or
            P token ids. Modules of hidden states have no vocabulary and take ``"normal"``.
        sequence_args: kinds of arguments that names do not tell: ``{"my_mask": "mask"}``; one of ``"ids"``,
            ``"embeds"``, ``"mask"``, ``"padding_mask"``, ``"positions"``, ``"types"``, ``"labels"``, ``"cache"``,
            ``"skip"``.

    Needs ``example=``.

    Raises:
        PeftlibError: a field out of range, token ids of another number, an unknown sequence-shaped argument, a model that
            does not take P more positions, or an embedding that runs outside the model's forward.

    Default sites: the root.

    Example:
        >>> import torch, peftlib
        >>> model = torch.nn.Sequential(torch.nn.Embedding(50, 8), torch.nn.Linear(8, 50))
        >>> ids = torch.randint(0, 50, (2, 5))
        >>> peftlib.attach(model, peftlib.PromptTuning(length=4), example=ids).num_parameters
        32
        >>> model(ids).shape
        torch.Size([2, 5, 50])

    Source: Lester et al. 2021, arXiv:2104.08691, section 2 (2.1 for the initializations).
    """

    init: Any = "vocab"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.init, str):
            if self.init not in ("vocab", "normal"):
                raise PeftlibError(
                    f"PromptTuning(init={self.init!r}): init must be 'vocab', 'normal' or a list of token ids."
                )
        elif len(_ids(self.init)) != self.length:
            raise PeftlibError(
                f"PromptTuning(length={self.length}, init=...) was given {len(_ids(self.init))} token ids; give as many as the "
                "prompt is long."
            )

    def prompt(self, width: int, table: nn.Module | None, **where: Any) -> nn.Module:
        made = Table(self.length, width, **where)
        start_rows(made.rows, self.init, table)
        return made


@torch.no_grad()
def start_rows(rows_PD: Tensor, init: Any, table: nn.Module | None) -> None:
    """Fill the rows: vocabulary entries, noise of the vocabulary's spread, or the entries of given ids."""
    if rows_PD.is_meta:
        return
    weight: Any = getattr(table, "weight", None)
    weight = (
        weight if isinstance(weight, Tensor) and weight.is_floating_point() and not weight.is_meta else None
    )
    if not isinstance(init, str):
        ids = torch.as_tensor(_ids(init))
        if weight is None:
            raise PeftlibError(
                "init= gives token ids, and the prompt's place has no vocabulary. Use init='normal'."
            )
        if int(ids.max()) >= weight.shape[0] or int(ids.min()) < 0:
            raise PeftlibError(
                f"init= names the token id {int(ids.max())}; the vocabulary has {weight.shape[0]}."
            )
        rows_PD.copy_(weight[ids.to(weight.device)])
    elif init == "vocab" and weight is not None:
        rows_PD.copy_(weight[torch.randint(weight.shape[0], (rows_PD.shape[0],)).to(weight.device)])
    else:
        nn.init.normal_(rows_PD, std=STD if weight is None else float(weight.float().std()) or STD)


def _ids(init: Any) -> list[int]:
    try:
        return [int(i) for i in (init.flatten().tolist() if isinstance(init, Tensor) else init)]
    except (TypeError, ValueError) as error:
        raise PeftlibError(f"init={init!r} must be a name or a list of token ids.") from error


def _plain_forward(module: nn.Module) -> Callable[..., Any]:
    return type(module).forward


def _ordinary_id(table: nn.Embedding, model: nn.Module) -> int:
    """An id in the middle of the vocabulary that is neither padding nor an end of sequence."""
    config = getattr(model, "config", None)
    special = {
        table.padding_idx,
        getattr(config, "pad_token_id", None),
        getattr(config, "eos_token_id", None),
    }
    start = table.num_embeddings // 2
    return next((i for i in range(start, table.num_embeddings) if i not in special), 0)
