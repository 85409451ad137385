"""``octavo grpo`` on two ranks: each samples its own prompts, one writes, and no rank waits for the other in vain."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml

import octavo
from octavo.train.metrics import read_metrics
from tests.curves import dequantized

from .grpo_runs import prompts, tree
from .vllm_server import VllmLike, serving


def on_two_ranks(config: dict, path) -> dict:
    path.write_text(yaml.safe_dump(config))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*torchrun, "-m", "octavo", "grpo", str(path), "--json"],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count('"adapter"') == 1, "only rank 0 speaks"
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("reward", ["vowels", "nothing"])
def test_two_ranks(tmp_path, checkpoint, reward):
    config = tree(checkpoint, prompts(tmp_path / "prompts.jsonl"), tmp_path / "run")
    if reward == "nothing":
        config["rewards"] = [{"function": "format", "arguments": {"pattern": "no model writes this"}}]
    assert on_two_ranks(config, tmp_path / "run.yaml")["step"] == 3
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    lines = read_metrics(tmp_path / "run" / "completions.jsonl")
    assert [line["step"] for line in lines] == [step for step in (1, 2, 3) for _ in range(2 * 8)]
    for record in records:
        those = [line for line in lines if line["step"] == record["step"]]
        assert len({line["prompt"] for line in those}) == 4, "two prompts on each rank"
        mean = sum(next(iter(line["rewards"].values())) for line in those) / len(those)
        assert record["reward"] == pytest.approx(mean, rel=1e-5)
        assert record["agreement_worst"] < 1e-4


def test_two_ranks_share_a_server(tmp_path):
    name = "qwen-tiny"
    state = VllmLike(dequantized(octavo.demo.checkpoint(name), tmp_path / "plain", torch.float32))
    with serving(state) as address:
        config = tree(octavo.demo.checkpoint(name), prompts(tmp_path / "prompts.jsonl"), tmp_path / "run", steps=2)
        config["rollout"] = {"max_new_tokens": 3, "server": address, "stop_mean": 5e-3}
        config["train"] |= {"prompts": 1, "completions": 2}
        on_two_ranks(config, tmp_path / "run.yaml")
    paths = [path.removeprefix("/v1/") for path, _ in state.requests]
    # Both ranks sample, the main one alone loads and unloads.
    assert paths.count("completions") == 4
    assert paths.count("load_lora_adapter") == 2
    assert paths.count("unload_lora_adapter") == 2
    assert all(record["agreement_worst"] < 2e-3 for record in read_metrics(tmp_path / "run" / "metrics.jsonl"))
