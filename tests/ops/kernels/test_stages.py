"""Whole expert MLPs on the kernels: the output and each gradient, from NaN-filled memory.

``exact`` against float64. The FP8 modes against the reference in the same mode, which rounds the same values: what
remains is float32 rounding, and seldom a value that it carries over the middle between two codes.
"""

import pytest
import torch
from torch import Tensor

from octavo.formats.scheme import ScaleLayout
from octavo.ops.choice import select
from octavo.ops.fused import KernelEngine
from octavo.ops.gates import SWIGLU, ModelGate
from tests.ops.cases import Case, assert_close, exact, random_index, run
from tests.ops.kernels.cases import LAYOUTS

# sums of some hundred terms, as for the reference in float32
TOLERANCE = 2e-6
# one E4M3 code of some ten thousand moved by one step
TOLERANCE_FP8 = 2e-4
# of four experts
INDEX = {
    "ragged": torch.cat([random_index(13, 2, 4), torch.tensor([[2, 0]] * 12)]),
    "one expert has all": torch.zeros(35, 1, dtype=torch.int64),
    "one token": torch.tensor([[3, 0]]),
    "no token": torch.empty(0, 2, dtype=torch.int64),
    "off-rank": torch.tensor([[0, 4], [9, 2], [7, 8], [3, 1], [-1, 2]] * 3),
    "an expert twice": torch.tensor([[2, 2], [2, 1]]),
}


def layer(label: str, layout: ScaleLayout = LAYOUTS[0], intermediate: int = 48, rank: int | None = 4) -> Case:
    return Case(INDEX[label], layout=layout, num_experts=4, hidden=80, intermediate=intermediate, rank=rank)


def kernels(name: str, numerics: str) -> KernelEngine:
    return KernelEngine(name, numerics, wide=False)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", ["dequant", "fused"])
def test_exact_matches_float64(name: str, layout: ScaleLayout) -> None:
    """I = 48 is not a multiple of a block, and is where the grids of gate and up part."""
    # beyond the rank up to which LoRA's backward is one read, in one of them
    case = layer("ragged", layout, rank=40 if layout is LAYOUTS[1] else 4)
    assert_close(exact(case), run(case, kernels(name, "exact")), TOLERANCE)


@pytest.mark.parametrize("label", [label for label in INDEX if label != "ragged"])
def test_exact_on_ragged_routing(label: str) -> None:
    case = layer(label, LAYOUTS[2])
    want, got = exact(case), run(case, kernels("fused", "exact"))
    assert_close(want, got, TOLERANCE)
    off_rank = (case.index_TK < 0) | (case.index_TK >= case.num_experts)
    assert torch.equal(got["dp"][off_rank], torch.zeros(int(off_rank.sum())))


@pytest.mark.parametrize(
    ("numerics", "layout"), [("fp8", one) for one in LAYOUTS] + [("fp8_grad", LAYOUTS[2])], ids=str
)
def test_fp8_rounds_where_the_reference_does(numerics: str, layout: ScaleLayout) -> None:
    case = layer("ragged", layout, intermediate=64)
    assert_close(run(case, select("reference", numerics)), run(case, kernels("scaled", numerics)), TOLERANCE_FP8)


def test_off_rank_in_fp8() -> None:
    case = layer("off-rank")
    assert_close(run(case, select("reference", "fp8")), run(case, kernels("scaled", "fp8")), TOLERANCE_FP8)


def test_without_lora_and_with_a_models_own_gate() -> None:
    def swiglu(z: Tensor) -> Tensor:
        gate, up = z.chunk(2, -1)
        return torch.nn.functional.silu(gate) * up

    case = layer("ragged", rank=None)
    want = exact(case)
    for gate in (SWIGLU, ModelGate("own", swiglu)):
        assert_close(want, run(case, kernels("fused", "exact"), gate), TOLERANCE)


def test_factors_that_train_in_another_dtype() -> None:
    """Their gradients come back in their dtype; and the same gradients each time."""
    case = layer("ragged")
    want = exact(case)
    for name in ("up_A", "up_B", "down_A", "down_B"):
        case.inputs[name] = case.inputs[name].detach().bfloat16().requires_grad_()
    want = exact(case)
    first, second = (run(case, kernels("fused", "exact")) for _ in range(2))
    assert first["dup_A"].dtype == torch.bfloat16
    # the interpreter rounds to bfloat16 by cutting off
    assert_close(want, first, 2**-7)
    assert all(torch.equal(first[key], second[key]) for key in first)
