"""The order of columns that a widened FP8 tile gives: of each 16 columns the even ones first, then the odd ones."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def interleave_kernel(x, out, num_groups, BLOCK: tl.constexpr):
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = group[:, None] * 16 + tl.arange(0, 16)[None, :]
    mask = (group < num_groups)[:, None]
    even, odd = tl.split(tl.reshape(tl.load(x + at, mask=mask, other=0.0), (BLOCK, 8, 2)))
    to = group[:, None] * 16 + tl.arange(0, 8)[None, :]
    tl.store(out + to, even, mask=mask)
    tl.store(out + to + 8, odd, mask=mask)


def interleave(x: Tensor) -> Tensor:
    """``x`` [*, C] with the columns of every 16 reordered: 0, 2, …, 14, 1, 3, …, 15; C a multiple of 16."""
    x = x.contiguous()
    out = torch.empty_like(x)
    groups = x.numel() // 16
    if groups:
        block = 256
        interleave_kernel[(-(-groups // block),)](x, out, groups, BLOCK=block, num_warps=4)
    return out
