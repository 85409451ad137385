"""Uninitialised memory that shows: NaN in floats, the largest value in integers."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def poisoned() -> Iterator[None]:
    """Within, ``torch.empty`` and its kin are filled (torch does so under deterministic algorithms)."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)
