"""What prompt tuning and P-Tuning v1 share: where the rows go, how they start. Subclasses say what makes them.

Shape legend: P prompt length, D embedding width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peftlib.errors import PeftlibError, ProbeError, TargetError
from peftlib.methods.base import Delta, Method, Site, check_positive_int, placement
from peftlib.methods.sequence import KINDS, Layout, argument_names, back, by_name, lengthen, sequence_axis
from peftlib.methods.virtual import Overwrite, Placeholder, Prepend

if TYPE_CHECKING:
    from peftlib.probe import Probe
    from peftlib.targets import Tree

STD = 0.02
"""Spread of randomly started rows where there is no vocabulary to take it from."""


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
        names = argument_names(type(site.module).forward)
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
