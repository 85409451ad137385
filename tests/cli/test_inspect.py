"""``octavo inspect``: what a person reads, what a program reads, and how it fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.checkpoints import LAYOUTS, Built, copy_of, truncate

Get = Callable[..., Built]


def octavo(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "octavo", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "160", **environment},
    )


def test_tables(built: Get):
    done = octavo("inspect", built(arch="glm", layout="ct-channel", files="shuffled", mixed=True).folder)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.strip() for line in done.stdout.splitlines()]
    assert lines[0].startswith("Glm4MoeLiteForCausalLM, compressed-tensors: FP8 weights (channel), scales BF16, activ")
    row = next(line for line in lines if line.startswith("1   routed experts"))
    assert row.split()[3:5] == ["BF16", "18"]
    assert "ignored: 'model.layers.1.mlp.experts.0.down_proj' and 17 more" in row
    assert next(line for line in lines if line.startswith("2   routed experts")).endswith("by group_0")
    assert lines[-1] == "Every one of 113 tensors in 3 files is accounted for."


@pytest.mark.parametrize("layout", ["bf16", *LAYOUTS])
def test_json(built: Get, layout):
    case = built(arch="qwen", layout=layout, files="shuffled")
    done = octavo("inspect", case.folder, "--json")
    assert done.returncode == 0
    found = json.loads(done.stdout)
    size = sum(file.stat().st_size for file in case.folder.glob("*.safetensors"))
    assert found["architectures"] == ["Qwen3MoeForCausalLM"]
    assert found["accounting"]["tensors"] == found["accounting"]["accounted"]
    assert found["accounting"]["tensors"] == sum(kind["tensors"] for kind in found["kinds"].values())
    assert sum(file["bytes"] for file in found["files"]) == size > found["accounting"]["bytes"] > 0.95 * size
    assert len(found["files"]) == 3
    if layout == "bf16":
        assert found["format"] is None
        return
    assert sum(found["format"]["layouts"].values()) == len(case.quantized) == found["kinds"]["FP8 codes"]["tensors"]
    assert found["format"]["scale_format"] == ("ue8m0" if layout == "ue8m0" else "float")


def test_a_damaged_checkpoint_is_one_sentence_and_exit_code_1(built: Get, tmp_path):
    folder = copy_of(built(arch="qwen", layout="ct-channel"), tmp_path / "x")
    truncate(folder / "model.safetensors", 9)
    done = octavo("inspect", folder)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert "model.safetensors is cut off" in done.stderr
    done = octavo("inspect", folder, "--json")
    assert done.returncode == 1
    assert "is cut off" in json.loads(done.stdout)["error"]


def cached(root: Path, folder: Path, commit: str) -> None:
    """The folder as a model of the hub's cache, under ``root``."""
    repo = root / "models--someone--tiny"
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir(exist_ok=True)
    (repo / "refs").mkdir(exist_ok=True)
    (repo / "refs" / "main").write_text(commit)
    for file in folder.iterdir():
        blob = repo / "blobs" / f"{commit[0]}-{file.name}"
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")


def test_a_hub_id_in_the_local_cache(built: Get, tmp_path):
    old, new = "1" * 40, "2" * 40
    cached(tmp_path, built(arch="qwen", layout="ct-channel").folder, old)
    cached(tmp_path, built(arch="qwen", layout="fp8-block").folder, new)
    cache = {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    for arguments, method in (((), "fp8"), (("--revision", old), "compressed-tensors")):
        done = octavo("inspect", "someone/tiny", "--json", *arguments, **cache)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["format"]["quant_method"] == method
    done = octavo("inspect", "someone/tiny", "--revision", "gone", **cache)
    assert done.returncode == 1
    assert "no snapshot of it at revision 'gone'" in done.stderr
    done = octavo("inspect", "someone/other", **cache)
    assert done.returncode == 1
    assert "'someone/other' is not a folder here" in done.stderr
    assert "hf download someone/other" in done.stderr


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere", "a/b/c"])
def test_a_path_that_is_not_there(name):
    done = octavo("inspect", name)
    assert done.returncode == 1
    assert f"{name} does not exist" in done.stderr


@pytest.mark.parametrize("name", ["a--b", "what is this", "-"])
def test_what_is_neither_path_nor_id(name):
    done = octavo("inspect", "--", name)
    assert done.returncode == 1
    assert "is not a folder here" in done.stderr
    assert "Traceback" not in done.stderr
