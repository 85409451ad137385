"""The order of columns that a widened FP8 tile gives: of each 16 columns the even ones first, then the odd ones."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def interleave_kernel(x, out, num_groups, factor, BLOCK: tl.constexpr):
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = group[:, None] * 16 + tl.arange(0, 16)[None, :]
    mask = (group < num_groups)[:, None]
    value = (tl.load(x + at, mask=mask, other=0.0).to(tl.float32) * factor).to(x.dtype.element_ty)
    even, odd = tl.split(tl.reshape(value, (BLOCK, 8, 2)))
    to = group[:, None] * 16 + tl.arange(0, 8)[None, :]
    tl.store(out + to, even, mask=mask)
    tl.store(out + to + 8, odd, mask=mask)


def interleave(x: Tensor, exponent: int = 0) -> Tensor:
    """``x`` [*, C] times ``2**exponent``, with the columns of every 16 reordered: 0, 2, …, 14, 1, 3, …, 15; C a
    multiple of 16. Exact unless the product leaves the range of the dtype.
    """
    x = x.contiguous()
    out = torch.empty_like(x)
    groups = x.numel() // 16
    if groups:
        block = 256
        interleave_kernel[(-(-groups // block),)](x, out, groups, 2.0**exponent, BLOCK=block, num_warps=4)
    return out
