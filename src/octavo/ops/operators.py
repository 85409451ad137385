"""Custom operators of PyTorch on flat tensors: what a compiled graph sees of a layer.

Each is opaque to tracing and has a fake implementation, so a compiled step has no break in the layer, whatever its
engine runs. Engines are passed by name and chosen when the operator runs, from the tensors that it gets. Gradients
are wired by :mod:`octavo.ops.experts` and :mod:`octavo.ops.linear`, not here; eager code does not come here either,
because a dispatch costs more than a small stage does.

Both projections travel as one list ``sides``, ``[weight, scales, bias, lora_A, lora_B]`` of up and of down with absent
ones ``None``, and their :class:`octavo.ops.weights.WeightSpec` as ten integers ``specs``; a routing travels as
``[token_M, row_TK, offsets_E]``. Codes and scales may be in host memory, see :mod:`octavo.ops.ring`. Outputs that are
not there are empty vectors.
"""

from typing import Optional

import torch
from torch import Tensor
from torch.library import custom_op

from octavo.formats.weight import Float8Weight
from octavo.ops import stages
from octavo.ops.choice import experts_layer, linear_layer, select
from octavo.ops.engines import Engine, Wants
from octavo.ops.gates import IDENTITY, SWIGLU, Gate
from octavo.ops.ring import on_device
from octavo.ops.routing import Routing
from octavo.ops.weights import WeightSpec

_SIDE = stages.SIDE
_GATES: dict[str, Gate] = {gate.name: gate for gate in (SWIGLU, IDENTITY)}


def has_operator(gate: Gate) -> bool:
    """Whether an operator can name this gate; any other stays outside, between the operators, and is traced."""
    return gate == SWIGLU


def flatten(spec: WeightSpec) -> list[int]:
    """A spec as an operator takes it."""
    return [int(spec.float8), spec.parts, *spec.block, int(spec.transposed)]


def _specs(flat: list[int]) -> tuple[WeightSpec, WeightSpec]:
    up, down = (WeightSpec(bool(one[0]), one[1], (one[2], one[3]), bool(one[4])) for one in (flat[:5], flat[5:]))
    return up, down


def _engine(
    x: Tensor, num_pairs: int, sides: list[Tensor | None], specs: list[int], name: str, numerics: str
) -> Engine:
    up_weight, down_weight = sides[0], sides[_SIDE]
    assert up_weight is not None
    assert down_weight is not None
    up, down = _specs(specs)
    weights = ((up, up_weight), (down, down_weight))
    layer = experts_layer(x.device, x.dtype, weights, bias=sides[2] is not None)
    return select(name, numerics, layer, num_pairs / up_weight.shape[0])


def _routing(tensors: list[Tensor]) -> Routing:
    token_M, row_TK, offsets_E = tensors
    return Routing(token_M, row_TK, offsets_E)


def _some(tensor: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if tensor is None else tensor


def _none(tensor: Tensor) -> Tensor | None:
    # what is there is two-dimensional, even without rows
    return None if tensor.ndim == 1 else tensor


def _outputs_of(grads: list[Tensor | None], wants: list[bool]) -> list[Tensor]:
    """The gradients that ``wants`` names, contiguous: a list of tensors cannot hold ``None``."""
    return [grad.contiguous() for grad, wanted in zip(grads, wants, strict=True) if wanted and grad is not None]


def _skinny_shape(x: Tensor, num_rows: int, lora_A: Tensor | None) -> Tensor:
    return x.new_empty(0) if lora_A is None else x.new_empty((num_rows, lora_A.shape[1]))


def _features(weight: Tensor, spec: WeightSpec) -> int:
    return weight.shape[2 if spec.transposed else 1]


@custom_op("octavo::mlp", mutates_args=())
def mlp(
    x: Tensor,
    index: Tensor,
    p: Tensor,
    sides: list[Optional[Tensor]],  # noqa: UP045
    specs: list[int],
    gate: str,
    engine: str,
    numerics: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The expert MLP forward: (y_TH, z_MG, x·A, h·A, token_M, row_TK, offsets_E)."""
    chosen = _engine(x, index.numel(), sides, specs, engine, numerics)
    up_spec, down_spec = _specs(specs)
    with on_device(sides, x.device) as sides:
        up, down = stages.projection(up_spec, sides[:_SIDE]), stages.projection(down_spec, sides[_SIDE:])
        routing = chosen.route(index, up.weight.num_experts)
        out = stages.forward(chosen, x, p, routing, up, down, _GATES[gate])
    saved = out.z_MG, _some(out.xa_MR, x), _some(out.ha_MR, x)
    return out.y_TH, *saved, routing.token_M, routing.row_TK, routing.offsets_E


@mlp.register_fake
def _(x, index, p, sides, specs, gate, engine, numerics):  # type: ignore[no-untyped-def]
    up, _ = _specs(specs)
    num_rows = index.shape[0] * index.shape[1]
    return (
        x.new_empty(x.shape),
        x.new_empty((num_rows, _features(sides[0], up))),
        _skinny_shape(x, num_rows, sides[3]),
        _skinny_shape(x, num_rows, sides[_SIDE + 3]),
        *_fake_routing(index, sides[0].shape[0]),
    )


def _fake_routing(index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = index.new_empty((index.shape[0] * index.shape[1],), dtype=torch.int64)
    return rows, index.new_empty(index.shape, dtype=torch.int64), index.new_empty((num_experts,), dtype=torch.int32)


@custom_op("octavo::mlp_inference", mutates_args=())
def mlp_inference(
    x: Tensor,
    index: Tensor,
    p: Tensor,
    sides: list[Optional[Tensor]],  # noqa: UP045
    specs: list[int],
    gate: str,
    engine: str,
    numerics: str,
) -> Tensor:
    """The expert MLP forward without gradient: y_TH, and nothing for backward."""
    chosen = _engine(x, index.numel(), sides, specs, engine, numerics)
    up_spec, down_spec = _specs(specs)
    with on_device(sides, x.device) as sides:
        halves = stages.projection(up_spec, sides[:_SIDE]), stages.projection(down_spec, sides[_SIDE:])
        return stages.inference(chosen, x, index, p, *halves, _GATES[gate])


@mlp_inference.register_fake
def _(x, index, p, sides, specs, gate, engine, numerics):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


@custom_op("octavo::mlp_backward", mutates_args=())
def mlp_backward(
    dy: Tensor,
    x: Tensor,
    p: Tensor,
    saved: list[Tensor],
    routing: list[Tensor],
    sides: list[Optional[Tensor]],  # noqa: UP045
    specs: list[int],
    wants: list[bool],
    gate: str,
    engine: str,
    numerics: str,
) -> list[Tensor]:
    """The gradients that ``wants`` names, of x, p and ``sides``, in that order. ``saved``: z, x·A, h·A."""
    chosen = _engine(x, p.numel(), sides, specs, engine, numerics)
    z, xa, ha = saved
    kept = z, _none(xa), _none(ha)
    with on_device(sides, x.device) as sides:
        halves = sides[:_SIDE], sides[_SIDE:]
        found = stages.backward(chosen, dy, x, p, kept, _routing(routing), halves, _specs(specs), _GATES[gate], wants)
    return _outputs_of([found.x, found.p, *found.up, *found.down], wants)


@mlp_backward.register_fake
def _(dy, x, p, saved, routing, sides, specs, wants, gate, engine, numerics):  # type: ignore[no-untyped-def]
    return [like.new_empty(like.shape) for like, wanted in zip([x, p, *sides], wants, strict=True) if wanted]


@custom_op("octavo::up", mutates_args=())
def up(
    x: Tensor,
    index: Tensor,
    sides: list[Optional[Tensor]],  # noqa: UP045
    specs: list[int],
    engine: str,
    numerics: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The up stage without its gate: (z_MG, x·A, token_M, row_TK, offsets_E); rows of other ranks are zero."""
    chosen = _engine(x, index.numel(), sides, specs, engine, numerics)
    with on_device(sides, x.device) as sides:
        up_spec, down_spec = _specs(specs)
        side, other = stages.projection(up_spec, sides[:_SIDE]), stages.projection(down_spec, sides[_SIDE:])
        routing = chosen.route(index, side.weight.num_experts)
        z, _, xa = chosen.up(x, routing, side, IDENTITY, other)
    # a kernel leaves rows of other ranks unwritten, and the gate outside reads every row
    live = torch.arange(z.shape[0], device=z.device)[:, None] < routing.offsets_E[-1]
    return torch.where(live, z, 0), _some(xa, x), routing.token_M, routing.row_TK, routing.offsets_E


@up.register_fake
def _(x, index, sides, specs, engine, numerics):  # type: ignore[no-untyped-def]
    num_rows = index.shape[0] * index.shape[1]
    z = x.new_empty((num_rows, _features(sides[0], _specs(specs)[0])))
    return z, _skinny_shape(x, num_rows, sides[3]), *_fake_routing(index, sides[0].shape[0])


@custom_op("octavo::up_backward", mutates_args=())
def up_backward(
    dz: Tensor,
    x: Tensor,
    xa: Tensor,
    routing: list[Tensor],
    sides: list[Optional[Tensor]],  # noqa: UP045
    specs: list[int],
    wants: list[bool],
    engine: str,
    numerics: str,
) -> list[Tensor]:
    """The gradients that ``wants`` names, of x and of up's half of ``sides``."""
    chosen = _engine(x, routing[1].numel(), sides, specs, engine, numerics)
    spec = _specs(specs)[0]
    asked = Wants(wants[0], wants[1], wants[3], wants[4] or wants[5])
    with on_device(sides, x.device) as sides:
        half = sides[:_SIDE]
        dx, grads = chosen.up_backward(
            dz.contiguous(), x, _none(xa), _routing(routing), stages.projection(spec, half), asked
        )
    return _outputs_of([dx, *stages.as_side(grads, spec, half)], wants)


@up_backward.register_fake
def _(dz, x, xa, routing, sides, specs, wants, engine, numerics):  # type: ignore[no-untyped-def]
    return [like.new_empty(like.shape) for like, wanted in zip([x, *sides[:_SIDE]], wants, strict=True) if wanted]


@custom_op("octavo::down", mutates_args=())
def down(
    h: Tensor,
    p: Tensor,
    routing: list[Tensor],
    sides: list[Optional[Tensor]],  # noqa: UP045
    specs: list[int],
    engine: str,
    numerics: str,
) -> tuple[Tensor, Tensor]:
    """The down stage and the combine: (y_TH, h·A)."""
    chosen = _engine(h, p.numel(), sides, specs, engine, numerics)
    with on_device(sides, h.device) as sides:
        side = stages.projection(_specs(specs)[1], sides[_SIDE:])
        y, ha = chosen.down(chosen.arrange(h.contiguous(), side), p, _routing(routing), side)
    return y, _some(ha, h)


@down.register_fake
def _(h, p, routing, sides, specs, engine, numerics):  # type: ignore[no-untyped-def]
    y = h.new_empty((p.shape[0], _features(sides[_SIDE], _specs(specs)[1])))
    return y, _skinny_shape(h, h.shape[0], sides[_SIDE + 3])


@custom_op("octavo::down_backward", mutates_args=())
def down_backward(
    dy: Tensor,
    h: Tensor,
    ha: Tensor,
    p: Tensor,
    routing: list[Tensor],
    sides: list[Optional[Tensor]],  # noqa: UP045
    specs: list[int],
    wants: list[bool],
    engine: str,
    numerics: str,
) -> list[Tensor]:
    """The gradients that ``wants`` names, of h, p and down's half of ``sides``."""
    chosen = _engine(h, p.numel(), sides, specs, engine, numerics)
    spec = _specs(specs)[1]
    asked = Wants(True, wants[2], wants[4], wants[5] or wants[6])
    # with the identity for its gate, the stage's dz is dh
    with on_device(sides, h.device) as sides:
        half = sides[_SIDE:]
        dh, dp, grads = stages.down_backward(
            chosen, dy, h, _none(ha), p, _routing(routing), stages.projection(spec, half), IDENTITY, asked
        )
    return _outputs_of([dh, dp, *stages.as_side(grads, spec, half)], wants)


@down_backward.register_fake
def _(dy, h, ha, p, routing, sides, specs, wants, engine, numerics):  # type: ignore[no-untyped-def]
    return [like.new_empty(like.shape) for like, wanted in zip([h, p, *sides[_SIDE:]], wants, strict=True) if wanted]


@custom_op("octavo::linear", mutates_args=())
def linear(
    x: Tensor, weight: Tensor, scales: Tensor, block: list[int], transposed: bool, engine: str, numerics: str
) -> Tensor:
    """``y = x · Wᵀ`` (or ``· W`` when ``transposed``): ``x`` [M, in], one-byte codes ``weight`` [out, in],
    ``scales`` [n, k].
    """
    spec = WeightSpec(True, 1, (block[0], block[1]))
    layer = linear_layer(x.device, x.dtype, spec, weight.shape)
    stack = Float8Weight.from_storage(weight, scales, block=spec.block)
    return select(engine, numerics, layer, x.shape[0]).linear(x, stack, transposed=transposed)


@linear.register_fake
def _(x, weight, scales, block, transposed, engine, numerics):  # type: ignore[no-untyped-def]
    return x.new_empty((x.shape[0], weight.shape[1 if transposed else 0]))
