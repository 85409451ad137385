"""A run that is killed and resumed, small, through the script that does it at full size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.runs import apart


def test_runs_that_differ_in_a_step_or_a_loss() -> None:
    assert apart({1: 2.0, 2: 4.0}, {1: 2.0, 2: 4.0}) == 0
    assert apart({1: 2.0, 2: 4.0}, {1: 2.0, 2: 3.0}) == 0.25
    assert apart({1: 2.0, 2: 4.0}, {1: 2.0}) == float("inf")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["glm", "qwen3-coder"])
def test_killed_and_resumed(tmp_path: Path, model: str) -> None:
    out = tmp_path / "rows.json"
    command = [sys.executable, "-m", "benchmarks.runs", model, "--tiny", "--folder", tmp_path / "made"]
    command += ["--work", tmp_path / "runs", "--steps", "12", "--kill-at", "5", "--seq", "128", "--out", out]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [row] = json.loads(out.read_text())
    assert row["finite"]
    assert row["killed_at"] >= 5
    assert (row["resumed_apart"], row["again_apart"]) == (0, 0)
    assert row["last_loss"] < row["first_loss"]
