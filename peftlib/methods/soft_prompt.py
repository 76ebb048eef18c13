"""What prompt tuning and P-Tuning v1 share: where the rows go, how they start. Subclasses say what makes them.

Shape legend: P prompt length, D embedding width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peftlib.errors import PeftlibError, TargetError
from peftlib.methods.arguments import KINDS
from peftlib.methods.base import Delta, Method, Site, check_positive_int, placement
from peftlib.methods.layout import learn, token_table
from peftlib.methods.virtual import Overwrite, Placeholder, Prepend, Relay

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
    init: Any = "normal"

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
                    f"{owner}(sequence_args={{{name!r}: {kind!r}}}): the kind must be one of "
                    f"{', '.join(map(repr, KINDS))}."
                )
        if isinstance(self.init, str):
            if self.init not in ("vocab", "normal"):
                raise PeftlibError(
                    f"{owner}(init={self.init!r}): init must be 'vocab', 'normal' or a list of token ids."
                )
        elif len(_ids(self.init)) != self.length:
            raise PeftlibError(
                f"{owner}(length={self.length}, init=...) was given {len(_ids(self.init))} token ids; give as many as "
                "the prompt is long."
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
            table = None if probe is None else token_table(tree.site(""), tree, probe)
            return [tree.token_embedding(probe) if table is None else tree.site(table)]
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
                if self.placeholder in padding_ids(site.module, tree.model):
                    raise PeftlibError(
                        f"placeholder_id={self.placeholder} is the id of padding, so padded sequences would hold more "
                        "placeholders than their template. Take an id that nothing else uses; it may lie outside the "
                        "vocabulary."
                    )
                found.append(replace(site, facts={"mode": "placeholder"}))
                continue
            assert probe is not None
            if isinstance(site.module, nn.Embedding):
                anchor, table = tree.site(""), site.name
            else:
                anchor, table = site, None
            facts = learn(anchor, table, self.length, self.sequence_args or {}, tree, probe)
            found.append(replace(anchor, facts=facts))
        return found

    def build(self, sites: Sequence[Site]) -> dict[str, Delta]:
        found: dict[str, Delta] = {}
        for site in sites:
            facts = site.facts
            if facts.get("mode") == "placeholder":
                host: Any = site.module
                prompt = self.prompt(host.embedding_dim, host, **placement(site, self.dtype))
                assert self.placeholder is not None
                made: dict[str, Delta] = {site.name: Placeholder(prompt, self.length, self.placeholder)}
            else:
                made = self._prepend(site)
            for name, delta in made.items():
                if name in found:
                    raise TargetError(
                        f"Two prompts of one method would meet at {name or 'the root'!r}; give them tunings of their "
                        "own."
                    )
                found[name] = delta
        return found

    def _prepend(self, site: Site) -> dict[str, Delta]:
        """The deltas of a prompt in front, by name of their host."""
        facts, root = site.facts, site.model
        assert root is not None
        table = None if facts["table"] is None else root.get_submodule(facts["table"])
        where = placement(site if table is None else replace(site, module=table), self.dtype)
        prompt = self.prompt(facts["width"], table, **where)
        anchor = Prepend(prompt, self.length, site.module, table, facts)
        made: dict[str, Delta] = {site.name: anchor}
        if table is not None:
            made[facts["table"]] = Overwrite(anchor)
        for name, inner in facts.get("relays", {}).items():
            made[name] = Relay(anchor, root.get_submodule(name), inner)
        return made

    def config(self) -> dict[str, Any]:
        return {
            "length": self.length,
            **{k: v for k, v in super().config().items() if k not in ("init", "sequence_args")},
        }


@torch.no_grad()
def start_rows(rows_PD: Tensor, init: Any, table: nn.Module | None) -> None:
    """Fill the rows: vocabulary entries, noise of the vocabulary's spread, or the entries of given ids."""
    weight: Any = getattr(table, "weight", None)
    weight = weight if isinstance(weight, Tensor) and weight.is_floating_point() else None
    ids = None if isinstance(init, str) else torch.as_tensor(_ids(init))
    if ids is not None:
        if weight is None:
            raise PeftlibError(
                "init= gives token ids, and the prompt's place has no vocabulary. Use init='normal'."
            )
        unknown = ids[(ids < 0) | (ids >= weight.shape[0])]
        if len(unknown):
            raise PeftlibError(
                f"init= names the token id {int(unknown[0])}; the vocabulary has {weight.shape[0]}."
            )
    if rows_PD.is_meta or (weight is not None and weight.is_meta):
        return
    if init == "vocab" and weight is not None:
        ids = torch.randint(weight.shape[0], (rows_PD.shape[0],))
    if ids is not None:
        rows_PD.copy_(weight[ids.to(weight.device)])
    else:
        nn.init.normal_(rows_PD, std=STD if weight is None else float(weight.float().std()) or STD)


def padding_ids(table: nn.Embedding, model: nn.Module) -> set[int | None]:
    """The ids that fill sequences up, as far as the model says."""
    return {table.padding_idx, getattr(getattr(model, "config", None), "pad_token_id", None)}


def _ids(init: Any) -> list[int]:
    try:
        return [int(i) for i in (init.flatten().tolist() if isinstance(init, Tensor) else init)]
    except (TypeError, ValueError) as error:
        raise PeftlibError(f"init={init!r} must be a name or a list of token ids.") from error
