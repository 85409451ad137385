"""The router's gradient through the bias of the down projection: ``dp_m += <dy_m, bias_{e(m)}>``.

Legend: ``M`` rows sorted by expert, ``E`` experts, ``N`` columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.ops.kernels.common import INTERPRETED, Cut, ceil_div, expert_rows, expert_tiles


@triton.jit
def dots_kernel(
    d, token_M, offsets_E, bias, dp, N: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    tiles = expert_tiles(offsets_E, 0, E, E, EP, BM)
    e = tl.sum((tiles <= pid).to(tl.int32), 0)
    if e < E:
        before = tl.sum(tl.where(tl.arange(0, EP) == e - 1, tiles, 0), 0)
        first, end = expert_rows(offsets_E, e)
        row = first + (pid - before) * BM + tl.arange(0, BM)
        mask_m = row < end
        source = tl.load(token_M + row, mask=mask_m, other=0)
        acc = tl.zeros((BM,), tl.float32)
        for n0 in tl.range(0, N, BN, num_stages=STAGES):
            n = n0 + tl.arange(0, BN)
            b = tl.load(bias + e.to(tl.int64) * N + n, mask=n < N, other=0.0).to(tl.float32)
            x = tl.load(d + source[:, None] * N + n[None, :], mask=mask_m[:, None] & (n < N)[None, :], other=0.0)
            acc += tl.sum(x.to(tl.float32) * b[None, :], 1)
        tl.store(dp + row, tl.load(dp + row, mask=mask_m, other=0.0) + acc, mask=mask_m)


def add_dots(dp_M: Tensor, d: Tensor, bias_EN: Tensor, offsets_E: Tensor, token_M: Tensor) -> None:
    """``dp_m += <d_token(m), bias_e(m)>`` in place, summed in float32 in a fixed order.

    ``dp_M``: float32. ``d``: rows [*, N], read at ``token_M`` (int64, [M]). ``bias_EN``: any float dtype, contiguous.
    Rows past the last offset stay as they are.
    """
    num_rows, (num_experts, cols) = token_M.shape[0], bias_EN.shape
    if num_rows == 0:
        return
    assert dp_M.dtype == torch.float32
    cut = Cut(16, 32, 4, 1) if INTERPRETED else Cut(16, 256, 4, 3)
    dots_kernel[(ceil_div(num_rows, cut.rows) + num_experts,)](
        d, token_M, offsets_E, bias_EN, dp_M, N=cols, E=num_experts, EP=max(16, triton.next_power_of_2(num_experts)),
        BM=cut.rows, BN=cut.columns, STAGES=cut.stages, num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
