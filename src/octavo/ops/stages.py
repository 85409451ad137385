"""An engine's stages in order: the expert MLP forward and backward, without autograd.

Legend: see :mod:`octavo.ops.experts`.
"""

from dataclasses import dataclass, replace

from torch import Tensor

from octavo.ops import decode
from octavo.ops.engines import Engine, Projection, ProjectionGrads, Wants
from octavo.ops.gates import Gate
from octavo.ops.routing import Routing, row_probabilities
from octavo.ops.weights import Factors, WeightSpec

SIDE = 5
"""Tensors of a projection as operators and autograd carry it: weight, scales, bias, lora_A, lora_B."""


@dataclass(frozen=True)
class Outputs:
    """The result and what backward needs of it."""

    y_TH: Tensor
    z_MG: Tensor
    xa_MR: Tensor | None
    ha_MR: Tensor | None


@dataclass(frozen=True)
class Gradients:
    """``up`` and ``down`` as ``[weight, None, bias, lora_A, lora_B]``, in the dtypes of the tensors themselves."""

    x: Tensor | None
    p: Tensor | None
    up: list[Tensor | None]
    down: list[Tensor | None]


def projection(spec: WeightSpec, tensors: list[Tensor | None]) -> Projection:
    """The projection over ``[weight, scales, bias, lora_A, lora_B]``; nothing is copied."""
    weight, scales, bias, lora_A, lora_B = tensors
    assert weight is not None
    lora = None if lora_A is None or lora_B is None else Factors(lora_A, lora_B)
    return Projection(spec.assemble(weight, scales), bias, lora)


def forward(
    engine: Engine, x_TH: Tensor, p_TK: Tensor, routing: Routing, up: Projection, down: Projection, gate: Gate
) -> Outputs:
    """``y_t = Σ_k p_tk · down_e(gate(up_e(x_t)))``."""
    z_MG, h_MI, xa_MR = engine.up(x_TH, routing, up, gate, down)
    y_TH, ha_MR = engine.down(h_MI, p_TK, routing, down)
    return Outputs(y_TH, z_MG, xa_MR, ha_MR)


def inference(
    engine: Engine, x_TH: Tensor, index_TK: Tensor, p_TK: Tensor, up: Projection, down: Projection, gate: Gate
) -> Tensor:
    """The output alone, from unsorted pairs: nothing is kept, and few pairs read their experts' weights directly."""
    num_experts = up.weight.num_experts
    if decode.applies(engine, x_TH, index_TK, num_experts):
        return decode.expert_mlp(x_TH, index_TK, p_TK, up, down, gate, engine.numerics)
    return forward(engine, x_TH, p_TK, engine.route(index_TK, num_experts), up, down, gate).y_TH


def backward(
    engine: Engine,
    dy_TH: Tensor,
    x_TH: Tensor,
    p_TK: Tensor,
    saved: tuple[Tensor, Tensor | None, Tensor | None],
    routing: Routing,
    sides: tuple[list[Tensor | None], list[Tensor | None]],
    specs: tuple[WeightSpec, WeightSpec],
    gate: Gate,
    wants: list[bool],
    *,
    spend: bool = False,
) -> Gradients:
    """Gradients of what ``wants`` names: x, p, then the five tensors of up and of down. ``saved``: z, x·A, h·A;
    ``spend``: z may be written over.
    """
    z_MG, xa_MR, ha_MR = saved
    up, down = projection(specs[0], sides[0]), projection(specs[1], sides[1])
    # dz is nobody else's, whether it takes z's place or not
    of_up, of_down = _wants(wants[0], wants[2 : 2 + SIDE], spend=True), _wants(True, wants[2 + SIDE :], spend)
    maxima = engine.maxima(dy_TH, routing, up, down, gate, of_up)
    of_up, of_down = replace(of_up, maxima=maxima), replace(of_down, maxima=maxima)
    dz_MG, dp_TK, down_grads = down_backward(engine, dy_TH, z_MG, ha_MR, p_TK, routing, down, gate, of_down)
    dx_TH, up_grads = engine.up_backward(dz_MG, x_TH, xa_MR, routing, up, of_up)
    return Gradients(
        dx_TH,
        dp_TK if wants[1] else None,
        as_side(up_grads, specs[0], sides[0]),
        as_side(down_grads, specs[1], sides[1]),
    )


def down_backward(
    engine: Engine,
    dy_TH: Tensor,
    z_MG: Tensor,
    ha_MR: Tensor | None,
    p_TK: Tensor,
    routing: Routing,
    down: Projection,
    gate: Gate,
    wants: Wants,
) -> tuple[Tensor, Tensor, ProjectionGrads]:
    """(dz_MG, dp_TK in the dtype of p, the projection's gradients)."""
    p_M = row_probabilities(p_TK, routing)
    dz_MG, dp_M, grads = engine.down_backward(dy_TH.contiguous(), z_MG, ha_MR, p_M, routing, down, gate, wants)
    return dz_MG, dp_M[routing.row_TK].to(p_TK.dtype), grads


def _wants(x: bool, side: list[bool], spend: bool = False) -> Wants:
    return Wants(x, weight=side[0], bias=side[2], lora=side[3] or side[4], spend=spend)


def as_side(grads: ProjectionGrads, spec: WeightSpec, side: list[Tensor | None]) -> list[Tensor | None]:
    """A projection's gradients in the order, layout and dtypes of its tensors."""
    weight = grads.weight
    if weight is not None and spec.transposed:
        weight = weight.transpose(-1, -2)
    found = (weight, None, grads.bias, grads.lora_A, grads.lora_B)
    return [
        None if grad is None or like is None else grad.to(like.dtype) for grad, like in zip(found, side, strict=True)
    ]
