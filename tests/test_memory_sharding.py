"""Two processes that shard a model hold what ShardedOver says, by the allocator's own records."""

import json

import pytest

from tests.ranks import launch

SCRIPT = """
import itertools, json, sys
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import peftlib
from peftlib import LoRA
from peftlib.memory import ShardedOver, estimate_memory, measure_memory

rank, folder, tuned = int(sys.argv[1]), sys.argv[3], sys.argv[4] == "lora"
torch.set_num_threads(1)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(256, 512, bias=False), nn.Linear(512, 256, bias=False)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.blocks = nn.Linear(256, 256), nn.ModuleList(Block() for _ in range(6))

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return x


model, x = Model(), torch.randn(2, 256)
if tuned:
    peftlib.attach(model, LoRA(rank=8), targets=["up", "down"])
said = ShardedOver(2)(model, estimate_memory(model, x))
group = sum(p.nbytes for p in model.blocks[0].parameters())
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
for block in model.blocks:
    fully_shard(block, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])


def step():
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


step()
local = lambda t: t.to_local().untyped_storage().nbytes() if isinstance(t, DTensor) else t.nbytes
trained = sum(local(p) for p in model.parameters() if p.requires_grad)
frozen = sum(local(p) for p in model.parameters() if not p.requires_grad)
state = sum(local(v) for s in optimizer.state.values() for v in s.values())
with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
    step()
events = [(e.start_ns(), e.nbytes()) for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
allocated = max(itertools.accumulate(size for _, size in sorted(events, key=lambda e: e[0])))
if rank == 0:
    found = {
        "said": said.peak_bytes, "parts": said.parts(), "group": group, "real": trained + frozen + state + allocated,
        "trained": trained, "frozen": frozen, "state": state,
    }
    print(json.dumps(found))
"""


@pytest.mark.parametrize("tuned", ["full", "lora"])
def test_a_rank_holds_what_is_said(tmp_path, tuned):
    printed = launch(SCRIPT, 2, tmp_path, tuned)
    found = json.loads(printed[0].splitlines()[-1])
    parts = found["parts"]
    assert parts["trained_bytes"] == found["trained"]
    assert parts["frozen_bytes"] == found["frozen"]
    assert parts["optimizer_bytes"] == found["state"]
    # which copies of gloo's own are alive at once is up to its threads
    assert abs(found["said"] - found["real"]) < 2 * found["group"]
