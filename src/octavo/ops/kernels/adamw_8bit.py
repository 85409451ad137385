"""AdamW with moments of 8 bits, one launch for many tensors: torchao's numbers, in torchao's own state tensors.

Each moment is a code per element, an entry of a sorted table of 256 (``qmap``), times a scale per block of 256
consecutive elements. With g the gradient and everything in float32::

    p ← p − lr·wd·p      m ← lerp(m, g, 1 − β1)      v ← lerp(v, g², 1 − β2)
    p ← p − lr·(m / c1) / (√v / √c2 + eps)           c = 1 − β^step

The update uses m and v before they are rounded to codes: scale = max(amax of the block, 1e-12), code = the entry
nearest to value / scale, the upper one from the midpoint on. That is what `torchao.optim` computes (0.18; the format is
that of arXiv 2110.02861). bfloat16 parameters are rounded to nearest, ties to even, or stochastically: 16 random bits
are added below those that stay. A parameter that is NaN stays NaN.

Tensors are found by a table of distances, in elements, from the first of each role: their addresses are data, so that
neither their number nor where they lie compiles anything anew. bfloat16 is read and written as the bits that it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.ops.kernels.common import ceil_div

BLOCK_SIZE = 256
"""Elements with one scale."""
# Blocks of a program, one a warp and 8 elements a thread: 96 registers on sm_90, where twice as many take 168.
_ROWS = 4
_WARPS = 4
_ALIGNMENT = 16
# Columns of the table after the distances of the eight roles: blocks of the tensor, its seed, its first program.
_BLOCKS, _SEED, _FIRST, _COLUMNS = tl.constexpr(8), tl.constexpr(9), tl.constexpr(10), tl.constexpr(11)


@triton.jit
def _loaded(pointer, mask, NARROW: tl.constexpr):
    """Float32 values; ``NARROW``: of bits of bfloat16."""
    stored = tl.load(pointer, mask=mask, other=0)
    if NARROW:
        return (stored.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return stored


@triton.jit
def _lerp(start, end, weight):
    """As torch has it: from the nearer end."""
    step = end - start
    return tl.where(weight < 0.5, start + weight * step, end - step * (1.0 - weight))


@triton.jit
def _quantized(x, qmap):
    """(codes, scales of rows). NaN in a row makes its scale NaN, as in torch."""
    # As integers, since these have NaN for their largest.
    peak = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1).to(tl.float32, bitcast=True)
    scale = tl.where(peak < 1e-12, 1e-12, peak)
    value = x / scale[:, None]
    code = tl.zeros(x.shape, tl.int32)
    # The entries around the value: the last that was not above it, and the last that was.
    low = tl.zeros(x.shape, tl.float32) + tl.load(qmap)
    high = tl.zeros(x.shape, tl.float32) + tl.load(qmap + 255)
    for bit in tl.static_range(8):
        probe = code + (128 >> bit)
        entry = tl.load(qmap + probe)
        above = value >= entry
        code = tl.where(above, probe, code)
        low = tl.where(above, entry, low)
        high = tl.where(above, high, entry)
    up = (value - low >= (high - low) * 0.5) & (code < 255)
    return tl.where(up, code + 1, code), scale


@triton.jit
def _random_16(seed, block, ROWS: tl.constexpr):
    """[ROWS, 256] integers below 2^16, by the place in the tensor: one draw of 128 bits has eight of them."""
    at = block.to(tl.int64)[:, None] * 32 + tl.arange(0, 32)[None, :]
    a, b, c, d = tl.randint4x(seed, at)
    words = tl.join(tl.join(a, b), tl.join(c, d)).to(tl.int32, bitcast=True)
    halves = tl.join(words & 0xFFFF, (words >> 16) & 0xFFFF)
    return tl.reshape(halves, (ROWS, 256))


@triton.jit
def _narrowed(x, seed, block, STOCHASTIC: tl.constexpr, ROWS: tl.constexpr):
    """Bits of bfloat16."""
    bits = x.to(tl.int32, bitcast=True)
    if STOCHASTIC:
        rounded = bits + _random_16(seed, block, ROWS)
    else:
        rounded = bits + (0x7FFF + ((bits >> 16) & 1))
    # The sum would carry NaN into the sign.
    return (tl.where(x == x, rounded, 0x7FC00000) >> 16).to(tl.int16)


@triton.jit
def adamw_8bit_kernel(
    p, g, m_codes, v_codes, m_scale, v_scale, m_qmap, v_qmap, table, owners,
    lr, decay, m_weight, v_weight, correction1, root_correction2, eps,
    NARROW: tl.constexpr, NARROW_GRADIENT: tl.constexpr, STOCHASTIC: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    row = table + tl.load(owners + pid).to(tl.int64) * _COLUMNS
    first = (pid - tl.load(row + _FIRST).to(tl.int32)) * ROWS
    block = first + tl.arange(0, ROWS)
    live = block < tl.load(row + _BLOCKS)
    mask = live[:, None]
    start = first.to(tl.int64) * 256
    at = tl.arange(0, ROWS)[:, None] * 256 + tl.arange(0, 256)[None, :]
    # distances are multiples of 16 bytes
    p += tl.multiple_of(tl.load(row), 8 if NARROW else 4) + start
    g += tl.multiple_of(tl.load(row + 1), 8 if NARROW_GRADIENT else 4) + start
    m_codes += tl.multiple_of(tl.load(row + 2), 16) + start
    v_codes += tl.multiple_of(tl.load(row + 3), 16) + start
    m_scale += tl.load(row + 4) + block
    v_scale += tl.load(row + 5) + block
    m_qmap += tl.load(row + 6)
    v_qmap += tl.load(row + 7)

    gradient = _loaded(g + at, mask, NARROW_GRADIENT)
    m = tl.load(m_qmap + tl.load(m_codes + at, mask=mask, other=0).to(tl.int32))
    m = _lerp(m * tl.load(m_scale, mask=live, other=0.0)[:, None], gradient, m_weight)
    code, scale = _quantized(m, m_qmap)
    tl.store(m_codes + at, code.to(tl.uint8), mask=mask)
    tl.store(m_scale, scale, mask=live)
    v = tl.load(v_qmap + tl.load(v_codes + at, mask=mask, other=0).to(tl.int32))
    v = _lerp(v * tl.load(v_scale, mask=live, other=0.0)[:, None], gradient * gradient, v_weight)
    code, scale = _quantized(v, v_qmap)
    tl.store(v_codes + at, code.to(tl.uint8), mask=mask)
    tl.store(v_scale, scale, mask=live)

    value = _loaded(p + at, mask, NARROW)
    value = value - decay * value
    value = value - lr * (m / correction1) / (tl.sqrt_rn(v) / root_correction2 + eps)
    if NARROW:
        value = _narrowed(value, tl.load(row + _SEED), block, STOCHASTIC, ROWS)
    tl.store(p + at, value, mask=mask)


@dataclass(frozen=True)
class Moment:
    """A quantized moment: uint8 ``codes`` of the parameter's shape, float32 ``scale`` [numel / 256] and ``qmap`` [256],
    which ascends.
    """

    codes: Tensor
    scale: Tensor
    qmap: Tensor


@dataclass(frozen=True)
class Tensors:
    """What one parameter's update reads and writes. ``seed``: 64 bits, of its stochastic rounding."""

    parameter: Tensor
    gradient: Tensor
    m: Moment
    v: Moment
    seed: int = 0


@dataclass(frozen=True)
class Numbers:
    """What all updates of a launch share. ``decay``: lr·wd; ``weights``: 1 − β of both; ``corrections``: c1 and √c2."""

    lr: float
    decay: float
    weights: tuple[float, float]
    corrections: tuple[float, float]
    eps: float


def fits(parameter: Tensor, m: Moment, v: Moment) -> bool:
    """Whether the kernel can update ``parameter``: float32 or bfloat16, contiguous as its codes, at whole 16 bytes."""
    wide = (parameter, m.codes, v.codes)
    return (
        parameter.dtype in (torch.float32, torch.bfloat16)
        and all(tensor.is_contiguous() and tensor.data_ptr() % _ALIGNMENT == 0 for tensor in wide)
        and all(each.is_contiguous() for moment in (m, v) for each in (moment.scale, moment.qmap))
        and all(moment.scale.numel() * BLOCK_SIZE == parameter.numel() for moment in (m, v))
    )


def step(tensors: Sequence[Tensors], numbers: Numbers, *, stochastic: bool) -> None:
    """Update parameters of one dtype and device, and their moments, in place. They `fits`; gradients need not.

    ``stochastic``: of bfloat16 parameters, by each one's seed and the place in it, whatever else is in the launch.
    """
    if not tensors:
        return
    narrow = tensors[0].parameter.dtype == torch.bfloat16
    assert all((one.parameter.dtype == torch.bfloat16) == narrow for one in tensors), "parameters of two dtypes"
    gradients = [_readable(one.gradient) for one in tensors]
    narrow_gradient = all(gradient.dtype == torch.bfloat16 for gradient in gradients)
    if not narrow_gradient:
        gradients = [gradient.float() for gradient in gradients]
    roles = [
        [one.parameter for one in tensors],
        gradients,
        [one.m.codes for one in tensors],
        [one.v.codes for one in tensors],
        [one.m.scale for one in tensors],
        [one.v.scale for one in tensors],
        [one.m.qmap for one in tensors],
        [one.v.qmap for one in tensors],
    ]
    blocks = [one.parameter.numel() // BLOCK_SIZE for one in tensors]
    programs = [ceil_div(count, _ROWS) for count in blocks]
    *before, total = accumulate(programs, initial=0)
    columns = [*map(_distances, roles, [_ALIGNMENT] * 4 + [4] * 4), blocks, [one.seed for one in tensors], before]
    device = tensors[0].parameter.device
    table = _to_device(torch.tensor(columns).T.contiguous(), device)
    each = torch.arange(len(tensors), dtype=torch.int32, device=device)
    # The size is said, so that the host waits for nothing.
    owners = torch.repeat_interleave(each, _to_device(torch.tensor(programs), device), output_size=total)
    first = [role[0] for role in roles]
    if narrow:
        first[0] = first[0].view(torch.int16)
    if narrow_gradient:
        first[1] = first[1].view(torch.int16)
    with torch.cuda.device_of(table):
        adamw_8bit_kernel[(total,)](
            *first, table, owners, numbers.lr, numbers.decay, *numbers.weights, *numbers.corrections, numbers.eps,
            NARROW=narrow, NARROW_GRADIENT=narrow_gradient, STOCHASTIC=stochastic and narrow, ROWS=_ROWS,
            num_warps=_WARPS,
        )  # fmt: skip


def _readable(gradient: Tensor) -> Tensor:
    """``gradient`` contiguous at whole 16 bytes, in float32 or bfloat16."""
    if gradient.dtype not in (torch.float32, torch.bfloat16):
        gradient = gradient.float()
    gradient = gradient.contiguous()
    return gradient if gradient.data_ptr() % _ALIGNMENT == 0 else gradient.clone()


def _distances(role: list[Tensor], alignment: int) -> list[int]:
    """Of each tensor from the first, in elements."""
    base, size = role[0].data_ptr(), role[0].element_size()
    found = [tensor.data_ptr() - base for tensor in role]
    assert not any(distance % alignment for distance in found), f"tensors lie at no multiple of {alignment} bytes"
    return [distance // size for distance in found]


def _to_device(table: Tensor, device: torch.device) -> Tensor:
    """The host does not wait for the copy."""
    if device.type != "cuda":
        return table
    return table.pin_memory().to(device, non_blocking=True)
