"""Stable counting sort of (token, expert) pairs on the device: one launch for a few pairs, three for many, no host
synchronisation.

Each program places ``CHUNK`` consecutive pairs: at its expert's start, plus the expert's pairs in earlier chunks, plus
those before it in its own chunk. Up to :data:`ONE_LAUNCH` pairs a program counts all of them itself; beyond, a first
launch counts per chunk, a second sums the chunks before each, and the third places. Counts are integers: the order of
summing them changes nothing.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.ops.kernels.common import ceil_div

# Counting all pairs in each of M / 128 programs costs M² / 128 look-ups: 2 M at 16384 pairs, as many as one wave hides.
ONE_LAUNCH = 2048
SCAN_STEP = 256
"""Chunks that the second launch sums at once."""


@triton.jit
def _experts(index, pair, M, E: tl.constexpr):
    """(expert of each pair, whether it is one of ours): ids outside 0 … E - 1 are another rank's."""
    expert = tl.load(index + pair, mask=pair < M, other=E)
    ours = (expert >= 0) & (expert < E)
    return tl.where(ours, expert, 0).to(tl.int32), ours


@triton.jit
def count_kernel(index, counts, M, E: tl.constexpr, EP: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    total = tl.zeros((EP,), tl.int32)
    for start in range(0, CHUNK, BLOCK):
        expert, ours = _experts(index, pid * CHUNK + start + tl.arange(0, BLOCK), M, E)
        total += tl.histogram(expert, EP, mask=ours)
    tl.store(counts + pid * EP + tl.arange(0, EP), total)


@triton.jit
def scan_kernel(counts, total_E, num_chunks, EP: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr):
    """In place of each count, the sum of those of earlier chunks; ``WIDTH`` experts a program."""
    e = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.int32)
    for start in range(0, num_chunks, STEP):
        chunk = start + tl.arange(0, STEP)
        at = counts + chunk[:, None] * EP + e[None, :]
        mask = (chunk < num_chunks)[:, None]
        here = tl.load(at, mask=mask, other=0)
        tl.store(at, total[None, :] + tl.cumsum(here, 0) - here, mask=mask)
        total += tl.sum(here, 0)
    tl.store(total_E + e, total)


@triton.jit
def place_kernel(
    index, counts, total_E, token_M, row_M, offsets_E, M, TOPK: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, COUNTED: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    e = tl.arange(0, EP)
    if COUNTED:
        before = tl.load(counts + pid * EP + e)
        total = tl.load(total_E + e)
    else:
        before = tl.zeros((EP,), tl.int32)
        total = tl.zeros((EP,), tl.int32)
        for start in range(0, M, STEP):
            pair = start + tl.arange(0, STEP)
            expert, ours = _experts(index, pair, M, E)
            total += tl.histogram(expert, EP, mask=ours)
            before += tl.histogram(expert, EP, mask=ours & (pair < pid * CHUNK))
    ends = tl.cumsum(total, 0)
    if pid == 0:
        tl.store(offsets_E + e, ends, mask=e < E)
    base = ends - total + before
    # another rank's pairs come after all of ours, in their order
    ours_before = tl.sum(before, 0)
    rest = tl.sum(total, 0)
    place = tl.arange(0, BLOCK)
    for start in range(0, CHUNK, BLOCK):
        pair = pid * CHUNK + start + place
        expert, ours = _experts(index, pair, M, E)
        same = (expert[:, None] == expert[None, :]) & ours[None, :] & (place[None, :] < place[:, None])
        row = tl.gather(base, expert, 0) + tl.sum(same.to(tl.int32), 1)
        count = ours.to(tl.int32)
        row = tl.where(ours, row, rest + pair - (ours_before + tl.cumsum(count, 0) - count))
        base += tl.histogram(expert, EP, mask=ours)
        ours_before += tl.sum(count, 0)
        mask = pair < M
        tl.store(token_M + row, (pair // TOPK).to(tl.int64), mask=mask)
        tl.store(row_M + pair, row.to(tl.int64), mask=mask)


def sort_pairs(index_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """(token_M int64, row_TK int64, offsets_E int32) of :class:`octavo.ops.routing.Routing`; ids outside 0 … E - 1
    sort last, in their order. ``index_TK``: any integer dtype.
    """
    num_pairs, device = index_TK.numel(), index_TK.device
    padded = max(32, triton.next_power_of_2(num_experts))
    counted = num_pairs > ONE_LAUNCH
    block = 128
    # eight programs for each multiprocessor of the largest devices; not fewer pairs than a block
    chunk = block * ceil_div(num_pairs, block * 1056) if counted else block
    num_chunks = ceil_div(num_pairs, chunk)
    offsets_E = torch.empty(num_experts, dtype=torch.int32, device=device)
    token_M = torch.empty(num_pairs, dtype=torch.int64, device=device)
    row_TK = torch.empty(index_TK.shape, dtype=torch.int64, device=device)
    index = index_TK.contiguous()
    sizes = {"E": num_experts, "EP": padded, "CHUNK": chunk, "BLOCK": block, "num_warps": 4}
    counts = total_E = None
    if counted:
        counts = torch.empty((num_chunks, padded), dtype=torch.int32, device=device)
        total_E = torch.empty(padded, dtype=torch.int32, device=device)
        count_kernel[(num_chunks,)](index, counts, num_pairs, **sizes)
        width = 16
        scan_kernel[(padded // width,)](
            counts, total_E, num_chunks, EP=padded, STEP=SCAN_STEP, WIDTH=width, num_warps=8
        )  # fmt: skip
    step = min(2048, max(128, triton.next_power_of_2(num_pairs)))
    # without a pair one program still writes the offsets
    place_kernel[(max(1, num_chunks),)](
        index, counts, total_E, token_M, row_TK, offsets_E, num_pairs, TOPK=index_TK.shape[1], COUNTED=counted,
        STEP=step, **sizes,
    )  # fmt: skip
    return token_M, row_TK, offsets_E
