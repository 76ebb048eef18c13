"""Runs ``triton_cases.py`` in a process of its own: under triton's interpreter, and on a GPU where there is one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CASES = Path(__file__).with_name("triton_cases.py")


def run(*options: str, **environment: str) -> None:
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES), *options],
        capture_output=True,
        text=True,
        cwd=CASES.parents[2],
        env=os.environ | environment,
    )
    assert found.returncode == 0, found.stdout[-8000:] + found.stderr[-2000:]
    passed = re.search(r"(\d+) passed", found.stdout)
    assert passed is not None
    assert int(passed[1]) > 30


def test_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    run(TRITON_INTERPRET="1")


@pytest.mark.slow
def test_under_the_interpreter_at_length() -> None:
    pytest.importorskip("triton")
    run(TRITON_INTERPRET="1", EXAMPLES="40")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu() -> None:
    run(TRITON_INTERPRET="0", EXAMPLES="40")
