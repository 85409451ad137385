"""Products of few rows, which read each FP8 code straight from the checkpoint's bytes: rows against one matrix, and an
expert MLP of few (token, expert) pairs, which reads the routed experts alone and sorts nothing.

Plain Triton on pointers. Sums in float32, one rounding at the store.

Legend: ``M`` rows, ``T`` tokens, ``P = T·K`` (token, expert) pairs, ``N`` out columns, ``K`` contraction.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.formats.weight import Float8Weight
from octavo.ops.kernels.common import INTERPRETED, bytes_of, ceil_div
from octavo.ops.kernels.rows import Rounded
from octavo.ops.weights import Factors, Weight

# how the scales of a weight enter: on a tile before it multiplies, on the sum of a step, or not at all
TILE, STEP, NONE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def matrix_kernel(
    x, x_scale, w, scales, out, M,
    N: tl.constexpr, K: tl.constexpr, COLS: tl.constexpr, GRID_K: tl.constexpr, SB_N: tl.constexpr,
    SB_K: tl.constexpr, X_GROUPS: tl.constexpr, X_GROUP: tl.constexpr, FLIP: tl.constexpr, SCALES: tl.constexpr,
    ROUNDED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    mask_m, mask_n = m < M, n < N
    kind: tl.constexpr = out.dtype.element_ty
    acc = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        mask_k = k < K
        rows = tl.load(x + m.to(tl.int64)[:, None] * K + k[None, :], mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        if FLIP:
            row_w = k[:, None]
            column_w = n[None, :]
        else:
            row_w = n[None, :]
            column_w = k[:, None]
        mask_w = mask_k[:, None] & mask_n[None, :]
        tile = tl.load(w + row_w.to(tl.int64) * COLS + column_w, mask=mask_w, other=0.0).to(tl.float32)
        if SCALES == TILE:
            tile *= tl.load(scales + (row_w // SB_N) * GRID_K + column_w // SB_K, mask=mask_w, other=0.0)
        if WIDE:
            part = tl.dot(rows.to(tl.float32), tile)
        else:
            part = tl.dot(rows.to(kind), tile.to(kind))
        if SCALES == STEP:
            if FLIP:
                part *= tl.load(scales + (k0 // SB_N) * GRID_K + n // SB_K, mask=mask_n, other=0.0)[None, :]
            else:
                part *= tl.load(scales + (n // SB_N) * GRID_K + k0 // SB_K, mask=mask_n, other=0.0)[None, :]
        if ROUNDED:
            part *= tl.load(x_scale + m * X_GROUPS + k0 // X_GROUP, mask=mask_m, other=0.0)[:, None]
        acc += part
    tl.store(out + m.to(tl.int64)[:, None] * N + n[None, :], acc.to(kind), mask=mask_m[:, None] & mask_n[None, :])


def rows_by_matrix(
    x: Tensor | Rounded, weight: Float8Weight, dtype: torch.dtype, *, transposed: bool, folded: bool = False
) -> Tensor:
    """``x · Wᵀ``, or ``x · W`` when ``transposed``, [M, N] in ``dtype``; each code is read once for every 64 rows.

    ``x`` [M, K]: in ``dtype``, or rounded with one scale per row, or per step of 16 or more columns that the blocks of
    the weight share. ``folded``: the weight's scales are in ``x`` already. Of the weight (E = 1) a scale multiplies the
    sum of the columns that share it, where there are 16 or more of them; else the tile, rounded to ``dtype``.
    """
    values, x_scales = (x.codes, x.scales) if isinstance(x, Rounded) else (x, None)
    num_rows, contraction = values.shape
    features, cols = weight.out_features, weight.in_features
    width = cols if transposed else features
    out = torch.empty((num_rows, width), dtype=dtype, device=values.device)
    if num_rows == 0:
        return out
    sb_n, sb_k = min(weight.block[0], features), min(weight.block[1], cols)
    shared = sb_n if transposed else sb_k
    # few rows are bound by memory: a long step has more bytes under way
    step = 32 if INTERPRETED else 256 if num_rows <= 16 else 128
    mode = TILE
    if shared < contraction:
        while shared % step and step > 16:
            step //= 2
        if shared % step:
            # every column of the contraction has a scale of its own
            step = 32 if INTERPRETED else 128
        else:
            mode = STEP
    else:
        mode = STEP
    if folded:
        mode = NONE
    groups = 1 if x_scales is None else x_scales.shape[1]
    assert groups == 1 or mode is STEP, "rounded rows share the weight's blocks"
    block_m = 16 if num_rows <= 16 else 32 if num_rows <= 32 else 64
    block_n = 64 if num_rows > 64 else 32 if INTERPRETED or width > 2048 else 16
    matrix_kernel[(ceil_div(width, block_n), ceil_div(num_rows, block_m))](
        values, x_scales, bytes_of(weight.codes), weight.scales, out, num_rows,
        N=width, K=contraction, COLS=cols, GRID_K=weight.scales.shape[3], SB_N=sb_n, SB_K=sb_k,
        X_GROUPS=groups, X_GROUP=contraction if groups == 1 else shared, FLIP=transposed, SCALES=mode.value,
        ROUNDED=x_scales is not None, BM=block_m, BN=block_n, BK=step, WIDE=INTERPRETED or dtype == torch.float32,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    return out


@triton.jit
def _weight_rows(
    w, scales, e, row, k, mask, stride_e, stride_n, stride_k, ROWS: tl.constexpr, GRID_E: tl.constexpr,
    GRID_N: tl.constexpr, GRID_K: tl.constexpr, SB_N: tl.constexpr, SB_K: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    """Rows of expert ``e`` in float32, [BN, BK]."""
    at = w + e * stride_e + row.to(tl.int64)[:, None] * stride_n + k.to(tl.int64)[None, :] * stride_k
    tile = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    if CODES:
        part = row // ROWS
        grid_row = part * GRID_N + (row - part * ROWS) // SB_N
        tile *= tl.load(scales + e * GRID_E + grid_row[:, None] * GRID_K + (k // SB_K)[None, :], mask=mask, other=0.0)
    return tile


@triton.jit
def _side_terms(
    acc, n, mask_n, e, pair, bias, xa, factor, N_ROWS, lora_e, lora_n, lora_r, R: tl.constexpr, RP: tl.constexpr,
    BIAS: tl.constexpr, LORA: tl.constexpr,
):  # fmt: skip
    if LORA:
        r = tl.arange(0, RP)
        at = factor + e * lora_e + n.to(tl.int64)[:, None] * lora_n + r[None, :] * lora_r
        b = tl.load(at, mask=mask_n[:, None] & (r < R)[None, :], other=0.0).to(tl.float32)
        a = tl.load(xa + pair * R + r, mask=r < R, other=0.0).to(tl.float32)
        acc += tl.sum(b * a[None, :], 1)
    if BIAS:
        acc += tl.load(bias + e * N_ROWS + n, mask=mask_n, other=0.0).to(tl.float32)
    return acc


@triton.jit
def pairs_kernel(
    x, x_scale, index, p_TK, w, scales, bias, xa, factor, out,
    stride_e, stride_n, stride_k, lora_e, lora_n, lora_r,
    N: tl.constexpr, K: tl.constexpr, E: tl.constexpr, N_ROWS: tl.constexpr, ROWS: tl.constexpr,
    GRID_E: tl.constexpr, GRID_N: tl.constexpr, GRID_K: tl.constexpr, SB_N: tl.constexpr, SB_K: tl.constexpr,
    X_GROUPS: tl.constexpr, X_GROUP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    PER_ROW: tl.constexpr, PER_OUT: tl.constexpr, CODES: tl.constexpr, ROUNDED: tl.constexpr, BIAS: tl.constexpr,
    LORA: tl.constexpr, GATED: tl.constexpr, WEIGHTED: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One row of ``out`` from the PER_OUT pairs that belong to it; a pair reads row ``pair // PER_ROW`` of x."""
    owner = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    mask_n = n < N
    kind: tl.constexpr = out.dtype.element_ty
    total = tl.zeros((BN,), tl.float32)
    for j in range(PER_OUT):
        pair = owner * PER_OUT + j
        e = tl.load(index + pair).to(tl.int64)
        # experts of another rank contribute nothing, and nothing of theirs is read
        live = (e >= 0) & (e < E)
        e = tl.where(live, e, 0)
        first = tl.zeros((BN, BK), tl.float32)
        second = tl.zeros((BN, BK), tl.float32)
        for k0 in range(0, K, BK):
            k = k0 + tl.arange(0, BK)
            mask_k = (k < K) & live
            row = tl.load(x + (pair // PER_ROW) * K + k, mask=mask_k, other=0.0).to(tl.float32)
            if ROUNDED:
                at = x_scale + (pair // PER_ROW) * X_GROUPS + k // X_GROUP
                row *= tl.load(at, mask=mask_k, other=0.0)
            mask = mask_n[:, None] & mask_k[None, :]
            first += row[None, :] * _weight_rows(w, scales, e, n, k, mask, stride_e, stride_n, stride_k, ROWS, GRID_E,
                                                 GRID_N, GRID_K, SB_N, SB_K, CODES)  # fmt: skip
            if GATED:
                second += row[None, :] * _weight_rows(w, scales, e, n + N, k, mask, stride_e, stride_n, stride_k, ROWS,
                                                      GRID_E, GRID_N, GRID_K, SB_N, SB_K, CODES)  # fmt: skip
        value = _side_terms(tl.sum(first, 1), n, mask_n & live, e, pair, bias, xa, factor, N_ROWS, lora_e, lora_n,
                            lora_r, R, RP, BIAS, LORA)  # fmt: skip
        if GATED:
            linear = _side_terms(tl.sum(second, 1), n + N, mask_n & live, e, pair, bias, xa, factor, N_ROWS, lora_e,
                                 lora_n, lora_r, R, RP, BIAS, LORA)  # fmt: skip
            # from the rounded z, as every engine has it
            gate = value.to(kind).to(tl.float32)
            value = gate * tl.sigmoid(gate) * linear.to(kind).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(p_TK + pair).to(tl.float32)
        total += tl.where(live, value, 0.0)
    tl.store(out + owner * N + n, total.to(kind), mask=mask_n)


def pairs(
    x: Tensor | Rounded,
    index_TK: Tensor,
    weight: Weight,
    dtype: torch.dtype,
    *,
    gated: bool = False,
    p_TK: Tensor | None = None,
    bias_EN: Tensor | None = None,
    lora: tuple[Tensor, Factors] | None = None,
) -> Tensor:
    """``W_e · x`` for each (token, expert) pair, [P, N]; or ``Σ_k p_tk · W_e · x_tk`` with ``p_TK``, [T, N].

    ``x``: [T, K] or [P, K], floats or rounded. ``gated``: ``silu(g) · u`` of the result ``[g, u]``, [P, N/2].
    ``lora``: (x·A float32 [P, R], the factors), adding ``x·A·Bᵀ``. Ids outside the experts give zero.
    """
    values, x_scales = (x.codes, x.scales) if isinstance(x, Rounded) else (x, None)
    num_tokens, top_k = index_TK.shape
    num_pairs, features, cols = num_tokens * top_k, weight.out_features, weight.in_features
    width = features // 2 if gated else features
    owners = num_pairs if p_TK is None else num_tokens
    out = torch.empty((owners, width), dtype=dtype, device=values.device)
    if owners == 0:
        return out
    if isinstance(weight, Float8Weight):
        stored, scales = bytes_of(weight.codes), weight.scales
        strides: tuple[int, ...] = (features * cols, cols, 1)
        grid_n, grid_k = scales.shape[2:]
        geometry = (weight.rows, weight.parts * grid_n * grid_k, grid_n, grid_k, *weight.block)
    else:
        stored, scales, strides = weight.weight_ENK, None, weight.weight_ENK.stride()
        geometry = (features, 1, 1, 1, 1, 1)
    groups = 1 if x_scales is None else x_scales.shape[1]
    group = cols if groups == 1 else geometry[5]
    lora_strides: tuple[int, ...] = (0, 0, 0)
    xa, factor, rank = None, None, 1
    if lora is not None:
        xa, factor = lora[0], lora[1].B_ENR
        rank, lora_strides = xa.shape[1], factor.stride()
    block_k = min(128 if INTERPRETED else 1024, triton.next_power_of_2(cols))
    block_n = 16 if INTERPRETED else 4
    rows, grid_e, grid_n, grid_k, sb_n, sb_k = geometry
    pairs_kernel[(ceil_div(width, block_n), owners)](
        values, x_scales, index_TK, p_TK, stored, scales, bias_EN, xa, factor, out, *strides, *lora_strides,
        N=width, K=cols, E=weight.num_experts, N_ROWS=features, ROWS=rows, GRID_E=grid_e, GRID_N=grid_n, GRID_K=grid_k,
        SB_N=sb_n, SB_K=sb_k, X_GROUPS=groups, X_GROUP=group, R=rank, RP=triton.next_power_of_2(rank),
        PER_ROW=num_pairs // values.shape[0], PER_OUT=num_pairs // owners, CODES=scales is not None,
        ROUNDED=x_scales is not None, BIAS=bias_EN is not None, LORA=lora is not None, GATED=gated,
        WEIGHTED=p_TK is not None, BN=block_n, BK=block_k, num_warps=4, num_stages=3,
    )  # fmt: skip
    return out


@triton.jit
def restore_kernel(codes, scales, out, K: tl.constexpr, GROUP: tl.constexpr, BK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    groups: tl.constexpr = (K + GROUP - 1) // GROUP
    value = tl.load(codes + row * K + k, mask=k < K, other=0.0).to(tl.float32)
    value *= tl.load(scales + row * groups + k // GROUP, mask=k < K, other=0.0)
    tl.store(out + row * K + k, value.to(out.dtype.element_ty), mask=k < K)


def restore(rounded: Rounded, group: int, dtype: torch.dtype) -> Tensor:
    """``codes × scales`` in ``dtype``, [M, K]: rounded rows for a product that takes no codes."""
    num_rows, cols = rounded.codes.shape
    out = torch.empty((num_rows, cols), dtype=dtype, device=rounded.codes.device)
    if num_rows:
        block = 1024
        restore_kernel[(num_rows, ceil_div(cols, block))](
            rounded.codes, rounded.scales, out, K=cols, GROUP=group, BK=block, num_warps=4
        )
    return out
