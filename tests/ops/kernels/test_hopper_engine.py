"""Whole expert MLPs as on Hopper: Triton's kernels interpreted in float32, `product.cu` emulated in bfloat16."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import octavo.ops.fused as fused
import octavo.ops.hopper.engine as hopper
from octavo.formats.scheme import ScaleLayout
from octavo.ops.choice import select
from octavo.ops.experts import expert_mlp
from octavo.ops.gates import SWIGLU, ModelGate
from octavo.ops.hopper.compiler import Mode
from octavo.ops.hopper.engine import HopperEngine
from octavo.ops.hopper.product import Bank, GateGradient, LoraStep, Rows, product
from tests.ops.cases import CHANNEL, TENSOR, Case, assert_close, exact, random_index, run
from tests.ops.hopper.conftest import launched, library

BLOCK = ScaleLayout("block", (128, 128))
# An ideal layer has 4.2e-3 (hundreds of rows and columns).
TOLERANCE = {"exact": 5e-3, "fp8_grad": 4.5e-2, "fp8": 5.5e-2}
# of four experts: one with more rows than a tile, one with few, one with none; and rows of another rank's
INDEX = torch.cat([random_index(20, 2, 3), torch.tensor([[0, 1]] * 50), torch.tensor([[0, 4], [7, 2], [-1, 9]] * 2)])
WAYS = [
    ("fused", "exact", CHANNEL),
    ("fused", "exact", BLOCK),
    ("dequant", "exact", TENSOR),
    ("scaled", "fp8", CHANNEL),
    ("scaled", "fp8", BLOCK),
    ("scaled", "fp8_grad", TENSOR),
]

__all__ = ["launched", "library"]


def case_of(layout: ScaleLayout, rank: int | None = 12, intermediate: int | None = None) -> Case:
    """In float32, with inputs that bfloat16 can hold."""
    intermediate = intermediate or (128 if layout is BLOCK else 160)
    case = Case(INDEX, torch.bfloat16, layout, num_experts=4, hidden=256, intermediate=intermediate, rank=rank)
    case.inputs = {name: tensor.detach().float().requires_grad_() for name, tensor in case.inputs.items()}
    case.dy = case.dy.float()
    return case


@pytest.fixture(autouse=True)
def narrowed(launched: list[Mode], monkeypatch: pytest.MonkeyPatch) -> list[Mode]:
    """Products get in bfloat16 what the interpreted kernels give in float32, and the other way round."""

    def narrow(tensor: Tensor) -> Tensor:
        return tensor.bfloat16() if tensor.dtype == torch.float32 else tensor

    def call(
        rows: Rows,
        weight: Any,
        offsets_E: Tensor,
        out: Tensor,
        *,
        lora: LoraStep | None = None,
        h: Tensor | None = None,
        gradient: GateGradient | None = None,
        bank: Bank | None = None,
        **rest: Any,
    ) -> None:
        narrow_out = narrow(out)
        narrow_h = None if h is None else narrow(h)
        if gradient is not None:
            z = narrow_out if gradient.z is out else narrow(gradient.z)
            gradient = replace(gradient, z=z)
        product(
            replace(rows, values=narrow(rows.values)), weight, offsets_E, narrow_out,
            lora=None if lora is None else LoraStep(narrow(lora.xa), lora.factor), h=narrow_h, gradient=gradient,
            bank=None if bank is None else Bank(narrow(bank.values), bank.first), **rest,
        )  # fmt: skip
        out.copy_(narrow_out)
        if h is not None and narrow_h is not None:
            h.copy_(narrow_h)

    monkeypatch.setattr(hopper, "product", call)
    return launched


@pytest.mark.parametrize(("name", "numerics", "layout"), WAYS, ids=str)
def test_matches_float64(narrowed: list[Mode], name: str, numerics: str, layout: ScaleLayout) -> None:
    """Its own products did all of it, and a graph that is kept gives the same gradients again: dz takes the place of z
    where it is not.
    """
    case, engine = case_of(layout), HopperEngine(name, numerics, wide=False)
    sides = case.side("up", case.up), case.side("down", case.down)
    y = expert_mlp(case.inputs["x"], case.index_TK, case.inputs["p"], *sides, SWIGLU, engine)
    first = torch.autograd.grad(y, list(case.inputs.values()), case.dy, retain_graph=True)
    second = torch.autograd.grad(y, list(case.inputs.values()), case.dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    got = {"y": y.detach()} | {f"d{key}": grad for key, grad in zip(case.inputs, first, strict=True)}
    assert_close(exact(case), got, TOLERANCE[numerics])
    assert {(mode.flip, mode.stage) for mode in narrowed} == {(False, 1), (False, 0), (True, 2), (True, 0)}


def test_fp8_rounds_where_the_reference_does() -> None:
    """What remains is bfloat16 rounding, and codes that it carries over the middle between two."""
    case = case_of(CHANNEL)
    assert_close(run(case, select("reference", "fp8")), run(case, HopperEngine("scaled", "fp8", wide=False)), 2e-2)


@pytest.mark.parametrize("numerics", ["fp8", "fp8_grad"])
@pytest.mark.parametrize("layout", [BLOCK, CHANNEL, TENSOR], ids=str)
def test_rounding_beside_other_sums_changes_nothing(
    narrowed: list[Mode], layout: ScaleLayout, numerics: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, engine = case_of(layout), HopperEngine("scaled", numerics, wide=False)
    got, found = [], []
    for fewest in (1 << 30, 0):
        narrowed.clear()
        monkeypatch.setattr(fused, "ROUNDED_WITH_LORA", fewest)
        got.append(run(case, engine))
        found.append(any(mode.peaks for mode in narrowed))
    assert found == [False, layout is not BLOCK]
    # of two widths of a tile: sums in another order
    assert_close(got[0], got[1], 1e-3)
    if layout is not BLOCK:
        assert all(torch.equal(got[0][name], got[1][name]) for name in got[0])


def own(z: Tensor) -> Tensor:
    gate, up = z.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def test_blocks_of_gates_and_ups_that_meet_in_a_tile(narrowed: list[Mode]) -> None:
    """With a model's own gate the up product is Triton's, and the others are these."""
    case, engine = case_of(BLOCK, intermediate=160), HopperEngine("fused", "exact", wide=False)
    want = exact(case)
    for gate, products in ((SWIGLU, 4), (ModelGate("own", own), 3)):
        narrowed.clear()
        assert_close(want, run(case, engine, gate), TOLERANCE["exact"])
        assert len(narrowed) == products


@pytest.mark.parametrize(("rank", "numerics"), [(None, "exact"), (40, "fp8")])
def test_ranks_and_a_models_own_gate(rank: int | None, numerics: str) -> None:
    """Without LoRA, and beyond the ranks of which sums are kept beside a product."""
    case = case_of(CHANNEL, rank)
    engine = HopperEngine("fused" if numerics == "exact" else "scaled", numerics, wide=False)
    want = exact(case)
    for gate in (SWIGLU, ModelGate("own", own)):
        assert_close(want, run(case, engine, gate), TOLERANCE[numerics])
