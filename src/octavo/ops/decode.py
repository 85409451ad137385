"""An expert MLP of few (token, expert) pairs without gradient: decoding.

Each pair reads its expert's codes straight from the checkpoint's bytes: only routed experts are touched, nothing is
sorted, dequantized or kept, and nothing asks the device for a value, so a step can be captured in a CUDA graph. Two
products, one skinny product before each with LoRA, and with rounded numerics one pass over rows.

Sums and the combine are in float32; z, h and the output are rounded to the dtype of the activations, as elsewhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from octavo.formats.weight import Float8Weight
from octavo.ops.capability import architecture_of, triton_missing
from octavo.ops.choice import decode_limit
from octavo.ops.engines import Engine, Projection
from octavo.ops.gates import Gate, SwiGlu
from octavo.ops.weights import DenseWeight, Factors

if TYPE_CHECKING:
    from octavo.ops.kernels.rows import Rounded

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def applies(engine: Engine, x_TH: Tensor, index_TK: Tensor, num_experts: int) -> bool:
    """Whether a forward without gradient is this one: few pairs, on a device where it was run, by any engine but the
    reference.
    """
    if x_TH.device.type != "cuda" or engine.name == "reference" or x_TH.dtype not in _DTYPES:
        return False
    return (
        index_TK.numel() <= decode_limit(x_TH.device) * num_experts
        and architecture_of(x_TH.device).kernels.runs == "yes"
        and triton_missing() is None
    )


def expert_mlp(
    x_TH: Tensor, index_TK: Tensor, p_TK: Tensor, up: Projection, down: Projection, gate: Gate, numerics: str
) -> Tensor:
    """``y_t = Σ_k p_tk · down_e(gate(up_e(x_t)))``, [T, H] in the dtype of ``x_TH``; see the module's docstring."""
    from octavo.ops.kernels.few import pairs

    dtype, swiglu = x_TH.dtype, isinstance(gate, SwiGlu)
    x_TH, index_TK, p_TK = x_TH.contiguous(), index_TK.contiguous(), p_TK.contiguous()
    lora = _skinny(x_TH, index_TK, up)
    operand = _operand(x_TH, up, numerics)
    h = pairs(operand, index_TK, up.weight, dtype, gated=swiglu, bias_EN=_bias(up), lora=lora)
    if not swiglu:
        h = gate.forward(h).to(dtype).contiguous()
    lora = _skinny(h, index_TK, down)
    operand = _operand(h, down, numerics)
    return pairs(operand, index_TK, down.weight, dtype, p_TK=p_TK, bias_EN=_bias(down), lora=lora)


def _bias(side: Projection) -> Tensor | None:
    return None if side.bias is None else side.bias.contiguous()


def _skinny(rows: Tensor, index_TK: Tensor, side: Projection) -> tuple[Tensor, Factors] | None:
    from octavo.ops.kernels.few import pairs

    if side.lora is None:
        return None
    return pairs(rows, index_TK, DenseWeight(side.lora.A_ERK), torch.float32), side.lora


def _operand(rows: Tensor, side: Projection, numerics: str) -> Tensor | Rounded:
    """The rows as the product sees them: as they are, or each once rounded to E4M3."""
    from octavo.ops.kernels.rows import pass_rows

    weight = side.weight
    if numerics != "fp8" or not isinstance(weight, Float8Weight):
        return rows
    _, rounded = pass_rows(rows, group=min(weight.block[1], weight.in_features))
    assert rounded is not None
    return rounded
