"""``octavo bench layer``: right before fast, the shapes that it takes, and the rows that it writes."""

import json
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from octavo.bench import run, upstream
from octavo.bench.layer import TOLERANCE, LayerCase, baseline, errors
from octavo.bench.shapes import MODELS, LayerShape, floor_ms, layout_of, shape_of
from octavo.checkpoint.accounting import open_ledger
from octavo.cli.main import app
from octavo.errors import EngineError
from octavo.ops.choice import select
from tests.checkpoints import Built

CPU = torch.device("cpu")
SMALL = ["--experts", "4", "--top-k", "2", "--hidden", "128", "--intermediate", "64", "--tokens", "48"]
# the schema of benchmarks/results
ROW = {
    "model", "layout", "tokens", "numerics", "engine", "lora_rank", "pass", "ms", "busy_ms", "eager_ms", "floor_ms",
    "ratio", "transposed", "peak_transient_mib", "shared_buffer_mib", "rel_err", "device", "torch", "triton", "commit",
}  # fmt: skip


def octavo(*arguments: str) -> object:
    return CliRunner().invoke(app, ["bench", "layer", *arguments])


@pytest.mark.parametrize("kind", ["channel", "tensor", "block"])
@pytest.mark.parametrize("rank", [0, 8])
def test_baselines_and_engines_agree_with_float64(kind: str, rank: int) -> None:
    """What everything is compared with, and what it is compared against, compute the same layer."""
    case = LayerCase(LayerShape("t", 4, 2, 160, 96, layout_of(kind)), 40, CPU, rank)
    want = case.exact()
    banks = case.up.dequantize(torch.bfloat16), case.down.dequantize(torch.bfloat16)
    for forward in (
        lambda: baseline(case, banks),
        lambda: baseline(case, None),
        lambda: case.octavo(select("dequant", "exact", case.facts)),
        lambda: case.octavo(select("reference", "exact", case.facts)),
    ):
        found = errors(want, case.step(forward))
        assert set(found) == {"y", *(f"d{name}" for name in case.inputs)}
        assert max(found.values()) < TOLERANCE["bf16"]


def test_rows_have_the_schema_and_say_what_ran() -> None:
    result = octavo(*SMALL, "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert {frozenset(row) for row in rows} == {frozenset(ROW)}
    assert [(row["numerics"], row["engine"]) for row in rows] == [
        ("bf16", "expert-loop"), ("bf16", "bank-eager"), ("exact", "reference"), ("exact", "dequant"),
        ("fp8_grad", "reference"), ("fp8", "reference"),
    ]  # fmt: skip
    assert all(row["ms"] > 0 and 0 < row["rel_err"] < 0.1 and row["floor_ms"] is None for row in rows)
    assert "says nothing about a GPU" in result.stderr
    assert "fused" in result.stderr
    assert "its kernels need a GPU" in result.stderr


def test_no_time_for_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def doubled(case: LayerCase, banks: object, *, triton: bool = False) -> Tensor:
        return 2 * baseline(case, banks, triton=triton)

    monkeypatch.setattr(run, "baseline", doubled)
    result = octavo(*SMALL, "--numerics", "exact", "--json")
    assert result.exit_code == 1
    assert {row["engine"] for row in json.loads(result.stdout)} == {"reference", "dequant"}
    line = next(line for line in result.stderr.splitlines() if "expert-loop" in line)
    assert "wrong: relative error" in line
    assert " ms" not in line


def test_a_way_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(case: LayerCase, banks: object, *, triton: bool = False) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.\nSee documentation.")

    monkeypatch.setattr(run, "baseline", breaks)
    result = octavo(*SMALL, "--numerics", "exact", "--json")
    assert result.exit_code == 1
    assert {row["engine"] for row in json.loads(result.stdout)} == {"reference", "dequant"}
    assert "failed: OutOfMemoryError: CUDA out of memory. Tried to allocate 3 GiB." in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--experts", "4"], 2, "--top-k"),
        (["--model", "qwen3", "--hidden", "64"], 2, "both say how large"),
        (["--experts", "2", "--top-k", "3", "--hidden", "64", "--intermediate", "64"], 1, "more than the 2 experts"),
        ([*SMALL, "--numerics", "int4"], 1, "numerics 'int4' does not exist"),
        (["--model", "./nowhere"], 1, "nowhere does not exist"),
    ],
)
def test_wrong_calls(arguments: list[str], code: int, says: str) -> None:
    result = octavo(*arguments)
    assert result.exit_code == code
    assert says in " ".join(result.stderr.split())


@pytest.mark.parametrize(("arch", "layout"), [("qwen", "fp8-block"), ("glm", "ct-channel"), ("qwen", "bf16")])
def test_the_shape_of_a_checkpoint(built: Callable[..., Built], arch: str, layout: str) -> None:
    case = built(arch=arch, layout=layout)
    shape = shape_of(case.folder)
    config = json.loads((case.folder / "config.json").read_text())
    assert (shape.hidden, shape.intermediate) == (config["hidden_size"], config["moe_intermediate_size"])
    assert shape.top_k == config["num_experts_per_tok"]
    # one number per expert in the names of layer 1
    names = {entry for entry in open_ledger(case.folder).entries if ".layers.1.mlp.experts." in entry}
    assert shape.experts == len({name.split(".experts.")[1].split(".")[0] for name in names})
    assert shape.layout.kind == {"fp8-block": "block", "ct-channel": "channel", "bf16": "channel"}[layout]


def test_floors_of_one_h200() -> None:
    """GLM at 2k, 8k and 32k tokens as worked out by hand: 2.47 TFLOP at 790 TFLOP/s is 3.13 ms, forward alone."""
    assert [round(floor_ms(MODELS["glm"], tokens, "NVIDIA H200"), 2) for tokens in (2048, 8192, 32768)] == [
        0.39, 1.57, 6.26,
    ]  # fmt: skip
    assert floor_ms(MODELS["glm"], 2048, "NVIDIA GeForce RTX 5090") is None
    # one token: both stacks' codes, twice, at 4.3 TB/s
    assert floor_ms(MODELS["glm"], 1, "NVIDIA H200") == pytest.approx(2 * 604e6 / 4.3e12 * 1e3, rel=0.01)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package in place of the kernel of transformers' FP8 experts, in torch, on the CPU."""

    def grouped(x, codes, scales, offsets, tokens_per_expert, block_size):  # type: ignore[no-untyped-def]
        bank = codes.float() * scales.repeat_interleave(128, 1).repeat_interleave(128, 2)
        ends = offsets.tolist()
        spans = zip([0, *ends[:-1]], ends, strict=True)
        parts = [x[start:end].float() @ bank[e].T for e, (start, end) in enumerate(spans)]
        return torch.cat(parts).to(x.dtype)

    package = ModuleType("finegrained_fp8")
    package.__spec__ = ModuleSpec("finegrained_fp8", None)
    package.matmul_2d = package.matmul_batched = None  # type: ignore[attr-defined]
    package.matmul_grouped = grouped  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "finegrained_fp8", package)
    monkeypatch.setattr("transformers.integrations.finegrained_fp8._FINEGRAINED_FP8", None)
    monkeypatch.setattr(upstream, "runs_on", lambda device: True)


@pytest.mark.usefixtures("kernel")
def test_transformers_own_experts_are_a_row() -> None:
    """The installed transformers takes the weights of the layer, whatever its scales, and computes the same."""
    case = LayerCase(LayerShape("t", 4, 2, 256, 128, layout_of("channel")), 24, CPU)
    way = run.upstream_way(case)
    assert way.passes == "fwd+dx"
    [found] = run.measure(case, [way])
    assert found.row is not None, found.problem
    assert found.row["layout"] == "block"
    assert found.row["lora_rank"] == 0
    assert found.row["pass"] == "fwd+dx"
    assert found.row["rel_err"] < TOLERANCE["bf16"]


@pytest.mark.usefixtures("kernel")
def test_transformers_own_experts_without_backward_are_timed_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    case = LayerCase(LayerShape("t", 4, 2, 256, 128, layout_of("block")), 24, CPU)
    forward = upstream.forward(upstream.experts_case(case))
    monkeypatch.setattr(upstream, "forward", lambda theirs: lambda: forward().detach())
    way = run.upstream_way(case)
    assert way.passes == "fwd"
    [found] = run.measure(case, [way])
    assert found.row is not None
    assert found.row["pass"] == "fwd"


def test_transformers_own_experts_say_why_they_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    case = LayerCase(LayerShape("t", 4, 2, 256, 128, layout_of("block")), 24, CPU)
    with pytest.raises(EngineError, match="needs a GPU"):
        run.upstream_way(case)
    monkeypatch.setattr(upstream, "runs_on", lambda device: True)
    monkeypatch.setattr("transformers.integrations.finegrained_fp8.is_kernels_available", lambda: False)
    with pytest.raises(EngineError, match="did not load its kernel"):
        run.upstream_way(case)
    odd = LayerCase(LayerShape("t", 4, 2, 160, 128, layout_of("channel")), 24, CPU)
    with pytest.raises(EngineError, match="a width of 160"):
        run.upstream_way(odd)
