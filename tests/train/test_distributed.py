"""The same command on two ranks: the same losses, one voice, one folder."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import octavo
from octavo.train.metrics import read_metrics

from .tiny import chat, train, tree, write_jsonl

PLAIN = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    # Its --cpu starts one process unless there is MPI; --multi_gpu starts as many as asked, also where there is no GPU.
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", *PLAIN],
}
# The balancing loss is a mean over a rank's own tokens, so it is not the same on two ranks.
SETTINGS = {"steps": 4, "router_aux_loss": 0.0}


def command(launcher: str, config: Path) -> list[str]:
    return [sys.executable, "-m", *LAUNCHERS[launcher], "-m", "octavo", "sft", str(config), "--json"]


def write_config(path: Path, config: dict) -> Path:
    path.write_text(yaml.safe_dump(config))
    return path


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_ranks_train_as_one_process_with_the_same_global_batch(tmp_path, checkpoint, chats, launcher):
    config = tree(checkpoint, chats, tmp_path / "two", batch_size=2, **SETTINGS)
    config["data"]["eval_fraction"] = 0.25
    train(**{**tree(checkpoint, chats, tmp_path / "one", batch_size=4, **SETTINGS), "data": config["data"]})
    done = subprocess.run(
        command(launcher, write_config(tmp_path / "sft.yaml", config)),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    # Only rank 0 speaks: one line of JSON, and each step told once.
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert done.stdout.count('"adapter"') == 1
    assert done.stderr.count("step 4/4  loss") == 1
    assert result["step"] == 4
    one, two = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert [line["step"] for line in one] == [line["step"] for line in two]
    # Rounding apart, in another order of sums. The evaluation loss is transformers' mean over examples of the means of
    # their batches, so it depends on which examples share a batch.
    for key, tolerance in (("loss", 1e-6), ("grad_norm", 1e-5), ("expert_load", 0), ("eval_loss", 1e-3)):
        a, b = ([line[key] for line in lines if key in line] for lines in (one, two))
        assert b == pytest.approx(a, rel=tolerance), key
    assert json.loads((tmp_path / "two" / "versions.json").read_text())["processes"] == 2


@pytest.mark.parametrize("offload", [False, True], ids=["resident", "optimizer on host"])
def test_two_ranks_train_the_real_fp8_model(tmp_path, offload):
    model = octavo.demo.checkpoint("glm-tiny")
    for name, size in (("one", 4), ("two", 2)):
        config = tree(model, octavo.demo.data("train"), tmp_path / name, batch_size=size, steps=3, lr=1e-3)
        if name == "one":
            train(**config)
        else:
            config["train"]["offload_optimizer"] = offload
            file = write_config(tmp_path / "sft.yaml", config)
            done = subprocess.run(
                command("torchrun", file), env=environment(), capture_output=True, text=True, timeout=300
            )
            assert done.returncode == 0, done.stderr[-4000:]
    one, two = ([line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl")] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-5)


@pytest.mark.slow
def test_ctrl_c_at_a_terminal_saves_on_all_ranks(tmp_path, checkpoint):
    """A terminal sends the signal to the whole group, and torchrun passes its own on."""
    data = write_jsonl(tmp_path / "a.jsonl", [chat(index) for index in range(200)])
    config = tree(checkpoint, data, tmp_path / "run", batch_size=1, steps=100000)
    process = subprocess.Popen(
        command("torchrun", write_config(tmp_path / "sft.yaml", config)),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    give_up = time.monotonic() + 120
    while len(read_metrics(metrics)) < 3 and time.monotonic() < give_up and process.poll() is None:
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=120)
    [saved] = (tmp_path / "run").glob("checkpoint-*")
    assert (saved / "trainer_state.json").is_file(), said[-3000:]
    assert f"saved {saved}" in said
    assert process.returncode != 0
