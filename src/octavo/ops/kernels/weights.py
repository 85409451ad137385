"""Passes over frozen codes: dequantize a range of experts into a buffer, and transpose codes.

Legend: ``E`` experts, ``N`` out features (``parts`` grids of ``rows``), ``K`` in features. Experts without rows are
skipped on the device: their slot of the buffer is left as it was, and nothing reads it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.formats.weight import Float8Weight
from octavo.ops.kernels.common import bytes_of, ceil_div, expert_rows


@triton.jit
def dequantize_kernel(
    codes, scales, bank, offsets_E, first, N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, GRID_N: tl.constexpr,
    GRID_K: tl.constexpr, SB_N: tl.constexpr, SB_K: tl.constexpr, PARTS: tl.constexpr, INTERLEAVED: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(1)
    e = first + slot
    start, end = expert_rows(offsets_E, e)
    if end > start:
        tiles_k: tl.constexpr = (K + BK - 1) // BK
        n = (tl.program_id(0) // tiles_k) * BN + tl.arange(0, BN)
        k = (tl.program_id(0) % tiles_k) * BK + tl.arange(0, BK)
        mask = (n < N)[:, None] & (k < K)[None, :]
        part = n // ROWS
        grid_row = part * GRID_N + (n - part * ROWS) // SB_N
        wide = e.to(tl.int64)
        at = n[:, None] * K + k[None, :]
        code = tl.load(codes + wide * (N * K) + at, mask=mask, other=0.0)
        if SB_K >= K:
            scale = tl.load(scales + wide * (PARTS * GRID_N) + grid_row, mask=n < N, other=0.0)[:, None]
        else:
            scale = tl.load(scales + (wide * (PARTS * GRID_N) + grid_row[:, None]) * GRID_K + (k // SB_K)[None, :],
                            mask=mask, other=0.0)  # fmt: skip
        value = (code.to(tl.float32) * scale).to(bank.dtype.element_ty)
        if INTERLEAVED:
            # of the columns of every 16 the even ones first
            value = tl.reshape(tl.permute(tl.reshape(value, (BN, BK // 16, 8, 2)), (0, 1, 3, 2)), (BN, BK))
        tl.store(bank + slot.to(tl.int64) * (N * K) + at, value, mask=mask)


@triton.jit
def transpose_kernel(
    codes, out, offsets_E, N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(1)
    start, end = expert_rows(offsets_E, e)
    if end > start:
        tiles_k: tl.constexpr = (K + BK - 1) // BK
        n = (tl.program_id(0) // tiles_k) * BN + tl.arange(0, BN)
        k = (tl.program_id(0) % tiles_k) * BK + tl.arange(0, BK)
        mask = (n < N)[:, None] & (k < K)[None, :]
        base = e.to(tl.int64) * (N * K)
        code = tl.load(codes + base + n[:, None] * K + k[None, :], mask=mask, other=0)
        tl.store(out + base + k[:, None] * N + n[None, :], tl.trans(code), mask=tl.trans(mask))


def dequantize(weight: Float8Weight, offsets_E: Tensor, first: int, bank: Tensor, *, interleaved: bool = False) -> None:
    """``bank[s] = codes[first + s] × scales`` in the dtype of ``bank``, rounded once from float32, for each expert
    that has rows.

    ``bank``: [experts of this chunk, N, K], contiguous. ``interleaved``: the columns of every 16 with the even ones
    first; K a multiple of 16.
    """
    features, cols = weight.out_features, weight.in_features
    block_n, block_k = 16, min(512, triton.next_power_of_2(cols))
    grid = (ceil_div(features, block_n) * ceil_div(cols, block_k), bank.shape[0])
    dequantize_kernel[grid](
        bytes_of(weight.codes), weight.scales, bank, offsets_E, first, N=features, K=cols, ROWS=weight.rows,
        GRID_N=weight.scales.shape[2], GRID_K=weight.scales.shape[3], SB_N=weight.block[0], SB_K=weight.block[1],
        PARTS=weight.parts, INTERLEAVED=interleaved, BN=block_n, BK=block_k, num_warps=4,
    )  # fmt: skip


def transpose(weight: Float8Weight, offsets_E: Tensor, out: Tensor) -> None:
    """``out[e] = codes[e]ᵀ`` for each expert that has rows; ``out``: one-byte [E, K, N], contiguous."""
    features, cols = weight.out_features, weight.in_features
    block_n, block_k = 128, 64
    grid = (ceil_div(features, block_n) * ceil_div(cols, block_k), weight.num_experts)
    transpose_kernel[grid](
        weight.codes.view(torch.uint8), out.view(torch.uint8), offsets_E, N=features, K=cols, BN=block_n, BK=block_k,
        num_warps=4,
    )  # fmt: skip
