"""FP8 weights in memory: one representation for every format, and the way into it and out of it.

Legend: ``E`` experts (1 for a plain linear layer), ``P`` parts with scale grids of their own (2 for a fused gate_up),
``N = P x rows`` output features, ``K`` input features, ``n = ceil(rows / b_n)``, ``k = ceil(K / b_k)``.

Codes are e4m3fn (OCP 8-bit Floating Point Specification, arXiv 2209.05433): largest value 448, no infinities, NaN at
0x7F and 0xFF.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.errors import CheckpointError
from octavo.formats.facts import ScaleLayout

E4M3_MAX = 448.0
_CODE_DTYPES = (torch.float8_e4m3fn, torch.uint8)
_VALUES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32)
# 2^-126, the smallest normal float32: a smaller scale could vanish on hardware that flushes subnormals.
_SMALLEST_EXPONENT = -126


@dataclass(frozen=True, eq=False)
class Float8Weight:
    """weight[e, p * rows + r, c] = codes[e, p, r, c] * scales[e, p, r // b_n, c // b_k].

    ``codes``: [E, P, rows, K], float8_e4m3fn or a uint8 view of the same bytes; a view of storage [E, N, K].
    ``scales``: float32 multipliers [E, P, n, k]. ``block``: (b_n, b_k). Neither is ever written to.
    """

    codes: Tensor
    scales: Tensor
    block: tuple[int, int]

    def __post_init__(self) -> None:
        if self.codes.dtype not in _CODE_DTYPES or self.scales.dtype != torch.float32:
            raise TypeError(
                f"codes are float8_e4m3fn or uint8 and scales float32, got {self.codes.dtype} and {self.scales.dtype}"
            )
        if self.codes.ndim != 4 or min(self.block) < 1:
            raise ValueError(f"codes are [E, parts, rows, K] in blocks >= 1, got {self.codes.shape} and {self.block}")
        num_experts, parts, rows, cols = self.codes.shape
        grid = (num_experts, parts, -(-rows // self.block[0]), -(-cols // self.block[1]))
        if tuple(self.scales.shape) != grid:
            found = tuple(self.scales.shape)
            raise ValueError(f"codes {tuple(self.codes.shape)} in blocks {self.block} need scales {grid}, got {found}")

    @classmethod
    def from_storage(cls, codes: Tensor, scales: Tensor, *, parts: int = 1, block: tuple[int, int]) -> Float8Weight:
        """Views, without a copy, of what a module stores.

        ``codes``: [E, N, K], or [N, K] for a linear layer. ``scales``: float32 [E, P*n, k], or [P*n, k].
        """
        if codes.ndim == 2:
            codes, scales = codes[None], scales[None]
        num_experts, features, cols = codes.shape
        return cls(
            codes.view(num_experts, parts, features // parts, cols),
            scales.view(num_experts, parts, scales.shape[1] // parts, scales.shape[2]),
            block,
        )

    @property
    def num_experts(self) -> int:
        return self.codes.shape[0]

    @property
    def parts(self) -> int:
        return self.codes.shape[1]

    @property
    def rows(self) -> int:
        """Output features of one part."""
        return self.codes.shape[2]

    @property
    def out_features(self) -> int:
        return self.parts * self.rows

    @property
    def in_features(self) -> int:
        return self.codes.shape[3]

    def expert(self, index: int) -> Float8Weight:
        """One expert, as a weight with E = 1 over the same storage."""
        return Float8Weight(self.codes[index : index + 1], self.scales[index : index + 1], self.block)

    def dequantize(self, dtype: torch.dtype = torch.float32, experts: Tensor | slice | None = None) -> Tensor:
        """code x scale in float32, then rounded once to ``dtype``: [E', N, K], contiguous, freshly allocated.

        ``experts``: which ones, as an index tensor or a slice; all by default. Peak memory beside the result: one
        float32 tensor of its shape where ``dtype`` is narrower.
        """
        # Indexed as bytes: float8 has no index kernels on every device.
        codes, scales = self.codes.view(torch.uint8), self.scales
        if experts is not None:
            codes, scales = codes[experts], scales[experts]
        weight = _decode(codes)
        for columns, factors in _column_runs(weight, scales, self.block):
            columns.mul_(factors)
        return weight.view(codes.shape[0], self.out_features, self.in_features).to(dtype)


def _decode(codes: Tensor) -> Tensor:
    """The float32 values of uint8 ``codes``, freshly allocated, same shape."""
    if codes.device.type != "cpu":
        return codes.view(torch.float8_e4m3fn).to(torch.float32)
    # torch casts float8 one element at a time on the CPU: a look-up is 3.5 times faster (1.1 against 0.3 G/s on one
    # core)
    return _VALUES.index_select(0, codes.reshape(-1).to(torch.int32)).view(codes.shape)


def _column_runs(weight: Tensor, scales: Tensor, block: tuple[int, int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of ``weight`` [..., rows, K], each with the part of ``scales`` [..., n, k] that broadcasts to it.

    The scales are spread over rows but not over columns, so that no scale tensor of the weight's size exists.
    """
    rows, cols = weight.shape[-2:]
    b_n, b_k = block
    if 1 < b_n < rows:
        scales = scales.repeat_interleave(b_n, dim=-2)[..., :rows, :]
    full, rest = divmod(cols, b_k)
    if full:
        yield weight[..., : full * b_k].unflatten(-1, (full, b_k)), scales[..., :full, None]
    if rest:
        yield weight[..., full * b_k :], scales[..., full:]


def quantize(
    weight: Tensor,
    layout: ScaleLayout,
    *,
    parts: int = 1,
    scale_dtype: torch.dtype = torch.float32,
    scale_format: Literal["float", "ue8m0"] = "float",
) -> Float8Weight:
    """The FP8 weight whose scales are amax / 448 of each group and whose codes are the nearest with those scales.

    ``weight``: [N, K] or [E, N, K], any float dtype, read as float32. ``parts``: how many grids N is cut into.
    ``scale_dtype``: what the file will hold; the scale is rounded to it (to a power of two, upward, for ``ue8m0``)
    *before* the codes are computed with it. No code is NaN; a group of zeros gets the smallest scale.

    Raises: CheckpointError where the weight has a NaN or infinity, or where a scale overflows ``scale_dtype``.
    """
    stack = weight.detach().to(torch.float32)
    stack = stack[None] if stack.ndim == 2 else stack
    num_experts, features, cols = stack.shape
    if features % parts:
        raise ValueError(f"{features} output features cannot be cut into {parts} parts")
    stack = stack.reshape(num_experts, parts, features // parts, cols)
    block = layout.block_of(features // parts, cols)
    amax = _amax(stack, block)
    if not bool(torch.isfinite(amax).all()):
        raise CheckpointError(
            f"the weight of shape {tuple(weight.shape)} has NaN or infinite values; FP8 holds neither."
        )
    # by a tensor: a GPU multiplies with the reciprocal of a number, which is not the quotient
    scales = _round_scales(amax / torch.full_like(amax, E4M3_MAX), scale_dtype, scale_format)
    scaled = stack.clone()
    for columns, factors in _column_runs(scaled, scales, block):
        # Divided: a product with the reciprocal rounds once more, and half an ulp would not bound the error.
        columns.div_(factors)
    # Not clamped: a scale that was rounded down, by 2^-9 at most, leaves 449 at most, and up to 464 the cast gives 448.
    return Float8Weight(scaled.to(torch.float8_e4m3fn), scales, block)


def _amax(stack: Tensor, block: tuple[int, int]) -> Tensor:
    """Largest magnitude of each block of [E, P, rows, K]: [E, P, n, k]; NaN where the block has one."""
    *lead, rows, cols = stack.shape
    b_n, b_k = min(block[0], rows), min(block[1], cols)
    n, k = -(-rows // b_n), -(-cols // b_k)
    padded = F.pad(stack, (0, k * b_k - cols, 0, n * b_n - rows)) if rows % b_n or cols % b_k else stack
    return padded.reshape(*lead, n, b_n, k, b_k).abs().amax(dim=(-3, -1))


def _round_scales(scales: Tensor, scale_dtype: torch.dtype, scale_format: str) -> Tensor:
    """Positive float32 scales that ``scale_dtype`` holds exactly."""
    if scale_format == "ue8m0":
        mantissa, exponent = torch.frexp(scales)
        # frexp has its mantissa in [0.5, 1): a power of two is 0.5 and one exponent too high.
        exponent = (exponent - (mantissa == 0.5).to(exponent.dtype)).clamp(min=_SMALLEST_EXPONENT)
        return torch.ldexp(torch.ones_like(scales), exponent)
    smallest = max(torch.finfo(scale_dtype).tiny, math.ldexp(1.0, _SMALLEST_EXPONENT))
    rounded = scales.clamp(min=smallest).to(scale_dtype).to(torch.float32)
    if not bool(torch.isfinite(rounded).all()):
        raise CheckpointError(
            f"a scale of {scales.max().item():.3g} does not fit {scale_dtype}; store scales as float32."
        )
    return rounded


def multipliers(scale: Tensor) -> Tensor:
    """A scale as stored, as the float32 multiplier that it is; same shape, exact for every dtype read.

    ``scale``: float32, bfloat16, float16, float8_e8m0fnu, or uint8 with the bytes of e8m0 (value 2^(byte - 127)).
    """
    if scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    return scale.to(torch.float32)
