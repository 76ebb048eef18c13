"""What one of n ranks holds when parameters, gradients and optimizer state are sharded (FSDP2's ``fully_shard``)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from peftlib.errors import PeftlibError, ProbeError, TargetError
from peftlib.memory.estimate import CUDA_BLOCK
from peftlib.memory.lives import BACKWARD, FORWARD, RECOMPUTATION, STEP
from peftlib.memory.report import MemoryReport
from peftlib.memory.step import chosen_modules
from peftlib.memory.storages import storages_of
from peftlib.report import format_bytes

Group = list[nn.Parameter]
Shapes = tuple[tuple[tuple[int, ...], torch.dtype], ...]


@dataclass(frozen=True)
class ShardedOver:
    """The memory of one rank when ``fully_shard`` spreads a model over n.

    Each parameter is cut along its first axis into n padded shards, and so are its gradient and its optimizer state.
    A group is what one ``fully_shard`` call covers, G bytes whole, of which t are trained; the root's group R (what is
    in no block) stays whole from the forward to the end of the backward. Beside its shards a rank holds::

        forward:   R + 3 G               the group that runs, and the next one as it is gathered and as it is copied out
        backward:  R + 3 G + 2 t + t_R   besides, gradients: whole, and once more to be reduced

    with G the largest group. Activations and inputs are the rank's own. What a backend copies for itself comes on top:
    peaks measured with torch 2.13 and gloo, which does, are within two groups of this, on either side.

    Args:
        ranks: n.
        groups: the modules that are sharded one by one: True for the repeated blocks (if there are none, the model is
            one group), None for none, else as in :func:`checkpointed`.

    Raises:
        PeftlibError: ``ranks`` is not a positive integer.

    Example:
        >>> from peftlib.memory import estimate_memory
        >>> model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8)))
        >>> report = estimate_memory(model, torch.ones(1, 64))
        >>> report.optimizer_bytes, ShardedOver(4, groups="*")(model, report).optimizer_bytes
        (266304, 66624)

    Source: Rajbhandari et al. 2020, ZeRO stage 3, arXiv:1910.02054; Zhao et al. 2023, arXiv:2304.11277.
    """

    ranks: int
    groups: Any = True

    def __post_init__(self) -> None:
        if isinstance(self.ranks, bool) or not isinstance(self.ranks, int) or self.ranks < 1:
            raise PeftlibError(f"ShardedOver({self.ranks!r}): give the number of ranks, 1 or more")

    def __call__(
        self,
        model: nn.Module,
        report: MemoryReport,
        *,
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = torch.optim.AdamW,
    ) -> MemoryReport:
        """One rank's report, from the report of the whole model with that rank's batch.

        Args:
            model: the model of the report, on any device.
            report: from :func:`estimate_memory` or :func:`measure_memory`.
            optimizer: as for the estimate.

        Raises:
            PeftlibError: the report has no timeline, or counts other weights than the model has.
            ProbeError: the optimizer cannot step on fake tensors.
        """
        if report.timeline is None:
            raise PeftlibError(
                "a report without a timeline cannot be sharded: give the one that estimate_memory gave"
            )
        *blocks, root = self._groups(model)
        parameters = [p for group in (*blocks, root) for p in group]
        trained = [p for p in parameters if p.requires_grad]
        _check_weights(model, report)
        if self.ranks == 1:
            return report
        ours, ours_trained = self._shards(parameters), self._shards(trained)
        buffers = report.frozen_bytes + report.trained_bytes - _bytes(parameters)
        largest = max(map(_bytes, blocks), default=0)
        of_largest, of_root = max(map(_trained_bytes, blocks), default=0), _trained_bytes(root)
        whole = {
            FORWARD: _bytes(root) + 3 * largest,
            BACKWARD: _bytes(root) + 3 * largest + 2 * of_largest + of_root,
            STEP: 0,
        }
        whole[RECOMPUTATION] = whole[BACKWARD]
        share = ours_trained / max(_bytes(trained), 1)
        shapes = tuple((self._shape(p), p.dtype) for p in trained)
        state = _state_bytes(shapes, optimizer) if optimizer is not None and shapes else 0
        fixed = {
            "frozen_bytes": buffers + ours - ours_trained,
            "trained_bytes": ours_trained,
            "optimizer_bytes": state,
        }
        best: tuple[int, str, Mapping[str, int]] = (-1, FORWARD, {})
        starts = dict(report.timeline.phases)
        phase = FORWARD
        for instant, parts in enumerate(zip(*report.timeline.parts.values(), strict=True)):
            phase = starts.get(instant, phase)
            now = dict(zip(report.timeline.parts, parts, strict=True)) | fixed
            # gradients that are still whole are not cut yet
            uncut = of_largest + of_root if phase in (BACKWARD, RECOMPUTATION) else 0
            now["gradient_bytes"] = round(max(0, now["gradient_bytes"] - uncut) * share)
            if phase == STEP:
                now["temporary_bytes"] = round(now["temporary_bytes"] * share)
            now["temporary_bytes"] += whole[phase]
            if (total := sum(now.values())) > best[0]:
                best = total, phase, now
        peak, phase, split = best
        fields: dict[str, Any] = {
            "peak_bytes": peak,
            "peak_at": phase,
            "modules": {},
            "timeline": None,
            **split,
        }
        note = f"one of {self.ranks} ranks; the parameters of {len(blocks)} groups and the rest are gathered in turns"
        return dataclasses.replace(report, **fields, notes=[*report.notes, note])

    def _groups(self, model: nn.Module) -> list[Group]:
        """The parameters of each block, each once, and last what is left."""
        try:
            blocks = chosen_modules(model, self.groups)
        except TargetError:
            if self.groups is not True:
                raise
            blocks = {}  # no repeated blocks: one group
        taken: set[int] = set()
        groups = []
        for module in (*blocks.values(), model):
            group = [p for p in module.parameters() if id(p) not in taken]
            taken |= {id(p) for p in group}
            groups.append(group)
        return groups

    def _shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        rows, *rest = parameter.shape or (1,)
        return (-(-rows // self.ranks), *rest)

    def _shards(self, parameters: Group) -> int:
        return sum(torch.Size(self._shape(p)).numel() * p.element_size() for p in parameters)


@functools.lru_cache(maxsize=64)
def _state_bytes(shapes: Shapes, optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> int:
    """Bytes of the optimizer's state of such parameters, after a step."""
    with FakeTensorMode():
        shards = [nn.Parameter(torch.empty(shape, dtype=dtype)) for shape, dtype in shapes]
        for shard in shards:
            shard.grad = torch.empty_like(shard)
        try:
            chosen = optimizer(shards)
            chosen.step()
        except Exception as error:
            raise ProbeError(
                f"the optimizer cannot step on shards of fake tensors ({type(error).__name__}: {error}): give "
                "optimizer=None, and add what its state needs"
            ) from error
    state = pytree.tree_leaves(list(chosen.state.values()))
    return sum(value.nbytes for value in state if isinstance(value, torch.Tensor))


def _check_weights(model: nn.Module, report: MemoryReport) -> None:
    """The report counts storages, in whole blocks; of another model it would leave negative or foreign bytes."""
    tensors = [*model.parameters(), *model.buffers()]
    storages = {s._cdata: s.nbytes() for tensor in tensors for s in storages_of(tensor)}
    has, counted = sum(storages.values()), report.frozen_bytes + report.trained_bytes
    if not has <= counted <= has + CUDA_BLOCK * len(storages):
        raise PeftlibError(
            f"the report counts {format_bytes(counted)} of weights, {type(model).__name__} has {format_bytes(has)}: "
            "give the model that was estimated, or measure_memory(step, model=model)"
        )


def _bytes(parameters: Group) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def _trained_bytes(group: Group) -> int:
    return _bytes([p for p in group if p.requires_grad])
