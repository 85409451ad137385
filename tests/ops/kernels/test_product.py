"""The grouped product in each of its modes against float64: what multiplies, where scales go, the epilogues."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from octavo.formats.scheme import ScaleLayout
from octavo.formats.weight import Float8Weight
from octavo.ops.kernels import product as kernel
from octavo.ops.kernels.common import INTERPRETED
from octavo.ops.kernels.product import Gradient, Lora, Operand, Stack, Tiles, product
from octavo.ops.kernels.rows import pass_rows, sum_parts
from octavo.ops.kernels.tiles import tiles_for
from octavo.ops.kernels.weights import transpose
from octavo.ops.weights import DenseWeight, storage
from tests.ops.kernels.cases import (
    ACTIVATIONS,
    BLOCK,
    CHANNEL,
    DEVICE,
    LAYOUTS,
    TENSOR,
    Rows,
    assert_sums,
    grouped,
    ragged,
)
from tests.ops.kernels.test_rows import poisoned_tokens

# the interpreter takes a second for a product
EXAMPLES = 3 if INTERPRETED else 20
ROUNDED = torch.finfo(ACTIVATIONS).eps / 2
TINY = torch.finfo(torch.float32).tiny


@dataclass
class Operands:
    """One product: what the kernel takes, and the float64 factors of what it must give."""

    rows: Rows
    operand: Operand
    stack: Stack
    scales: int
    tiles: Tiles
    left_MK: Tensor
    right_EKN: Tensor
    lora: Lora | None = None
    lora_EKN: Tensor | None = None
    bias_EN: Tensor | None = None

    def want(self) -> tuple[Tensor, Tensor]:
        value, magnitude = grouped(self.rows, self.left_MK, self.right_EKN)
        if self.lora is not None:
            assert self.lora_EKN is not None
            more, its_magnitude = grouped(self.rows, self.lora.xa, self.lora_EKN)
            value, magnitude = value + more, magnitude + its_magnitude
        if self.bias_EN is not None:
            spread = torch.tensor(self.rows.counts, device=DEVICE)
            each = self.bias_EN.double().repeat_interleave(spread, 0)
            value, magnitude = value + each, magnitude + each.abs()
        return value, magnitude

    @property
    def terms(self) -> int:
        # products, LoRA's, and the float32 scales that multiply the sum
        return self.left_MK.shape[1] + (0 if self.lora is None else self.lora.xa.shape[1]) + 4

    @property
    def slack(self) -> float:
        """Relative to the magnitude: a scaled weight tile is rounded to the dtype of the activations; Hopper's FP8
        products keep 13 bits of their sums (DeepSeek-V3, arXiv 2412.19437, 3.3.2).
        """
        if self.operand.scales is not None:
            return 0.0 if INTERPRETED else 2.0**-12
        return 0.0 if self.scales == kernel.COLUMN.value else 1.01 * ROUNDED


def operands(
    drawn: tuple[list[int], int, int], way: str, layout: ScaleLayout, *, flip: bool, parts: int, size: tuple[int, int],
    rank: int | None, gather: bool, left: bool, site: str, bias: torch.dtype | None = None,
) -> Operands:  # fmt: skip
    """A product of ``way`` (see tiles.py) with a weight of ``parts`` × ``size[0]`` rows and ``size[1]`` columns."""
    rows = Rows(*drawn)
    weight = rows.weight(layout, parts, *size)
    features, width = weight.out_features, weight.in_features
    K, N = (features, width) if flip else (width, features)
    x = poisoned_tokens(rows, K) if gather else rows.rows(K)
    token_M = rows.token_M if gather else None
    channel = weight.block[1] >= width
    step = None
    if way == "scaled" and not channel:
        step = weight.block[0 if flip else 1]
    tiles = replace(tiles_for(f"{way}.{site}", 1, step), left=left)
    dense = weight.dequantize(torch.float64)
    right = dense if flip else dense.transpose(1, 2)
    source = x if token_M is None else x[token_M]
    if way == "bank":
        stack = Stack(weight.dequantize(ACTIVATIONS), weight, 0, rows.num_experts, flip=flip)
        scales, operand = kernel.NONE.value, Operand(x, token_M)
    elif way == "codes":
        stack = Stack(storage(weight)[0], weight, 0, rows.num_experts, flip=flip, widen=True)
        scales = kernel.COLUMN.value if channel and not flip else kernel.TILE.value
        operand = Operand(x, token_M)
    else:
        operand, source, right, scales = scaled_operand(rows, x, token_M, weight, right, flip, step)
        codes = storage(weight)[0]
        if flip:
            codes = torch.empty((rows.num_experts, width, features), dtype=codes.dtype, device=DEVICE)
            transpose(weight, rows.offsets_E, codes)
        stack = Stack(codes, weight, 0, rows.num_experts, turned=flip)
    case = Operands(rows, operand, stack, scales, tiles, source.double().nan_to_num(0), right)
    if rank is not None:
        factor = rows.draw(rows.num_experts, *((rank, N) if flip else (N, rank)))
        case.lora = Lora(rows.rows(rank), factor, 1 if flip else 2)
        case.lora_EKN = factor if flip else factor.transpose(1, 2)
    if bias is not None:
        case.bias_EN = rows.draw(rows.num_experts, N, dtype=bias)
    return case


def scaled_operand(
    rows: Rows, x: Tensor, token_M: Tensor | None, weight: Float8Weight, right: Tensor, flip: bool, step: int | None
) -> tuple[Operand, Tensor, Tensor, int]:
    """E4M3 rows as the engine rounds them: (operand, its values per row, the matrix that they multiply, scales)."""
    if step is not None:
        _, rounded = pass_rows(x, group=step)
        scales = kernel.SLAB.value
    elif flip:
        columns = weight.scales[..., 0].repeat_interleave(min(weight.block[0], weight.rows), 2)[..., : weight.rows]
        _, rounded = pass_rows(
            x, offsets_E=rows.offsets_E, token_M=token_M, fold_EK=columns.reshape(rows.num_experts, -1).contiguous(),
            group=weight.out_features,
        )  # fmt: skip
        token_M, scales = None, kernel.NONE.value
        right = storage(weight)[0].double()
    else:
        _, rounded = pass_rows(x, group=weight.in_features)
        scales = kernel.COLUMN.value
    assert rounded is not None
    group = step or x.shape[1]
    values = rounded.codes.double() * rounded.scales.double().repeat_interleave(group, 1)[:, : x.shape[1]]
    operand = Operand(rounded.codes, token_M, rounded.scales)
    return operand, values if token_M is None else values[token_M], right, scales


common = {
    "drawn": ragged,
    "rank": st.sampled_from((None, 4, 16)),
    "gather": st.booleans(),
    "left": st.booleans(),
}
biases = st.sampled_from((None, torch.float32, torch.bfloat16))
WAYS = ("bank", "codes", "scaled")


@pytest.mark.parametrize("flip", [False, True], ids=["forward", "input gradient"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("way", WAYS)
@given(parts=st.integers(1, 2), size=st.sampled_from([(48, 80), (64, 96), (16, 160)]), bias=biases, **common)
@settings(max_examples=EXAMPLES, deadline=None)
def test_product(
    way: str, layout: ScaleLayout, flip: bool, parts: int, size: tuple[int, int], bias: torch.dtype | None,
    drawn: tuple[list[int], int, int], rank: int | None, gather: bool, left: bool,
) -> None:  # fmt: skip
    """Each row times its expert's matrix, plus LoRA and a bias; rows of other ranks stay unwritten."""
    if way == "scaled" and layout is BLOCK and flip:
        # a slab of the contraction lies in one part
        step = BLOCK.block_of(*size)[0]
        size = (-(-size[0] // step) * step, size[1])
    if way == "scaled":
        # the weight is read as it lies: FP8 operands take no other order
        left = False
    site = "up_grad" if flip else "down"
    case = operands(
        drawn, way, layout, flip=flip, parts=parts, size=size, rank=rank, gather=gather, left=left, site=site,
        bias=None if flip else bias,
    )  # fmt: skip
    value, magnitude = case.want()
    out = torch.empty((case.rows.num_rows, value.shape[1]), dtype=ACTIVATIONS, device=DEVICE)
    product(
        case.operand, case.stack, case.rows.offsets_E, out, case.tiles, scales=case.scales, lora=case.lora,
        bias_EN=case.bias_EN,
    )  # fmt: skip
    live = case.rows.live
    assert_sums("y", out[:live], value, magnitude, case.terms, slack=case.slack * magnitude)
    assert bool(out[live:].isnan().all())


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("way", WAYS)
@given(size=st.sampled_from([(48, 80), (32, 96)]), bias=biases, **common)
@settings(max_examples=EXAMPLES, deadline=None)
def test_swiglu_epilogue(
    way: str, layout: ScaleLayout, size: tuple[int, int], bias: torch.dtype | None, drawn: tuple[list[int], int, int],
    rank: int | None, gather: bool, left: bool,
) -> None:  # fmt: skip
    """z = [gate, up] and h = silu(gate)·up of the z that was stored; gate and up have grids of their own."""
    left = left and way != "scaled"
    case = operands(
        drawn, way, layout, flip=False, parts=2, size=size, rank=rank, gather=gather, left=left, site="up", bias=bias
    )
    check_swiglu(case, size[0])


@given(size=st.sampled_from([(48, 80), (32, 96)]), bias=biases, **common)
@settings(max_examples=EXAMPLES, deadline=None)
def test_plain_stacks_stored_either_way_round(
    size: tuple[int, int], bias: torch.dtype | None, drawn: tuple[list[int], int, int], rank: int | None, gather: bool,
    left: bool,
) -> None:  # fmt: skip
    """A stack without scales, and one stored [E, in, out], whose rows forward contracts over."""
    case = operands(
        drawn, "bank", CHANNEL, flip=False, parts=2, size=size, rank=rank, gather=gather, left=left, site="up",
        bias=bias,
    )  # fmt: skip
    values = case.stack.values
    case.right_EKN = values.double().transpose(1, 2)
    for transposed in (False, True):
        stored = values.transpose(1, 2).contiguous() if transposed else values
        case.stack = Stack(stored, DenseWeight(values), 0, case.rows.num_experts, flip=transposed)
        check_swiglu(case, size[0])


def check_swiglu(case: Operands, width: int) -> None:
    live = case.rows.live
    z_MG = torch.empty((case.rows.num_rows, 2 * width), dtype=ACTIVATIONS, device=DEVICE)
    h_MI = torch.empty((case.rows.num_rows, width), dtype=ACTIVATIONS, device=DEVICE)
    product(
        case.operand, case.stack, case.rows.offsets_E, z_MG, case.tiles, scales=case.scales, lora=case.lora,
        bias_EN=case.bias_EN, h=h_MI,
    )  # fmt: skip
    value, magnitude = case.want()
    assert_sums("z", z_MG[:live], value, magnitude, case.terms, slack=case.slack * magnitude)
    g, u = z_MG[:live].double().chunk(2, 1)
    want = g * torch.sigmoid(g) * u
    # a sigmoid below the smallest float32 is zero
    assert_sums("h", h_MI[:live], want, want.abs(), 8, slack=TINY * (g * u).abs())
    assert bool(z_MG[live:].isnan().all())
    assert bool(h_MI[live:].isnan().all())


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("way", WAYS)
@given(size=st.sampled_from([(64, 48), (96, 80)]), **common)
@settings(max_examples=EXAMPLES, deadline=None)
def test_swiglu_gradient_epilogue(
    way: str, layout: ScaleLayout, size: tuple[int, int], drawn: tuple[list[int], int, int], rank: int | None,
    gather: bool, left: bool,
) -> None:  # fmt: skip
    """dz from dh = dy·W and z, weighted by the router; and <dh, h> of each row, before that weight."""
    left = left and way != "scaled"
    case = operands(
        drawn, way, layout, flip=True, parts=1, size=size, rank=rank, gather=gather, left=left, site="down_grad"
    )
    rows, width = case.rows, size[1]
    live = rows.live
    z_MG, p_M = rows.rows(2 * width), rows.rows(1)[:, 0].contiguous()
    dz_MG = torch.empty_like(z_MG)
    shares = torch.empty((-(-width // case.tiles.columns), rows.num_rows), dtype=torch.float32, device=DEVICE)
    product(
        case.operand, case.stack, rows.offsets_E, dz_MG, case.tiles, scales=case.scales, lora=case.lora,
        gradient=Gradient(z_MG, p_M, shares),
    )  # fmt: skip
    dh, its = case.want()
    g, u = z_MG[:live].double().chunk(2, 1)
    p, sigmoid = p_M[:live].double()[:, None], torch.sigmoid(g)
    slope = torch.cat([u * sigmoid * (1 + g * (1 - sigmoid)), g * sigmoid], 1) * p
    # the gate's own arithmetic in float32: a cancellation in 1 + g·(1 - sigmoid) is bounded by its terms
    # and a sigmoid below the smallest float32 is zero
    terms = torch.cat([(u * sigmoid).abs() * (1 + (g * (1 - sigmoid)).abs()), (g * sigmoid).abs()], 1) * p.abs()
    twice = torch.cat([dh, dh], 1)
    magnitude = torch.cat([its, its], 1)
    slack = (
        case.slack * magnitude * slope.abs() + TINY * magnitude * torch.cat([u * (1 + g.abs()), g], 1).abs() * p.abs()
    )
    assert_sums("dz", dz_MG[:live], twice * slope, magnitude * terms, case.terms + 8, slack=slack)
    h = g * sigmoid * u
    share = sum_parts(shares, rows.offsets_E)
    slack = ((case.slack + 16 * 2**-24 + 1.01 * ROUNDED) * its * h.abs() + TINY * its * (g * u).abs()).sum(1)
    assert_sums("<dh, h>", share[:live], (dh * h).sum(1), (its * h.abs()).sum(1), case.terms + width, slack=slack)
    assert bool(dz_MG[live:].isnan().all())


@given(drawn=ragged, first=st.integers(0, 2), more=st.integers(1, 3))
@settings(max_examples=EXAMPLES, deadline=None)
def test_a_range_of_experts(drawn: tuple[list[int], int, int], first: int, more: int) -> None:
    """A chunk's bank writes the rows of its experts and no other row."""
    rows = Rows(*drawn)
    first = min(first, rows.num_experts - 1)
    last = min(first + more, rows.num_experts)
    weight = rows.weight(TENSOR, 1, 48, 64)
    x = rows.rows(64)
    out = torch.empty((rows.num_rows, 48), dtype=ACTIVATIONS, device=DEVICE)
    bank = weight.dequantize(ACTIVATIONS)
    stack = Stack(bank[first:last].contiguous(), weight, first, last)
    product(Operand(x), stack, rows.offsets_E, out, tiles_for("bank.down", 1), scales=kernel.NONE.value)
    value, magnitude = grouped(rows, x, bank.transpose(1, 2))
    for e, span in rows.spans():
        if first <= e < last:
            assert_sums("y", out[span], value[span], magnitude[span], 64)
        else:
            assert bool(out[span].isnan().all())


def test_an_expert_with_every_row() -> None:
    for counts in ([200, 0, 0], [0, 0, 200], [200]):
        case = operands(
            (counts, 0, 0), "codes", CHANNEL, flip=False, parts=1, size=(48, 64), rank=4, gather=True, left=True,
            site="down",
        )  # fmt: skip
        out = torch.empty((200, 48), dtype=ACTIVATIONS, device=DEVICE)
        product(case.operand, case.stack, case.rows.offsets_E, out, case.tiles, scales=case.scales, lora=case.lora)
        assert_sums("y", out, *case.want(), case.terms)
        again = torch.empty_like(out)
        product(case.operand, case.stack, case.rows.offsets_E, again, case.tiles, scales=case.scales, lora=case.lora)
        assert torch.equal(out, again)
