"""``octavo bench model`` and the table of rows, in sizes for a CPU; the figures themselves are for a GPU."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.checkpoints import write
from benchmarks.train import SETS, rows_of
from octavo.cli.main import app
from octavo.errors import OctavoError
from octavo.trial import step, suite
from octavo.trial.profile import _union, profiled, stage_of
from octavo.trial.step import Row, measure, shared
from octavo.trial.suite import run_rows

# Every row of a published table has these.
KEYS = {
    "model", "numerics", "experts", "batch", "seq", "lora", "optimizer", "tokens_per_s", "step_ms",
    "peak_allocated_gb", "peak_reserved_gb", "plan_gb", "load_s", "load_gb_per_s", "host_peak_gb", "device", "torch",
    "commit",
}  # fmt: skip


@pytest.fixture(scope="module", params=["glm", "qwen3-coder"])
def folder(request, tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("bench") / request.param
    write(request.param, made, tiny=True)
    return made


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.parametrize("numerics", ["bf16", "exact"])
@pytest.mark.parametrize("expert_rank", [4, 0])
def test_a_row_has_every_figure(folder, numerics, expert_rank):
    row = Row(str(folder), "tiny", numerics, seq=48, attention_rank=4, expert_rank=expert_rank, steps=2)
    found = measure(replace(row, with_plan=numerics == "exact" and expert_rank == 4))
    assert found.keys() >= KEYS
    assert found["tokens_per_s"] == pytest.approx(48 / found["step_ms"] * 1e3)
    assert found["lora"] == {"attention": 4, "experts": expert_rank}
    assert found["first_loss"] == pytest.approx(torch.log(torch.tensor(4096.0)).item(), rel=0.25)
    assert (found["plan_gb"] is not None) == (numerics == "exact" and expert_rank == 4)


def test_an_offloaded_optimizer_trains_the_same(folder):
    row = Row(str(folder), "tiny", seq=48, attention_rank=4, expert_rank=4, steps=3)
    found = []
    for offload in (False, True):
        # Adapters are drawn.
        torch.manual_seed(0)
        found.append(measure(replace(row, offload_optimizer=offload)))
    resident, streamed = found
    assert streamed["offload_optimizer"]
    assert streamed["last_loss"] == resident["last_loss"] != resident["first_loss"]
    assert streamed["plan_gb"] < resident["plan_gb"]


def test_both_ways_train_the_same_factors(folder):
    """The baseline is the same model with the same adapters, or its speed would say nothing."""
    from octavo.trial.step import _adapted, _load, _plain, device

    row = Row(str(folder), "tiny", "exact", attention_rank=4, expert_rank=4)
    ours, theirs = _adapted(_load(row), row), _adapted(_plain(row.checkpoint, device()), row)
    shapes = [
        {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad} for model in (ours, theirs)
    ]
    assert shapes[0] == shapes[1]
    assert any("experts" in name for name in shapes[0])


def test_rows_are_written_one_by_one_and_a_failure_is_a_row(folder, tmp_path):
    out, said = tmp_path / "rows.json", []
    good = Row(str(folder), "tiny", seq=32, attention_rank=2, expert_rank=2, steps=1, with_plan=False)
    rows = [good, replace(good, engine="warp"), replace(good, checkpoint=str(tmp_path / "nothing"))]
    found = run_rows(rows, out=out, budget_s=600, say=said.append)
    assert json.loads(out.read_text()) == found
    assert "tokens_per_s" in found[0]
    assert "'warp' does not exist" in found[1]["error"]
    assert "neither a folder" in found[2]["error"]
    assert len(said) == 3
    # A second call goes on in the same file.
    assert run_rows([good], out=out, budget_s=5, say=said.append) == []
    assert "1 rows are left out" in said[-1]
    assert len(json.loads(out.read_text())) == 3


@pytest.mark.parametrize("end", ["os._exit(9)", "time.sleep(30)"], ids=["dies", "hangs"])
def test_a_row_that_was_measured_counts_however_its_process_ends(tmp_path, monkeypatch, end):
    """As one does that waits at its exit for a GPU, or crashes there."""
    row = Row("nowhere", "tiny", seq=7)
    measured = {"tokens_per_s": 1.0, "step_ms": 1.0, "load_s": 1.0, "peak_reserved_gb": None, "plan_gb": None}
    for text, want in ((json.dumps(measured), measured), (json.dumps(measured)[:-1], None)):
        script = tmp_path / "python"
        script.write_text(f"#!{sys.executable}\nimport os, time\nprint({text!r}, flush=True)\n{end}\n")
        script.chmod(0o755)
        monkeypatch.setattr(suite.sys, "executable", str(script))
        monkeypatch.setattr(suite, "_LEAST_SECONDS", 0.0)
        (found,) = run_rows([row], out=None, budget_s=4, say=lambda text: None)
        monkeypatch.undo()
        assert found == want or (want is None and "error" in found and found["seq"] == 7)


def test_the_command(folder, tmp_path):
    arguments = ["bench", "model", str(folder), "--seq", "32", "--numerics", "exact", "--steps", "1", "--json"]
    result = CliRunner().invoke(app, [*arguments, "--rank", "2", "--expert-rank", "2"])
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)
    assert row["model"] == folder.name
    assert row["seq"] == 32


@pytest.mark.slow
@pytest.mark.parametrize("what", SETS)
def test_the_table_runs(folder, tmp_path, what):
    """The script of the GPU machine, whole, in sizes for a CPU."""
    command = [sys.executable, "-m", "benchmarks.train", folder.name, "--rows", what, "--tiny", "--steps", "1"]
    command += ["--folder", str(folder), "--out", str(tmp_path / "rows.json")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == len(rows_of(what, Row("", "")))
    wrong = [row["error"] for row in rows if "error" in row]
    if find_spec("torchao") is None:
        wrong = [error for error in wrong if "needs torchao" not in error]
    else:
        assert done.returncode == 0
    assert not wrong


def test_rows_share_a_model_only_with_the_same_experts_and_cap(folder):
    row = Row(str(folder), "tiny")
    assert shared(row) == shared(replace(row, seq=64, numerics="fp8"))
    for other in (replace(row, experts="host"), replace(row, cap_gb=16)):
        assert shared(other) != shared(row)


def test_a_row_that_fails_leaves_the_others_their_own_model(folder, monkeypatch, capsys):
    row = Row(str(folder), "tiny", seq=32, attention_rank=2, expert_rank=0, steps=1, with_plan=False)
    fails = replace(row, attention_rank=4, optimizer="adafactor")
    rows = [row, fails, replace(row, seq=16), replace(row, seq=16, profile=True), replace(row, seq=24)]
    loads, load = [], step.load
    monkeypatch.setattr(step, "load", lambda row: (loads.append(row.attention_rank), load(row))[1])

    def breaks(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(step, "profiled", breaks)
    monkeypatch.setattr(sys, "argv", ["step", json.dumps([asdict(row) for row in rows])])
    step.main()
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one.get("error") for one in found] == [
        None,
        "a bench of optimizer adafactor does not exist; choose adamw, adamw_8bit or sgd.",
        None,
        "CUDA error: an illegal memory access was encountered",
        None,
    ]
    assert loads == [2, 4, 2]


def test_gradients_of_a_row_that_failed_are_not_the_next_ones(folder):
    row = Row(str(folder), "tiny", seq=32, attention_rank=2, expert_rank=0, steps=2, optimizer="sgd", with_plan=False)
    found = []
    for left in (False, True):
        torch.manual_seed(0)
        loaded = step.load(row)
        if left:
            for parameter in loaded.tuned.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.full_like(parameter, 1e3)
        found.append(step.step_on(loaded, row)["last_loss"])
    assert found[0] == found[1]


def test_experts_on_the_host_are_a_row(folder):
    row = Row(str(folder), "tiny", seq=32, attention_rank=2, expert_rank=2, steps=2, with_plan=False)
    torch.manual_seed(0)
    resident = measure(row)
    torch.manual_seed(0)
    host = measure(replace(row, experts="host"))
    assert (resident["experts"], host["experts"]) == ("resident", "host")
    assert host["last_loss"] == resident["last_loss"]
    with pytest.raises(OctavoError, match="cap_gb caps a CUDA GPU"):
        measure(replace(row, cap_gb=16))


def test_kernels_have_a_stage():
    assert stage_of("void flash_fwd_kernel<...>") == "attention"
    assert stage_of("nvjet_tst_128x256_64x4") == "products"
    assert stage_of("void at::native::vectorized_elementwise_kernel<4>") == "elementwise"
    for ours in ("product", "rows_kernel", "both_kernel", "sum_tiles_kernel", "combine_kernel", "place_kernel"):
        assert stage_of(ours) == "experts"
    assert stage_of("something") == "other"
    assert _union([(0, 2), (1, 3), (5, 6)]) == 4
    assert profiled(lambda: None, torch.device("cpu")) == {}
