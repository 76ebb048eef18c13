"""What a GPU's allocator gave out beside what was estimated for it: `python -m benchmarks.estimates`.

    python -m benchmarks.estimates                         # on a machine with CUDA; else the estimates alone
    python -m benchmarks.estimates --quick --device cpu    # whether it works: a CPU's estimates are exact

A GPT is trained under each method and in each way. Its second step is estimated from the model on meta, followed by
the tracker, and counted by CUDA's allocator (`max_memory_allocated`); an estimate is right within 5 %. The table
goes to estimates.json and estimates.txt in the folder.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import peftlib
from benchmarks.gpt import GPT, GPTConfig
from benchmarks.machine import about
from benchmarks.run import NOT_ON_GPU
from peftlib.memory import MemoryReport, checkpointed, default_loss, estimate_memory, measure_memory
from peftlib.report import Table
from peftlib.storage import write_atomically

WITHIN = 0.05
METHODS: dict[str, Any] = {
    "full": None,
    "lora": peftlib.LoRA(rank=16),
    "adapter": peftlib.Adapter(dim=64),
    "prefix": peftlib.PrefixTuning(length=30, hidden=512),
}
HALF = torch.bfloat16
LARGE = GPTConfig(vocabulary=32000, width=2048, layers=12, heads=16)
QUICK = GPTConfig(width=32, layers=2, heads=2)


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to take a step."""

    dtype: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    checkpointing: bool = False
    accumulate: int = 1


WAYS = {
    "float32": Way(),
    "bfloat16": Way(dtype=HALF),
    "bfloat16, checkpointing": Way(dtype=HALF, checkpointing=True),
    "autocast": Way(autocast=HALF),
    "autocast, checkpointing, 2 accumulated": Way(autocast=HALF, checkpointing=True, accumulate=2),
}


def model_of(config: GPTConfig, method: str, way: Way, ids_BT: torch.Tensor) -> torch.nn.Module:
    """The model with a method on it, on the ids' device."""
    with ids_BT.device:
        model = GPT(config).to(way.dtype)
        if METHODS[method] is not None:
            peftlib.attach(model, METHODS[method], example=ids_BT)
    return model


def estimated(config: GPTConfig, method: str, way: Way, shape: tuple[int, int], device: str) -> MemoryReport:
    ids_BT = torch.empty(shape, dtype=torch.long, device="meta")
    return estimate_memory(
        model_of(config, method, way, ids_BT),
        ids_BT,
        autocast=way.autocast,
        checkpointing=way.checkpointing,
        accumulate=way.accumulate,
        device=device,
    )


def measured(config: GPTConfig, method: str, way: Way, shape: tuple[int, int], device: str) -> MemoryReport:
    """The same step for real, as :func:`estimate_memory` writes it down."""
    ids_BT = torch.zeros(shape, dtype=torch.long, device=device)
    model = model_of(config, method, way, ids_BT)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])

    def step() -> None:
        for _ in range(way.accumulate):
            with torch.autocast(device, way.autocast or HALF, enabled=way.autocast is not None):
                output = model(ids_BT)
                loss = default_loss(output)
            (loss if way.accumulate == 1 else loss / way.accumulate).backward()
        optimizer.step()
        optimizer.zero_grad()

    with checkpointed(model, way.checkpointing):
        step()
        return measure_memory(step, model=model)


def row(config: GPTConfig, method: str, way: str, shape: tuple[int, int], device: str) -> dict[str, Any]:
    """Estimate, tracker and allocator of one step; None for what this machine cannot measure."""
    found: dict[str, Any] = {"method": method, "way": way}
    estimate = found["estimate"] = estimated(config, method, WAYS[way], shape, device).peak_bytes
    real = None
    if device == "cpu" or torch.cuda.is_available():
        real = measured(config, method, WAYS[way], shape, device)
    found["tracker"] = None if real is None else real.peak_bytes
    given = found["allocator"] = None if real is None else real.cuda_peak_bytes
    found["estimate / allocator"] = None if given is None else estimate / given
    found["within 5 %"] = None if given is None else abs(estimate / given - 1) <= WITHIN
    return found


def table(rows: Sequence[dict[str, Any]], device: str, note: str) -> Table:
    formats: dict[str, Any] = dict.fromkeys(("estimate", "tracker", "allocator"), "bytes")
    formats["estimate / allocator"] = "{:.3f}".format
    title = f"Peak memory of one step ({device})"
    return Table(title=title, rows=rows, formats=formats, notes=[note], width=140)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.estimates", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="(default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a tiny model: shows that it runs")
    parser.add_argument("--batch", type=int, default=4, help="(default: %(default)s)")
    parser.add_argument("--length", type=int, default=1024, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder (default: %(default)s)")
    args = parser.parse_args(argv)
    config, shape = (QUICK, (2, 16)) if args.quick else (LARGE, (args.batch, args.length))
    rows = []
    for method in METHODS:
        for way in WAYS:
            print(f"{method}, {way}", file=sys.stderr, flush=True)
            rows.append(row(config, method, way, shape, args.device))
    here = args.device == "cpu" or torch.cuda.is_available()
    where = about(torch.get_num_threads(), args.device) if here else {"unavailable": NOT_ON_GPU}
    on = f"{where['device']}, torch {torch.__version__}" if here else NOT_ON_GPU
    note = f"{shape[0]} x {shape[1]} tokens, AdamW; {on}"
    text = f"{table(rows, args.device, note)}\n"
    args.out.mkdir(parents=True, exist_ok=True)
    result = {"about": where, "config": asdict(config), "shape": shape, "rows": rows}
    write_atomically(args.out / "estimates.json", (json.dumps(result, indent=1) + "\n").encode())
    write_atomically(args.out / "estimates.txt", text.encode())
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
