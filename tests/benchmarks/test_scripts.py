"""Every script can at least be imported: most of them run on a GPU alone."""

import importlib
from pathlib import Path

import pytest

import benchmarks

SCRIPTS = sorted(path.stem for path in Path(benchmarks.__path__[0]).glob("*.py") if not path.stem.startswith("__"))
# tests/ops/kernels imports these
NEED_TRITON = ("products", "rows")


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script not in NEED_TRITON])
def test_imports(script: str) -> None:
    importlib.import_module(f"benchmarks.{script}")


def test_those_that_need_triton_are_there() -> None:
    assert {*NEED_TRITON} <= {*SCRIPTS}
