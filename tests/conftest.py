"""Every test starts from the same seed, on one thread."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from peftlib.kernels import causal_prefix, low_rank

# The same examples on every machine and in every run: a failure seen once is seen by everybody.
settings.register_profile("tests", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("tests")

# Two workers share two cores, and sums must not depend on how many threads there are.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def kernels_for_small_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests are small; what runs for large inputs shall run in them."""
    monkeypatch.setattr(low_rank, "FEW", 0)
    monkeypatch.setattr(causal_prefix, "LONG", 0)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Let ``torch.empty`` give NaN, so that a parameter nobody initialised, or a padding nobody wrote, shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
