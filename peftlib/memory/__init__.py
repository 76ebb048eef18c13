"""Peak bytes of one training step and what they consist of: measured on real tensors, estimated on fake ones.

:class:`LiveBytes` sees every ATen operator of the step and follows the storages, not the tensors: a view or an
in-place result is no new memory, and a storage leaves the count at the moment it is freed. What a storage was
*for* is settled afterwards, from its whole life. Each storage counts under the first line that holds:

- frozen, trained: a parameter's, by ``requires_grad``; with ``model`` also its buffers (frozen)
- gradient: once held by a ``.grad``, from the moment it was made
- optimizer: in the state of an optimizer that stepped, or made in its step and still there afterwards
- input: existed before the step
- activation: made by a forward (or a checkpoint's recomputation) and alive when a later backward formula ran
- temporary: the rest

The activation rule needs no saved-tensor hooks, so it also sees what a custom function keeps on ``ctx`` and what a
checkpoint recomputes, and ``torch.vmap`` and autograd's in-place checks keep working. A result that the step itself
holds through the backward (its output, its loss) is an activation too.

Left out on purpose: workspace inside one kernel, and what an allocator adds (rounding, fragments, caches), so that
the same step gives the same bytes anywhere; compiled code, which runs as its eager self here; what ``torch.func.grad``
saves, which reads as temporary; a storage resized by itself is noticed at its next use.
"""

from peftlib.memory.estimate import estimate_memory
from peftlib.memory.extrapolate import extrapolate
from peftlib.memory.live import OUTSIDE, LiveBytes
from peftlib.memory.measure import measure_memory
from peftlib.memory.oom import OutOfMemory, explain_oom
from peftlib.memory.plan import MemoryPlan, plan_memory
from peftlib.memory.report import PARTS, MemoryReport, Timeline
from peftlib.memory.sharding import ShardedOver
from peftlib.memory.step import checkpointed, default_loss

__all__ = [
    "OUTSIDE",
    "PARTS",
    "LiveBytes",
    "MemoryPlan",
    "MemoryReport",
    "OutOfMemory",
    "ShardedOver",
    "Timeline",
    "checkpointed",
    "default_loss",
    "estimate_memory",
    "explain_oom",
    "extrapolate",
    "measure_memory",
    "plan_memory",
]
