"""Two processes with sharded parameters compute what one does, save the same file and go on from it."""

import torch

from peftlib.container import read
from tests.ranks import launch

SCRIPT = """
import copy
import sys
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import peftlib
from peftlib import Adapter, LoRA, PrefixTuning


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return x + self.down(self.up(x).relu())


rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.manual_seed(0)
torch.set_num_threads(1)
model = nn.Sequential(Block(), Block(), nn.Linear(8, 3)).double()
fresh = copy.deepcopy(model)
x, y = torch.randn(4, 12, 8).double(), torch.randn(4, 12, 3).double()
parts = {"up": LoRA(rank=2), "down": Adapter(dim=3), "attention": PrefixTuning(length=2, hidden=4)}
tuning = peftlib.attach(model, parts, example=x)
with torch.no_grad():
    for p in tuning.parameters():
        p.add_(torch.randn_like(p) * 0.3)


def shard(model):
    if world > 1:
        for block in model[:2]:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)


def two_steps(model, optimizer):
    mine = slice(rank * 4 // world, (rank + 1) * 4 // world)
    for _ in range(2):
        (model(x[mine]) - y[mine]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


if world > 1:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
shard(model)
optimizer = torch.optim.Adam(tuning.parameters(), lr=0.1)
two_steps(model, optimizer)
path = f"{folder}/world{world}.safetensors"
tuning.save(path, optimizer=optimizer)
out = model(x).detach()
if rank == 0:
    torch.save(out, f"{folder}/world{world}.pt")
# What stopped goes on as what did not.
loaded = peftlib.load(fresh, path)
shard(fresh)
again = torch.optim.Adam(loaded.parameters())
loaded.load_optimizer(again, path)
two_steps(model, optimizer)
two_steps(fresh, again)
for (name, p), q in zip(tuning.named_parameters(), loaded.parameters(), strict=True):
    assert type(p) is type(q), name
    p, q = (t.to_local() if world > 1 else t for t in (p, q))
    assert torch.equal(p, q), name
"""


def test_two_sharded_processes_equal_one(tmp_path):
    launch(SCRIPT, 1, tmp_path)
    launch(SCRIPT, 2, tmp_path)
    one, two = (torch.load(tmp_path / f"world{n}.pt") for n in (1, 2))
    torch.testing.assert_close(two, one)
    files = [read(tmp_path / f"world{n}.safetensors") for n in (1, 2)]
    assert files[0][0]["plan"] == files[1][0]["plan"]
    assert files[0][1].keys() == files[1][1].keys()
    for key, value in files[0][1].items():
        torch.testing.assert_close(files[1][1][key], value)


SHARED = """
import sys
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import peftlib
from peftlib import LoRA
from peftlib.methods import shared_input


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        return x + self.out(self.q(x).sigmoid() * self.k(x).tanh() + self.v(x))


rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
groups, together = [], shared_input.low_rank_linears


def counted(x, linears, *rest):
    groups.append(len(linears))
    return together(x, linears, *rest)


shared_input.low_rank_linears = counted
if world > 1:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
for apart in (False, True):
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block()).double()
    x, y = torch.randn(2, 4, 40, 8).double()
    tuning = peftlib.attach(model, LoRA(rank=2), targets=["q", "k", "v", "out"], example=x)
    with torch.no_grad():
        for p in tuning.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    if world > 1:
        for block in model:
            for part in block.children() if apart else (block,):
                fully_shard(part, mesh=mesh)
        fully_shard(model, mesh=mesh)
    groups.clear()
    optimizer = torch.optim.SGD(tuning.parameters(), lr=0.5)
    mine = slice(rank * 4 // world, (rank + 1) * 4 // world)
    for _ in range(3):
        (model(x[mine]) - y[mine]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert groups == ([] if apart and world > 1 else [3] * 6), groups
    values = {n: p.full_tensor() if world > 1 else p.detach() for n, p in tuning.named_parameters()}
    if rank == 0:
        torch.save(values, f"{folder}/world{world}-{apart}.pt")
"""


def test_sites_of_one_input_train_as_in_one_process_sharded_by_block_or_by_leaf(tmp_path):
    """By block they compute together; leaf by leaf each has its weight only while it runs, and computes alone."""
    launch(SHARED, 1, tmp_path)
    launch(SHARED, 2, tmp_path)
    for apart in (False, True):
        one, two = (torch.load(tmp_path / f"world{n}-{apart}.pt") for n in (1, 2))
        assert one.keys() == two.keys()
        for name, value in one.items():
            torch.testing.assert_close(two[name], value)
