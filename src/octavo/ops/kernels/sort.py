"""Stable counting sort of (token, expert) pairs on the device: three small launches, no host synchronisation.

Each program owns ``CHUNK`` consecutive pairs; counts per (program, expert), a scan over programs and experts, then each
pair's place is its program's base plus its rank inside the program.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.ops.kernels.common import ceil_div


@triton.jit
def _one_hot(index, chunk_start, M, E: tl.constexpr, EP: tl.constexpr, BLOCK: tl.constexpr):
    pair = chunk_start + tl.arange(0, BLOCK)
    expert = tl.load(index + pair, mask=pair < M, other=E)
    # off-rank ids share the last, dropped bin: their order is kept after everybody else's
    expert = tl.where((expert >= 0) & (expert < E), expert, E).to(tl.int32)
    return expert, (expert[:, None] == tl.arange(0, EP)[None, :]) & (pair < M)[:, None]


@triton.jit
def count_kernel(index, counts, M, E: tl.constexpr, EP: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    total = tl.zeros((EP,), tl.int32)
    for start in range(0, CHUNK, BLOCK):
        _, hot = _one_hot(index, pid * CHUNK + start, M, E, EP, BLOCK)
        total += tl.sum(hot.to(tl.int32), 0)
    tl.store(counts + pid * EP + tl.arange(0, EP), total)


@triton.jit
def scan_kernel(counts, bases, offsets_E, num_chunks, E: tl.constexpr, EP: tl.constexpr, BLOCK: tl.constexpr):
    e = tl.arange(0, EP)
    running = tl.zeros((EP,), tl.int32)
    for start in range(0, num_chunks, BLOCK):
        chunk = start + tl.arange(0, BLOCK)
        mask = (chunk < num_chunks)[:, None]
        block = tl.load(counts + chunk[:, None] * EP + e[None, :], mask=mask, other=0)
        before = tl.cumsum(block, 0) - block + running[None, :]
        tl.store(bases + chunk[:, None] * EP + e[None, :], before, mask=mask)
        running += tl.sum(block, 0)
    ends = tl.cumsum(running, 0)
    # the bins' own starts, one row past the last chunk
    tl.store(bases + num_chunks * EP + e, ends - running)
    tl.store(offsets_E + e, ends, mask=e < E)


@triton.jit
def place_kernel(
    index, bases, token_M, row_M, M, num_chunks, TOPK: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    e = tl.arange(0, EP)
    base = tl.load(bases + pid * EP + e) + tl.load(bases + num_chunks * EP + e)
    for start in range(0, CHUNK, BLOCK):
        pair = pid * CHUNK + start + tl.arange(0, BLOCK)
        _, hot = _one_hot(index, pid * CHUNK + start, M, E, EP, BLOCK)
        ones = hot.to(tl.int32)
        places = tl.cumsum(ones, 0) - ones + base[None, :]
        row = tl.sum(tl.where(hot, places, 0), 1)
        base += tl.sum(ones, 0)
        mask = pair < M
        tl.store(token_M + row, (pair // TOPK).to(tl.int64), mask=mask)
        tl.store(row_M + pair, row.to(tl.int64), mask=mask)


def sort_pairs(index_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """(token_M int64, row_TK int64, offsets_E int32) of :class:`octavo.ops.routing.Routing`; ids ≥ E sort last."""
    num_pairs, device = index_TK.numel(), index_TK.device
    # one bin more than experts, for off-rank ids
    padded = max(16, triton.next_power_of_2(num_experts + 1))
    block = max(16, min(128, 16384 // padded))
    chunk = block * max(1, min(16, num_pairs // (block * 128)))
    num_chunks = ceil_div(num_pairs, chunk)
    counts = torch.empty((num_chunks, padded), dtype=torch.int32, device=device)
    bases = torch.empty((num_chunks + 1, padded), dtype=torch.int32, device=device)
    offsets_E = torch.empty(num_experts, dtype=torch.int32, device=device)
    token_M = torch.empty(num_pairs, dtype=torch.int64, device=device)
    row_TK = torch.empty(index_TK.shape, dtype=torch.int64, device=device)
    index = index_TK.contiguous()
    sizes = {"E": num_experts, "EP": padded, "BLOCK": block}
    if num_chunks:
        count_kernel[(num_chunks,)](index, counts, num_pairs, CHUNK=chunk, **sizes, num_warps=8)
    scan_kernel[(1,)](counts, bases, offsets_E, num_chunks, **sizes | {"BLOCK": max(4, 4096 // padded)}, num_warps=8)
    if num_chunks:
        place_kernel[(num_chunks,)](
            index,
            bases,
            token_M,
            row_TK,
            num_pairs,
            num_chunks,
            TOPK=index_TK.shape[1],
            CHUNK=chunk,
            **sizes,
            num_warps=8,
        )
    return token_M, row_TK, offsets_E
