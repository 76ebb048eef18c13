"""Every Triton kernel, as it is launched, compiles to machine code for real GPUs, without one at hand."""

from __future__ import annotations

import dataclasses
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from peftlib.kernels import triton_ops  # noqa: E402

SHARED = 99 * 1024
"""Bytes of shared memory that a block may have on every GPU from sm_80 on."""
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclasses.dataclass
class Recorder:
    """Stands in for a kernel and keeps what it was launched with."""

    kernel: Any
    launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert all(0 < g < 2**31 for g in grid)
        return lambda *args, **kwargs: self.launches.append((self.kernel, args, kwargs))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    found: list[Any] = []
    monkeypatch.setattr(triton_ops, "wrap_triton", lambda kernel: Recorder(kernel, found))
    return found


def run_all(dtype: torch.dtype, rank: int, width: int) -> None:
    """Each operator once, on the functions behind the registration."""
    ops = {name: getattr(triton_ops, name)._init_fn for name in NAMES}
    make = lambda *shape: torch.empty(*shape, dtype=dtype)  # noqa: E731
    n = 8192
    x, a, b, s = make(n, width), make(rank, width), make(width, rank), make(rank, n)
    seed = torch.zeros((), dtype=torch.int64)
    ops["shrink"](x, a, seed, 2.0, 0.05, 1)
    ops["factor_gradient"](x, s, seed, 0.05, 1)
    ops["add_input_gradient"](x, s, a, seed, 0.05, 1)
    ops["rank_gradients"](x, b, s, 2.0)
    which = torch.zeros(4, dtype=torch.int32)
    y, factors = make(4, 32, width), make(3, rank, width)
    ops["routed_shrink"](y, factors, which, torch.ones(3))
    ops["routed_expand"](y, make(4, 32, rank), factors, which)
    ops["routed_expand"](None, make(4, 32, rank), factors, which)
    ops["routed_outer"](make(4, 32, rank), y, which, 3)


NAMES = (
    "shrink", "factor_gradient", "add_input_gradient", "rank_gradients",
    "routed_shrink", "routed_expand", "routed_outer",
)  # fmt: skip


def compiled(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any], capability: int) -> Any:
    """What the launch would compile on a GPU of that capability."""
    signature, constants, attributes = {}, {}, {}
    options = {n: kwargs[n] for n in ("num_warps", "num_stages") if n in kwargs}
    given = dict(zip([p.name for p in kernel.params], args, strict=False)) | kwargs
    for place, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name] = "constexpr"
            constants[place,] = value
        elif isinstance(value, Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            attributes[place,] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
                attributes[place,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def spilled(cubin: bytes, where: Path) -> int:
    """Bytes of stack: registers that did not suffice."""
    file = where / "kernel.cubin"
    file.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    report = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    return max(int(size) for size in re.findall(r"STACK:(\d+)", report))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("capability", [80, 86, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rank, width", [(16, 4096), (64, 4096), (5, 1000)])
def test_for_real_gpus(
    capability: int, dtype: torch.dtype, rank: int, width: int, launches: list[Any], tmp_path: Path
) -> None:
    run_all(dtype, rank, width)
    kernels = {kernel.fn.__name__ for kernel, _, _ in launches}
    assert kernels == {n for n in vars(triton_ops) if n.endswith("_kernel")}
    for kernel, args, kwargs in launches:
        binary = compiled(kernel, args, kwargs, capability)
        assert binary.asm["cubin"]
        assert binary.metadata.shared <= SHARED, (kernel.fn.__name__, binary.metadata.shared)
        # Factors that do not fit into registers would be read over and over.
        print(
            kernel.fn.__name__,
            capability,
            dtype,
            rank,
            binary.metadata.shared,
            binary.asm["ptx"].count("mma"),
        )
