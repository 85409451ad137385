"""Triton's interpreter runs this folder on the CPU (`make test-kernels`); tests/gpu runs the same tests compiled."""

import os
from collections.abc import Iterator

import pytest

from tests.ops.kernels.poison import poisoned

# Compiled kernels need a GPU, and other environments have no Triton.
if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """``torch.empty`` gives NaN: an element that no kernel writes turns a test red."""
    with poisoned():
        yield
