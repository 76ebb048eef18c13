"""What fits into a budget: methods against batch sizes, lengths and checkpointing, and what to do about the rest."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftlib.charts import bar_chart, text_bars
from peftlib.errors import PeftlibError, TargetError
from peftlib.memory.estimate import Optimizers
from peftlib.memory.examples import Examples
from peftlib.memory.factory import prepared
from peftlib.memory.fakes import Hint
from peftlib.memory.remedies import Remedy, Search, largest_batch, remedies
from peftlib.memory.report import COLORS, MemoryReport
from peftlib.memory.ways import Way, estimator, example_of
from peftlib.methods.base import Method
from peftlib.progress import bar_on_stderr
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
                "checkpoint": choice.way.again,
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
        helps = []
        for choice in self.choices:
            found: list[tuple[str, int | None]] = [(r.text, r.peak_bytes) for r in choice.remedies]
            for text, peak in found or ([] if choice.fits else [("nothing in this plan", None)]):
                helps.append({"what does not fit": str(choice.way), "what helps": text, "peak": peak})
        if helps:
            sharded = any(r.way.ranks > 1 for choice in self.choices for r in choice.remedies)
            notes = ["with sharding, the peak is one rank's"] if sharded else []
            tables.append(Table(rows=helps, formats={"peak": "bytes"}, notes=notes))
        return tables

    def bars(self, width: int = 50) -> str:
        """The table as stacked bars of text, with the budget marked."""
        return text_bars(self._labels(), self._series(), limit=self.budget, width=width)

    def plot(self, path: str | Path) -> None:
        """Draw the rows as stacked bars, with the budget marked, into a file (.png, .svg, .pdf).

        Raises:
            PeftlibError: matplotlib is missing.
        """
        bar_chart(path, self._labels(), self._series(), self.title, "bytes", limit=self.budget, colors=COLORS)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON can hold it; sizes in bytes."""
        choices = [
            row
            | {
                "peak at": choice.report.peak_at,
                "remedies": [{"text": r.text, "peak_bytes": r.peak_bytes} for r in choice.remedies],
            }
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
    hint: Hint | None = None,
    device: str | torch.device | None = "cuda",
    ranks: Sequence[int] = RANKS,
    progress: bool | None = None,
) -> MemoryPlan:
    """Estimate a training step under every method, batch size, length and checkpointing, against a budget.

    For each method, length and checkpointing the largest batch that fits is searched, and for each row that does not
    fit the plan names what helps, cheapest first: equal micro-batches that are accumulated, checkpointing, another
    method, sharding over n ranks (each of which takes the row's batch), and combinations that spare micro-batches.

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
        optimizer: as in :func:`estimate_memory`; so are loss, autocast and device.
        loss: the forward's output -> a scalar.
        autocast: a floating type, or None.
        hint: what a fake tensor answers when it is asked for its value; methods are attached without example= then.
        device: "cuda" or "cpu".
        ranks: numbers of ranks to try sharding over, in this order; () tries none.
        progress: a bar on stderr that counts estimates (needs tqdm); None shows it in a terminal only.

    Returns:
        A :class:`MemoryPlan`: it prints as tables, and has ``rows``, ``to_dict()``, ``bars()`` and ``plot(path)``.

    Raises:
        PeftlibError: the factory makes no module, or cannot make it on the meta device; an argument is none of these.
        TargetError: ``checkpointing`` matches nothing in the model.
        ProbeError: a row's step cannot run on fake tensors.

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
    sizes = _several("batches", [examples.batch] if batches is None else batches, 1)
    spans = [None] if lengths is None else _several("lengths", lengths, 1)
    # False and None are one row, and what is several targets is one value
    twice = [
        tuple(again) if isinstance(again, (list, set)) else again or None
        for again in _several("checkpointing", checkpointing)
    ]
    over = [] if ranks in ((), []) else _several("ranks", ranks, 2)
    first = example_of(examples, sizes[0], spans[0])
    known = first if hint is None else None  # attaching does not take answers
    models: dict[str, nn.Module] = {}
    first_time = itertools.chain([True], itertools.repeat(False))

    def model(name: str) -> nn.Module:
        if name not in models:
            if not all(p.is_meta for made in models.values() for p in made.parameters()):
                models.clear()  # one at a time, where they take memory
            models[name] = prepared(factory, named[name], known, warn=next(first_time))
        return models[name]

    with bar_on_stderr("estimate", progress) as bar:
        estimate = estimator(
            model,
            examples,
            told=bar.update if bar is not None else int,
            optimizer=optimizer,
            loss=loss,
            autocast=autocast,
            hint=hint,
            device=device,
        )
        search = Search(estimate, limit, tuple(named), tuple(twice), tuple(over))
        choices = []
        notes: dict[str, None] = {}
        for name, length, again in itertools.product(named, spans, dict.fromkeys(twice)):
            ways = [Way(name, batch, length, again) for batch in sizes]
            try:
                reports = [estimate(way) for way in ways]
            except TargetError as error:
                if again is not True or None not in twice:
                    raise
                notes[f"without checkpointing: {str(error).partition('. ')[0].rstrip('.')}"] = None
                continue
            most = largest_batch(search, ways[0])
            for way, report in zip(ways, reports, strict=True):
                fits = report.peak_bytes <= limit
                choices.append(Choice(way, report, fits, most, () if fits else remedies(search, way)))
                notes |= dict.fromkeys(report.notes)
    title = f"One training step against {format_bytes(limit)} ({choices[0].report.device})"
    return MemoryPlan(choices, limit, title, list(notes))


def _several(name: str, values: Any, least: int | None = None) -> list[Any]:
    """A list's different values; whole numbers of ``least`` or more, if that is given."""
    if isinstance(values, str) or not isinstance(values, Sequence) or not values:
        raise PeftlibError(f"{name}={values!r}: give a list of one or more, as in {name}=[{least or True}]")
    for value in values:
        whole = isinstance(value, int) and not isinstance(value, bool)
        if least is not None and not (whole and value >= least):
            raise PeftlibError(f"{name}={values!r}: {value!r} is no whole number of {least} or more")
    return [value for place, value in enumerate(values) if value not in values[:place]]


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
