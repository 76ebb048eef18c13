"""Whether the Triton kernels run for a tensor. Nobody else asks what machine this is.

They do for CUDA tensors in float32, bfloat16 and float16, up to rank 64, where triton can be imported and its kernels
have passed a trial on that very device, in that dtype and padded rank: compiled, launched, and agreeing with torch. The
first call makes the trial; one that fails is logged once, and torch's own operators run from then on. So an unknown GPU
is slower, never an error.

Importing this file does not import triton.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

_LOG = logging.getLogger(__name__)
MAX_RANK = 64
"""Beyond it the products are no longer thin, and cuBLAS does them as well."""
PLAIN = (Tensor, nn.Parameter, FakeTensor)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_found: dict[tuple[torch.device, torch.dtype, int], bool] = {}


def ready(x: Tensor, factor: Tensor, rank: int) -> bool:
    """Whether :func:`operators` are right for products of ``x`` with a factor of that rank, here and now."""
    return (
        takes(x)
        and type(x) in PLAIN
        and type(factor) in PLAIN
        and x.dtype in _DTYPES
        and x.dtype is factor.dtype
        and 0 < rank <= MAX_RANK
        and _passed(x.device, x.dtype, rank)
    )


def operators() -> Any:
    """``torch.ops.peftlib`` with what is around it; only where something was :func:`ready`."""
    from peftlib.kernels import triton_ops

    return triton_ops


def padded(rank: int) -> int:
    """The rank that the kernels compute with: a power of two, 16 or more."""
    return max(16, 1 << (rank - 1).bit_length())


def takes(x: Tensor) -> bool:
    """Whether they run for tensors on that device at all."""
    return x.is_cuda


def _passed(device: torch.device, dtype: torch.dtype, rank: int) -> bool:
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    key = device, dtype, padded(rank)
    if key in _found:
        return _found[key]
    try:
        operators()
    except ImportError:  # nothing to say: triton is optional
        return _found.setdefault(key, False)
    if isinstance(torch.empty(0), FakeTensor):
        return True  # only shapes are asked for
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return False  # a capture cannot load kernels; the same call runs torch's operators in it each time
    return _found.setdefault(key, _trial(*key))


# What torch.compiler.assume_constant_result sets, without importing the compiler for it.
_passed._dynamo_marked_constant = True  # type: ignore[attr-defined]


@torch.no_grad()
def _trial(device: torch.device, dtype: torch.dtype, rank: int) -> bool:
    """Every kernel once, on a problem so small that it costs what compiling costs."""
    try:
        with torch.cuda.device_of(torch.empty(0, device=device)), torch.autocast(device.type, enabled=False):
            worst = _worst_error(device, dtype, rank)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001  whatever a compiler or a driver may raise
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    else:
        if worst < 0.02:
            return True
        reason = f"a result is off by {worst:.1%}"
    _LOG.warning("Triton kernels do not run on %s in %s (%s); torch's operators do.", device, dtype, reason)
    return False


def _worst_error(device: torch.device, dtype: torch.dtype, rank: int) -> float:
    """The largest relative error over the results of all operators; NaN counts as the whole."""
    ops = operators()
    waves = lambda *shape: torch.arange(shape[0] * shape[1], device=device).view(shape).sin().to(dtype)  # noqa: E731
    x, a, b, dy = waves(64, 128), waves(rank, 128), waves(256, rank), waves(64, 256)
    seed, p = torch.tensor(1, device=device), 0.5
    s = ops.shrink(x, a, seed, 1.0, 0.0, 1)
    g, db = ops.rank_gradients(dy, b, s, 1.0)
    da = ops.factor_gradient(x, g, seed, 0.0, 1)
    dx = x.clone()
    ops.add_input_gradient(dx, g, a, seed, 0.0, 1)
    found = [
        (s, a @ x.T),
        (g, b.T @ dy.T),
        (db, (s @ dy).T),
        (da, g @ x),
        (dx, x + g.T @ a),
    ]
    # One draw, seen from three sides: drop(x) = x keep.
    keep = torch.zeros_like(x)
    ones = torch.ones(1, 64, device=device, dtype=dtype)
    ops.add_input_gradient(keep, ones, torch.ones(1, 128, device=device, dtype=dtype), seed, p, 1)
    found += [
        (ops.shrink(x, a, seed, 1.0, p, 1), a @ (x * keep).T),
        (ops.factor_gradient(x, g, seed, p, 1), g @ (x * keep)),
    ]
    which = torch.tensor([0, -1, 1, 0], device=device, dtype=torch.int32)
    scale = torch.ones(2, device=device)
    x_BTC, f_URC = x.view(4, 16, 128), torch.stack([a, -a])
    s_BTR = ops.routed_shrink(x_BTC, f_URC, which, scale)
    sign = torch.tensor([1, 0, -1, 1], device=device, dtype=dtype).view(4, 1, 1)
    per_row = s_BTR.mT @ x_BTC
    found += [
        (s_BTR, sign * (x_BTC @ a.T)),
        (ops.routed_expand(x_BTC, s_BTR, f_URC, which), x_BTC + sign * (s_BTR @ a)),
        (ops.routed_outer(s_BTR, x_BTC, which, 2), torch.stack([per_row[0] + per_row[3], per_row[2]])),
    ]
    errors = [(ours - theirs).float().norm() / theirs.float().norm() for ours, theirs in found]
    return float(torch.stack(errors).nan_to_num(nan=1.0).max())
