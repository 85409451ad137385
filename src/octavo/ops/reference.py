"""The spec: products with FP8 weights in plain torch, one expert at a time, in float32 (float64 for float64 input).

Every other engine is compared with these functions. Legend: ``M`` rows sorted by expert, ``N`` out features, ``K`` in
features, ``E`` experts, ``R`` LoRA rank.

Numerics, per product with weight ``W = codes × scales``:

``exact``
    ``y = x · Wᵀ`` and ``dx = dy · W``, operands as they are, accumulated wide.
``fp8_grad``
    as exact in forward. In the input gradient ``dy`` is rounded to E4M3 with a scale per row: a weight's scale per
    channel or tensor, which lies on the contraction axis, is folded into ``dy`` first.
``fp8``
    as fp8_grad, and in forward ``x`` is rounded to E4M3 per token (for blocks per group of ``block[1]`` columns, as
    servers of such checkpoints do).
"""

from typing import Literal

import torch
from torch import Tensor

from octavo.formats.weight import Float8Weight
from octavo.ops.weights import DenseWeight, Weight

Numerics = Literal["exact", "fp8_grad", "fp8"]

E4M3_MAX = 448.0


def round_to_e4m3(x_MK: Tensor, group: int) -> Tensor:
    """``x`` as an FP8 product sees it: E4M3 codes times one scale per row and ``group`` columns, in the dtype of
    ``x``.
    """
    rows, columns = x_MK.shape
    padded = torch.nn.functional.pad(x_MK, (0, -columns % group)).view(rows, -1, group)
    scale = padded.abs().amax(-1, keepdim=True) / E4M3_MAX
    # a group of zeros has no scale; its codes are zero under any
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    codes = (padded / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return (codes.to(x_MK.dtype) * scale).reshape(rows, -1)[:, :columns]


def forward_operand(x_MK: Tensor, weight: Weight, numerics: Numerics) -> Tensor:
    """``x`` as the forward product of ``weight`` sees it under ``numerics``."""
    if numerics != "fp8" or isinstance(weight, DenseWeight):
        return x_MK
    return round_to_e4m3(x_MK, min(weight.block[1], weight.in_features))


def product(x_MK: Tensor, weight: Weight, expert: int, numerics: Numerics) -> Tensor:
    """``x · W_eᵀ`` in the dtype of ``x`` (float32 or float64), [rows, N]."""
    w_NK = weight.dequantize(x_MK.dtype, slice(expert, expert + 1))[0]
    return forward_operand(x_MK, weight, numerics) @ w_NK.T


def product_transposed(dy_MN: Tensor, weight: Weight, expert: int, numerics: Numerics) -> Tensor:
    """``dy · W_e`` in the dtype of ``dy`` (float32 or float64), [rows, K]."""
    one = slice(expert, expert + 1)
    if numerics == "exact" or isinstance(weight, DenseWeight):
        return dy_MN @ weight.dequantize(dy_MN.dtype, one)[0]
    if folds_into_rows(weight):
        scales_N = weight.scales[expert, :, :, 0].repeat_interleave(weight.block[0], 1)[:, : weight.rows].reshape(-1)
        folded = round_to_e4m3(dy_MN * scales_N.to(dy_MN.dtype), weight.out_features)
        return folded @ weight.codes[expert].view(torch.float8_e4m3fn).reshape(-1, weight.in_features).to(dy_MN.dtype)
    return round_to_e4m3(dy_MN, weight.out_features) @ weight.dequantize(dy_MN.dtype, one)[0]


def folds_into_rows(weight: Float8Weight) -> bool:
    """Whether one scale serves a whole row of the weight, so that it can be folded into the incoming gradient."""
    return weight.block[1] >= weight.in_features


def grouped_product(x_MK: Tensor, weight: Weight, ends: list[int], numerics: Numerics) -> Tensor:
    """``y_m = x_m · W_{e(m)}ᵀ`` for rows sorted by expert; ``ends`` are the rows' ends per expert. Zero past the
    last end.
    """
    y_MN = x_MK.new_zeros((x_MK.shape[0], weight.out_features))
    for expert, rows in spans(ends):
        y_MN[rows] = product(x_MK[rows], weight, expert, numerics)
    return y_MN


def grouped_product_transposed(dy_MN: Tensor, weight: Weight, ends: list[int], numerics: Numerics) -> Tensor:
    """``dx_m = dy_m · W_{e(m)}``; see :func:`grouped_product`."""
    dx_MK = dy_MN.new_zeros((dy_MN.shape[0], weight.in_features))
    for expert, rows in spans(ends):
        dx_MK[rows] = product_transposed(dy_MN[rows], weight, expert, numerics)
    return dx_MK


def grouped_outer(dy_MN: Tensor, x_MK: Tensor, ends: list[int]) -> Tensor:
    """``dW_e = Σ_{m in e} dy_m ⊗ x_m``, [E, N, K]; zero for an expert without rows."""
    out = dy_MN.new_zeros((len(ends), dy_MN.shape[1], x_MK.shape[1]))
    for expert, rows in spans(ends):
        torch.mm(dy_MN[rows].T, x_MK[rows], out=out[expert])
    return out


def spans(ends: list[int]) -> list[tuple[int, slice]]:
    """(expert, its rows) for every expert that has rows."""
    starts = [0, *ends[:-1]]
    return [(e, slice(start, end)) for e, (start, end) in enumerate(zip(starts, ends, strict=True)) if end > start]
