"""What a rank holds by ShardedOver, counted by hand."""

import pytest
import torch
from torch import nn

from peftlib.errors import PeftlibError, ProbeError
from peftlib.memory import PARTS, MemoryReport, ShardedOver, Timeline, estimate_memory, measure_memory


def blocks(width=64, depth=4, dtype=torch.float32):
    layers = (nn.Sequential(nn.Linear(width, width, bias=False, dtype=dtype)) for _ in range(depth))
    return nn.Sequential(nn.Linear(width, width, bias=False, dtype=dtype), nn.Sequential(*layers))


def test_shards_are_what_zero_counts():
    model = blocks()
    report = estimate_memory(model, torch.ones(1, 64))
    one = 64 * 64 * 4
    rank = ShardedOver(4, groups="1.*")(model, report)
    assert rank.trained_bytes == 5 * one / 4
    assert rank.optimizer_bytes == 2 * 5 * one / 4 + 5 * 4  # and a count of steps per weight
    assert rank.frozen_bytes == 0
    # in the backward, what is whole: the root's, three groups, the gradients of one of them twice and of the root's
    whole = one + 3 * one + 2 * one + one
    assert rank.peak_at == "backward"
    assert whole <= rank.temporary_bytes <= whole + 3 * 64 * 4
    assert sum(rank.parts().values()) == rank.peak_bytes
    assert "one of 4 ranks" in str(rank)
    assert ShardedOver(1)(model, report) is report


def test_rows_that_do_not_divide_are_padded_and_frozen_ones_have_no_state():
    model = nn.Sequential(
        nn.Linear(3, 5, bias=False), nn.Linear(5, 7, bias=False), nn.BatchNorm1d(7, affine=False)
    )
    model[0].requires_grad_(False)
    rank = ShardedOver(4, groups=None)(model, estimate_memory(model, torch.ones(2, 3)))
    assert rank.trained_bytes == 2 * 5 * 4  # 7 rows over 4
    assert rank.frozen_bytes == 2 * 3 * 4 + (7 + 7) * 4 + 8  # 5 rows over 4, and the statistics, whole
    assert rank.optimizer_bytes == 2 * 2 * 5 * 4 + 4


def test_sharding_refuses():
    report = estimate_memory(blocks(), torch.ones(1, 64))
    with pytest.raises(PeftlibError, match="number of ranks"):
        ShardedOver(0)
    with pytest.raises(PeftlibError, match="without a timeline"):
        ShardedOver(2)(blocks(), MemoryReport(peak_bytes=0, peak_at="forward"))
    with pytest.raises(PeftlibError, match="'nope' matches nothing"):
        ShardedOver(2, groups="nope")(blocks(), report)


def course(model, *moments):
    """A report of such a step: (phase, gradients, activations, temporaries) at each moment."""
    weights = {
        "frozen_bytes": sum(p.nbytes for p in model.parameters() if not p.requires_grad),
        "trained_bytes": sum(p.nbytes for p in model.parameters() if p.requires_grad),
    }
    lists = {name: [weights.get(name, 0)] * len(moments) for name in PARTS}
    for name, column in zip(
        ("gradient_bytes", "activation_bytes", "temporary_bytes"), (1, 2, 3), strict=True
    ):
        lists[name] = [moment[column] for moment in moments]
    phases = [(place, moment[0]) for place, moment in enumerate(moments)]
    return MemoryReport(
        peak_bytes=0, peak_at="forward", timeline=Timeline(parts=lists, phases=phases), **weights
    )


def test_each_phase_holds_what_is_whole_in_it():
    """Two of three blocks are trained, and the root; four ranks; no optimizer."""
    model = blocks(width=8, depth=3)
    model[1][1].requires_grad_(False)
    one = 8 * 8 * 4
    shards = 4 * one // 4
    whole = one + 3 * one  # the root's and three groups
    gathered = whole + 2 * one + one  # and gradients: a group's twice, the root's once
    large = 10**6

    def rank(*moments):
        return ShardedOver(4, groups="1.*")(model, course(model, *moments), optimizer=None)

    for phase in ("forward", "recomputation", "backward", "optimizer step"):
        found = rank(("forward", 0, 1, 0), (phase, 0, large, 0), ("optimizer step", 0, 2, 0))
        assert found.peak_at == phase
        assert found.activation_bytes == large  # its own batch, not shared
        assert (found.frozen_bytes, found.trained_bytes) == (one // 4, 3 * one // 4)
        temporary = {"forward": whole, "optimizer step": 0}.get(phase, gathered)
        assert found.temporary_bytes == temporary
        assert found.peak_bytes == shards + large + temporary
    # gradients: what is whole in the backward is counted there, the rest is cut
    for phase in ("recomputation", "backward"):
        assert rank((phase, 3 * one, large, 0)).gradient_bytes == (3 * one - 2 * one) // 4
        assert rank((phase, one, large, 0)).gradient_bytes == 0
    for phase in ("forward", "optimizer step"):
        assert rank((phase, 3 * one, large, 0)).gradient_bytes == 3 * one // 4
    # what the optimizer's step makes is as large as the shards, what others make is theirs
    assert rank(("optimizer step", 0, large, 4000)).temporary_bytes == 1000
    assert rank(("forward", 0, large, 4000)).temporary_bytes == 4000 + whole
    assert rank(("backward", 0, large, 4000)).temporary_bytes == 4000 + gathered


def test_a_report_of_another_model_is_refused():
    report = estimate_memory(blocks(depth=2), torch.ones(1, 64))
    for other in (blocks(depth=3), blocks(depth=1), blocks(width=128, depth=2)):
        with pytest.raises(PeftlibError, match=r"the report counts 48\.0 KiB of weights, Sequential has"):
            ShardedOver(2)(other, report)
    # of a GPU it counts whole blocks, and buffers are weights
    normed = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
    cuda = estimate_memory(normed, torch.ones(4, 3), device="cuda")
    assert min(ShardedOver(2)(normed, cuda).parts().values()) >= 0
    model, x = blocks(), torch.ones(1, 64)
    blind = measure_memory(lambda: model[0](x).sum().backward())
    with pytest.raises(PeftlibError, match=r"measure_memory\(step, model=model\)"):
        ShardedOver(2)(model, blind)


def test_an_optimizer_that_needs_values_is_named():
    report = estimate_memory(blocks(), torch.ones(1, 64))
    with pytest.raises(
        ProbeError, match=r"cannot step on shards of fake tensors .*SparseAdam.*optimizer=None"
    ):
        ShardedOver(2)(blocks(), report, optimizer=torch.optim.SparseAdam)
