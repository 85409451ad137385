"""What every kernel shares: finding a tile's expert, and the two facts about how kernels run.

Legend: ``M`` rows sorted by expert, ``E`` experts, ``EP`` E rounded up to a power of two.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter, on CPU tensors."""
FAILURE: type[Exception] = TritonError
"""What Triton raises where it cannot compile a kernel, or the GPU has not got what it needs."""


@dataclass(frozen=True)
class Cut:
    """How a pass over rows is cut: rows and columns of a tile, warps, and stages of its loads."""

    rows: int
    columns: int
    warps: int = 4
    stages: int = 3


@triton.jit
def expert_tiles(offsets_E, first, last, E: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr):
    """Tiles of ``BM`` rows that end with each expert of [first, last): an inclusive prefix sum over experts, [EP]."""
    e = tl.arange(0, EP)
    ends = tl.load(offsets_E + e, mask=e < E, other=0)
    starts = tl.load(offsets_E + e - 1, mask=(e > 0) & (e < E), other=0)
    rows = tl.where((e >= first) & (e < last), ends - starts, 0)
    return tl.cumsum((rows + BM - 1) // BM, 0)


@triton.jit
def expert_rows(offsets_E, e):
    """(first row, end) of expert ``e``."""
    start = tl.load(offsets_E + e - 1, mask=e > 0, other=0)
    return start, tl.load(offsets_E + e)


E4M3_MAX = tl.constexpr(448.0)


@triton.jit
def scale_of(peak):
    """The scale under which the largest magnitude ``peak`` becomes E4M3's largest, to the bit as torch divides on any
    processor; zeros have one of 1.
    """
    return tl.where(peak > 0, tl.div_rn(peak, tl.zeros_like(peak) + E4M3_MAX), 1.0)


@triton.jit
def to_e4m3(x, WIDE: tl.constexpr):
    """Float32 to E4M3 within ±448, to nearest, ties to even; NaN stays NaN, which a clamp by itself does away with on
    a GPU. ``WIDE``: in the interpreter, whose own conversion loses the carry into the exponent and NaN, so that it is
    given values that need no rounding.
    """
    x = tl.clamp(x, -E4M3_MAX, E4M3_MAX, propagate_nan=tl.PropagateNan.ALL)
    if WIDE:
        lost = x != x
        bits = x.to(tl.int32, bitcast=True)
        # three bits of mantissa stay of 23
        bits += 0x7FFFF + ((bits >> 20) & 1)
        normal = (bits & -0x100000).to(tl.float32, bitcast=True)
        # subnormals are multiples of 2^-9: the last bit of a float32 between 2^14 and 2^15
        x = tl.where(tl.abs(x) < 0.015625, (x + 24576.0) - 24576.0, normal)
        code = tl.where(lost, 0.0, x).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        return tl.where(lost, 0x7F, code).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    return x.to(tl.float8e4nv)


def num_multiprocessors(device: torch.device) -> int:
    """Programs that fill the device once; a handful in the interpreter, so that a persistent loop has several turns."""
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def padded_rank(rank: int) -> int:
    """LoRA ranks are padded to what a dot takes."""
    return max(16, int(triton.next_power_of_2(rank)))


def bytes_of(codes: Tensor) -> Tensor:
    """Codes as the float8 that they are, whatever one-byte dtype stores them."""
    return codes.view(torch.float8_e4m3fn)
