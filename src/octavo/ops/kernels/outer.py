"""``dW_e = Σ_{m in e} a_m ⊗ b_m`` with a narrow ``b``: the gradients of LoRA factors.

One program per expert and tile of columns walks the expert's rows in order, so the sum is deterministic.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.ops.kernels.common import INTERPRETED, Cut, ceil_div, expert_rows, expert_tiles, padded_rank


@triton.jit
def outer_kernel(
    a, b, token_M, p_M, offsets_E, out, stride_e, stride_n, stride_r,
    N: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    GATHER: tl.constexpr, WEIGHTED: tl.constexpr, GATED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(1)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    r = tl.arange(0, RP)
    start, end = expert_rows(offsets_E, e)
    acc = tl.zeros((BN, RP), tl.float32)
    for m0 in tl.range(start, end, BM):
        m = m0 + tl.arange(0, BM)
        mask_m = m < end
        row = m.to(tl.int64)
        source = row
        if GATHER:
            source = tl.load(token_M + m, mask=mask_m, other=0)
        mask = mask_m[:, None] & (n < N)[None, :]
        if GATED:
            at = source[:, None] * (2 * N) + n[None, :]
            g = tl.load(a + at, mask=mask, other=0.0).to(tl.float32)
            u = tl.load(a + at + N, mask=mask, other=0.0).to(tl.float32)
            left = (g * tl.sigmoid(g) * u).to(a.dtype.element_ty)
        else:
            left = tl.load(a + source[:, None] * N + n[None, :], mask=mask, other=0.0)
        mask_b = mask_m[:, None] & (r < R)[None, :]
        right = tl.load(b + row[:, None] * R + r[None, :], mask=mask_b, other=0.0)
        if WEIGHTED:
            p = tl.load(p_M + m, mask=mask_m, other=0.0).to(tl.float32)
            right = (right.to(tl.float32) * p[:, None]).to(left.dtype)
        if WIDE:
            acc = tl.dot(tl.trans(left).to(tl.float32), right.to(tl.float32), acc)
        else:
            acc = tl.dot(tl.trans(left), right, acc)
    at = out + e.to(tl.int64) * stride_e + n[:, None] * stride_n + r[None, :] * stride_r
    tl.store(at, acc.to(out.dtype.element_ty), mask=(n < N)[:, None] & (r < R)[None, :])


def outer(
    a: Tensor,
    b_MR: Tensor,
    offsets_E: Tensor,
    *,
    rank_first: bool,
    dtype: torch.dtype,
    token_M: Tensor | None = None,
    p_M: Tensor | None = None,
    gated: bool = False,
    cut: Cut | None = None,
) -> Tensor:
    """``Σ_m (p_m) a_m ⊗ b_m`` per expert in ``dtype``: [E, N, R], or [E, R, N] with ``rank_first``.

    ``a``: rows [*, N], read at ``token_M`` where given; with ``gated`` they are z = [g, u] [M, 2N] and ``a_m`` is
    silu(g)·u, rounded to the dtype of z. ``cut``: the measured one by default. Zero for an expert without rows.
    """
    num_experts, rank = offsets_E.shape[0], b_MR.shape[1]
    cols = a.shape[1] // 2 if gated else a.shape[1]
    shape = (num_experts, rank, cols) if rank_first else (num_experts, cols, rank)
    out = torch.empty(shape, dtype=dtype, device=a.device)
    strides = (out.stride(0), out.stride(2), out.stride(1)) if rank_first else out.stride()
    cut = cut or (Cut(16, 32, 4, 1) if INTERPRETED else Cut(32, 128, 4, 3 if gated else 4))
    outer_kernel[(ceil_div(cols, cut.columns), num_experts)](
        a, b_MR, token_M, p_M, offsets_E, out, *strides, N=cols, R=rank, RP=padded_rank(rank),
        GATHER=token_M is not None, WEIGHTED=p_M is not None, GATED=gated, BM=cut.rows, BN=cut.columns,
        WIDE=INTERPRETED, num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    return out


@triton.jit
def sum_tiles_kernel(
    sums_CNR, offsets_E, out, N: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
    TOKENS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(1)
    index_E = tl.arange(0, EP)
    tiles = expert_tiles(offsets_E, 0, E, E, EP, TOKENS)
    first = tl.sum(tl.where(index_E == e - 1, tiles, 0), 0)
    last = tl.sum(tl.where(index_E == e, tiles, 0), 0)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    r = tl.arange(0, RP)
    acc = tl.zeros((BN, RP), tl.float32)
    source = sums_CNR + first.to(tl.int64) * (N * RP) + n[:, None] * RP + r[None, :]
    for _ in range(first, last):
        acc += tl.load(source, mask=(n < N)[:, None], other=0.0)
        source += N * RP
    at = out + e.to(tl.int64) * (N * R) + r[:, None] * N + n[None, :]
    tl.store(at, tl.trans(acc).to(out.dtype.element_ty), mask=(r < R)[:, None] & (n < N)[None, :])


def sum_tiles(sums_CNR: Tensor, offsets_E: Tensor, tokens: int, like_ERN: Tensor) -> Tensor:
    """Each expert's sum of what its token tiles, of ``tokens`` rows at most, have in float32 [tiles, N, ranks], in
    order: the first ranks, in the shape and dtype of ``like_ERN`` [E, R, N]. Zero for an expert without rows.
    """
    out = torch.empty(like_ERN.shape, dtype=like_ERN.dtype, device=like_ERN.device)
    num_experts, rank, cols = out.shape
    sum_tiles_kernel[(ceil_div(cols, 64), num_experts)](
        sums_CNR, offsets_E, out, N=cols, R=rank, RP=sums_CNR.shape[2], E=num_experts,
        EP=max(16, triton.next_power_of_2(num_experts)), TOKENS=tokens, BN=64, num_warps=4,
    )  # fmt: skip
    return out
