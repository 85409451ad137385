"""LoRA's backward beside a product: ``yb = d·B`` and ``dB_e = Σ_{m in e} d_m ⊗ (p_m) xa_m`` from one read of d, and
where asked for d rounded to E4M3, with a scale for each row.

A program holds up to ``CHUNK`` rows of one expert and walks the columns of d: each tile of d is multiplied by B from
the right (a sum over columns, kept in registers) and, transposed, by xa (a sum over the chunk's rows, written per
chunk). An expert of one chunk is finished there; the chunks of a longer one are summed in order by a second kernel, so
nothing is atomic. The chunks' sums cost ``64 / CHUNK`` of the bytes of d at rank 16; a second read costs all of them.
A row's scale takes its maximum from who wrote d: it is known only after a chunk of 1.5 MB, and those of all
multiprocessors do not stay in the L2 for a second read.

Legend: ``M`` rows sorted by expert, ``E`` experts, ``N`` columns of d, ``R`` LoRA rank (``RP`` padded), ``C`` chunks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.ops.engines import RowMaxima
from octavo.ops.kernels.common import (
    INTERPRETED,
    Cut,
    ceil_div,
    expert_rows,
    expert_tiles,
    padded_rank,
    scale_of,
    to_e4m3,
)
from octavo.ops.kernels.rows import Rounded


@triton.jit
def both_kernel(
    d, token_M, p_M, offsets_E, factor, xa, yb, out, sums_CNR, codes, scales, fold_EN, parts_PM, num_rows,
    stride_e, stride_n, stride_r,
    N: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, PARTS: tl.constexpr,
    FOLD: tl.constexpr, GATHER: tl.constexpr, WEIGHTED: tl.constexpr, CHUNK: tl.constexpr, BN: tl.constexpr,
    STAGES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    chunks = expert_tiles(offsets_E, 0, E, E, EP, CHUNK)
    e = tl.sum((chunks <= pid).to(tl.int32), 0)
    if e < E:
        index_E = tl.arange(0, EP)
        before = tl.sum(tl.where(index_E == e - 1, chunks, 0), 0)
        alone = tl.sum(tl.where(index_E == e, chunks, 0), 0) - before == 1
        first, end = expert_rows(offsets_E, e)
        m = first + (pid - before) * CHUNK + tl.arange(0, CHUNK)
        mask_m = m < end
        row = m.to(tl.int64)
        source = row
        if GATHER:
            source = tl.load(token_M + m, mask=mask_m, other=0)
        r = tl.arange(0, RP)
        mask_mr = mask_m[:, None] & (r < R)[None, :]
        right = tl.load(xa + row[:, None] * R + r[None, :], mask=mask_mr, other=0.0)
        if WEIGHTED:
            p = tl.load(p_M + m, mask=mask_m, other=0.0).to(tl.float32)
            right = (right.to(tl.float32) * p[:, None]).to(right.dtype)
        if WIDE:
            right = right.to(tl.float32)
        acc = tl.zeros((CHUNK, RP), tl.float32)
        wide = e.to(tl.int64)
        if PARTS:
            peak = tl.zeros((CHUNK,), tl.float32)
            for i in tl.static_range(PARTS):
                peak = tl.maximum(peak, tl.load(parts_PM + i * num_rows + row, mask=mask_m, other=0.0))
            row_scale = scale_of(peak)
            tl.store(scales + row, row_scale, mask=mask_m)
        for n0 in tl.range(0, N, BN, num_stages=STAGES):
            n = n0 + tl.arange(0, BN)
            mask_mn = mask_m[:, None] & (n < N)[None, :]
            tile = tl.load(d + source[:, None] * N + n[None, :], mask=mask_mn, other=0.0)
            if PARTS:
                value = tile.to(tl.float32)
                if FOLD:
                    value *= tl.load(fold_EN + wide * N + n, mask=n < N, other=0.0)[None, :]
                row_code = to_e4m3(value / row_scale[:, None], WIDE)
                tl.store(codes + row[:, None] * N + n[None, :], row_code, mask=mask_mn)
            mask_nr = (n < N)[:, None] & (r < R)[None, :]
            b = tl.load(factor + wide * stride_e + n[:, None] * stride_n + r[None, :] * stride_r, mask=mask_nr,
                        other=0.0).to(tile.dtype)  # fmt: skip
            if WIDE:
                tile = tile.to(tl.float32)
                b = b.to(tl.float32)
            acc = tl.dot(tile, b, acc)
            part = tl.dot(tl.trans(tile), right)
            at = n[:, None] * R + r[None, :]
            tl.store(out + wide * (N * R) + at, part.to(out.dtype.element_ty), mask=mask_nr & alone)
            tl.store(sums_CNR + pid.to(tl.int64) * (N * R) + at, part, mask=mask_nr & (alone == 0))
        tl.store(yb + row[:, None] * R + r[None, :], acc.to(yb.dtype.element_ty), mask=mask_mr)


@triton.jit
def sum_chunks_kernel(
    sums_CNR, offsets_E, out, SIZE: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(1)
    index_E = tl.arange(0, EP)
    chunks = expert_tiles(offsets_E, 0, E, E, EP, CHUNK)
    first = tl.sum(tl.where(index_E == e - 1, chunks, 0), 0)
    last = tl.sum(tl.where(index_E == e, chunks, 0), 0)
    if last - first != 1:
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        acc = tl.zeros((BLOCK,), tl.float32)
        source = sums_CNR + first.to(tl.int64) * SIZE + at
        for _ in range(first, last):
            acc += tl.load(source, mask=at < SIZE, other=0.0)
            source += SIZE
        tl.store(out + e.to(tl.int64) * SIZE + at, acc.to(out.dtype.element_ty), mask=at < SIZE)


# By bytes, not yet by time: a chunk of 256 rows holds the average expert of 2048 tokens whole, and saves 36 % of two
# reads at 2048 rows per expert (128: 24 %, 512: 43 %, in half as many programs).
CUT = Cut(32, 32, 4, 1) if INTERPRETED else Cut(256, 64, 8, 3)
FEW = Cut(32, 32, 4, 1) if INTERPRETED else Cut(128, 64, 4, 4)
"""For experts of so few rows that longer chunks would leave multiprocessors idle."""

FEW_ROWS = 192
"""Up to how many rows per expert."""

# Beyond, the chunks' sums (4·R / CHUNK of the bytes of d) cost what a second read does.
MOST_RANK = 32


def lora_backward(
    d: Tensor,
    factor_ENR: Tensor,
    xa_MR: Tensor,
    offsets_E: Tensor,
    *,
    token_M: Tensor | None = None,
    p_M: Tensor | None = None,
    maxima: RowMaxima | None = None,
    cut: Cut | None = None,
) -> tuple[Tensor, Tensor, Rounded | None]:
    """(``d·B`` [M, R] in the dtype of ``d``, ``dB`` [E, N, R] in the dtype of ``factor_ENR``, d rounded to E4M3).

    ``d``: rows [*, N], read at ``token_M`` where given; ``xa_MR`` in the dtype of ``d``; ``p_M`` weighs the rows in dB
    only. Ranks up to :data:`MOST_RANK` are worth it. Sums in float32. dB is zero for an expert without rows; rows past
    the last offset are not written. ``maxima``: of d · fold, which is rounded with one scale a row where they are
    given; codes and scales are those of :func:`octavo.ops.kernels.rows.round_rows`. ``cut``: its rows are those of a
    chunk.
    """
    num_rows, rank = xa_MR.shape
    num_experts, cols, _ = factor_ENR.shape
    yb_MR = torch.empty((num_rows, rank), dtype=d.dtype, device=d.device)
    out_ENR = torch.empty((num_experts, cols, rank), dtype=factor_ENR.dtype, device=d.device)
    rounded = None
    if maxima is not None:
        rounded = Rounded(
            torch.empty((num_rows, cols), dtype=torch.float8_e4m3fn, device=d.device),
            torch.empty((num_rows, 1), dtype=torch.float32, device=d.device),
        )
    if cut is None:
        cut = FEW if num_rows <= FEW_ROWS * num_experts else CUT
    sizes = {"E": num_experts, "EP": max(16, triton.next_power_of_2(num_experts)), "CHUNK": cut.rows}
    most_chunks = ceil_div(num_rows, cut.rows) + num_experts
    sums_CNR = torch.empty((most_chunks, cols, rank), dtype=torch.float32, device=d.device)
    if num_rows:
        both_kernel[(most_chunks,)](
            d, token_M, p_M, offsets_E, factor_ENR, xa_MR, yb_MR, out_ENR, sums_CNR,
            rounded and rounded.codes, rounded and rounded.scales,
            maxima and maxima.fold_EG, maxima and maxima.parts_PM, num_rows, *factor_ENR.stride(), N=cols, R=rank,
            RP=padded_rank(rank), PARTS=0 if maxima is None else maxima.parts_PM.shape[0],
            FOLD=maxima is not None and maxima.fold_EG is not None, GATHER=token_M is not None,
            WEIGHTED=p_M is not None, BN=cut.columns, STAGES=cut.stages, WIDE=INTERPRETED, **sizes, num_warps=cut.warps,
            num_stages=cut.stages,
        )  # fmt: skip
    block = 256 if INTERPRETED else 1024
    sum_chunks_kernel[(ceil_div(cols * rank, block), num_experts)](
        sums_CNR, offsets_E, out_ENR, SIZE=cols * rank, BLOCK=block, **sizes, num_warps=4
    )
    return yb_MR, out_ENR, rounded
