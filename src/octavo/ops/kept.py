"""What a layer keeps for backward, in E4M3 on request: codes and one float32 scale per row, half of bfloat16.

Forward is untouched; backward sees ``codes × scale``, a value within 2⁻⁴ of what was there. ``M`` rows, ``N`` columns.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from octavo.ops.capability import architecture_of, triton_missing
from octavo.ops.reference import E4M3_MAX

Activations = Literal["bf16", "fp8"]
ACTIVATIONS: tuple[Activations, ...] = get_args(Activations)
# Values that are rounded or restored at a time: what is float32 for a while stays small.
_AT_ONCE = 1 << 24


def shrink(x_MN: Tensor) -> tuple[Tensor, Tensor]:
    """``x ≈ codes × scale``: (E4M3 codes [M, N], float32 scales [M, 1]). The largest of a row becomes 448."""
    if _has_kernel(x_MN):
        from octavo.ops.kernels.rows import round_rows

        rounded = round_rows(x_MN.contiguous(), x_MN.shape[1])
        return rounded.codes, rounded.scales
    codes_MN = torch.empty(x_MN.shape, dtype=torch.float8_e4m3fn, device=x_MN.device)
    scale_M1 = torch.empty((len(x_MN), 1), dtype=torch.float32, device=x_MN.device)
    step = _rows(x_MN)
    for x, codes, scale in zip(x_MN.split(step), codes_MN.split(step), scale_M1.split(step), strict=True):
        largest = x.abs().amax(1, keepdim=True).float() / E4M3_MAX
        # A row of zeros has no scale; its codes are zero under any.
        scale.copy_(torch.where(largest > 0, largest, torch.ones_like(largest)))
        codes.copy_((x.float() / scale).clamp_(-E4M3_MAX, E4M3_MAX))
    return codes_MN, scale_M1


def grow(codes_MN: Tensor, scale_M1: Tensor, dtype: torch.dtype) -> Tensor:
    """``codes × scale``, multiplied in float32 and rounded once to ``dtype``."""
    x_MN = torch.empty(codes_MN.shape, dtype=dtype, device=codes_MN.device)
    step = _rows(codes_MN)
    for out, codes, scale in zip(x_MN.split(step), codes_MN.split(step), scale_M1.split(step), strict=True):
        out.copy_(codes.float().mul_(scale))
    return x_MN


def _rows(x_MN: Tensor) -> int:
    """How many rows at a time; a compiled graph needs no buffer, and takes them all."""
    return max(1, len(x_MN) if torch.compiler.is_compiling() else _AT_ONCE // max(1, x_MN.shape[1]))


def _has_kernel(x_MN: Tensor) -> bool:
    if torch.compiler.is_compiling() or x_MN.device.type != "cuda" or x_MN.dtype != torch.bfloat16:
        return False
    return architecture_of(x_MN.device).kernels.runs == "yes" and triton_missing() is None
