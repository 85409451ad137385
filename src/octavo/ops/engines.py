"""Engines: ways to compute one numerics mode. A few stage verbs, chosen once in forward and reused in backward.

An engine's verbs are the stages of an expert MLP, not a bare product, because a fast engine gathers in its loads,
folds LoRA into its accumulator and applies the gate in its epilogue. :class:`ProductEngine` builds the stages from
grouped products; it serves the two engines that run anywhere.

Legend: ``T`` tokens, ``M`` rows sorted by expert, ``H`` hidden, ``G`` width of the up product (2I with a gate), ``I``
expert intermediate size, ``R`` LoRA rank.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from octavo.formats.weight import Float8Weight
from octavo.ops import dequant, reference
from octavo.ops.gates import Gate
from octavo.ops.reference import Numerics
from octavo.ops.routing import Routing, combine, route
from octavo.ops.weights import DenseWeight, Factors, Weight


@dataclass(frozen=True)
class Projection:
    """One projection of an expert MLP: its frozen weight, its bias [E, out] and its LoRA factors."""

    weight: Weight
    bias: Tensor | None
    lora: Factors | None


@dataclass(frozen=True)
class ProjectionGrads:
    """Gradients of a projection, in the compute dtype; ``None`` where nothing was asked for."""

    weight: Tensor | None
    bias: Tensor | None
    lora_A: Tensor | None
    lora_B: Tensor | None


@dataclass(frozen=True)
class RowMaxima:
    """What rounding dz with one scale a row needs to know before it reads dz: ``parts_PM`` float32 [P, M], the largest
    |dz · fold| of each row by parts of its columns, with ``fold_EG`` float32 [E, G], which belongs to the up
    projection's scales; nothing is folded where these do not lie on rows.
    """

    fold_EG: Tensor | None
    parts_PM: Tensor


@dataclass(frozen=True)
class Wants:
    """Which gradients of a stage are needed."""

    x: bool
    weight: bool
    bias: bool
    lora: bool
    spend: bool = False
    """Whether z in ``down_backward``, dz in ``up_backward``, may be written over: nobody reads it again."""
    maxima: RowMaxima | None = None
    """Of dz: written by ``down_backward`` and read by ``up_backward``."""


class Engine(Protocol):
    """Computes the stages of an expert MLP and the products of a linear layer."""

    @property
    def name(self) -> str: ...

    @property
    def numerics(self) -> Numerics: ...

    def route(self, index_TK: Tensor, num_experts: int) -> Routing:
        """The sorted order of the pairs of ``index_TK``; see :func:`octavo.ops.routing.route`."""
        ...

    def up(
        self, x_TH: Tensor, routing: Routing, up: Projection, gate: Gate, down: Projection
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """``z = x·Wᵀ + b + x·Aᵀ·Bᵀ`` and ``h = gate(z)`` per routed row: (z_MG, h_MI, x·A [M, R]), all in
        ``x.dtype``; h as :meth:`arrange` gives it for ``down``.
        """
        ...

    def arrange(self, h_MI: Tensor, down: Projection) -> Tensor:
        """h in the order and scale in which :meth:`down` reads it, from one in its own: for a gate that was computed
        elsewhere.
        """
        ...

    def down(self, h_MI: Tensor, p_TK: Tensor, routing: Routing, down: Projection) -> tuple[Tensor, Tensor | None]:
        """``y_t = Σ_k p_tk · (h·Wᵀ + b + h·Aᵀ·Bᵀ)``: (y_TH, h·A [M, R])."""
        ...

    def maxima(
        self, dy_TH: Tensor, routing: Routing, up: Projection, down: Projection, gate: Gate, wants: Wants
    ) -> RowMaxima | None:
        """Room for the maxima of dz's rows, where ``down_backward`` finds them and ``up_backward`` uses them, whose
        ``wants`` these are.
        """
        ...

    def down_backward(
        self,
        dy_TH: Tensor,
        z_MG: Tensor,
        ha_MR: Tensor | None,
        p_M: Tensor,
        routing: Routing,
        down: Projection,
        gate: Gate,
        wants: Wants,
    ) -> tuple[Tensor, Tensor, ProjectionGrads]:
        """(dz_MG through the gate, dp_M in float32 or wider, the projection's gradients); ``h`` is computed again
        from ``z``.
        """
        ...

    def up_backward(
        self, dz_MG: Tensor, x_TH: Tensor, xa_MR: Tensor | None, routing: Routing, up: Projection, wants: Wants
    ) -> tuple[Tensor | None, ProjectionGrads]:
        """(dx_TH, the projection's gradients)."""
        ...

    def linear(self, x_MK: Tensor, weight: Float8Weight, *, transposed: bool) -> Tensor:
        """``x · Wᵀ``, or ``x · W`` when ``transposed``, in the dtype of ``x``."""
        ...


@dataclass(frozen=True)
class ProductEngine:
    """Stages built from grouped products: gather, product, add, gate, combine.

    ``wide``: every operand and intermediate of a stage is float32 (float64 for float64 input), rounded once at its
    end; else everything is in the dtype of the activations.
    """

    name: str
    numerics: Numerics
    wide: bool

    def route(self, index_TK: Tensor, num_experts: int) -> Routing:
        return route(index_TK, num_experts)

    def _compute(self, dtype: torch.dtype) -> torch.dtype:
        return torch.promote_types(dtype, torch.float32) if self.wide else dtype

    def _product(self, x_MK: Tensor, weight: Weight, routing: Routing, *, transposed: bool = False) -> Tensor:
        if self.name == "dequant" and isinstance(weight, DenseWeight) and dequant.takes_unasked(x_MK):
            return dequant.unasked_product(x_MK, weight, routing.offsets_E, transposed=transposed)
        ends = routing.offsets_E.tolist()
        if self.name == "dequant":
            return dequant.grouped_product(x_MK, weight, ends, transposed=transposed)
        function = reference.grouped_product_transposed if transposed else reference.grouped_product
        return function(x_MK, weight, ends, self.numerics)

    def _skinny(self, x_MK: Tensor, factor: Tensor, routing: Routing, *, transposed: bool = False) -> Tensor:
        return self._product(x_MK, DenseWeight(factor.to(x_MK.dtype)), routing, transposed=transposed)

    def _project(self, x_MK: Tensor, side: Projection, routing: Routing) -> tuple[Tensor, Tensor | None]:
        y_MN = self._product(x_MK, side.weight, routing)
        xa_MR = None
        if side.lora is not None:
            xa_MR = self._skinny(x_MK, side.lora.A_ERK, routing)
            y_MN = y_MN + self._skinny(xa_MR, side.lora.B_ENR, routing)
        if side.bias is not None:
            y_MN = y_MN + _per_row(side.bias, routing).to(y_MN.dtype)
        return y_MN, xa_MR

    def _product_transposed(self, dy_MN: Tensor, side: Projection, routing: Routing) -> Tensor:
        """``dy · (W + BA)``."""
        dx_MK = self._product(dy_MN, side.weight, routing, transposed=True)
        if side.lora is None:
            return dx_MK
        yb_MR = self._skinny(dy_MN, side.lora.B_ENR, routing, transposed=True)
        return dx_MK + self._skinny(yb_MR, side.lora.A_ERK, routing, transposed=True)

    def up(
        self, x_TH: Tensor, routing: Routing, up: Projection, gate: Gate, down: Projection
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        dtype, compute = x_TH.dtype, self._compute(x_TH.dtype)
        z_MG, xa_MR = self._project(x_TH[routing.token_M].to(compute), up, routing)
        z_MG = z_MG.to(dtype)
        return z_MG, self._gate(z_MG, gate), None if xa_MR is None else xa_MR.to(dtype)

    def _gate(self, z_MG: Tensor, gate: Gate) -> Tensor:
        """``h = gate(z)`` from the rounded ``z``, so that backward computes the same ``h`` again."""
        return gate.forward(z_MG.to(self._compute(z_MG.dtype))).to(z_MG.dtype)

    def arrange(self, h_MI: Tensor, down: Projection) -> Tensor:
        """See :class:`Engine`: as it is."""
        return h_MI

    def down(self, h_MI: Tensor, p_TK: Tensor, routing: Routing, down: Projection) -> tuple[Tensor, Tensor | None]:
        dtype = h_MI.dtype
        y_MH, ha_MR = self._project(h_MI.to(self._compute(dtype)), down, routing)
        return combine(y_MH, routing, p_TK, dtype), None if ha_MR is None else ha_MR.to(dtype)

    def maxima(
        self, dy_TH: Tensor, routing: Routing, up: Projection, down: Projection, gate: Gate, wants: Wants
    ) -> RowMaxima | None:
        return None

    def down_backward(
        self,
        dy_TH: Tensor,
        z_MG: Tensor,
        ha_MR: Tensor | None,
        p_M: Tensor,
        routing: Routing,
        down: Projection,
        gate: Gate,
        wants: Wants,
    ) -> tuple[Tensor, Tensor, ProjectionGrads]:
        compute = self._compute(z_MG.dtype)
        wide = torch.promote_types(compute, torch.float32)
        dy_MH = dy_TH[routing.token_M].to(compute)
        h_MI = self._gate(z_MG, gate).to(compute)
        # before the router's weight, so that its own gradient needs no output of the down product: dp = <dy·W, h> +
        # <dy, b>
        dh_MI = self._product_transposed(dy_MH, down, routing)
        dp_M = (dh_MI.to(wide) * h_MI.to(wide)).sum(-1)
        if down.bias is not None:
            dp_M = dp_M + (dy_MH.to(wide) * _per_row(down.bias, routing).to(wide)).sum(-1)
        p_M1 = p_M[:, None].to(wide)
        grads = self._grads((dy_MH * p_M1).to(compute), h_MI, ha_MR, routing, down, wants)
        dz_MG = gate.backward(z_MG.to(compute), (dh_MI * p_M1).to(compute))
        return dz_MG.to(z_MG.dtype), dp_M, grads

    def up_backward(
        self, dz_MG: Tensor, x_TH: Tensor, xa_MR: Tensor | None, routing: Routing, up: Projection, wants: Wants
    ) -> tuple[Tensor | None, ProjectionGrads]:
        compute = self._compute(x_TH.dtype)
        dz_wide = dz_MG.to(compute)
        x_MH = x_TH[routing.token_M].to(compute)
        grads = self._grads(dz_wide, x_MH, xa_MR, routing, up, wants)
        if not wants.x:
            return None, grads
        return combine(self._product_transposed(dz_wide, up, routing), routing, None, x_TH.dtype), grads

    def _grads(
        self, dy_MN: Tensor, x_MK: Tensor, xa_MR: Tensor | None, routing: Routing, side: Projection, wants: Wants
    ) -> ProjectionGrads:
        ends = routing.offsets_E.tolist()
        lora_A = lora_B = None
        if wants.lora and side.lora is not None:
            assert xa_MR is not None
            lora_B = dequant.grouped_outer(dy_MN, xa_MR.to(dy_MN.dtype), ends)
            yb_MR = self._skinny(dy_MN, side.lora.B_ENR, routing, transposed=True)
            lora_A = dequant.grouped_outer(yb_MR, x_MK, ends)
        weight = dequant.grouped_outer(dy_MN, x_MK, ends) if wants.weight else None
        bias = None
        if wants.bias and side.bias is not None:
            ones = dy_MN.new_ones((dy_MN.shape[0], 1))
            bias = dequant.grouped_outer(dy_MN, ones, ends)[..., 0]
        return ProjectionGrads(weight, bias, lora_A, lora_B)

    def linear(self, x_MK: Tensor, weight: Float8Weight, *, transposed: bool) -> Tensor:
        wide = x_MK.to(self._compute(x_MK.dtype))
        if self.name == "dequant":
            w_NK = weight.dequantize(wide.dtype)[0]
            return wide @ w_NK if transposed else wide @ w_NK.T
        function = reference.product_transposed if transposed else reference.product
        return function(wide, weight, 0, self.numerics).to(x_MK.dtype)


def _per_row(bias_EN: Tensor, routing: Routing) -> Tensor:
    """Each row's bias, [M, N]; zero for rows past the last offset."""
    rows = torch.arange(routing.num_rows, device=bias_EN.device)
    expert_M = torch.searchsorted(routing.offsets_E, rows, right=True)
    padded = torch.cat([bias_EN, bias_EN.new_zeros((1, bias_EN.shape[1]))])
    return padded[expert_M]
