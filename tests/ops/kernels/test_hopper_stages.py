"""The stages around the products for Hopper, on the CPU: the products themselves in torch, from what `product.py` says.

Rows are interleaved and enlarged between two of these products and are not between one of them and Triton's.
"""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from octavo.formats.scheme import ScaleLayout
from octavo.formats.weight import Float8Weight
from octavo.ops.choice import select
from octavo.ops.engines import Projection, Wants
from octavo.ops.gates import SWIGLU, ModelGate
from octavo.ops.hopper import engine as hopper
from octavo.ops.hopper.product import ROWS_UP, Bank, GateGradient, LoraStep, Rows
from octavo.ops.kernels.interleave import interleave
from octavo.ops.reference import folds_into_rows
from tests.ops.cases import Case, assert_close, exact, run
from tests.ops.kernels.test_stages import INDEX, LAYOUTS, TOLERANCE, TOLERANCE_FP8

# columns of every 16, the even ones first
ORDER = torch.cat([torch.arange(0, 16, 2), torch.arange(1, 16, 2)])


def straight(x: Tensor) -> Tensor:
    """The columns of interleaved rows in their own order."""
    return x.unflatten(-1, (-1, 16))[..., ORDER.argsort()].flatten(-2)


def product(
    rows: Rows, weight: Float8Weight, offsets_E: Tensor, out: Tensor, *, flip: bool = False,
    lora: LoraStep | None = None, h: Tensor | None = None, gradient: GateGradient | None = None, tokens: int,
    bank: Bank | None = None,
) -> None:  # fmt: skip
    """What :func:`octavo.ops.hopper.product.product` says, in float32."""
    first, dense, rounded = 0, weight.dequantize(), rows.scales is not None
    if bank is not None:
        first, dense = bank.first, straight(bank.values)
    x = rows.values
    if rows.scales is not None:
        x = (x.float().unflatten(1, (rows.scales.shape[1], -1)) * rows.scales[..., None]).flatten(1)
        if flip and folds_into_rows(weight):
            dense = weight.codes.view(torch.float8_e4m3fn).float().flatten(1, 2)
    x = x if rows.token_M is None else x[rows.token_M]
    x = x if flip or rounded else straight(x) * 2.0**-ROWS_UP
    ends = [0, *offsets_E.tolist()]
    for slot, w_NK in enumerate(dense):
        e = first + slot
        span = slice(ends[e], ends[e + 1])
        if bank is not None and ends[e] == ends[e + 1]:
            continue
        y = x[span] @ (w_NK if flip else w_NK.T)
        if lora is not None:
            factor = lora.factor[e].float()
            y = y + lora.xa[span] @ factor.T
        if gradient is None:
            out[span] = y
        else:
            z, p_M1 = gradient.z[span].clone(), gradient.p_M[span, None].float()
            gradient.shares[:, span] = 0
            gradient.shares[0, span] = (y * SWIGLU.forward(z)).sum(1)
            out[span] = SWIGLU.backward(z, y * p_M1)
            if gradient.sums is not None and lora is not None:
                tiles = [-(-(end - start) // tokens) for start, end in pairwise(ends)]
                mine = gradient.sums[sum(tiles[:e]) : sum(tiles[: e + 1])]
                mine.zero_()
                if len(mine):
                    mine[0, :, : lora.xa.shape[1]] = (SWIGLU.forward(z) * p_M1).T @ lora.xa[span].float()
        if h is not None:
            h[span] = SWIGLU.forward(y) if rounded else interleave(SWIGLU.forward(y), ROWS_UP)


def bfloat16_factors(case: Case) -> Case:
    """``case`` with factors that the products, which take them in bfloat16, need not round."""
    for key in ("up_A", "up_B", "down_A", "down_B"):
        case.inputs[key] = case.inputs[key].detach().bfloat16().float().requires_grad_()
    return case


CASES = {
    "FP8": {},
    "plain": {"plain": ("up", "down")},
    "up is plain": {"plain": ("up",)},
    "down is plain": {"plain": ("down",)},
    "biases": {"bias": True},
}


@pytest.mark.parametrize("more", CASES.values(), ids=CASES)
@pytest.mark.parametrize("name", ["dequant", "fused"])
def test_exact_matches_float64(name: str, more: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "product", product)
    case = bfloat16_factors(
        Case(INDEX["off-rank"], layout=LAYOUTS[0], num_experts=4, hidden=96, intermediate=64, rank=8, **more)
    )
    engine = hopper.HopperEngine(name, "exact", wide=False)
    for gate in (SWIGLU, ModelGate("own", lambda z: SWIGLU.forward(z))):
        assert_close(exact(case), run(case, engine, gate), TOLERANCE)


@pytest.mark.parametrize("hidden", [128, 384])
@pytest.mark.parametrize("layout", [*LAYOUTS[:2], ScaleLayout("block", (128, 128))], ids=str)
def test_fp8_rounds_where_the_reference_does(layout: ScaleLayout, hidden: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The input gradient's rows take the place of dz once that is rounded, where they are no larger."""
    outs = []

    def watched(rows: Rows, weight: Float8Weight, offsets_E: Tensor, out: Tensor, **options: Any) -> None:
        outs.append((tuple(out.shape), out.untyped_storage().nbytes() // out.element_size()))
        product(rows, weight, offsets_E, out, **options)

    monkeypatch.setattr(hopper, "product", watched)
    case = bfloat16_factors(
        Case(INDEX["off-rank"], layout=layout, num_experts=4, hidden=hidden, intermediate=128, rank=8)
    )
    found = run(case, hopper.HopperEngine("scaled", "fp8", wide=False), SWIGLU)
    assert_close(run(case, select("reference", "fp8"), SWIGLU), found, TOLERANCE_FP8)
    num_rows = INDEX["off-rank"].numel()
    assert outs[-1] == ((num_rows, hidden), num_rows * max(hidden, 256))


@pytest.mark.parametrize("spend", [False, True])
def test_dz_is_written_over_only_where_it_may_be(spend: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "product", product)
    case = Case(INDEX["off-rank"], layout=ScaleLayout("block", (128, 128)), num_experts=4, hidden=128, intermediate=128)
    engine, x_TH, up = (
        hopper.HopperEngine("scaled", "fp8", wide=False),
        case.inputs["x"].detach(),
        Projection(case.up, None, None),
    )
    routing = engine.route(case.index_TK, case.num_experts)
    kept_MG = torch.randn(routing.num_rows, 256)
    dz_MG, wants = kept_MG.clone(), Wants(x=True, weight=False, bias=False, lora=False)
    found, _ = engine.up_backward(dz_MG, x_TH, None, routing, up, replace(wants, spend=spend))
    assert torch.equal(dz_MG, kept_MG) != spend
    want, _ = engine.up_backward(kept_MG, x_TH, None, routing, up, wants)
    assert found is not None
    assert want is not None
    assert torch.equal(found, want)
