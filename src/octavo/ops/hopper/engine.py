"""The stages of an expert MLP on the products of `product.cu`: engines ``fused`` and ``scaled`` on Hopper.

What lies between the products (sorting, LoRA's skinny products, rounding, combining) is that of
:class:`octavo.ops.fused.KernelEngine`, and so is every layer that the products do not take. Legend: see there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.formats.weight import Float8Weight
from octavo.ops.engines import Projection, ProjectionGrads, Wants
from octavo.ops.fused import KernelEngine, Site
from octavo.ops.gates import Gate, SwiGlu
from octavo.ops.hopper.product import FEATURES, MAX_EXPERTS, GateGradient, LoraStep, Rows, product
from octavo.ops.reference import folds_into_rows
from octavo.ops.routing import Routing

_PRODUCTS = 2


@dataclass(frozen=True)
class HopperEngine(KernelEngine):
    """See the module's docstring."""

    def _takes(self, x: Tensor, side: Projection) -> bool:
        return self._kernels(x, side) and side.weight.num_experts <= MAX_EXPERTS

    def _rounds(self, site: Site) -> bool:
        return self._way(site) == "scaled"

    def up(self, x_TH: Tensor, routing: Routing, up: Projection, gate: Gate) -> tuple[Tensor, Tensor, Tensor | None]:
        if not self._takes(x_TH, up):
            return super().up(x_TH, routing, up, gate)
        from octavo.ops.hopper.interleave import interleave
        from octavo.ops.kernels.rows import pass_rows

        weight, x_TH = _codes(up), x_TH.contiguous()
        xa_MR = None
        if up.lora is not None:
            xa_MR, _ = pass_rows(x_TH, offsets_E=routing.offsets_E, token_M=routing.token_M, factor=up.lora.A_ERK)
        if self._rounds("up"):
            # each token once, before the gather
            _, rounded = pass_rows(x_TH, group=min(weight.block[1], weight.in_features))
            assert rounded is not None
            rows = Rows(rounded.codes, routing.token_M, rounded.scales)
        else:
            rows = Rows(interleave(x_TH), routing.token_M)
        z_MG = x_TH.new_empty((routing.num_rows, weight.out_features))
        lora = None if up.lora is None else _step(xa_MR, up.lora.B_ENR)
        if isinstance(gate, SwiGlu):
            h_MI = x_TH.new_empty((routing.num_rows, weight.rows))
            self._product("up", rows, weight, routing, z_MG, lora, h=h_MI)
            return z_MG, h_MI, xa_MR
        self._product("up", rows, weight, routing, z_MG, lora)
        h_MI = self._gate(z_MG, gate)
        return z_MG, h_MI if self._rounds("down") else interleave(h_MI), xa_MR

    def down(self, h_MI: Tensor, p_TK: Tensor, routing: Routing, down: Projection) -> tuple[Tensor, Tensor | None]:
        if not self._takes(h_MI, down):
            return super().down(h_MI, p_TK, routing, down)
        from octavo.ops.hopper.interleave import interleave
        from octavo.ops.kernels.rows import combine, pass_rows

        weight, ha_MR = _codes(down), None
        if self._rounds("down"):
            group = min(weight.block[1], weight.in_features)
            factor = None if down.lora is None else down.lora.A_ERK
            ha_MR, rounded = pass_rows(h_MI, offsets_E=routing.offsets_E, factor=factor, group=group)
            assert rounded is not None
            rows = Rows(rounded.codes, None, rounded.scales)
        else:
            rows = Rows(h_MI)
            if down.lora is not None:
                # h is interleaved, so the factor must be
                ha_MR, _ = pass_rows(h_MI, offsets_E=routing.offsets_E, factor=interleave(down.lora.A_ERK))
        y_MH = h_MI.new_empty((routing.num_rows, weight.out_features))
        lora = None if down.lora is None else _step(ha_MR, down.lora.B_ENR)
        self._product("down", rows, weight, routing, y_MH, lora)
        return combine(y_MH, routing.row_TK, routing.offsets_E, p_TK.contiguous()), ha_MR

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
        if not self._takes(dy_TH, down):
            return super().down_backward(dy_TH, z_MG, ha_MR, p_M, routing, down, gate, wants)
        from octavo.ops.kernels.outer import outer
        from octavo.ops.kernels.rows import sum_parts

        weight, offsets_E = _codes(down), routing.offsets_E
        if p_M.dtype not in (torch.float32, torch.bfloat16):
            p_M = p_M.float()
        rows, yb_MR, lora_B = self._backward_rows(dy_TH, ha_MR, down, routing, wants, routing.token_M, p_M)
        lora = None if down.lora is None else _step(yb_MR, down.lora.A_ERK.transpose(1, 2))
        swiglu = isinstance(gate, SwiGlu)
        if swiglu:
            dz_MG = torch.empty_like(z_MG)
            parts = -(-weight.in_features // (FEATURES * _PRODUCTS))
            shares = dy_TH.new_empty((parts, routing.num_rows), dtype=torch.float32)
            self._product(
                "down_grad", rows, weight, routing, dz_MG, lora, gradient=GateGradient(z_MG, p_M.contiguous(), shares)
            )
            dp_M, rows_h = sum_parts(shares, offsets_E), z_MG
        else:
            dh_MI = dy_TH.new_empty((routing.num_rows, weight.in_features))
            self._product("down_grad", rows, weight, routing, dh_MI, lora)
            # rows past the last offset were never written, here nor in z
            live_M1 = torch.arange(routing.num_rows, device=dy_TH.device)[:, None] < offsets_E[-1]
            dh_MI, z_MG = torch.where(live_M1, dh_MI, 0), torch.where(live_M1, z_MG, 0)
            rows_h = self._gate(z_MG, gate)
            dp_M = (dh_MI.float() * rows_h.float()).sum(-1)
            dz_MG = gate.backward(z_MG, (dh_MI * p_M[:, None]).to(z_MG.dtype))
        lora_A = None
        if lora_B is not None and down.lora is not None:
            assert yb_MR is not None
            dtype = down.lora.A_ERK.dtype
            lora_A = outer(rows_h, yb_MR, offsets_E, rank_first=True, dtype=dtype, p_M=p_M, gated=swiglu)
        return dz_MG, dp_M, ProjectionGrads(None, None, lora_A, lora_B)

    def up_backward(
        self, dz_MG: Tensor, x_TH: Tensor, xa_MR: Tensor | None, routing: Routing, up: Projection, wants: Wants
    ) -> tuple[Tensor | None, ProjectionGrads]:
        if not self._takes(dz_MG, up):
            return super().up_backward(dz_MG, x_TH, xa_MR, routing, up, wants)
        from octavo.ops.kernels.outer import outer
        from octavo.ops.kernels.rows import combine

        weight, offsets_E = _codes(up), routing.offsets_E
        rows, yb_MR, lora_B = self._backward_rows(dz_MG, xa_MR, up, routing, wants, None, None)
        lora_A = dx_TH = None
        if lora_B is not None and up.lora is not None:
            assert yb_MR is not None
            dtype, x_TH = up.lora.A_ERK.dtype, x_TH.contiguous()
            lora_A = outer(x_TH, yb_MR, offsets_E, rank_first=True, dtype=dtype, token_M=routing.token_M)
        if wants.x:
            dx_MH = x_TH.new_empty((routing.num_rows, weight.in_features))
            lora = None if up.lora is None else _step(yb_MR, up.lora.A_ERK.transpose(1, 2))
            self._product("up_grad", rows, weight, routing, dx_MH, lora)
            dx_TH = combine(dx_MH, routing.row_TK, offsets_E, None)
        return dx_TH, ProjectionGrads(None, None, lora_A, lora_B)

    def _backward_rows(
        self,
        d: Tensor,
        xa_MR: Tensor | None,
        side: Projection,
        routing: Routing,
        wants: Wants,
        token_M: Tensor | None,
        p_M: Tensor | None,
    ) -> tuple[Rows, Tensor | None, Tensor | None]:
        """(the input gradient's rows, ``d·B`` [M, R], dB)."""
        from octavo.ops.kernels.lora_backward import lora_backward
        from octavo.ops.kernels.outer import outer

        d, offsets_E = d.contiguous(), routing.offsets_E
        if not self._rounds("up_grad") and wants.lora and side.lora is not None:
            assert xa_MR is not None
            yb_MR, lora_B = lora_backward(d, side.lora.B_ENR, xa_MR, offsets_E, token_M=token_M, p_M=p_M)
            return Rows(d, token_M), yb_MR, lora_B
        operand, yb_MR = self._incoming(d, side, routing, token_M)
        lora_B = None
        if wants.lora and side.lora is not None:
            assert xa_MR is not None
            dtype = side.lora.B_ENR.dtype
            lora_B = outer(d, xa_MR, offsets_E, rank_first=False, dtype=dtype, token_M=token_M, p_M=p_M)
        return Rows(operand.values, operand.token_M, operand.scales), yb_MR, lora_B

    def _product(
        self,
        site: Site,
        rows: Rows,
        weight: Float8Weight,
        routing: Routing,
        out: Tensor,
        lora: LoraStep | None,
        *,
        h: Tensor | None = None,
        gradient: GateGradient | None = None,
    ) -> None:
        slabs = rows.scales is not None and not folds_into_rows(weight)
        tokens = tokens_of_tile(routing.num_rows / weight.num_experts, most=128 if slabs else 160)
        product(
            rows, weight, routing.offsets_E, out, flip=site.endswith("grad"), lora=lora, h=h, gradient=gradient,
            tokens=tokens, products=_PRODUCTS,
        )  # fmt: skip


def tokens_of_tile(rows: float, most: int) -> int:
    """The tile that wastes least on experts of ``rows`` rows, give or take what random routing gives."""
    spread = math.sqrt(rows)

    def padded(tokens: int) -> float:
        return sum(-(-max(1.0, rows + by) // tokens) * tokens for by in (-spread, -0.5, 0.5, spread))

    # a wider tile reads and widens the weight less often, which is worth a little padding
    return min((tokens for tokens in (160, 128, 64) if tokens <= most), key=lambda n: padded(n) * (1 + 24 / n))


def _codes(side: Projection) -> Float8Weight:
    assert isinstance(side.weight, Float8Weight)
    return side.weight


def _step(xa_MR: Tensor | None, factor_EFR: Tensor) -> LoraStep:
    """LoRA's part of a product; ranks are padded to rows of 16 bytes."""
    assert xa_MR is not None
    factor = factor_EFR.to(torch.bfloat16)
    if short := -xa_MR.shape[1] % 8:
        xa_MR, factor = F.pad(xa_MR, (0, short)), F.pad(factor, (0, short))
    return LoraStep(xa_MR, factor.contiguous())
