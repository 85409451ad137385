"""Offsets past 2³¹ elements: the last rows and experts of tensors that a 32-bit address does not reach.

In the interpreter the tensors are sparse files, of which only the pages that a kernel touches exist.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from octavo.formats.weight import Float8Weight
from octavo.ops.kernels import product as kernel
from octavo.ops.kernels.common import INTERPRETED
from octavo.ops.kernels.lora_backward import lora_backward
from octavo.ops.kernels.outer import outer
from octavo.ops.kernels.product import Operand, Stack, product
from octavo.ops.kernels.rows import combine, pass_rows
from octavo.ops.kernels.tiles import tiles_for
from octavo.ops.kernels.weights import dequantize
from octavo.ops.weights import DenseWeight, storage
from tests.ops.kernels.cases import ACTIVATIONS, CHANNEL, DEVICE, Rows, assert_sums, grouped, grouped_outer

FAR = 2**31


def sparse(folder: Path, *shape: int, dtype: torch.dtype = ACTIVATIONS) -> Tensor:
    """Zeros."""
    if not INTERPRETED:
        return torch.zeros(shape, dtype=dtype, device=DEVICE)
    size = torch.Size(shape).numel()
    assert size > FAR
    return torch.from_file(str(folder / "sparse"), shared=True, size=size, dtype=dtype).view(shape)


@pytest.fixture
def far(tmp_path: Path) -> tuple[Rows, Tensor]:
    """Ten rows of one expert and [T, 64] with T · 64 > 2³¹, of which the rows gather the last tokens."""
    rows = Rows([10], 0, 0)
    tokens = FAR // 64 + 16
    x_TK = sparse(tmp_path, tokens, 64)
    x_TK[-16:] = rows.draw(16, 64)
    rows.token_M = torch.randint(tokens - 16, tokens, (10,)).to(DEVICE)
    return rows, x_TK


def test_gathered_rows(far: tuple[Rows, Tensor]) -> None:
    rows, x_TK = far
    factor, b_MR = rows.draw(1, 64, 16), rows.rows(16)
    gathered = x_TK[rows.token_M]
    skinny, _ = pass_rows(x_TK, offsets_E=rows.offsets_E, token_M=rows.token_M, factor=factor, contract=1)
    assert skinny is not None
    yb_MR, dB, _ = lora_backward(x_TK, factor, b_MR, rows.offsets_E, token_M=rows.token_M)
    for name, got in (("skinny", skinny), ("yb", yb_MR)):
        assert_sums(name, got, *grouped(rows, gathered, factor), terms=64)
    dA = outer(x_TK, b_MR, rows.offsets_E, rank_first=False, dtype=torch.float32, token_M=rows.token_M)
    for name, got in (("dB", dB), ("dA", dA)):
        assert_sums(name, got, *grouped_outer(rows, gathered, b_MR), terms=10)


def test_gathered_rows_of_a_product(far: tuple[Rows, Tensor]) -> None:
    rows, x_TK = far
    weight = rows.weight(CHANNEL, 1, 48, 64)
    bank = weight.dequantize(ACTIVATIONS)
    out = torch.empty((10, 48), dtype=ACTIVATIONS, device=DEVICE)
    stack = Stack(bank, weight, 0, 1)
    product(
        Operand(x_TK, rows.token_M), stack, rows.offsets_E, out, tiles_for("bank.down", 1), scales=kernel.NONE.value
    )
    assert_sums("y", out, *grouped(rows, x_TK[rows.token_M], bank.transpose(1, 2)), terms=64)


def test_combined_rows(far: tuple[Rows, Tensor]) -> None:
    _, y_MH = far
    row_TK = torch.arange(y_MH.shape[0] - 6, y_MH.shape[0]).view(3, 2).to(DEVICE)
    offsets_E = torch.tensor([y_MH.shape[0]], dtype=torch.int32, device=DEVICE)
    got = combine(y_MH, row_TK, offsets_E, None)
    wide = y_MH[row_TK].double()
    assert_sums("combine", got, wide.sum(1), wide.abs().sum(1), terms=2)


def test_experts(tmp_path: Path) -> None:
    """E·N·K > 2³¹: the last expert alone has rows."""
    # a program holds all experts' offsets: few on a GPU, where memory is no matter
    width = 128 if INTERPRETED else 4096
    experts = FAR // width**2 + 1
    codes = sparse(tmp_path, experts, 1, width, width, dtype=torch.uint8)
    rows = Rows([10], 0, 0)
    last = rows.weight(CHANNEL, 1, width, width)
    codes[-1] = last.codes[0].view(torch.uint8)
    scales = torch.zeros((experts, 1, width, 1), device=DEVICE)
    scales[-1] = last.scales[0]
    weight = Float8Weight(codes.view(torch.float8_e4m3fn), scales, last.block)
    offsets_E = torch.zeros(experts, dtype=torch.int32, device=DEVICE)
    offsets_E[-1] = 10

    bank = torch.empty((1, width, width), dtype=ACTIVATIONS, device=DEVICE)
    dequantize(weight, offsets_E, experts - 1, bank)
    assert torch.equal(bank, last.dequantize(ACTIVATIONS))

    x_MK = rows.rows(width)
    for site, flip in (("down", False), ("up_grad", True)):
        out = torch.empty((10, width), dtype=ACTIVATIONS, device=DEVICE)
        stack = Stack(storage(weight)[0], weight, 0, experts, flip=flip, widen=True)
        scaling = kernel.TILE.value if flip else kernel.COLUMN.value
        product(Operand(x_MK), stack, offsets_E, out, tiles_for(f"codes.{site}", 1), scales=scaling)
        right = last.dequantize(torch.float64)
        want, magnitude = grouped(rows, x_MK, right if flip else right.transpose(1, 2))
        slack = torch.finfo(ACTIVATIONS).eps / 2 * 1.01 * magnitude
        assert_sums(site, out, want, magnitude, terms=width + 4, slack=slack)


def test_plain_experts(tmp_path: Path) -> None:
    """The same of a stack that is not quantized, whose last expert has a bias."""
    width = 128 if INTERPRETED else 4096
    experts = FAR // width**2 + 1
    stack_ENK = sparse(tmp_path, experts, width, width)
    rows = Rows([10], 0, 0)
    stack_ENK[-1] = rows.draw(width, width)
    bias_EN = torch.zeros((experts, width), device=DEVICE)
    bias_EN[-1] = rows.draw(width)
    offsets_E = torch.zeros(experts, dtype=torch.int32, device=DEVICE)
    offsets_E[-1] = 10
    x_MK = rows.rows(width)
    for site, flip in (("down", False), ("up_grad", True)):
        out = torch.empty((10, width), dtype=ACTIVATIONS, device=DEVICE)
        stack = Stack(stack_ENK, DenseWeight(stack_ENK), 0, experts, flip=flip)
        product(
            Operand(x_MK), stack, offsets_E, out, tiles_for(f"bank.{site}", 1), scales=kernel.NONE.value,
            bias_EN=bias_EN,
        )  # fmt: skip
        right = stack_ENK[-1:] if flip else stack_ENK[-1:].transpose(1, 2)
        want, magnitude = grouped(rows, x_MK, right)
        bias = bias_EN[-1].double()
        assert_sums(site, out, want + bias, magnitude + bias.abs(), terms=width + 1)
