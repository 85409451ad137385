"""Every kernel compiles for Hopper as the layers of real models launch it, and the passes keep to the registers."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.test_scripts import NEED_TRITON

# the products have a budget of their own, and their tiles are chosen by time
PASSES = (
    "rows",
    "combine",
    "sum_parts",
    "outer",
    "both",
    "sum_chunks",
    "dequantize",
    "transpose",
    "count",
    "place",
    "dots",
    "adamw_8bit",
)
FEW = ("matrix", "pairs", "restore")


@pytest.mark.parametrize(
    "jobs",
    [
        pytest.param(["qwen3:2048:dequant-exact", "qwen3:2048:scaled-fp8", "qwen3:2:few"], id="block scales"),
        pytest.param(["glm:32768:dequant-exact", "glm:32768:scaled-fp8", "glm:2:few"], id="channel scales"),
        pytest.param(["glm:2048:plain", "glm:32768:plain", "glm:0:adamw_8bit"], id="plain"),
    ],
)
def test_compiles_for_sm_90(jobs: list[str], tmp_path: Path) -> None:
    known = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.ops.kernels.compiled", *jobs],
        capture_output=True, text=True, env=known | {"TRITON_CACHE_DIR": str(tmp_path)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    kernels = [json.loads(line) for line in run.stdout.splitlines()]
    print(*kernels, sep="\n")
    names = {kernel["kernel"].removesuffix("_kernel") for kernel in kernels}
    assert {"product", *PASSES[:4]} <= names
    if any(job.endswith(":few") for job in jobs):
        assert {*FEW} <= names
    if any(job.endswith(":plain") for job in jobs):
        assert {"dots", "adamw_8bit"} <= names
    spilled = [one for one in kernels if one["stack"] and one["kernel"].removesuffix("_kernel") in PASSES + FEW]
    assert not spilled, spilled


@pytest.mark.parametrize("script", NEED_TRITON)
def test_scripts_that_need_triton_import(script: str) -> None:
    importlib.import_module(f"benchmarks.{script}")
