"""The grouped product: ``acc[m, n] = Σ_k a[m, k] · w_{e(m)}[n, k]`` (or ``w_{e(m)}[k, n]``) for rows sorted by expert.

One persistent kernel serves every engine. What varies is known when it is compiled:

``CODES``  the weight's tile is E4M3 and is widened in registers (W8A16); else it is multiplied as it is stored
           (a bfloat16 stack, dequantized or never quantized, or E4M3 by E4M3 on the FP8 tensor cores).
``LEFT``   the weight is the product's left operand and the transposed tile is computed: a widened tile can then stay
           in registers instead of taking a turn through shared memory.
``FLIP``   the contraction runs over the rows as they are stored: the input gradient, or forward of a transposed stack.
``SCALES`` where the weight's scale is applied: nowhere; to the accumulator's columns after the product; to the tile
           before it; or per slab of the contraction (``SLAB``), promoted into a float32 accumulator.
``STAGE``  what the epilogue does: store; SwiGLU (two accumulators, gate and up; writes z and h); or SwiGLU's gradient
           (writes dz and, per tile of columns, the row's share of <dh, h>).

LoRA enters as one more step of the accumulation: ``acc += xa[m, :] · b_e[n, :]``, and ``BIAS`` as a last one:
``acc += bias_e[n]``. Operands in their dtype, sums in float32, one rounding at the store. Rows past the last offset are
neither read into a sum nor written.

Legend: ``M`` rows, ``E`` experts, ``N`` out columns of the product (of one part for SwiGLU), ``K`` contraction,
``R`` LoRA rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from octavo.formats.weight import Float8Weight
from octavo.ops.kernels.common import INTERPRETED, ceil_div, expert_rows, expert_tiles, num_multiprocessors, padded_rank
from octavo.ops.weights import Weight

NONE, COLUMN, TILE, SLAB = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
STORE, SWIGLU, SWIGLU_GRADIENT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _widen(x, WIDE: tl.constexpr):
    # The interpreter's dot of bfloat16 is garbage without a word.
    if WIDE:
        return x.to(tl.float32)
    else:
        return x


@triton.jit
def _weight_tile(
    w, scales, slot, e, n0, n_base, k0, N_ROWS: tl.constexpr, FLIP: tl.constexpr, CODES: tl.constexpr,
    SCALES: tl.constexpr, ROWS: tl.constexpr, GRID_N: tl.constexpr, GRID_K: tl.constexpr, SB_N: tl.constexpr,
    SB_K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WIDE: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """The tile of columns ``n0`` (of the part that starts at weight row ``n_base``) and contraction ``k0``: [BN, BK],
    or [BK, BN] when FLIP.
    """
    if FLIP:
        tile = w.load([slot, k0, n_base + n0]).reshape(BK, BN)
    else:
        tile = w.load([slot, n_base + n0, k0]).reshape(BN, BK)
    if CODES:
        if SCALES == TILE:
            row = (k0 + tl.arange(0, BK)) if FLIP else (n_base + n0 + tl.arange(0, BN))
            column = n0 if FLIP else k0
            part = row // ROWS
            at = (e.to(tl.int64) * (N_ROWS // ROWS * GRID_N) + part * GRID_N + (row - part * ROWS) // SB_N) * GRID_K
            scale = tl.load(scales + at + column // SB_K, mask=row < N_ROWS, other=0.0)
            tile = (tile.to(tl.float32) * scale[:, None]).to(KIND)
        else:
            tile = tile.to(KIND)
    return _widen(tile, WIDE)


@triton.jit
def _multiply(a, tile, acc, LEFT: tl.constexpr, FLIP: tl.constexpr):
    if LEFT:
        if FLIP:
            return tl.dot(tl.trans(tile), tl.trans(a), acc)
        else:
            return tl.dot(tile, tl.trans(a), acc)
    else:
        if FLIP:
            return tl.dot(a, tile, acc)
        else:
            return tl.dot(a, tl.trans(tile), acc)


@triton.jit
def _on_columns(x, LEFT: tl.constexpr):
    """A vector over columns n, laid along the accumulator."""
    if LEFT:
        return x[:, None]
    else:
        return x[None, :]


@triton.jit
def _on_rows(x, LEFT: tl.constexpr):
    if LEFT:
        return x[None, :]
    else:
        return x[:, None]


@triton.jit
def _slab_scale(
    scales, e, n0, n_base, k0, N_ROWS: tl.constexpr, ROWS: tl.constexpr, GRID_N: tl.constexpr, GRID_K: tl.constexpr,
    SB_N: tl.constexpr, SB_K: tl.constexpr, TURNED: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The weight's scales for BN columns of the product and the slab at ``k0``, [BN].

    TURNED: the codes are transposed, so that the product's columns are the grid's columns and ``k0`` its rows.
    """
    wide = e.to(tl.int64) * (N_ROWS // ROWS * GRID_N)
    if TURNED:
        column = n0 + tl.arange(0, BN)
        part = k0 // ROWS
        row = part * GRID_N + (k0 - part * ROWS) // SB_N
        return tl.load(scales + (wide + row) * GRID_K + tl.minimum(column // SB_K, GRID_K - 1))
    else:
        row = tl.minimum(n_base + n0 + tl.arange(0, BN), N_ROWS - 1)
        part = row // ROWS
        return tl.load(scales + (wide + part * GRID_N + (row - part * ROWS) // SB_N) * GRID_K + k0 // SB_K)


@triton.jit
def _lora_step(
    acc, xa, factor, row, mask_m, e, n, n_base, N: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, stride_e, stride_n,
    stride_r, LEFT: tl.constexpr, WIDE: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    RB: tl.constexpr = 64 if RP > 64 else RP
    for r0 in tl.static_range(0, RP, RB):
        r = r0 + tl.arange(0, RB)
        left = tl.load(xa + row.to(tl.int64)[:, None] * R + r[None, :],
                       mask=mask_m[:, None] & (r < R)[None, :], other=0.0).to(KIND)  # fmt: skip
        right = tl.load(factor + e.to(tl.int64) * stride_e + (n_base + n)[:, None] * stride_n + r[None, :] * stride_r,
                        mask=(n < N)[:, None] & (r < R)[None, :], other=0.0).to(KIND)  # fmt: skip
        acc = _multiply(_widen(left, WIDE), _widen(right, WIDE), acc, LEFT, False)
    return acc


@triton.jit
def product_kernel(
    a, w, token_M, offsets_E, a_scale, scales, bias, xa, factor, stride_e, stride_n, stride_r,
    out, h, z, p_M, shares, M, first, last, slot_shift,
    N: tl.constexpr, K: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
    N_ROWS: tl.constexpr, ROWS: tl.constexpr, GRID_N: tl.constexpr, GRID_K: tl.constexpr, SB_N: tl.constexpr,
    SB_K: tl.constexpr, A_GROUPS: tl.constexpr,
    GATHER: tl.constexpr, CODES: tl.constexpr, LEFT: tl.constexpr, FLIP: tl.constexpr, TURNED: tl.constexpr,
    SCALES: tl.constexpr, A_SCALED: tl.constexpr, BIAS: tl.constexpr, LORA: tl.constexpr, STAGE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PROGRAMS: tl.constexpr, STAGES: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    KIND: tl.constexpr = out.dtype.element_ty
    DUAL: tl.constexpr = STAGE == SWIGLU
    NN: tl.constexpr = (N + BN - 1) // BN
    tiles = expert_tiles(offsets_E, first, last, E, EP, BM)
    index_E = tl.arange(0, EP)
    total = tl.max(tiles, 0) * NN
    for tile in tl.range(tl.program_id(0), total, PROGRAMS):
        e = tl.sum((tiles * NN <= tile).to(tl.int32), 0)
        before = tl.sum(tl.where(index_E == e - 1, tiles, 0), 0)
        here = tl.sum(tl.where(index_E == e, tiles, 0), 0) - before
        start, end = expert_rows(offsets_E, e)
        local = tile - before * NN
        row0 = start + (local % here) * BM
        n0 = (local // here) * BN
        row = row0 + tl.arange(0, BM)
        mask_m = row < end
        n = n0 + tl.arange(0, BN)
        slot = e - slot_shift
        source = row
        if GATHER:
            source = tl.load(token_M + row, mask=mask_m, other=0)

        if LEFT:
            acc = tl.zeros((BN, BM), tl.float32)
        else:
            acc = tl.zeros((BM, BN), tl.float32)
        up = acc
        for k0 in tl.range(0, K, BK, num_stages=STAGES):
            if GATHER:
                k = k0 + tl.arange(0, BK)
                at = a + source.to(tl.int64)[:, None] * K + k[None, :]
                if K % BK == 0:
                    x = tl.load(at)
                else:
                    x = tl.load(at, mask=(k < K)[None, :], other=0.0)
            else:
                x = a.load([row0, k0])
            x = _widen(x, WIDE)
            tile_w = _weight_tile(w, scales, slot, e, n0, 0, k0, N_ROWS, FLIP, CODES, SCALES, ROWS, GRID_N, GRID_K,
                                  SB_N, SB_K, BN, BK, WIDE, KIND)  # fmt: skip
            if DUAL:
                tile_u = _weight_tile(w, scales, slot, e, n0, N, k0, N_ROWS, FLIP, CODES, SCALES, ROWS, GRID_N, GRID_K,
                                      SB_N, SB_K, BN, BK, WIDE, KIND)  # fmt: skip
            if SCALES == SLAB:
                zero = tl.zeros_like(acc)
                group = k0 // BK if A_GROUPS > 1 else 0
                slab_a = tl.load(a_scale + source.to(tl.int64) * A_GROUPS + group, mask=mask_m, other=0.0)
                along_m = _on_rows(slab_a, LEFT)
                slab_w = _slab_scale(scales, e, n0, 0, k0, N_ROWS, ROWS, GRID_N, GRID_K, SB_N, SB_K, TURNED, BN)
                acc += _multiply(x, tile_w, zero, LEFT, FLIP) * (along_m * _on_columns(slab_w, LEFT))
                if DUAL:
                    slab_u = _slab_scale(scales, e, n0, N, k0, N_ROWS, ROWS, GRID_N, GRID_K, SB_N, SB_K, TURNED, BN)
                    up += _multiply(x, tile_u, zero, LEFT, FLIP) * (along_m * _on_columns(slab_u, LEFT))
            else:
                acc = _multiply(x, tile_w, acc, LEFT, FLIP)
                if DUAL:
                    up = _multiply(x, tile_u, up, LEFT, FLIP)

        if A_SCALED and SCALES != SLAB:
            along_m = _on_rows(tl.load(a_scale + source, mask=mask_m, other=0.0), LEFT)
            acc *= along_m
            if DUAL:
                up *= along_m
        if SCALES == COLUMN:
            # b_k covers K: one column of scales, per row of the weight or per several
            col = tl.minimum(n, N - 1)
            part = col // ROWS
            wide = e.to(tl.int64) * (N_ROWS // ROWS * GRID_N)
            acc *= _on_columns(tl.load(scales + wide + part * GRID_N + (col - part * ROWS) // SB_N), LEFT)
            if DUAL:
                up *= _on_columns(tl.load(scales + wide + GRID_N + col // SB_N), LEFT)
        if LORA:
            acc = _lora_step(acc, xa, factor, row, mask_m, e, n, 0, N, R, RP, stride_e, stride_n, stride_r, LEFT, WIDE,
                             KIND)  # fmt: skip
            if DUAL:
                up = _lora_step(up, xa, factor, row, mask_m, e, n, N, N, R, RP, stride_e, stride_n, stride_r, LEFT,
                                WIDE, KIND)  # fmt: skip
        if BIAS:
            at_b = bias + e.to(tl.int64) * N_ROWS + n
            acc += _on_columns(tl.load(at_b, mask=n < N, other=0.0).to(tl.float32), LEFT)
            if DUAL:
                up += _on_columns(tl.load(at_b + N, mask=n < N, other=0.0).to(tl.float32), LEFT)

        # addresses are 32-bit offsets from a tile's first row: 64-bit ones would fill the registers
        inside = _on_rows(tl.arange(0, BM), LEFT)
        column = _on_columns(n, LEFT)
        mask = _on_rows(mask_m, LEFT) & (column < N)
        wide = row0.to(tl.int64)
        if STAGE == STORE:
            tl.store(out + wide * N + (inside * N + column), acc.to(out.dtype.element_ty), mask=mask)
        if STAGE == SWIGLU:
            gate = acc.to(out.dtype.element_ty)
            linear = up.to(out.dtype.element_ty)
            at = inside * (2 * N) + column
            tl.store(out + wide * (2 * N) + at, gate, mask=mask)
            tl.store(out + wide * (2 * N) + N + at, linear, mask=mask)
            # from the rounded z, so that backward computes the same h again
            g = gate.to(tl.float32)
            value = g * tl.sigmoid(g) * linear.to(tl.float32)
            tl.store(h + wide * N + (inside * N + column), value.to(out.dtype.element_ty), mask=mask)
        if STAGE == SWIGLU_GRADIENT:
            p = tl.load(p_M + row, mask=mask_m, other=0.0).to(tl.float32)
            base = z + wide * (2 * N)
            to = out + wide * (2 * N)
            share = _gate_gradient(acc, base, to, p, n0, end - row0, N, BM, BN, LEFT)
            tl.store(shares + (n0 // BN).to(tl.int64) * M + row, share, mask=mask_m)


@triton.jit
def _halves(x, BM: tl.constexpr, BN: tl.constexpr, LEFT: tl.constexpr):
    """The accumulator's columns, cut in two."""
    if LEFT:
        return tl.split(tl.permute(tl.reshape(x, (2, BN // 2, BM)), (1, 2, 0)))
    else:
        return tl.split(tl.permute(tl.reshape(x, (BM, 2, BN // 2)), (0, 2, 1)))


@triton.jit
def _gate_gradient(dh, z, dz, p, n0, rows, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, LEFT: tl.constexpr):
    """Write dz for ``BN`` columns of dh (before the router's weight ``p``) and return each row's share of <dh, h>."""
    if BN > 64:
        # 64 columns at a time: z, dz and their addresses beside the accumulator would not fit the registers
        first, second = _halves(dh, BM, BN, LEFT)
        share = _gate_gradient(first, z, dz, p, n0, rows, N, BM, BN // 2, LEFT)
        return share + _gate_gradient(second, z, dz, p, n0 + BN // 2, rows, N, BM, BN // 2, LEFT)
    else:
        inside = _on_rows(tl.arange(0, BM), LEFT)
        column = _on_columns(n0 + tl.arange(0, BN), LEFT)
        mask = (inside < rows) & (column < N)
        at = inside * (2 * N) + column
        kind: tl.constexpr = z.dtype.element_ty
        g = tl.load(z + at, mask=mask, other=0.0).to(tl.float32)
        u = tl.load(z + N + at, mask=mask, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(g)
        silu = g * sigmoid
        h = (silu * u).to(kind).to(tl.float32)
        share = tl.sum(tl.where(mask, dh * h, 0.0), 0 if LEFT else 1)
        dh *= _on_rows(p, LEFT)
        tl.store(dz + at, (dh * u * sigmoid * (1 + g * (1 - sigmoid))).to(kind), mask=mask)
        tl.store(dz + N + at, (dh * silu).to(kind), mask=mask)
        return share


@dataclass(frozen=True)
class Tiles:
    """How the product is cut: a tile's rows, columns and contraction step, warps, stages, programs per multiprocessor,
    and whether the weight is the left operand.
    """

    rows: int
    columns: int
    step: int
    warps: int = 8
    stages: int = 3
    resident: int = 1
    left: bool = False


@dataclass(frozen=True)
class Operand:
    """The rows that multiply: ``values`` [*, K], read at ``token_M`` where given, with float32 ``scales`` [*,
    groups]: one of a row, or of each step of the product.
    """

    values: Tensor
    token_M: Tensor | None = None
    scales: Tensor | None = None


@dataclass(frozen=True)
class Stack:
    """The weight of the product, for experts [first, last): ``values`` [last - first or E, ...] and how to read them.

    ``weight`` has the scales, if there are any. ``flip``: contract over the stored rows. ``turned``: the values are
    transposed codes, so that the input gradient needs no flip. ``widen``: E4M3 tiles are widened in registers.
    """

    values: Tensor
    weight: Weight
    first: int
    last: int
    flip: bool = False
    turned: bool = False
    widen: bool = False


@dataclass(frozen=True)
class Lora:
    """One more step: ``xa`` [M, R] times ``factor``, [E, N, R] with ``rank_axis=2`` or [E, R, N] with
    ``rank_axis=1``.
    """

    xa: Tensor
    factor: Tensor
    rank_axis: int


@dataclass(frozen=True)
class Gradient:
    """Operands of SwiGLU's gradient: ``z`` [M, 2N], ``p`` [M] and where the rows' shares of <dh, h> go, [tiles, M]."""

    z: Tensor
    p: Tensor
    shares: Tensor


def product(
    operand: Operand,
    stack: Stack,
    offsets_E: Tensor,
    out: Tensor,
    tiles: Tiles,
    *,
    scales: int,
    lora: Lora | None = None,
    bias_EN: Tensor | None = None,
    h: Tensor | None = None,
    gradient: Gradient | None = None,
) -> None:
    """Write the rows of experts [first, last) into ``out``: [M, N], or z [M, 2N] with ``h`` [M, N] (SwiGLU), or dz
    [M, 2N] with ``gradient``. See the module's docstring; ``scales`` is one of NONE, COLUMN, TILE, SLAB. ``bias_EN``:
    of all experts and of all rows of the weight, any float dtype, contiguous.
    """
    num_rows = out.shape[0]
    if num_rows == 0:
        return
    dual = h is not None
    cols = out.shape[1] // 2 if dual or gradient is not None else out.shape[1]
    weight, contraction = stack.weight, operand.values.shape[1]
    num_experts = offsets_E.shape[0]
    box = [1, tiles.step, tiles.columns] if stack.flip else [1, tiles.columns, tiles.step]
    left_values: Tensor | TensorDescriptor = operand.values
    if operand.token_M is None:
        left_values = TensorDescriptor.from_tensor(operand.values, [tiles.rows, tiles.step])
    rank, strides = 1, (0, 0, 0)
    if lora is not None:
        rank = lora.xa.shape[1]
        factor = lora.factor
        strides = (factor.stride(0), factor.stride(3 - lora.rank_axis), factor.stride(lora.rank_axis))
    scaled = weight if isinstance(weight, Float8Weight) else None
    grid_n, grid_k = (1, 1) if scaled is None else scaled.scales.shape[2:]
    block_n, block_k = (1, 1) if scaled is None else scaled.block
    most_tiles = (ceil_div(num_rows, tiles.rows) + stack.last - stack.first) * ceil_div(cols, tiles.columns)
    programs = min(most_tiles, num_multiprocessors(out.device) * tiles.resident)
    product_kernel[(programs,)](
        left_values, TensorDescriptor.from_tensor(stack.values, box), operand.token_M, offsets_E, operand.scales,
        scaled and scaled.scales, bias_EN, lora and lora.xa, lora and lora.factor, *strides,
        out, h, gradient and gradient.z, gradient and gradient.p, gradient and gradient.shares, num_rows,
        stack.first, stack.last, stack.first if stack.values.shape[0] != num_experts else 0,
        N=cols, K=contraction, R=rank, RP=padded_rank(rank), E=num_experts,
        EP=max(16, triton.next_power_of_2(num_experts)), N_ROWS=weight.out_features,
        ROWS=weight.out_features if scaled is None else scaled.rows, GRID_N=grid_n, GRID_K=grid_k, SB_N=block_n,
        SB_K=block_k, A_GROUPS=1 if operand.scales is None else operand.scales.shape[1],
        GATHER=operand.token_M is not None, CODES=stack.widen, LEFT=tiles.left, FLIP=stack.flip, TURNED=stack.turned,
        SCALES=scales, A_SCALED=operand.scales is not None, BIAS=bias_EN is not None, LORA=lora is not None,
        STAGE=SWIGLU.value if dual else SWIGLU_GRADIENT.value if gradient is not None else STORE.value,
        BM=tiles.rows, BN=tiles.columns, BK=tiles.step, PROGRAMS=programs, STAGES=tiles.stages, WIDE=INTERPRETED,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
