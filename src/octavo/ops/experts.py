"""The expert MLP as one autograd function: ``y_t = Σ_k p_tk · down_e(gate(up_e(x_t)))``, experts ``e`` frozen in FP8
or plain, LoRA on both.

Legend: ``T`` tokens, ``K`` top-k, ``M = T·K`` routed rows sorted by expert, ``E`` experts, ``H`` hidden size, ``I``
expert intermediate size, ``G`` width of the up product, ``R`` LoRA rank.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from octavo.ops.engines import Engine, Projection, Wants
from octavo.ops.gates import Gate
from octavo.ops.routing import Routing, row_probabilities
from octavo.ops.weights import Factors, WeightSpec


@dataclass(frozen=True)
class Side:
    """The tensors of one projection as the caller holds them.

    ``weight`` [E, out, in]: one-byte codes with float32 ``scales`` [E, parts·n, k], or floats; ``bias`` [E, out];
    ``lora_A`` [E, R, in] and ``lora_B`` [E, out, R] with the scaling folded into B, any float dtype.
    """

    spec: WeightSpec
    weight: Tensor
    scales: Tensor | None = None
    bias: Tensor | None = None
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None


@dataclass(frozen=True)
class MlpSpec:
    """The static half of the call: how to read both weights, the gate and the engine."""

    up: WeightSpec
    down: WeightSpec
    gate: Gate
    engine: Engine


def expert_mlp(
    x_TH: Tensor, index_TK: Tensor, p_TK: Tensor, up: Side, down: Side, gate: Gate, engine: Engine
) -> Tensor:
    """Route, gather, up (+LoRA), gate, down (+LoRA), combine: [T, H] in the dtype of ``x_TH``.

    ``index_TK``: chosen experts, integer, ids ≥ E are off-rank and contribute nothing. ``p_TK``: their weights.
    Differentiable in ``x_TH``, ``p_TK``, the factors, the biases and unquantized weights. Keeps x, z, x·A, h·A and the
    routing for backward; never a dequantized weight.
    """
    routing = engine.route(index_TK, up.weight.shape[0])
    spec = MlpSpec(up.spec, down.spec, gate, engine)
    sides = [t for s in (up, down) for t in (s.weight, s.scales, s.bias, s.lora_A, s.lora_B)]
    output: Tensor = ExpertMlp.apply(  # type: ignore[no-untyped-call]
        spec, x_TH, p_TK, routing.token_M, routing.row_TK, routing.offsets_E, *sides
    )
    return output


class ExpertMlp(torch.autograd.Function):
    """See :func:`expert_mlp`. The engine chosen in forward is the one used in backward."""

    @staticmethod
    def forward(ctx: Any, spec: MlpSpec, x_TH: Tensor, p_TK: Tensor, *tensors: Tensor | None) -> Tensor:
        routing, up, down = _assemble(spec, tensors)
        z_MG, h_MI, xa_MR = spec.engine.up(x_TH, routing, up, spec.gate)
        y_TH, ha_MR = spec.engine.down(h_MI, p_TK, routing, down)
        ctx.spec = spec
        ctx.save_for_backward(x_TH, p_TK, z_MG, xa_MR, ha_MR, *tensors)
        return y_TH

    @staticmethod
    def backward(ctx: Any, dy_TH: Tensor) -> tuple[Tensor | None, ...]:
        spec: MlpSpec = ctx.spec
        x_TH, p_TK, z_MG, xa_MR, ha_MR, *tensors = ctx.saved_tensors
        routing, up, down = _assemble(spec, tuple(tensors))
        # needs_input_grad follows forward's arguments: spec, x, p, three of routing, then five per projection
        _, wants_x, wants_p, _, _, _, *wants = ctx.needs_input_grad
        wants_up = Wants(wants_x, wants[0], wants[2], wants[3] or wants[4])
        wants_down = Wants(True, wants[5], wants[7], wants[8] or wants[9])

        p_M = row_probabilities(p_TK, routing)
        dz_MG, dp_M, down_grads = spec.engine.down_backward(
            dy_TH.contiguous(), z_MG, ha_MR, p_M, routing, down, spec.gate, wants_down
        )
        dx_TH, up_grads = spec.engine.up_backward(dz_MG, x_TH, xa_MR, routing, up, wants_up)
        dp_TK = dp_M[routing.row_TK].to(p_TK.dtype) if wants_p else None
        sides: list[Tensor | None] = []
        for grads, side, part in ((up_grads, spec.up, tensors[3:8]), (down_grads, spec.down, tensors[8:13])):
            weight = grads.weight
            if weight is not None and side.transposed:
                weight = weight.transpose(-1, -2)
            for grad, like in zip((weight, None, grads.bias, grads.lora_A, grads.lora_B), part, strict=True):
                sides.append(None if grad is None else grad.to(like.dtype))
        return (None, dx_TH, dp_TK, None, None, None, *sides)


def _assemble(spec: MlpSpec, tensors: tuple[Tensor | None, ...]) -> tuple[Routing, Projection, Projection]:
    token_M, row_TK, offsets_E, *sides = tensors
    assert token_M is not None
    assert row_TK is not None
    assert offsets_E is not None
    up, down = (_projection(how, *sides[start : start + 5]) for how, start in ((spec.up, 0), (spec.down, 5)))
    return Routing(token_M, row_TK, offsets_E), up, down


def _projection(
    spec: WeightSpec,
    weight: Tensor | None,
    scales: Tensor | None,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
) -> Projection:
    assert weight is not None
    lora = None if lora_A is None or lora_B is None else Factors(lora_A, lora_B)
    return Projection(spec.assemble(weight, scales), bias, lora)
