"""What fits into a budget: methods against batch sizes, lengths and checkpointing, and what to do about the rest."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftlib.attach import attach
from peftlib.charts import bar_chart, text_bars
from peftlib.errors import PeftlibError, TargetError
from peftlib.memory.estimate import Optimizers, estimate_memory
from peftlib.memory.examples import Examples
from peftlib.memory.remedies import Cost, Remedy, Way, largest_batch, remedies
from peftlib.memory.report import MemoryReport
from peftlib.memory.sharding import ShardedOver
from peftlib.methods.base import Method
from peftlib.report import Table, format_bytes, parse_bytes

SHOWN = {
    "weights": ("frozen_bytes", "trained_bytes"),
    "gradients": ("gradient_bytes",),
    "optimizer": ("optimizer_bytes",),
    "activations": ("activation_bytes",),
    "other": ("temporary_bytes", "input_bytes"),
}
RANKS = (2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class Choice:
    """One row of a plan: a way to train, what it costs, and what helps where it does not fit."""

    way: Way
    report: MemoryReport
    fits: bool
    largest_batch: int
    remedies: Sequence[Remedy] = ()


@dataclass(frozen=True, repr=False)
class MemoryPlan:
    """What fits into a budget, as a table with the remedies under it; made by :func:`plan_memory`.

    Attributes:
        choices: one :class:`Choice` per method, batch, length and checkpointing.
        budget: bytes.
        title: what was planned for.
        notes: what a reader of the numbers should know.
    """

    choices: Sequence[Choice]
    budget: int
    title: str
    notes: Sequence[str] = ()

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The table as a list of dicts; sizes in bytes."""
        return [
            {
                "method": choice.way.method,
                "batch": choice.way.batch,
                "length": choice.way.length,
                "checkpoint": "yes" if choice.way.checkpointing else "no",
                **{
                    name: sum(getattr(choice.report, part) for part in parts) for name, parts in SHOWN.items()
                },
                "peak": choice.report.peak_bytes,
                "fits": "yes" if choice.fits else "no",
                "max batch": choice.largest_batch or None,
            }
            for choice in self.choices
        ]

    def tables(self) -> list[Table]:
        """The plan and the remedies."""
        sizes = dict.fromkeys((*SHOWN, "peak"), "bytes")
        rows = self.rows
        columns = [name for name in rows[0] if any(row[name] is not None for row in rows)] if rows else None
        tables = [Table(title=self.title, rows=rows, columns=columns, formats=sizes, notes=self.notes)]
        helps = [
            {"what does not fit": str(choice.way), "what helps": remedy.text, "peak": remedy.peak_bytes}
            for choice in self.choices
            for remedy in choice.remedies or ([] if choice.fits else [Remedy("nothing in this plan", None)])
        ]
        if helps:
            tables.append(Table(rows=helps, formats={"peak": "bytes"}))
        return tables

    def bars(self, width: int = 50) -> str:
        """The table as stacked bars of text, with the budget marked."""
        return text_bars(self._labels(), self._series(), limit=self.budget, width=width)

    def plot(self, path: str | Path) -> None:
        """Draw the rows as stacked bars, with the budget marked, into a file (.png, .svg, .pdf).

        Raises:
            PeftlibError: matplotlib is missing.
        """
        bar_chart(path, self._labels(), self._series(), self.title, "bytes", limit=self.budget)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON can hold it; sizes in bytes."""
        choices = [
            row
            | {"peak at": choice.report.peak_at, "remedies": [dataclasses.asdict(r) for r in choice.remedies]}
            for row, choice in zip(self.rows, self.choices, strict=True)
        ]
        return {"title": self.title, "budget": self.budget, "choices": choices, "notes": list(self.notes)}

    def __str__(self) -> str:
        return "\n\n".join(map(str, self.tables()))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return "".join(table._repr_html_() for table in self.tables())

    def _labels(self) -> list[str]:
        return [str(choice.way) for choice in self.choices]

    def _series(self) -> dict[str, list[int]]:
        rows = self.rows
        return {name: [row[name] for row in rows] for name in SHOWN}


Methods = Mapping[str, Any] | Sequence[Method]


def plan_memory(
    factory: Callable[[], nn.Module],
    example: Any,
    methods: Methods,
    budget: str | float = "24GiB",
    *,
    batches: Sequence[int] | None = None,
    lengths: Sequence[int] | None = None,
    checkpointing: Sequence[Any] = (None, True),
    optimizer: Optimizers | None = torch.optim.AdamW,
    loss: Callable[[Any], Tensor] | None = None,
    autocast: torch.dtype | None = None,
    device: str | torch.device | None = "cuda",
    ranks: Sequence[int] = RANKS,
) -> MemoryPlan:
    """Estimate a training step under every method, batch size, length and checkpointing, against a budget.

    For each method the largest batch that fits is searched, and for each row that does not fit the plan names what
    helps, cheapest first: micro-batches with accumulation, checkpointing, both, another method, sharding over n ranks.

    Args:
        factory: makes the model; called on the meta device, so that no memory is used.
        example: one forward's arguments (a tensor, a tuple, a dict), which are resized, or a function
            ``(batch, length) -> example``; see :class:`Examples`.
        methods: name -> method, mapping ``{target: method}``, or None for the model as it comes, fully trained. Or a
            list of methods.
        budget: bytes, or a text such as "24GiB" or "80GB".
        batches: batch sizes of the rows; None takes the example's.
        lengths: sequence lengths of the rows; None takes the example's.
        checkpointing: what each row computes twice, as in :func:`estimate_memory`; (None,) leaves it out.
        optimizer: as in :func:`estimate_memory`; so are the next three.
        loss: the forward's output -> a scalar.
        autocast: a floating type, or None.
        device: "cuda" or "cpu".
        ranks: numbers of ranks to try sharding over.

    Returns:
        A :class:`MemoryPlan`: it prints as tables, and has ``rows``, ``to_dict()``, ``bars()`` and ``plot(path)``.

    Raises:
        PeftlibError: the factory makes no module, or cannot make it on the meta device; no size, no method.
        ProbeError: a step cannot run on fake tensors.

    Example:
        >>> import peftlib
        >>> def factory():
        ...     return nn.Sequential(nn.Linear(512, 2048), nn.ReLU(), nn.Linear(2048, 512))
        >>> methods = {"full": None, "lora": peftlib.LoRA(rank=8)}
        >>> plan = plan_memory(factory, torch.ones(8, 512), methods, "20MiB", checkpointing=(None,))
        >>> [(row["method"], row["fits"], row["max batch"]) for row in plan.rows]
        [('full', 'no', None), ('lora', 'yes', 429)]
    """
    limit = parse_bytes(budget)
    named = _named(methods)
    examples = Examples(example)
    sizes, spans = list(batches or (examples.batch,)), list(lengths or (None,))
    first = examples(sizes[0], spans[0])
    found: dict[Way, MemoryReport] = {}
    models: dict[str, nn.Module] = {}

    def model(name: str) -> nn.Module:
        if name not in models:
            models.clear()  # one at a time; making it anew costs no memory
            models[name] = _prepared(factory, named[name], first)
        return models[name]

    def cost(way: Way) -> MemoryReport:
        if way not in found:
            found[way] = estimate_memory(
                model(way.method),
                examples(way.batch, way.length),
                optimizer=optimizer,
                loss=loss,
                accumulate=way.accumulate,
                checkpointing=way.checkpointing,
                device=device,
                autocast=autocast,
            )
        return found[way]

    def sharded(way: Way, over: int) -> MemoryReport:
        return ShardedOver(over)(model(way.method), cost(way), optimizer=optimizer)

    costs = Cost(cost, sharded, limit, tuple(named), tuple(checkpointing), tuple(ranks))
    ways: list[Way] = []
    notes: dict[str, None] = {}
    for name in named:
        for length in spans:
            for again in checkpointing:
                row = [Way(name, batch, length, again) for batch in sizes]
                try:
                    cost(row[0])
                except TargetError as error:
                    if again is not True:
                        raise
                    notes[f"without checkpointing: {str(error).partition('.')[0]}"] = None
                    continue
                ways += row
    choices = []
    for way in ways:
        report, fits = cost(way), cost(way).peak_bytes <= limit
        notes |= dict.fromkeys(report.notes)
        most = largest_batch(costs, way)
        choices.append(Choice(way, report, fits, most, () if fits else remedies(costs, way)))
    title = f"One training step against {format_bytes(limit)} ({choices[0].report.device})"
    return MemoryPlan(choices, limit, title, list(notes))


def _named(methods: Methods) -> dict[str, Any]:
    if isinstance(methods, Mapping):
        named = dict(methods)
    elif isinstance(methods, (list, tuple)):
        named = {type(method).__name__ if method is not None else "full": method for method in methods}
        if len(named) < len(methods):
            raise PeftlibError("methods= lists one kind of method twice: give a mapping, {name: method}")
    else:
        raise PeftlibError(f"methods= is {type(methods).__name__}: give a mapping {{name: method}} or a list")
    if not named:
        raise PeftlibError("methods= is empty: name at least one, as in {'lora': LoRA(rank=8)}")
    return named


def build_on_meta(factory: Callable[[], nn.Module]) -> nn.Module:
    """The factory's model, made on the meta device; a warning if it has real parameters all the same.

    Raises:
        PeftlibError: it is no factory of modules, or does not work on meta.

    Example:
        >>> build_on_meta(lambda: nn.Linear(10**6, 10**6)).weight.device
        device(type='meta')
    """
    if isinstance(factory, nn.Module) or not callable(factory):
        raise PeftlibError(
            f"the factory is {type(factory).__name__}: give a function without arguments that makes the model, so that "
            "it can be made on the meta device"
        )
    try:
        with torch.device("meta"):
            model = factory()
    except Exception as error:
        raise PeftlibError(
            f"the factory does not work on the meta device ({type(error).__name__}: {error}). Where it needs values, "
            "let it make them under torch.device('cpu')"
        ) from error
    if not isinstance(model, nn.Module):
        raise PeftlibError(f"the factory gave {type(model).__name__}, no nn.Module: return the model")
    real = sum(p.nbytes for p in model.parameters() if not p.is_meta)
    if real:
        warnings.warn(
            f"the factory allocates {format_bytes(real)} of real parameters although it is called on the meta device: "
            "make the model from its configuration, and load no weights in it",
            stacklevel=2,
        )
    return model


def _prepared(factory: Callable[[], nn.Module], method: Any, example: Any) -> nn.Module:
    model = build_on_meta(factory)
    if method is not None:
        attach(model, method, example=example)
    return model
