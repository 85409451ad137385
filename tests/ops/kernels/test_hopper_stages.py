"""The stages around the products for Hopper, on the CPU: the products themselves in torch, from what `product.py` says.

Rows are interleaved and enlarged between two of these products and are not between one of them and Triton's.
"""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from octavo.formats.weight import Float8Weight
from octavo.ops.gates import SWIGLU, ModelGate
from octavo.ops.hopper import engine as hopper
from octavo.ops.hopper.product import ROWS_UP, Bank, GateGradient, LoraStep, Rows
from octavo.ops.kernels.interleave import interleave
from tests.ops.cases import Case, assert_close, exact, run
from tests.ops.kernels.test_stages import INDEX, LAYOUTS, TOLERANCE

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
    """Exact numerics of :func:`octavo.ops.hopper.product.product`."""
    first, dense = 0, weight.dequantize()
    if bank is not None:
        first, dense = bank.first, straight(bank.values)
    x = rows.values if rows.token_M is None else rows.values[rows.token_M]
    x = x if flip else straight(x) * 2.0**-ROWS_UP
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
            h[span] = interleave(SWIGLU.forward(y), ROWS_UP)


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
    case = Case(INDEX["off-rank"], layout=LAYOUTS[0], num_experts=4, hidden=96, intermediate=64, rank=8, **more)
    for key in ("up_A", "up_B", "down_A", "down_B"):
        # factors go into these products in bfloat16
        case.inputs[key] = case.inputs[key].detach().bfloat16().float().requires_grad_()
    engine = hopper.HopperEngine(name, "exact", wide=False)
    for gate in (SWIGLU, ModelGate("own", lambda z: SWIGLU.forward(z))):
        assert_close(exact(case), run(case, engine, gate), TOLERANCE)
