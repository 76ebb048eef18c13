"""A module's call in the example, repeated with changes under fake tensors.

Shape legend: B batch, P prompt length, T tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from peftlib.attention import attention_with_weights
from peftlib.errors import PeftlibError, ProbeError, TargetError
from peftlib.methods.arguments import DECODER, Layout
from peftlib.methods.base import Site, first_tensor
from peftlib.methods.calls import argument_names, back, by_name, named_tensors
from peftlib.methods.outputs import learn_outputs
from peftlib.methods.sequence import Longer, lengthen
from peftlib.methods.virtual import prompts_within, resting

if TYPE_CHECKING:
    from peftlib.observe import Record
    from peftlib.probe import Probe
    from peftlib.targets import Tree

_OTHERS = ("mask", "type", "label", "pos", "target", "segment", *DECODER)
"""In names of integer arguments that may be looked up somewhere but are not the tokens."""
_LABELS = ("labels", "targets", "label", "target")

_ATTENTION = (F.scaled_dot_product_attention, attention_with_weights)
_SOFTMAX = (torch.softmax, Tensor.softmax)
_LOSSES = (F.cross_entropy, F.nll_loss)


@dataclass
class Run:
    """One forward of a site: the record, the sizes of sequence axes in it, the label that a loss ignored."""

    record: Record
    times: list[int]
    ignored: int


class Example:
    """A module's call in the example, and the means to repeat it."""

    def __init__(self, site: Site, tree: Tree, probe: Probe):
        trace = probe.trace(site)
        assert trace is not None
        self.site, self.tree, self.probe = site, tree, probe
        self.names = argument_names(type(site.module).forward)
        self.args, self.kwargs = trace.call
        self.call = by_name(self.names, self.args, self.kwargs)
        self.signature = set(self.names) | set(self.call)

    @property
    def title(self) -> str:
        return type(self.site.module).__name__

    def run(self, changed: Mapping[str, Any] | None = None, more: Mapping[str, Any] | None = None) -> Run:
        """The call once more, with some arguments changed and some added."""
        args, kwargs = back(self.names, self.args, self.kwargs, changed or {})
        with Witness() as witness, resting(self.probe.part(self.site.name)):
            record = self.probe.run(args, {**kwargs, **(more or {})}, self.site.name)
        return Run(record, [*witness.times, *_module_times(record, self.tree)], witness.ignored)

    def sequence(self, table: str | None) -> tuple[str, str | None]:
        """The argument that carries the sequence, and the embedding that looks it up (``None``: vectors already)."""
        whole = {n: v for n, v in self.call.items() if isinstance(v, Tensor) and not v.is_floating_point()}
        inside = {id(m) for m in self.site.module.modules()}
        tables = [n for n, m in self.tree.modules.items() if isinstance(m, nn.Embedding) and id(m) in inside]
        tables = [n for n in ([table] if table else tables) if n in self.probe.record.traces]
        declared = self._declared()
        found = []
        for name in tables:
            ids, module = self._looked_up(name), self.tree.modules[name]
            others = prompts_within(self.site.module, module)
            sources = [main for main, value in whole.items() if is_handed_on(ids, value, others)]
            # Ids that were changed on the way are known by their shape alone.
            alike = [main for main, value in whole.items() if ids is not None and ids.shape == value.shape]
            found += [(main, name) for main in sources or alike]

        def preference(pair: tuple[str, str]) -> tuple[bool, bool, int]:
            # The declared embedding, then tokens before what goes with them, then the first argument.
            main, name = pair
            other = any(word in main.lower() or word in name.rpartition(".")[2].lower() for word in _OTHERS)
            return name != declared, other, list(whole).index(main)

        if found:
            return min(found, key=preference)
        for name, v in self.call.items():
            if isinstance(v, Tensor) and v.is_floating_point() and (self.site.name or v.dim() == 3):
                if v.dim() != 3:
                    raise TargetError(
                        "A prompt goes before a sequence of vectors (B, T, D); "
                        f"{self.site.name or 'the root'!r} takes {name!r} of shape {tuple(v.shape)}. Target the module "
                        "that takes the sequence."
                    )
                return name, None
        raise TargetError(
            f"{self.title} shows no sequence that a prompt could go before: no ids that an nn.Embedding looks up, no "
            "(B, T, D) tensor. Target the module that takes the sequence: "
            "attach(model, {'encoder': PromptTuning(...)})."
        )

    def _looked_up(self, table: str) -> Tensor | None:
        args, kwargs = self.probe.record.traces[table].call
        return first_tensor([*args, *kwargs.values()])

    def _declared(self) -> str | None:
        declared = getattr(self.site.module, "get_input_embeddings", None)
        try:
            module = declared() if callable(declared) else None
        except (NotImplementedError, AttributeError):
            return None
        return self.tree.name_of(module) if isinstance(module, nn.Module) else None

    def check_names(self, layout: Layout, before: Run) -> None:
        """Refuse kinds given to what is neither an argument nor a part of the output."""
        outputs = {path.partition(".")[0] for path, _ in named_tensors(before.record.output)}
        missing = set(layout.given) - self.signature - outputs
        if missing:
            raise PeftlibError(
                f"sequence_args names {', '.join(map(repr, sorted(missing)))}, which {self.title}.forward does not "
                f"have; it takes {', '.join(map(repr, self.names))}."
            )

    def lengthen(self, layout: Layout, length: int, before: Run) -> tuple[Longer, Run]:
        """The call ``length`` positions longer, along the axis that turns out to be the sequence's."""
        first_error: Exception | None = None
        usual: tuple[Longer, Run] | None = None
        for layout.axis in (-1, 0):
            try:
                longer = lengthen(layout, self.call, length)
                if not longer.shape:
                    raise TargetError(
                        "The example's cache is filled, and a prompt goes before the first tokens. Give the first "
                        "call of a generation as the example, or one without a cache."
                    )
                after = self.run(longer.changed)
            except PeftlibError:
                raise
            except Exception as error:  # noqa: BLE001 (whatever the model raises; the first is raised below)
                first_error = first_error or error
                continue
            if any(b - a == length for a, b in zip(before.times, after.times, strict=False)):
                return longer, after
            if layout.axis == -1:
                usual = longer, after
                if not before.times:
                    break
        layout.axis = -1
        if usual is not None:
            return usual
        assert first_error is not None
        lines = str(first_error).strip().splitlines()
        raise ProbeError(
            f"{self.title} does not take {length} more positions than the example has: "
            f"{type(first_error).__name__}: {lines[0] if lines else ''} The prompt may be longer than the context; "
            "if an argument was mistaken, name its kind with sequence_args={...}."
        ) from first_error

    def try_labels(self, layout: Layout, length: int) -> None:
        """What the outputs are with labels, and which label the loss ignores, if the example has none."""
        name = next((n for n in _LABELS if n in self.names), None)
        if name is None or layout.kind != "ids" or layout.paired or self.call.get(name) is not None:
            return
        if name in self.names[: len(self.args)]:
            return
        labels = {name: torch.zeros_like(self.call[layout.main])}
        # Labels may be of another shape, say; then their first use has to tell.
        with contextlib.suppress(Exception):
            before = self.run(more=labels)
            layout.ignored = before.ignored
            outputs = named_tensors(before.record.output)
            if all(path in layout.outputs for path, tensor in outputs if tensor.dim()):
                return
            longer = lengthen(layout, {**self.call, **labels}, length)
            after = self.run(longer.changed, {name: longer.changed.get(name, labels[name])})
            short = tuple(self.call[layout.main].shape)
            learn_outputs(layout, before.record.output, after.record.output, short, longer.shape)


class Witness(TorchFunctionMode):
    """Note how long the sequence is wherever attention sees it, and which label a loss ignores."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[int] = []
        self.ignored = -100

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _ATTENTION:
            self.times.append((args[0] if args else kwargs["query"]).shape[-2])
        elif func in _SOFTMAX:
            scores = args[0] if args else kwargs["input"]
            self.times.append(scores.shape[-1] if scores.dim() else 1)
        elif func in _LOSSES:
            self.ignored = kwargs.get("ignore_index", -100)
        return func(*args, **kwargs)


def _module_times(record: Record, tree: Tree) -> Iterator[int]:
    """How long the sequence is in recurrent and convolutional modules."""
    for name, trace in record.traces.items():
        module, shape = tree.modules.get(name), trace.input
        if shape is None or len(shape) < 2:
            continue
        if isinstance(module, nn.RNNBase):
            yield shape[1] if module.batch_first and len(shape) == 3 else shape[0]
        elif isinstance(module, nn.Conv1d):
            yield shape[-1]


def is_handed_on(ids: Any, given: Tensor, prompts: int) -> bool:
    """Whether ids are the given ones, or longer by other prompts' positions."""
    if not isinstance(ids, Tensor) or ids.is_floating_point():
        return False
    growth = [b - a for a, b in zip(given.shape, ids.shape, strict=False) if a != b]
    return _same_memory(given, ids) or (ids.dim() == given.dim() and growth == [prompts])


def _same_memory(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and a.untyped_storage()._cdata == b.untyped_storage()._cdata
