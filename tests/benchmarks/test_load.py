"""The benchmark of loading, in a size for a CPU."""

import json
import subprocess
import sys

from benchmarks.checkpoints import write


def test_every_way_is_measured(tmp_path):
    size = write("glm", tmp_path / "glm", tiny=True, shard_bytes=1_000_000)
    command = [sys.executable, "-m", "benchmarks.load", str(tmp_path / "glm"), "--out", str(tmp_path / "rows.json")]
    subprocess.run([*command, "--only", "warm"], check=True, capture_output=True)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["way"] for row in rows] == ["read", "load", "stock"]
    for row in rows:
        # Headers are read too.
        assert size / 1e9 < row["gb"] < 1.2 * size / 1e9
        assert row["gb_per_s"] * row["seconds"] > 0
        assert row["of_sequential"] > 0
