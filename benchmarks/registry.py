"""Which cases there are, as data: what runs, with which numbers, and what is aimed at.

A case is named `family/what`; a family is one table and one plot. The targets stand where the first design put them,
beside what its prototypes reached and what HF peft did there; results say what is reached now.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from benchmarks.cases import generation, methods, overhead, routed, setup, steps
from benchmarks.contest import Contest
from benchmarks.peers import BASE


class UnknownCase(Exception):
    """No case has that name."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """At most this, for peftlib, with and without shared inputs.

    Attributes:
        at_most: in the case's metric.
        seen: the best that prototypes reached.
        hf: what HF peft reached beside them.
    """

    at_most: float
    seen: str = ""
    hf: str = ""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One contest.

    Attributes:
        name: `family/what`.
        make: the contest, from the parameters.
        parameters: what it runs with.
        quick: what differs in a quick run, which shows that the case works and nothing else.
        metric: "ratio" to the floor; "extra": microseconds a piece above the floor; "ms": milliseconds of a run.
        clock: as in `benchmarks.timing`; None is the fair one for the threads and the device.
        unit: of a run by itself: "ms" or "bytes".
        rounds: how often.
        threads: of torch.
        device: where.
        at: an axis and a place on it, for cases that are points of a line.
        target: what is aimed at.
    """

    name: str
    make: Callable[..., Contest]
    parameters: Mapping[str, Any]
    quick: Mapping[str, Any] = field(default_factory=dict)
    metric: str = "ratio"
    clock: str | None = None
    unit: str = "ms"
    rounds: int = 11
    threads: int = 1
    device: str = "cpu"
    at: tuple[str, int] | None = None
    target: Target | None = None

    @property
    def family(self) -> str:
        return self.name.split("/")[0]

    def changed(self, *, threads: int | None, dtype: str | None, device: str | None) -> Case:
        """The case otherwise run. It has another name then, and the target, set for other conditions, is not its own.

        Raises:
            UnknownCase: the case has no dtype.

        >>> CASES["step/768-fp32"].changed(threads=2, dtype=None, device=None).name
        'step/768-fp32 threads=2'
        """
        change: dict[str, Any] = {}
        said = []
        if threads is not None and threads != self.threads:
            change["threads"] = threads
            said.append(f"threads={threads}")
        if dtype is not None:
            if "dtype" not in self.parameters:
                raise UnknownCase(
                    f"{self.name} has no dtype to choose: leave --dtype out, or choose other cases"
                )
            if dtype != self.parameters["dtype"]:
                change["parameters"] = {**self.parameters, "dtype": dtype}
                said.append(f"dtype={dtype}")
        if device is not None and device != self.device:
            change["device"] = device
            said.append(f"device={device}")
        if not said:
            return self
        return dataclasses.replace(self, **change, name=f"{self.name} {' '.join(said)}", target=None)


TINY: dict[str, Any] = {"width": 64, "layers": 1, "batch": 2, "tokens": 24}
ALL_LINEAR: dict[str, Any] = {
    "block": "decoder",
    "width": 768,
    "dtype": "float32",
    "layers": 2,
    "batch": 4,
    "tokens": 128,
}
QKV = ALL_LINEAR | {"block": "qkv"}
LAYER: dict[str, Any] = {
    "block": "linear",
    "width": 768,
    "dtype": "float32",
    "layers": 1,
    "batch": 4,
    "tokens": 128,
}
# M = 8192 rows through K = N = 4096
H200: dict[str, Any] = {
    "width": 4096,
    "dtype": "bfloat16",
    "layers": 1,
    "batch": 4,
    "tokens": 2048,
    "rank": 16,
}
BF16: dict[str, Any] = {"dtype": "bfloat16"}
DROPOUT: dict[str, Any] = {"dropout": 0.05}
COMPILED = {"compiled": "inductor"}


def _step(what: str, kind: Mapping[str, Any], target: Target | None = None, **more: Any) -> Case:
    # small enough for any rank's, width's and number's own case to be quick
    quick = {**TINY, "rank": min(kind.get("rank", 8), 16), "tunings": min(kind.get("tunings", 1), 3)}
    if "compiled" in kind:
        quick["compiled"] = "eager"
    name = what if "/" in what else f"step/{what}"
    return Case(name=name, make=steps.time_of_step, parameters=kind, quick=quick, target=target, **more)


def _bytes(what: str, make: Callable[..., Contest], kind: Mapping[str, Any], target: Target) -> Case:
    return Case(
        name=f"memory/{what}",
        make=make,
        parameters=kind,
        quick=TINY,
        target=target,
        clock="value",
        unit="bytes",
        rounds=1,
    )


def _routed(what: str, tokens: int, tunings: int, against: str, target: Target) -> Case:
    kind = {"width": 768, "layers": 2, "rows": 32, "tokens": tokens, "tunings": tunings, "against": against}
    quick = {"width": 32, "layers": 1, "rows": 4, "tunings": 2}
    return Case(name=f"routed/{what}", make=routed.forward, parameters=kind, quick=quick, target=target)


_LIST: Sequence[Case] = (
    # whole decoder steps: LoRA of rank 8 on q, k, v, o, up and down
    _step("768-fp32", ALL_LINEAR, Target(at_most=1.05, seen="1.048", hf="1.15")),
    _step("768-bf16", ALL_LINEAR | BF16, Target(at_most=1.05, seen="1.052", hf="1.39")),
    _step("768-dropout", ALL_LINEAR | DROPOUT, Target(at_most=1.08, seen="1.084", hf="1.30")),
    _step("768-bf16-dropout", ALL_LINEAR | BF16 | DROPOUT),
    _step("768-compiled", ALL_LINEAR | COMPILED, Target(at_most=1.09, seen="1.09", hf="1.17")),
    _step("512-fp32", ALL_LINEAR | {"width": 512}, Target(at_most=1.08)),
    _step("512-bf16", ALL_LINEAR | {"width": 512} | BF16, Target(at_most=1.10)),
    _step("512-dropout", ALL_LINEAR | {"width": 512} | DROPOUT, Target(at_most=1.13)),
    _step(
        "512-two-threads",
        ALL_LINEAR | {"width": 512},
        Target(at_most=1.13, seen="1.12-1.16", hf="1.24-1.30"),
        threads=2,
        rounds=31,
    ),
    _step("qkv-fp32", QKV, Target(at_most=1.05, seen="1.052", hf="1.24"), rounds=21),
    _step("qkv-bf16", QKV | BF16, Target(at_most=1.09, seen="1.092", hf="1.41"), rounds=21),
    # one layer by itself
    _step("layer/fp32", LAYER, rounds=41),
    _step("layer/bf16", LAYER | BF16, rounds=41),
    _step("layer/dropout", LAYER | DROPOUT, rounds=41),
    _step("layer/gate-up", LAYER | {"block": "gate-up"}, rounds=41),
    # bytes
    _bytes("saved-fp32", steps.saved_bytes, ALL_LINEAR, Target(at_most=1.60, seen="1.59", hf="1.59")),
    _bytes("saved-bf16", steps.saved_bytes, ALL_LINEAR | BF16, Target(at_most=1.60, seen="1.59", hf="2.76")),
    _bytes(
        "saved-dropout", steps.saved_bytes, ALL_LINEAR | DROPOUT, Target(at_most=1.68, seen="1.68", hf="2.76")
    ),
    _bytes("peak-fp32", steps.peak_bytes, ALL_LINEAR, Target(at_most=1.41, seen="1.41", hf="1.49")),
    _bytes("peak-bf16", steps.peak_bytes, ALL_LINEAR | BF16, Target(at_most=1.41, hf="2.64")),
    # the other methods
    *(
        Case(
            name=f"method/{kind}",
            make=methods.time_of_step,
            parameters={"kind": kind, "width": 384, "layers": 4, "batch": 4, "tokens": 128},
            quick=TINY | {"length": 3, "hidden": 8},
        )
        for kind in methods.METHODS
    ),
    # what happens once
    Case(
        name="setup/injection",
        make=setup.injection,
        parameters={"width": 8192, "layers": 80},
        quick={"width": 64, "layers": 2},
        metric="ms",
        rounds=7,
        target=Target(at_most=30, seen="17", hf="790"),
    ),
    Case(
        name="setup/import",
        make=setup.importing,
        parameters={"packages": ("torch", "peftlib", "peft", "loralib")},
        quick={"packages": ("torch", "peftlib")},
        clock="children",
        rounds=7,
        target=Target(at_most=1.05, seen="1.00", hf="3.17"),
    ),
    Case(
        name="setup/merge",
        make=setup.merging,
        parameters={"width": 1024, "layers": 8, "dtype": "float32"},
        quick={"width": 32, "layers": 2},
        target=Target(at_most=1.2, seen="1.0", hf="2.0-2.5"),
    ),
    # 32 rows through several tunings
    _routed("single-8", 1, 8, BASE, Target(at_most=1.13, seen="1.13", hf="1.60")),
    _routed("single-32", 1, 32, BASE, Target(at_most=1.35, seen="1.35", hf="2.77")),
    _routed("sequences-8", 64, 8, routed.ONE, Target(at_most=1.10)),
    _routed("sequences-32", 64, 32, routed.ONE, Target(at_most=1.10)),
    # what a wrapped linear costs by itself
    *(
        Case(
            name=f"linear/{what}",
            make=overhead.per_linear,
            parameters={"width": 64, "rows": 8, "layers": 16, "calls": 10, "grad": grad},
            quick={"layers": 2, "calls": 1},
            metric="extra",
            rounds=41,
            target=target,
        )
        for what, grad, target in (
            ("no-grad", False, Target(at_most=8, seen="6.7", hf="32")),
            ("grad", True, Target(at_most=55, seen="52", hf="93")),
        )
    ),
    Case(
        name="generation/greedy",
        make=generation.greedy,
        parameters={"width": 512, "layers": 4, "batch": 1, "prompt": 16, "new": 48},
        quick={"width": 64, "layers": 1, "prompt": 4, "new": 3},
        rounds=11,
    ),
    # how it grows, each from the step of q, k, v and o, up and down at width 512
    *(
        _step(
            f"scaling/{axis}-{n}",
            ALL_LINEAR | {"width": 512, "layers": 1} | {axis: n},
            at=(axis, n),
            rounds=7,
        )
        for axis, places in {
            "rank": (1, 8, 64, 256),
            "width": (256, 512, 1024),
            "layers": (1, 2, 4),
            "tunings": (1, 8, 64),
        }.items()
        for n in places
    ),
    # an H200: 8192 rows, 4096 wide, rank 16, bf16
    *(
        _step(f"gpu/{what}", H200 | kind, target, device="cuda", rounds=51)
        for what, kind, target in (
            ("linear", {"block": "linear"}, Target(at_most=1.15, hf="1.9 (model)")),
            ("linear-dropout", {"block": "linear"} | DROPOUT, Target(at_most=1.20)),
            ("qkv", {"block": "qkv"}, Target(at_most=1.08)),
            ("gate-up", {"block": "gate-up"}, Target(at_most=1.08)),
        )
    ),
)
CASES: Mapping[str, Case] = MappingProxyType({case.name: case for case in _LIST})
FAMILIES: Sequence[str] = tuple(dict.fromkeys(case.family for case in _LIST))
assert len(CASES) == len(_LIST), "two cases have one name"


def select(patterns: Sequence[str]) -> list[Case]:
    """The cases that names, families, globs or "all" stand for, in the registry's order.

    Raises:
        UnknownCase: a pattern stands for none; with the nearest names.

    >>> [case.name for case in select(["setup", "routed/single-*"])]
    ['setup/injection', 'setup/import', 'setup/merge', 'routed/single-8', 'routed/single-32']
    """
    chosen: set[str] = set()
    for pattern in patterns:
        found = {
            name
            for name, case in CASES.items()
            if pattern in ("all", case.family) or fnmatch.fnmatchcase(name, pattern)
        }
        if not found:
            near = difflib.get_close_matches(pattern, [*FAMILIES, *CASES], n=3, cutoff=0.4)
            raise UnknownCase(
                f"no case {pattern!r}"
                + (f"; near it: {', '.join(near)}" if near else "")
                + ". Without a CASE, `python -m benchmarks.run` lists all."
            )
        chosen |= found
    return [case for name, case in CASES.items() if name in chosen]
