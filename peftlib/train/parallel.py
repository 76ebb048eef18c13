"""One training in several processes, on torch's own engines: rows are dealt out, numbers agree, rank 0 writes.

Every process goes through the same windows of the same batches and works on its rows of each. Losses and targets are
added up over all processes before anything is divided, so that n processes make the steps that one would make, to
rounding. What is drawn at random in a step is drawn from (seed, step, rank); everything else is drawn alike by all.

Left out on purpose: models that are cut inside a layer (tensor and pipeline parallelism). A model that its owner has
put under ``fully_shard`` before the optimizer was made is taken as it is.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from peftlib import PeftlibError
from peftlib.memory.step import chosen_modules
from peftlib.storage import is_sharded
from peftlib.train.batches import Batches
from peftlib.train.rng import seeded, untouched

TORCHRUN = "torchrun --nproc-per-node 2 train.py"


@dataclass(frozen=True)
class Idle:
    """A batch that is worked on for the sake of the others, who wait, and counts nothing: this process has no rows."""

    batch: Any


class Ranks:
    """The processes of a training, as one of them sees them; alone, every method is the obvious one.

    Args:
        rank: this one's number.
        world: how many there are.
        device: where numbers that travel are.
        seed: of the training.
    """

    def __init__(
        self, rank: int = 0, world: int = 1, device: torch.device | None = None, seed: int | None = None
    ):
        self.rank, self.world, self.device, self.seed = rank, world, device, seed
        self._engine: Any = None

    @property
    def first(self) -> bool:
        """Whether this process writes and shows."""
        return self.rank == 0

    def total(self, *numbers: float | Tensor) -> list[float]:
        """Each number, added up over all processes."""
        if self.world == 1:
            return [float(number) for number in numbers]
        together = torch.tensor([float(n) for n in numbers], dtype=torch.float64, device=self.device)
        dist.all_reduce(together)
        return together.tolist()

    def agreed(self, value: Any) -> Any:
        """What rank 0 says: a small value that pickles."""
        if self.world == 1:
            return value
        said = [value]
        dist.broadcast_object_list(said, src=0, device=self.device)
        return said[0]

    def told(self, row: Mapping[str, Any], callbacks: Sequence[Callable[[Mapping[str, Any]], Any]]) -> bool:
        """Whether a callback, all of which rank 0 calls, answers that it is enough; what they draw is not missed."""
        if not callbacks:
            return False
        with untouched():
            answers = [callback(row) for callback in callbacks] if self.first else []
        return self.total(any(answer is True for answer in answers))[0] > 0

    def check(self, batches: Iterable[Any], accumulate: int) -> None:
        """Refuse what leaves some without work."""
        if accumulate < self.world and not isinstance(batches, Batches):
            raise PeftlibError(
                f"{self.world} processes share accumulate={accumulate} batch(es) a step, and those of "
                f"{type(batches).__name__} are not cut into rows. Give train.Batches, or accumulate={self.world}."
            )
        if self.world > 1 and isinstance(batches, Batches) and batches.state_dict():
            raise PeftlibError(
                f"{type(batches.sampler).__name__} draws by what it has seen, and each process sees its own rows, so "
                "that they would draw different orders. Train in one process, or without it."
            )

    def sharded(self, trained: Any) -> bool:
        """Whether a model or a tuning has shards."""
        return any(is_sharded(p) for p in trained.parameters())

    def add_up(self, parameters: Sequence[Tensor]) -> None:
        """Gradients, added up over all processes in place."""
        if self.world > 1:
            for parameter in parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)

    def mean(self, row: Mapping[str, float]) -> dict[str, float]:
        """Each number of a row, as the mean over all processes."""
        return {
            name: number / self.world for name, number in zip(row, self.total(*row.values()), strict=True)
        }

    def wait(self) -> None:
        """Until all are here."""
        if self.world > 1:
            dist.barrier()

    def drawing(self, *where: int) -> AbstractContextManager[None]:
        """Random numbers of one place: other ones on each process, and no trace of them afterwards."""
        if self.world == 1:
            return contextlib.nullcontext()
        words = repr((self.seed, where, self.rank)).encode()
        return seeded(int.from_bytes(hashlib.sha256(words).digest()[:6], "little"))

    def deal(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The own part of each batch: rows of it, or, of as many batches as there are processes, one."""
        if self.world == 1:
            yield from batches
        elif isinstance(batches, Batches):
            yield from self.rows(batches, 0, 0)
        else:
            source = iter(batches)
            while group := list(islice(source, self.world)):
                yield from self.own(group)

    def rows(self, batches: Batches, epoch: int, start: int) -> Iterator[Any]:
        """The own rows of an epoch's batches; of a batch with fewer rows than processes some have none."""
        for number, places in enumerate(batches.places(epoch, start), start):
            mine = places[self.rank :: self.world]
            with self.drawing(epoch, number):
                made = batches.made(epoch, mine or places[:1])
            yield made if mine else Idle(made)

    def own(self, window: Sequence[Any]) -> list[Any]:
        """The own batches of a window, as many on each process."""
        short = -len(window) % self.world
        return [*window, *[Idle(window[0])] * short][self.rank :: self.world]

    def engage(self, kind: str | None, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Give all processes the values of the first, and cut the model into shards if that is the ``kind``.

        Under "fsdp" the optimizer goes on with the shards of its parameters.
        """
        if self.world == 1 or self.sharded(model):
            return
        for tensor in (*model.parameters(), *model.buffers()):
            # as bytes, which every backend sends, whatever they mean
            sent = tensor.detach().contiguous()
            dist.broadcast(sent.view(-1).view(torch.uint8), src=0)
            tensor.detach().copy_(sent)
        if kind == "fsdp":
            shard(model, optimizer)

    def wrapped(self, kind: str | None, model: nn.Module, loss: Any) -> Any:
        """The loss, in DDP's hands if that is the ``kind``: it sees the user's own model, and DDP what it returns."""
        if kind != "ddp" or self.world == 1:
            return loss
        from torch.nn.parallel import DistributedDataParallel

        # unused: a model may hold other tunings, or experts that no token of this batch went to
        self._engine = DistributedDataParallel(
            _Loss(model, loss), find_unused_parameters=True, gradient_as_bucket_view=True, init_sync=False
        )
        return lambda model, batch: self._engine(batch)

    @contextlib.contextmanager
    def settled(self, model: nn.Module) -> Iterator[None]:
        """Shards again at the end: a forward without a backward leaves the outermost group whole."""
        yield
        if self.world > 1:
            from torch.distributed.fsdp import FSDPModule

            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    def adding(self, last: bool) -> AbstractContextManager[None]:
        """Around one micro-batch: whether gradients travel now, or wait for the window's last."""
        return contextlib.nullcontext() if last or self._engine is None else self._engine.no_sync()


class _Loss(nn.Module):
    """A loss as a module, so that DDP has a forward to prepare for."""

    def __init__(self, model: nn.Module, loss: Any):
        super().__init__()
        self.model, self.loss = model, loss
        # one that no loss uses, or torch warns in every run of a model that uses all of its own
        own = next(p for p in model.parameters() if p.requires_grad)
        self.unused = nn.Parameter(own.detach().new_zeros(()))

    def forward(self, batch: Any) -> Any:
        return self.loss(self.model, batch)


ALONE = Ranks()


def ranks_of(parallel: str | None, device: torch.device, seed: int | None) -> Ranks:
    """The processes that torchrun started, joined; or this one alone.

    Raises:
        PeftlibError: an unknown ``parallel``, several processes without it, or one process with it.
    """
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if parallel is None:
        if launched and int(os.environ["WORLD_SIZE"]) > 1:
            raise PeftlibError(
                f"{os.environ['WORLD_SIZE']} processes were started, and each would train by itself what the others "
                "train. Give parallel='ddp' or 'fsdp'."
            )
        return ALONE
    if parallel not in ("ddp", "fsdp"):
        raise PeftlibError(f"parallel={parallel!r} is unknown: use 'ddp', 'fsdp' or None.")
    if not dist.is_available() or not (launched or dist.is_initialized()):
        raise PeftlibError(f"parallel={parallel!r} needs processes: start the program with {TORCHRUN}.")
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        # after the end too: a tuning that is sharded is saved by all together
        atexit.register(lambda: dist.destroy_process_group() if dist.is_initialized() else None)
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), device, seed)
    if ranks.world > 1 and seed is None:
        raise PeftlibError(
            "Several processes draw the same order of the data only from a seed: give seed=, not None."
        )
    return ranks


def shard(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """``fully_shard`` of the repeated blocks and of what is around them; the optimizer gets the shards.

    Raises:
        PeftlibError: the optimizer has made steps, whose state belongs to whole parameters.
    """
    from torch.distributed.fsdp import fully_shard

    if optimizer.state:
        raise PeftlibError(
            "The optimizer has made steps on whole parameters. Make a new one before fit(..., parallel='fsdp')."
        )
    names = {id(p): name for name, p in model.named_parameters()}
    try:
        blocks = chosen_modules(model, True)
    except PeftlibError:
        blocks = {}  # no repeated blocks: the model is one group
    for module in (*blocks.values(), model):
        fully_shard(module)
    shards = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"][:] = [shards[names[id(p)]] for p in group["params"]]
