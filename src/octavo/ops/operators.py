"""``torch.library`` operators on flat tensors: what a compiled graph sees of a product with frozen weights.

Each has a fake implementation, so tracing never looks inside; each returns a new tensor. ``scales`` is ``None`` for a
weight that is not quantized. Gradients are wired by :mod:`octavo.ops.experts` and :mod:`octavo.ops.linear`, not here.
"""

from typing import cast

import torch
from torch import Tensor

from octavo.ops import dequant, reference
from octavo.ops.reference import Numerics
from octavo.ops.weights import Weight, WeightSpec


@torch.library.custom_op("octavo::grouped_product", mutates_args=())
def grouped_product(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    offsets: Tensor,
    parts: int,
    block: list[int],
    stored_transposed: bool,
    transposed: bool,
    engine: str,
    numerics: str,
) -> Tensor:
    """``y_m = x_m · W_{e(m)}ᵀ`` (or ``· W_{e(m)}`` when ``transposed``) for rows sorted by expert.

    ``x`` [M, in]; ``weight`` [E, out, in] one-byte codes with float32 ``scales`` [E, parts·n, k], or floats;
    ``offsets`` int32 [E]. Rows past the last offset are zero.
    """
    spec = WeightSpec(scales is not None, parts, (block[0], block[1]), stored_transposed)
    stack = spec.assemble(weight, scales)
    ends = offsets.tolist()
    if engine == "dequant":
        return dequant.grouped_product(x, stack, ends, transposed=transposed)
    function = reference.grouped_product_transposed if transposed else reference.grouped_product
    return function(x, stack, ends, cast(Numerics, numerics))


@grouped_product.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    offsets: Tensor,
    parts: int,
    block: list[int],
    stored_transposed: bool,
    transposed: bool,
    engine: str,
    numerics: str,
) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[2 if transposed != stored_transposed else 1]))


@torch.library.custom_op("octavo::grouped_outer", mutates_args=())
def grouped_outer(dy: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    """``dW_e = Σ_{m in e} dy_m ⊗ x_m``: ``dy`` [M, N], ``x`` [M, K], int32 ``offsets`` [E] → [E, N, K]."""
    return dequant.grouped_outer(dy, x, offsets.tolist())


@grouped_outer.register_fake
def _(dy: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    return dy.new_empty((offsets.shape[0], dy.shape[1], x.shape[1]))


@torch.library.custom_op("octavo::product", mutates_args=())
def product(
    x: Tensor, weight: Tensor, scales: Tensor, block: list[int], transposed: bool, engine: str, numerics: str
) -> Tensor:
    """``y = x · Wᵀ`` (or ``· W`` when ``transposed``): ``x`` [M, in], one-byte codes ``weight`` [out, in],
    ``scales`` [n, k].
    """
    stack: Weight = WeightSpec(True, 1, (block[0], block[1])).assemble(weight, scales)
    if engine == "dequant":
        w_NK = stack.dequantize(x.dtype)[0]
        return x @ w_NK if transposed else x @ w_NK.T
    function = reference.product_transposed if transposed else reference.product
    return function(x, stack, 0, cast(Numerics, numerics))


@product.register_fake
def _(
    x: Tensor, weight: Tensor, scales: Tensor, block: list[int], transposed: bool, engine: str, numerics: str
) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[1 if transposed else 0]))
