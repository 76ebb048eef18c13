"""Programs that run in several processes at once: ``script`` gets its rank, the world's size and what is given."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

END = """
import os, sys
import torch.distributed
if torch.distributed.is_initialized():
    torch.distributed.barrier()
sys.stdout.flush()
os._exit(0)
"""
"""Together, and without the interpreter's end: gloo's threads may abort in it while a mesh still holds their group."""
ROOT = Path(__file__).parent.parent


def start(script: str, world: int, *given: Any) -> list[subprocess.Popen[str]]:
    """The processes, rank 0 first."""
    if not torch.distributed.is_available():
        pytest.skip("torch is built without torch.distributed")
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script) + END]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen([*command, str(rank), str(world), *map(str, given)], env=environment, **pipes)
        for rank in range(world)
    ]


def launch(script: str, world: int, *given: Any) -> list[str]:
    """What each process printed; all have to end well."""
    processes = start(script, world, *given)
    said = []
    for process in processes:
        said.append(process.communicate(timeout=300))
        if process.returncode:
            for other in processes:
                other.kill()
    assert not any(process.returncode for process in processes), "\n".join(errors for _, errors in said)
    return [printed for printed, _ in said]
