"""The expert MLP as one autograd function: ``y_t = Σ_k p_tk · down_e(gate(up_e(x_t)))``, experts ``e`` frozen in FP8
or plain, LoRA on both.

Eager code calls the engine's stages directly. Under ``torch.compile`` the same function calls the operators of
:mod:`octavo.ops.operators`, which tracing does not look into.

Legend: ``T`` tokens, ``K`` top-k, ``M = T·K`` routed rows sorted by expert, ``E`` experts, ``H`` hidden size, ``I``
expert intermediate size, ``G`` width of the up product, ``R`` LoRA rank.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from octavo.errors import EngineError
from octavo.ops import operators, stages
from octavo.ops.choice import Request, experts_layer, select
from octavo.ops.engines import Engine
from octavo.ops.gates import Gate
from octavo.ops.kept import Activations, grow, shrink
from octavo.ops.ring import on_device
from octavo.ops.routing import Routing
from octavo.ops.weights import WeightSpec

_SIDE = stages.SIDE


@dataclass(frozen=True)
class Side:
    """The tensors of one projection as the caller holds them.

    ``weight`` [E, out, in]: one-byte codes with float32 ``scales`` [E, parts·n, k] (for a ring their bits, int32, see
    :mod:`octavo.ops.ring`), or floats; ``bias`` [E, out]; ``lora_A`` [E, R, in] and ``lora_B`` [E, out, R] with
    the scaling folded into B, any float dtype.
    """

    spec: WeightSpec
    weight: Tensor
    scales: Tensor | None = None
    bias: Tensor | None = None
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor | None]:
        """In the order of :data:`octavo.ops.stages.SIDE`."""
        return [self.weight, self.scales, self.bias, self.lora_A, self.lora_B]


@dataclass(frozen=True)
class MlpSpec:
    """The static half of the call: how to read both weights, the gate, the engine, and in what x and z are kept."""

    up: WeightSpec
    down: WeightSpec
    gate: Gate
    engine: Engine | Request
    activations: Activations = "bf16"

    @property
    def flat(self) -> list[int]:
        """Both weights as an operator takes them."""
        return operators.flatten(self.up) + operators.flatten(self.down)


def expert_mlp(
    x_TH: Tensor,
    index_TK: Tensor,
    p_TK: Tensor,
    up: Side,
    down: Side,
    gate: Gate,
    engine: Engine | Request,
    activations: Activations = "bf16",
) -> Tensor:
    """Route, gather, up (+LoRA), gate, down (+LoRA), combine: [T, H] in the dtype of ``x_TH``.

    ``index_TK``: chosen experts, integer, ids ≥ E are off-rank and contribute nothing. ``p_TK``: their weights.
    ``engine``: one that was chosen, or a request by name; a compiled graph knows an engine by its name alone.
    ``activations``: ``fp8`` keeps x and z for backward in E4M3, with a scale per row; forward is the same.
    Differentiable in ``x_TH``, ``p_TK``, the factors, the biases and unquantized weights. Keeps x, z, x·A, h·A and the
    routing for backward, never a dequantized weight; without gradient it keeps nothing.
    """
    sides = [*up.tensors, *down.tensors]
    if torch.compiler.is_compiling():
        return _traced(x_TH, index_TK, p_TK, sides, MlpSpec(up.spec, down.spec, gate, engine, activations))
    if isinstance(engine, Request):
        weights = ((up.spec, up.weight), (down.spec, down.weight))
        layer = experts_layer(x_TH.device, x_TH.dtype, weights, bias=up.bias is not None)
        engine = select(engine.name, engine.numerics, layer, index_TK.numel() / up.weight.shape[0])
    if not _differentiates(x_TH, p_TK, sides):
        with on_device(sides, x_TH.device) as sides:
            halves = stages.projection(up.spec, sides[:_SIDE]), stages.projection(down.spec, sides[_SIDE:])
            return stages.inference(engine, x_TH, index_TK, p_TK, *halves, gate)
    routing = engine.route(index_TK, up.weight.shape[0])
    spec = MlpSpec(up.spec, down.spec, gate, engine, activations)
    output: Tensor = ExpertMlp.apply(  # type: ignore[no-untyped-call]
        spec, x_TH, p_TK, routing.token_M, routing.row_TK, routing.offsets_E, *sides
    )
    return output


def _differentiates(x_TH: Tensor, p_TK: Tensor, sides: list[Tensor | None]) -> bool:
    if not torch.is_grad_enabled():
        return False
    return x_TH.requires_grad or p_TK.requires_grad or any(t is not None and t.requires_grad for t in sides)


class ExpertMlp(torch.autograd.Function):
    """See :func:`expert_mlp`. The engine chosen in forward is the one used in backward."""

    @staticmethod
    def forward(ctx: Any, spec: MlpSpec, x_TH: Tensor, p_TK: Tensor, *tensors: Tensor | None) -> Tensor:
        assert not isinstance(spec.engine, Request)
        routing = _routing(tensors)
        with on_device(tensors[3:], x_TH.device) as sides:
            halves = stages.projection(spec.up, sides[:_SIDE]), stages.projection(spec.down, sides[_SIDE:])
            out = stages.forward(spec.engine, x_TH, p_TK, routing, *halves, spec.gate)
        ctx.spec = spec
        kept = _keep(spec, x_TH, out.z_MG)
        ctx.save_for_backward(p_TK, out.xa_MR, out.ha_MR, *tensors, *kept)
        return out.y_TH

    @staticmethod
    def backward(ctx: Any, dy_TH: Tensor) -> tuple[Tensor | None, ...]:
        spec: MlpSpec = ctx.spec
        p_TK, xa_MR, ha_MR, *rest = ctx.saved_tensors
        tensors, kept = rest[: 3 + 2 * _SIDE], rest[3 + 2 * _SIDE :]
        x_TH, z_MG = _kept(spec, kept, dy_TH.dtype)
        # needs_input_grad follows forward's arguments: spec, x, p, three of routing, then five per projection
        wants = [*ctx.needs_input_grad[1:3], *ctx.needs_input_grad[6:]]
        assert not isinstance(spec.engine, Request)
        # z is the largest thing that a layer keeps; where the graph is not kept, its gradient takes its place
        fresh = spec.activations == "fp8"
        spend = fresh or not torch._C._autograd._get_current_graph_task_keep_graph()
        with on_device(tensors[3:], dy_TH.device) as sides:
            grads = stages.backward(
                spec.engine,
                dy_TH,
                x_TH,
                p_TK,
                (z_MG, xa_MR, ha_MR),
                _routing(tuple(tensors)),
                (sides[:_SIDE], sides[_SIDE:]),
                (spec.up, spec.down),
                spec.gate,
                wants,
                spend=spend,
            )
        if spend and not fresh:
            torch.autograd.graph.increment_version(z_MG)
        return (None, grads.x, grads.p, None, None, None, *grads.up, *grads.down)


def _keep(spec: MlpSpec, x_TH: Tensor, z_MG: Tensor) -> list[Tensor]:
    """What is kept of x and z: themselves, or their codes and scales."""
    if spec.activations == "bf16":
        return [x_TH, z_MG]
    return [*shrink(x_TH), *shrink(z_MG)]


def _kept(spec: MlpSpec, kept: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(x_TH, z_MG) of what :func:`_keep` kept."""
    if spec.activations == "bf16":
        x_TH, z_MG = kept
        return x_TH, z_MG
    x_codes, x_scales, z_codes, z_scales = kept
    return grow(x_codes, x_scales, dtype), grow(z_codes, z_scales, dtype)


def _routing(tensors: tuple[Tensor | None, ...]) -> Routing:
    token_M, row_TK, offsets_E = tensors[:3]
    assert token_M is not None
    assert row_TK is not None
    assert offsets_E is not None
    return Routing(token_M, row_TK, offsets_E)


def _traced(x_TH: Tensor, index_TK: Tensor, p_TK: Tensor, sides: list[Tensor | None], spec: MlpSpec) -> Tensor:
    """The layer in a compiled graph. A gate that no operator can name is traced, between two operators."""
    if spec.activations == "fp8" and not operators.has_operator(spec.gate):
        raise EngineError(
            f"activations 'fp8' cannot be compiled with the gate {spec.gate.name!r}, which keeps its own input. Set "
            "activations to 'bf16', or do not compile this layer."
        )
    if operators.has_operator(spec.gate):
        if not torch.is_grad_enabled():
            how = (spec.gate.name, spec.engine.name, spec.engine.numerics)
            return cast(Tensor, operators.mlp_inference(x_TH, index_TK, p_TK, sides, spec.flat, *how))
        return cast(Tensor, TracedMlp.apply(spec, x_TH, index_TK, p_TK, *sides))  # type: ignore[no-untyped-call]
    z_MG, *routing = TracedUp.apply(spec, x_TH, index_TK, *sides)  # type: ignore[no-untyped-call]
    h_MI = spec.gate.forward(z_MG).to(z_MG.dtype)
    return cast(Tensor, TracedDown.apply(spec, h_MI, p_TK, *routing, *sides))  # type: ignore[no-untyped-call]


class TracedMlp(torch.autograd.Function):
    """:class:`ExpertMlp` over operators."""

    @staticmethod
    def forward(ctx: Any, spec: MlpSpec, x_TH: Tensor, index_TK: Tensor, p_TK: Tensor, *sides: Tensor | None) -> Tensor:
        how = (spec.gate.name, spec.engine.name, spec.engine.numerics)
        y_TH: Tensor
        y_TH, *kept = operators.mlp(x_TH, index_TK, p_TK, list(sides), spec.flat, *how)
        z_MG, *rest = kept
        ctx.spec = spec
        ctx.save_for_backward(p_TK, *rest, *sides, *_keep(spec, x_TH, z_MG))
        return y_TH

    @staticmethod
    def backward(ctx: Any, dy_TH: Tensor) -> tuple[Tensor | None, ...]:
        spec: MlpSpec = ctx.spec
        p_TK, xa_MR, ha_MR, token_M, row_TK, offsets_E, *rest = ctx.saved_tensors
        sides, kept = rest[: 2 * _SIDE], rest[2 * _SIDE :]
        x_TH, z_MG = _kept(spec, kept, dy_TH.dtype)
        wants = [ctx.needs_input_grad[1], *ctx.needs_input_grad[3:]]
        found = operators.mlp_backward(
            dy_TH,
            x_TH,
            p_TK,
            [z_MG, xa_MR, ha_MR],
            [token_M, row_TK, offsets_E],
            sides,
            spec.flat,
            wants,
            spec.gate.name,
            spec.engine.name,
            spec.engine.numerics,
        )
        dx, dp, *rest = _spread(found, wants)
        return (None, dx, None, dp, *rest)


class TracedUp(torch.autograd.Function):
    """The up stage of :class:`TracedMlp`, for a gate outside: (z_MG, token_M, row_TK, offsets_E)."""

    @staticmethod
    def forward(ctx: Any, spec: MlpSpec, x_TH: Tensor, index_TK: Tensor, *sides: Tensor | None) -> tuple[Tensor, ...]:
        how = (spec.engine.name, spec.engine.numerics)
        z_MG, xa_MR, *routing = operators.up(x_TH, index_TK, list(sides), spec.flat, *how)
        ctx.spec = spec
        ctx.save_for_backward(x_TH, xa_MR, *routing, *sides)
        ctx.mark_non_differentiable(*routing)
        return z_MG, *routing

    @staticmethod
    def backward(ctx: Any, dz_MG: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        spec: MlpSpec = ctx.spec
        x_TH, xa_MR, token_M, row_TK, offsets_E, *sides = ctx.saved_tensors
        wants = [ctx.needs_input_grad[1], *ctx.needs_input_grad[3 : 3 + _SIDE]]
        routing = [token_M, row_TK, offsets_E]
        how = (spec.engine.name, spec.engine.numerics)
        found = operators.up_backward(dz_MG, x_TH, xa_MR, routing, sides, spec.flat, wants, *how)
        dx, *rest = _spread(found, wants)
        return (None, dx, None, *rest, *[None] * _SIDE)


class TracedDown(torch.autograd.Function):
    """The down stage of :class:`TracedMlp`, for a gate outside."""

    @staticmethod
    def forward(ctx: Any, spec: MlpSpec, h_MI: Tensor, p_TK: Tensor, *tensors: Tensor | None) -> Tensor:
        routing, sides = list(tensors[:3]), list(tensors[3:])
        how = (spec.engine.name, spec.engine.numerics)
        y_TH: Tensor
        y_TH, ha_MR = operators.down(h_MI, p_TK, routing, sides, spec.flat, *how)
        ctx.spec = spec
        ctx.save_for_backward(h_MI, ha_MR, p_TK, *tensors)
        return y_TH

    @staticmethod
    def backward(ctx: Any, dy_TH: Tensor) -> tuple[Tensor | None, ...]:
        spec: MlpSpec = ctx.spec
        h_MI, ha_MR, p_TK, token_M, row_TK, offsets_E, *sides = ctx.saved_tensors
        wants = [*ctx.needs_input_grad[1:3], *ctx.needs_input_grad[6 + _SIDE :]]
        routing = [token_M, row_TK, offsets_E]
        how = (spec.engine.name, spec.engine.numerics)
        found = operators.down_backward(dy_TH, h_MI, ha_MR, p_TK, routing, sides, spec.flat, wants, *how)
        dh, dp, *rest = _spread(found, wants)
        return (None, dh, dp, None, None, None, *[None] * _SIDE, *rest)


def _spread(found: list[Tensor], wants: list[bool]) -> list[Tensor | None]:
    """An operator's gradients at the places that ``wants`` names."""
    left = list(found)
    return [left.pop(0) if wanted else None for wanted in wants]
