"""``y = x · Wᵀ`` with a frozen FP8 ``W``: the product of attention, dense and shared-expert layers."""

import math
from typing import Any

import torch
from torch import Tensor

from octavo.formats.weight import Float8Weight
from octavo.ops import operators
from octavo.ops.choice import Request, linear_layer, select
from octavo.ops.engines import Engine
from octavo.ops.weights import WeightSpec


def float8_linear(x: Tensor, codes_NK: Tensor, scales_nk: Tensor, spec: WeightSpec, engine: Engine | Request) -> Tensor:
    """``x · (codes × scales)ᵀ`` for ``x`` [..., K] of any float dtype: [..., N] in that dtype, differentiable in ``x``
    only.

    ``codes_NK``: one-byte E4M3 codes; ``scales_nk``: float32 grid. ``engine``: one that was chosen, or a request by
    name. Keeps nothing but the weight's own tensors.
    """
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    if not torch.compiler.is_compiling():
        if isinstance(engine, Request):
            layer = linear_layer(x.device, x.dtype, spec, codes_NK.shape)
            engine = select(engine.name, engine.numerics, layer, rows.shape[0])
        if not (torch.is_grad_enabled() and x.requires_grad):
            product = _product(rows, codes_NK, scales_nk, spec, engine, transposed=False)
            return product.view(*x.shape[:-1], codes_NK.shape[0])
    # reshaped outside the function: its output may then be modified in place, as a linear layer's
    output: Tensor = Float8Product.apply(rows, codes_NK, scales_nk, spec, engine)  # type: ignore[no-untyped-call]
    return output.view(*x.shape[:-1], codes_NK.shape[0])


class Float8Product(torch.autograd.Function):
    """See :func:`float8_linear`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codes_NK: Tensor, scales_nk: Tensor, spec: WeightSpec, engine: Engine | Request
    ) -> Tensor:
        ctx.save_for_backward(codes_NK, scales_nk)
        ctx.spec, ctx.engine = spec, engine
        return _product(x, codes_NK, scales_nk, spec, engine, transposed=False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        codes_NK, scales_nk = ctx.saved_tensors
        return _product(dy, codes_NK, scales_nk, ctx.spec, ctx.engine, transposed=True), None, None, None, None


def _product(
    x: Tensor, codes_NK: Tensor, scales_nk: Tensor, spec: WeightSpec, engine: Engine | Request, *, transposed: bool
) -> Tensor:
    if torch.compiler.is_compiling():
        how = (engine.name, engine.numerics)
        y: Tensor = operators.linear(x.contiguous(), codes_NK, scales_nk, list(spec.block), transposed, *how)
        return y
    assert not isinstance(engine, Request)
    weight = Float8Weight.from_storage(codes_NK, scales_nk, block=spec.block)
    return engine.linear(x, weight, transposed=transposed)
