"""Passes over rows of activations: skinny products, rounding to E4M3, folding a scale, combine, the router's gradient.

Legend: ``T`` tokens, ``M`` rows sorted by expert, ``E`` experts, ``K`` columns, ``R`` LoRA rank (``RP`` padded).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

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


@triton.jit
def _load(x, source, k, mask_m, scale_EK, e, K: tl.constexpr, FOLD: tl.constexpr):
    """A tile of rows: (as stored, float32 with the expert's column scale folded in)."""
    mask = mask_m[:, None] & (k < K)[None, :]
    stored = tl.load(x + source[:, None] * K + k[None, :], mask=mask, other=0.0)
    value = stored.to(tl.float32)
    if FOLD:
        value *= tl.load(scale_EK + e.to(tl.int64) * K + k, mask=k < K, other=0.0)[None, :]
    return stored, value


@triton.jit
def rows_kernel(
    x, token_M, offsets_E, scale_EK, factor, skinny, codes, scales, num_rows, stride_e, stride_k, stride_r,
    K: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, GROUP: tl.constexpr,
    BY_EXPERT: tl.constexpr, GATHER: tl.constexpr, FOLD: tl.constexpr, SKINNY: tl.constexpr, ROUND: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    e = 0
    start = pid * BM
    end = num_rows
    live = start < num_rows
    if BY_EXPERT:
        tiles = expert_tiles(offsets_E, 0, E, E, EP, BM)
        e = tl.sum((tiles <= pid).to(tl.int32), 0)
        live = e < E
        e = tl.minimum(e, E - 1)
        first, end = expert_rows(offsets_E, e)
        before = tl.sum(tl.where(tl.arange(0, EP) == e - 1, tiles, 0), 0)
        start = first + (pid - before) * BM
    if live:
        row = start + tl.arange(0, BM)
        mask_m = row < end
        source = row.to(tl.int64)
        if GATHER:
            source = tl.load(token_M + row, mask=mask_m, other=0)
        amax = tl.zeros((BM,), tl.float32)
        acc = tl.zeros((BM, RP), tl.float32)
        r = tl.arange(0, RP)
        for k0 in range(0, K, BK):
            k = k0 + tl.arange(0, BK)
            stored, value = _load(x, source, k, mask_m, scale_EK, e, K, FOLD)
            if SKINNY:
                f = tl.load(
                    factor + e.to(tl.int64) * stride_e  # type: ignore[attr-defined]
                    + k[:, None] * stride_k + r[None, :] * stride_r,
                    mask=(k < K)[:, None] & (r < R)[None, :], other=0.0,
                ).to(stored.dtype)  # fmt: skip
                if WIDE:
                    acc = tl.dot(stored.to(tl.float32), f.to(tl.float32), acc)
                else:
                    acc = tl.dot(stored, f, acc)
            if ROUND:
                peak = tl.max(tl.abs(value), 1)
                if GROUP < K:
                    # one group per step: BK == GROUP
                    scale = scale_of(peak)
                    code = to_e4m3(value / scale[:, None], WIDE)
                    mask = mask_m[:, None] & (k < K)[None, :]
                    tl.store(codes + row.to(tl.int64)[:, None] * K + k[None, :], code, mask=mask)
                    groups: tl.constexpr = (K + GROUP - 1) // GROUP
                    tl.store(scales + row.to(tl.int64) * groups + k0 // GROUP, scale, mask=mask_m)
                else:
                    amax = tl.maximum(amax, peak)
        if SKINNY:
            at = row.to(tl.int64)[:, None] * R + r[None, :]
            tl.store(skinny + at, acc.to(skinny.dtype.element_ty), mask=mask_m[:, None] & (r < R)[None, :])
        if ROUND and GROUP >= K:
            scale = scale_of(amax)
            tl.store(scales + row, scale, mask=mask_m)
            for k0 in range(0, K, BK):
                k = k0 + tl.arange(0, BK)
                _, value = _load(x, source, k, mask_m, scale_EK, e, K, FOLD)
                code = to_e4m3(value / scale[:, None], WIDE)
                mask = mask_m[:, None] & (k < K)[None, :]
                tl.store(codes + row.to(tl.int64)[:, None] * K + k[None, :], code, mask=mask)


@triton.jit
def round_groups(value, BM: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, WIDE: tl.constexpr):
    """A float32 tile as (E4M3 codes, a scale for each row and ``GROUP`` columns)."""
    grouped = tl.reshape(value, (BM, BK // GROUP, GROUP))
    peak = tl.max(tl.abs(grouped), 2)
    scale = scale_of(peak)
    code = to_e4m3(grouped / scale[:, :, None], WIDE)
    return tl.reshape(code, (BM, BK)), scale


@triton.jit
def round_kernel(
    x, token_M, offsets_E, scale_EK, codes, scales, num_rows, K: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
    GROUP: tl.constexpr, SORTED: tl.constexpr, GATHER: tl.constexpr, FOLD: tl.constexpr, BM: tl.constexpr,
    BK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    e = 0
    start = pid * BM
    end = num_rows
    if SORTED:
        end = tl.load(offsets_E + E - 1)
    live = start < end
    if FOLD:
        tiles = expert_tiles(offsets_E, 0, E, E, EP, BM)
        e = tl.sum((tiles <= pid).to(tl.int32), 0)
        live = e < E
        e = tl.minimum(e, E - 1)
        first, end = expert_rows(offsets_E, e)
        before = tl.sum(tl.where(tl.arange(0, EP) == e - 1, tiles, 0), 0)
        start = first + (pid - before) * BM
    if live:
        row = start + tl.arange(0, BM)
        mask_m = row < end
        row = row.to(tl.int64)
        source = row
        if GATHER:
            source = tl.load(token_M + row, mask=mask_m, other=0)
        k = tl.arange(0, BK)
        mask = mask_m[:, None] & (k < K)[None, :]
        value = tl.load(x + source[:, None] * K + k[None, :], mask=mask, other=0.0).to(tl.float32)
        if FOLD:
            value *= tl.load(scale_EK + e.to(tl.int64) * K + k, mask=k < K, other=0.0)[None, :]  # type: ignore[attr-defined]
        code, scale = round_groups(value, BM, BK, GROUP, WIDE)
        tl.store(codes + row[:, None] * K + k[None, :], code, mask=mask)
        groups: tl.constexpr = (K + GROUP - 1) // GROUP
        g = tl.arange(0, BK // GROUP)
        tl.store(scales + row[:, None] * groups + g[None, :], scale, mask=mask_m[:, None] & (g < groups)[None, :])


@triton.jit
def combine_kernel(
    y, row_TK, p_TK, offsets_E, out, H: tl.constexpr, TOPK: tl.constexpr, E: tl.constexpr, WEIGHTED: tl.constexpr,
    BH: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    total = tl.load(offsets_E + E - 1)
    acc = tl.zeros((BH,), tl.float32)
    for k in tl.static_range(TOPK):
        row = tl.load(row_TK + t * TOPK + k)
        # rows past the last offset were never written
        value = tl.load(y + row * H + h, mask=(h < H) & (row < total), other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(p_TK + t * TOPK + k).to(tl.float32)
        acc += value
    tl.store(out + t * H + h, acc.to(out.dtype.element_ty), mask=h < H)


@triton.jit
def sum_parts_kernel(parts, offsets_E, out, M, num_parts, E: tl.constexpr, BM: tl.constexpr):
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    total = tl.load(offsets_E + E - 1)
    acc = tl.zeros((BM,), tl.float32)
    for part in range(num_parts):
        acc += tl.load(parts + part * M + m, mask=m < total, other=0.0)
    tl.store(out + m, acc, mask=m < M)


@dataclass(frozen=True)
class Rounded:
    """Rows as an FP8 product reads them: E4M3 ``codes`` [rows, K] and float32 ``scales`` [rows, groups]."""

    codes: Tensor
    scales: Tensor


def pass_rows(
    x: Tensor,
    *,
    offsets_E: Tensor | None = None,
    token_M: Tensor | None = None,
    factor: Tensor | None = None,
    contract: int = 2,
    fold_EK: Tensor | None = None,
    group: int | None = None,
    cut: Cut | None = None,
) -> tuple[Tensor | None, Rounded | None]:
    """One pass over the rows of ``x`` [*, K] bfloat16: (x·factorᵀ [M, R], x rounded to E4M3), each where asked for.

    With ``offsets_E`` rows are sorted by expert, read at ``token_M`` where given. ``factor``: [E, R, K] with
    ``contract=2`` or [E, K, R] with ``contract=1``. ``fold_EK``: float32 column scales that multiply before rounding.
    ``group``: columns per scale of the rounding, K for one scale per row; ``None`` for no rounding. ``cut``: the
    measured one by default; a smaller group than K is itself the tile's columns.
    """
    num_rows, cols = (x if token_M is None else token_M).shape[0], x.shape[1]
    device = x.device
    by_expert = offsets_E is not None
    num_experts = offsets_E.shape[0] if offsets_E is not None else 1
    rank, strides, skinny = 1, (0, 0, 0), None
    if factor is not None:
        rank = factor.shape[3 - contract]
        strides = (factor.stride(0), factor.stride(contract), factor.stride(3 - contract))
        skinny = torch.empty((num_rows, rank), dtype=x.dtype, device=device)
    rounded = None
    if group is not None:
        groups = ceil_div(cols, group)
        rounded = Rounded(
            torch.empty((num_rows, cols), dtype=torch.float8_e4m3fn, device=device),
            torch.empty((num_rows, groups), dtype=torch.float32, device=device),
        )
    if num_rows == 0:
        return skinny, rounded
    grouped = group is not None and group < cols
    if cut is None:
        cut = Cut(32 if num_rows <= 16384 else 64, 64 if INTERPRETED else 128, 4, 4) if group else Cut(64, 64, 4, 4)
    block_k = group if grouped else cut.columns
    grid = ceil_div(num_rows, cut.rows) + (num_experts if by_expert else 0)
    rows_kernel[(grid,)](
        x, token_M, offsets_E, fold_EK, factor, skinny, rounded and rounded.codes, rounded and rounded.scales,
        num_rows, *strides, K=cols, R=rank, RP=padded_rank(rank), E=num_experts,
        EP=max(16, triton.next_power_of_2(num_experts)), GROUP=group or cols, BY_EXPERT=by_expert,
        GATHER=token_M is not None, FOLD=fold_EK is not None, SKINNY=factor is not None, ROUND=rounded is not None,
        BM=cut.rows, BK=block_k, WIDE=INTERPRETED, num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    return skinny, rounded


def round_rows(
    x: Tensor,
    group: int,
    *,
    offsets_E: Tensor | None = None,
    token_M: Tensor | None = None,
    fold_EK: Tensor | None = None,
    cut: Cut | None = None,
) -> Rounded:
    """``x`` [*, K] rounded to E4M3 with a scale per row and ``group`` columns (a power of two, or K), in one read.

    With ``offsets_E`` rows are sorted by expert, read at ``token_M`` where given, and those past the last offset are
    not written. ``fold_EK``: float32 column scales of the row's expert that multiply before rounding.
    """
    assert fold_EK is None or offsets_E is not None
    num_rows, cols = (x if token_M is None else token_M).shape[0], x.shape[1]
    block = int(triton.next_power_of_2(cols))
    # a scale per row: the padding up to a power of two is zero
    size = block if group >= cols else group
    rounded = Rounded(
        torch.empty((num_rows, cols), dtype=torch.float8_e4m3fn, device=x.device),
        torch.empty((num_rows, ceil_div(cols, size)), dtype=torch.float32, device=x.device),
    )
    if num_rows == 0:
        return rounded
    num_experts = 1 if offsets_E is None else offsets_E.shape[0]
    cut = cut or Cut(max(1, min(4, 16384 // block)), 0, 4)
    # only a scale to fold in asks whose rows these are, and finding that costs more than rounding four of them
    grid = ceil_div(num_rows, cut.rows) + (0 if fold_EK is None else num_experts)
    round_kernel[(grid,)](
        x, token_M, offsets_E, fold_EK, rounded.codes, rounded.scales, num_rows, K=cols, E=num_experts,
        EP=max(16, triton.next_power_of_2(num_experts)), GROUP=size, SORTED=offsets_E is not None,
        GATHER=token_M is not None, FOLD=fold_EK is not None, BM=cut.rows, BK=block, WIDE=INTERPRETED,
        num_warps=cut.warps,
    )  # fmt: skip
    return rounded


def combine(y_MH: Tensor, row_TK: Tensor, offsets_E: Tensor, p_TK: Tensor | None, cut: Cut | None = None) -> Tensor:
    """``y_t = Σ_k p_tk · y_row(t,k)`` in a fixed order, float32 sums, [T, H]; rows past the last offset count zero."""
    (num_tokens, top_k), hidden = row_TK.shape, y_MH.shape[1]
    out = torch.empty((num_tokens, hidden), dtype=y_MH.dtype, device=y_MH.device)
    if num_tokens == 0:
        return out
    cut = cut or Cut(1, 2048, 4)
    block = min(cut.columns, triton.next_power_of_2(hidden))
    combine_kernel[(num_tokens, ceil_div(hidden, block))](
        y_MH, row_TK, p_TK, offsets_E, out, H=hidden, TOPK=top_k, E=offsets_E.shape[0], WEIGHTED=p_TK is not None,
        BH=block, num_warps=cut.warps,
    )  # fmt: skip
    return out


def sum_parts(parts_PM: Tensor, offsets_E: Tensor) -> Tensor:
    """``Σ_p parts[p, m]`` in a fixed order, float32 [M]; zero for rows past the last offset."""
    num_parts, num_rows = parts_PM.shape
    out = torch.empty(num_rows, dtype=torch.float32, device=parts_PM.device)
    if num_rows:
        sum_parts_kernel[(ceil_div(num_rows, 256),)](
            parts_PM, offsets_E, out, num_rows, num_parts, E=offsets_E.shape[0], BM=256
        )
    return out
