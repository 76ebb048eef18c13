"""What the thousandth tuning costs, against the first.

    python -m benchmarks.tunings                # up to 1,000 LoRAs of rank 4 on 224 linears of width 64
    python -m benchmarks.tunings --peers        # HF peft beside it (needs the package peft)

Everything runs on one thread; times are processor time, medians of several rounds, and shown as ratios to the same
operation with one tuning on the model. Milliseconds are of the machine that is named; only the ratios mean anything
elsewhere.

Left out on purpose: quality, the size of the tunings, which does not depend on their number, and rows of one batch
through several, which are cases of `benchmarks.run`.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import peftlib
from benchmarks.models import stack
from peftlib.report import Table

BLOCKS, WIDTH, RANK = 32, 64, 4
"""7 linears a block: 224 of them."""


def make_model(blocks: int = BLOCKS, width: int = WIDTH) -> nn.Module:
    return stack("seven", width, blocks)


def width_of(model: nn.Module) -> int:
    return next(model.parameters()).shape[1]


def milliseconds(run: Callable[[], Any], rounds: int) -> float:
    """Median processor time of a call."""
    spent = []
    for _ in range(rounds):
        started = time.process_time()
        run()
        spent.append(time.process_time() - started)
    return 1000 * statistics.median(spent)


def ours(counts: Sequence[int], folder: Path, rounds: int) -> Iterator[dict[str, Any]]:
    """The operations of peftlib with so many tunings on the model."""
    model, path = make_model(), folder / "tuning.safetensors"
    made = peftlib.attach(model, peftlib.LoRA(rank=RANK), name="made")
    made.save(path)
    made.detach()
    x = torch.randn(1, width_of(model))
    floor = milliseconds(path.read_bytes, rounds)
    for count in counts:
        for i in range(len(peftlib.tunings(model)), count):
            peftlib.load(model, path, name=f"t{i}").disable()
        peftlib.use(model, "t0")
        have = peftlib.tunings(model)

        def load_one_more() -> None:
            peftlib.load(model, path, name="more").detach()

        def within(make: Callable[[], Any]) -> None:
            with make():
                pass

        first, other = have["t0"], peftlib.load(model, path, name="other")
        other.disable()
        save = functools.partial(other.save, path)
        with torch.no_grad():
            yield {
                "library": "peftlib",
                "tunings": count,
                "load": milliseconds(load_one_more, rounds),
                "switch": milliseconds(lambda: within(lambda: peftlib.use(model, "other")), rounds) / 2,
                "disabled": milliseconds(functools.partial(within, first.disabled), rounds),
                "route": milliseconds(lambda: within(lambda: peftlib.route(model, ["t0", "other"])), rounds),
                "save": milliseconds(save, rounds),
                "forward": milliseconds(lambda: model(x), rounds),
                "read": floor,
            }
        other.detach()


def theirs(counts: Sequence[int], folder: Path, rounds: int) -> Iterator[dict[str, Any]]:
    """The same with HF peft, which has neither a route without a loop nor a fresh base beside."""
    import peft

    names = ["q", "k", "v", "o", "gate", "up", "down"]
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names, init_lora_weights=False)
    model: Any = peft.get_peft_model(make_model(), config, adapter_name="t0")
    model.save_pretrained(str(folder), selected_adapters=["t0"])
    x = torch.randn(1, width_of(model))
    have = 1
    for count in counts:
        for i in range(have, count):
            model.load_adapter(str(folder / "t0"), adapter_name=f"t{i}")
        have = count

        def load_one_more() -> None:
            model.load_adapter(str(folder / "t0"), adapter_name="more")
            model.delete_adapter("more")

        def switch() -> None:
            model.set_adapter("other")
            model.set_adapter("t0")

        def disabled() -> None:
            with model.disable_adapter():
                pass

        model.load_adapter(str(folder / "t0"), adapter_name="other")
        with torch.no_grad():
            yield {
                "library": "HF peft",
                "tunings": count,
                "load": milliseconds(load_one_more, rounds),
                "switch": milliseconds(switch, rounds) / 2,
                "disabled": milliseconds(disabled, rounds),
                "save": milliseconds(
                    lambda: model.save_pretrained(str(folder / "saved"), selected_adapters=["other"]), rounds
                ),
                "forward": milliseconds(lambda: model(x), rounds),
            }
        model.delete_adapter("other")


def table(rows: list[dict[str, Any]]) -> Table:
    operations = ("load", "switch", "disabled", "route", "save", "forward")
    first = {row["library"]: row for row in reversed(rows)}
    shown = [
        {"library": row["library"], "tunings": row["tunings"]}
        | {
            name: f"{row[name]:.2f} ({row[name] / first[row['library']][name]:.2f})" if name in row else ""
            for name in operations
        }
        for row in rows
    ]
    title = (
        f"224 linears, LoRA rank {RANK}; milliseconds of one thread, and the ratio to one tuning. Reading the file "
        f"takes {rows[0]['read']:.2f} ms.\n"
    )
    return Table(rows=shown, title=title)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tunings", description=__doc__.split("\n")[0])
    parser.add_argument("--counts", default="1,10,50,1000", help="numbers of tunings (default: %(default)s)")
    parser.add_argument("--peers", action="store_true", help="HF peft as well, up to 50 tunings")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("tunings"), help="folder (default: %(default)s)")
    args = parser.parse_args(argv)
    counts = [int(n) for n in args.counts.split(",")]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = list(ours(counts, Path(folder), args.rounds))
        if args.peers:
            rows += theirs([n for n in counts if n <= 50], Path(folder), args.rounds)
    shown = str(table(rows))
    print(shown)
    args.out.mkdir(parents=True, exist_ok=True)
    about = {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    (args.out / "tunings.txt").write_text(shown + "\n", encoding="utf-8")
    results = {**about, "rows": rows}
    (args.out / "tunings.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
