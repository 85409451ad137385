"""Linear layers on kernels: ``x · Wᵀ`` and ``x · W`` for FP8 ``W`` [N, K], four ways.

``few``     the codes are read straight into the product (W8A16, or rounded rows): fewest bytes, for few rows.
``bank``    one pass dequantizes the matrix into a temporary of the activations' dtype, then torch multiplies.
``hopper``  the grouped product of :mod:`octavo.ops.hopper` with one expert, for E4M3 rows.
``scaled``  torch's rowwise FP8 product, for scales that cover whole rows; the input gradient on transposed codes.

Where neither of the last two runs, rounded operands are multiplied in bfloat16 past few rows, which is the numerics
asked for at the speed of bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from octavo.formats.weight import Float8Weight
from octavo.ops.engines import ProductEngine
from octavo.ops.reference import folds_into_rows

if TYPE_CHECKING:
    from octavo.ops.kernels.rows import Rounded


@dataclass(frozen=True)
class MatrixEngine(ProductEngine):
    """``linear`` as the module's docstring says; the other stages belong to experts.

    ``few``: up to how many rows codes are read straight into the product. ``scaled_mm``: whether torch's rowwise FP8
    product runs here, ``hopper`` whether the products for Hopper take the weight.
    """

    few: int
    scaled_mm: bool
    hopper: bool = False

    def linear(self, x_MK: Tensor, weight: Float8Weight, *, transposed: bool) -> Tensor:
        from octavo.ops.kernels import few

        x_MK = x_MK.contiguous()
        straight = x_MK.shape[0] <= self.few
        if self.numerics == "fp8" or (self.numerics == "fp8_grad" and transposed):
            return self._rounded(x_MK, weight, transposed=transposed, straight=straight)
        if straight:
            return few.rows_by_matrix(x_MK, weight, x_MK.dtype, transposed=transposed)
        return _multiply(x_MK, _bank(weight, x_MK.dtype), transposed=transposed)

    def _rounded(self, x_MK: Tensor, weight: Float8Weight, *, transposed: bool, straight: bool) -> Tensor:
        from octavo.ops.kernels import few
        from octavo.ops.kernels.rows import pass_rows

        dtype, folds = x_MK.dtype, folds_into_rows(weight)
        folded = folds and transposed
        if folded:
            _, rounded = pass_rows(x_MK, fold_EK=_per_row(weight), group=weight.out_features)
        else:
            group = weight.out_features if transposed else min(weight.block[1], weight.in_features)
            _, rounded = pass_rows(x_MK, group=group)
        assert rounded is not None
        if straight:
            return few.rows_by_matrix(rounded, weight, dtype, transposed=transposed, folded=folded)
        if self.hopper and not folds:
            return _grouped(rounded, weight, transposed=transposed)
        if folds and self.scaled_mm:
            return _scaled_mm(rounded, weight, dtype, transposed=transposed)
        if folded:
            # E4M3 codes are exact in bfloat16: the row's scale comes after the product
            y_MN = rounded.codes.to(dtype) @ weight.codes.view(torch.float8_e4m3fn)[0, 0].to(dtype)
            return (y_MN.float() * rounded.scales).to(dtype)
        return _multiply(few.restore(rounded, group, dtype), _bank(weight, dtype), transposed=transposed)


def _multiply(x_MK: Tensor, w_NK: Tensor, *, transposed: bool) -> Tensor:
    return x_MK @ w_NK if transposed else x_MK @ w_NK.T


@cache
def _has_rows(device: torch.device) -> Tensor:
    """The offsets of one expert that has rows: passes over weights skip experts without."""
    with torch.inference_mode(False):
        return torch.ones(1, dtype=torch.int32, device=device)


def _bank(weight: Float8Weight, dtype: torch.dtype) -> Tensor:
    from octavo.ops.kernels.weights import dequantize

    bank = torch.empty((1, weight.out_features, weight.in_features), dtype=dtype, device=weight.codes.device)
    dequantize(weight, _has_rows(weight.codes.device), 0, bank)
    return bank[0]


def _per_row(weight: Float8Weight) -> Tensor:
    """The scale of each output feature, float32 [1, N], of a weight whose scales cover whole rows."""
    grid = weight.scales[0, :, :, 0]
    return grid.repeat_interleave(weight.block[0], 1)[:, : weight.rows].contiguous()


def _grouped(rounded: Rounded, weight: Float8Weight, *, transposed: bool) -> Tensor:
    """By the products for Hopper, over blocks: one expert, which has all rows."""
    from octavo.ops.hopper.engine import tile_sizes, tokens_of_tile
    from octavo.ops.hopper.product import Rows, product

    num_rows, device = rounded.codes.shape[0], rounded.codes.device
    width = weight.in_features if transposed else weight.out_features
    out = torch.empty((num_rows, width), dtype=torch.bfloat16, device=device)
    offsets_E = torch.full((1,), num_rows, dtype=torch.int32, device=device)
    tokens = tokens_of_tile(num_rows, tile_sizes(tokens_left=not transposed))
    rows = Rows(rounded.codes, None, rounded.scales)
    product(rows, weight, offsets_E, out, flip=transposed, tokens=tokens)
    return out


def _scaled_mm(rounded: Rounded, weight: Float8Weight, dtype: torch.dtype, *, transposed: bool) -> Tensor:
    """torch's FP8 product with a scale per row of both operands; its right operand is contiguous along the
    contraction.
    """
    from octavo.ops.kernels.weights import transpose

    codes = weight.codes.view(torch.float8_e4m3fn)[0, 0]
    if transposed:
        turned = torch.empty((1, weight.in_features, weight.out_features), dtype=codes.dtype, device=codes.device)
        transpose(weight, _has_rows(codes.device), turned)
        right, scale = turned[0].t(), rounded.scales.new_ones((1, weight.in_features))
    else:
        right, scale = codes.t(), _per_row(weight)
    # without fast accumulation: sums stay in float32, as everywhere else
    return torch._scaled_mm(rounded.codes, right, rounded.scales, scale, out_dtype=dtype, use_fast_accum=False)
