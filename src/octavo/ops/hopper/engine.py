"""The stages of an expert MLP on the products of `product.cu`: engines ``fused`` and ``scaled`` on Hopper.

What lies between the products (sorting, LoRA's skinny products, rounding, combining) is that of
:class:`octavo.ops.fused.KernelEngine`, and so is every projection that the products do not take: one that is not
quantized, or has a bias. Legend: see there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.formats.weight import Float8Weight
from octavo.ops.dequant import CHUNK_BYTES
from octavo.ops.engines import Projection, ProjectionGrads, RowMaxima, Wants
from octavo.ops.fused import KernelEngine, Site, scale_of_features
from octavo.ops.gates import Gate, SwiGlu
from octavo.ops.hopper.compiler import COLUMN, GRADIENT, NONE, SLAB, STORE, SWIGLU, TABLE, Mode
from octavo.ops.hopper.product import (
    FEATURES,
    MAX_EXPERTS,
    RANKS,
    ROWS_UP,
    Bank,
    GateGradient,
    LoraStep,
    Rows,
    features_of_group,
    product,
    straddles,
)
from octavo.ops.reference import folds_into_rows
from octavo.ops.routing import Routing


@dataclass(frozen=True)
class HopperEngine(KernelEngine):
    """See the module's docstring."""

    def _takes(self, x: Tensor, side: Projection) -> bool:
        if not self._kernels(x, side) or not isinstance(side.weight, Float8Weight) or side.bias is not None:
            return False
        slabs = self._rounds("up", side) and not folds_into_rows(side.weight)
        return side.weight.num_experts <= MAX_EXPERTS and side.weight.rows % features_of_group(slabs) == 0

    def _reads_scales(self, side: Projection) -> bool:
        return self._way("up", side.weight) != "bank"

    def _rounds(self, site: Site, side: Projection) -> bool:
        return self._way(site, side.weight) == "scaled"

    def up(
        self, x_TH: Tensor, routing: Routing, up: Projection, gate: Gate, down: Projection
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        # the product's own h is for the other product, which may be Triton's
        fuses = isinstance(gate, SwiGlu) and self._takes(x_TH, down)
        if not self._takes(x_TH, up) or (not fuses and self._reads_scales(up) and straddles(_codes(up))):
            z_MG, h_MI, xa_MR = super().up(x_TH, routing, up, gate, down)
            return z_MG, self.arrange(h_MI, down), xa_MR
        from octavo.ops.kernels.interleave import interleave
        from octavo.ops.kernels.rows import pass_rows, round_rows

        weight, x_TH = _codes(up), x_TH.contiguous()
        xa_MR = None
        if up.lora is not None:
            xa_MR, _ = pass_rows(x_TH, offsets_E=routing.offsets_E, token_M=routing.token_M, factor=up.lora.A_ERK)
        if self._rounds("up", up):
            # each token once, before the gather
            rounded = round_rows(x_TH, min(weight.block[1], weight.in_features))
            rows = Rows(rounded.codes, routing.token_M, rounded.scales)
        else:
            rows = Rows(interleave(x_TH, ROWS_UP), routing.token_M)
        z_MG = x_TH.new_empty((routing.num_rows, weight.out_features))
        lora = None if up.lora is None else _step(xa_MR, up.lora.B_ENR)
        if fuses:
            h_MI = x_TH.new_empty((routing.num_rows, weight.rows))
            self._grouped("up", rows, weight, routing, z_MG, lora, h=h_MI)
            return z_MG, h_MI, xa_MR
        self._grouped("up", rows, weight, routing, z_MG, lora)
        return z_MG, self.arrange(self._gate(z_MG, gate), down), xa_MR

    def arrange(self, h_MI: Tensor, down: Projection) -> Tensor:
        """See :class:`octavo.ops.engines.Engine`: bfloat16 rows are interleaved."""
        if not self._takes(h_MI, down) or self._rounds("down", down):
            return h_MI
        from octavo.ops.kernels.interleave import interleave

        return interleave(h_MI, ROWS_UP)

    def down(self, h_MI: Tensor, p_TK: Tensor, routing: Routing, down: Projection) -> tuple[Tensor, Tensor | None]:
        if not self._takes(h_MI, down):
            return super().down(h_MI, p_TK, routing, down)
        from octavo.ops.kernels.interleave import interleave
        from octavo.ops.kernels.rows import combine, pass_rows, round_rows

        weight, ha_MR, rounded = _codes(down), None, None
        if self._rounds("down", down):
            group = min(weight.block[1], weight.in_features)
            if down.lora is not None:
                # with one scale a row, registers that hold rows until their maximum is known cost more than a read
                at_once = group < weight.in_features and self._rounds_with_lora(down, routing)
                ha_MR, rounded = pass_rows(
                    h_MI, offsets_E=routing.offsets_E, factor=down.lora.A_ERK, group=group if at_once else None
                )
            if rounded is None:
                rounded = round_rows(h_MI, group, offsets_E=routing.offsets_E)
            rows = Rows(rounded.codes, None, rounded.scales)
        else:
            rows = Rows(h_MI)
            if down.lora is not None:
                # h is interleaved and larger, so the factor is interleaved and smaller
                factor = interleave(down.lora.A_ERK, -ROWS_UP)
                ha_MR, _ = pass_rows(h_MI, offsets_E=routing.offsets_E, factor=factor)
        y_MH = h_MI.new_empty((routing.num_rows, weight.out_features))
        lora = None if down.lora is None else _step(ha_MR, down.lora.B_ENR)
        self._grouped("down", rows, weight, routing, y_MH, lora)
        return combine(y_MH, routing.row_TK, routing.offsets_E, p_TK.contiguous()), ha_MR

    def maxima(
        self, dy_TH: Tensor, routing: Routing, up: Projection, down: Projection, gate: Gate, wants: Wants
    ) -> RowMaxima | None:
        """See :class:`octavo.ops.engines.Engine`."""
        if not (isinstance(gate, SwiGlu) and self._takes(dy_TH, up) and self._takes(dy_TH, down)):
            return None
        if not self._rounds_with_lora(up, routing):
            return None
        if not all(self._rounds("down_grad", side) for side in (up, down)):
            return None
        # what is folded is read by a product whose own weight has scales on rows
        folds = folds_into_rows(_codes(up))
        if folds != folds_into_rows(_codes(down)):
            return None
        from octavo.ops.kernels.lora_backward import MOST_RANK

        if up.lora is None or not wants.lora or up.lora.B_ENR.shape[2] > MOST_RANK:
            return None
        shape = (_parts(_codes(down)), routing.num_rows)
        fold_EG = scale_of_features(_codes(up)).contiguous() if folds else None
        return RowMaxima(fold_EG, dy_TH.new_empty(shape, dtype=torch.float32))

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
        from octavo.ops.kernels.outer import sum_tiles
        from octavo.ops.kernels.rows import sum_parts

        weight, offsets_E = _codes(down), routing.offsets_E
        if p_M.dtype not in (torch.float32, torch.bfloat16):
            p_M = p_M.float()
        rows, yb_MR, lora_B = self._backward_rows(dy_TH, ha_MR, down, routing, wants, routing.token_M, p_M)
        lora = None if down.lora is None else _step(yb_MR, down.lora.A_ERK.transpose(1, 2))
        swiglu, lora_A, sums = isinstance(gate, SwiGlu), None, None
        if swiglu:
            if lora_B is not None and lora is not None:
                if lora.xa.shape[1] <= RANKS and self._way("down_grad", weight) != "bank":
                    tokens = self._tokens("down_grad", rows, weight, routing, gated=True)
                    tiles = -(-routing.num_rows // tokens) + weight.num_experts
                    sums = dy_TH.new_empty((tiles, weight.in_features, RANKS), dtype=torch.float32)
                else:
                    # before dz may take z's place
                    lora_A = self._lora_A(z_MG, yb_MR, down, routing, p_M, gated=True)
            dz_MG = z_MG if wants.spend else torch.empty_like(z_MG)
            shares = dy_TH.new_empty((_parts(weight), routing.num_rows), dtype=torch.float32)
            fold_EG, peaks = (None, None) if wants.maxima is None else (wants.maxima.fold_EG, wants.maxima.parts_PM)
            gradient = GateGradient(z_MG, p_M.contiguous(), shares, sums, fold_EG, peaks)
            self._grouped("down_grad", rows, weight, routing, dz_MG, lora, gradient=gradient)
            dp_M = sum_parts(shares, offsets_E)
            if sums is not None and down.lora is not None:
                lora_A = sum_tiles(sums, offsets_E, tokens, down.lora.A_ERK)
        else:
            dh_MI = dy_TH.new_empty((routing.num_rows, weight.in_features))
            self._grouped("down_grad", rows, weight, routing, dh_MI, lora)
            # rows past the last offset were never written, here nor in z
            live_M1 = torch.arange(routing.num_rows, device=dy_TH.device)[:, None] < offsets_E[-1]
            dh_MI, z_MG = torch.where(live_M1, dh_MI, 0), torch.where(live_M1, z_MG, 0)
            rows_h = self._gate(z_MG, gate)
            dp_M = (dh_MI.float() * rows_h.float()).sum(-1)
            dz_MG = gate.backward(z_MG, (dh_MI * p_M[:, None]).to(z_MG.dtype))
            if lora_B is not None:
                lora_A = self._lora_A(rows_h, yb_MR, down, routing, p_M, gated=False)
        return dz_MG, dp_M, ProjectionGrads(None, None, lora_A, lora_B)

    @staticmethod
    def _lora_A(
        h: Tensor, yb_MR: Tensor | None, down: Projection, routing: Routing, p_M: Tensor, *, gated: bool
    ) -> Tensor:
        """dA of the down projection from h, or from z with ``gated``."""
        from octavo.ops.kernels.outer import outer

        assert down.lora is not None
        assert yb_MR is not None
        dtype = down.lora.A_ERK.dtype
        return outer(h, yb_MR, routing.offsets_E, rank_first=True, dtype=dtype, p_M=p_M, gated=gated)

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
            shape = (routing.num_rows, weight.in_features)
            size = math.prod(shape)
            # once dz is rounded nobody reads it, and it is the largest thing of a layer
            free = wants.spend and rows.scales is not None and dz_MG.is_contiguous() and dz_MG.numel() >= size
            dx_MH = dz_MG.view(-1)[:size].view(shape) if free else x_TH.new_empty(shape)
            lora = None if up.lora is None else _step(yb_MR, up.lora.A_ERK.transpose(1, 2))
            self._grouped("up_grad", rows, weight, routing, dx_MH, lora)
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
        from octavo.ops.kernels.lora_backward import MOST_RANK, lora_backward
        from octavo.ops.kernels.outer import outer
        from octavo.ops.kernels.rows import pass_rows, round_rows

        d, offsets_E, weight = d.contiguous(), routing.offsets_E, _codes(side)
        yb_MR = lora_B = rounded = None
        folds, rounds = folds_into_rows(weight), self._rounds("up_grad", side)
        if side.lora is not None:
            factor = side.lora.B_ENR
            if wants.lora and factor.shape[2] <= MOST_RANK:
                assert xa_MR is not None
                # those in ``wants`` are of dz
                maxima = wants.maxima if token_M is None else None
                yb_MR, lora_B, rounded = lora_backward(
                    d, factor, xa_MR, offsets_E, token_M=token_M, p_M=p_M, maxima=maxima
                )
            else:
                yb_MR, _ = pass_rows(d, offsets_E=offsets_E, token_M=token_M, factor=factor, contract=1)
                if wants.lora:
                    assert xa_MR is not None
                    dtype = factor.dtype
                    lora_B = outer(d, xa_MR, offsets_E, rank_first=False, dtype=dtype, token_M=token_M, p_M=p_M)
        if not rounds:
            return Rows(d, token_M), yb_MR, lora_B
        if rounded is not None:
            return Rows(rounded.codes, None, rounded.scales), yb_MR, lora_B
        if folds:
            fold_EN = scale_of_features(weight)
            rounded = round_rows(d, weight.out_features, offsets_E=offsets_E, token_M=token_M, fold_EK=fold_EN)
            return Rows(rounded.codes, None, rounded.scales), yb_MR, lora_B
        # gathered tokens are rounded once each, not once for every expert; rows of the up product as they are
        rounded = round_rows(d, weight.out_features, offsets_E=None if token_M is not None else offsets_E)
        return Rows(rounded.codes, token_M, rounded.scales), yb_MR, lora_B

    def _grouped(
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
        flip = site.endswith("grad")
        tokens = self._tokens(site, rows, weight, routing, gated=gradient is not None)
        if self._way(site, weight) == "bank":
            for bank in self._banks(weight, routing, out):
                product(
                    rows, weight, routing.offsets_E, out, flip=flip, lora=lora, h=h, gradient=gradient, tokens=tokens,
                    bank=bank,
                )  # fmt: skip
            return
        product(
            rows, weight, routing.offsets_E, out, flip=flip, lora=lora, h=h, gradient=gradient, tokens=tokens,
        )  # fmt: skip

    def _tokens(self, site: Site, rows: Rows, weight: Float8Weight, routing: Routing, *, gated: bool) -> int:
        """Of a tile. ``gated``: of the gate's gradient."""
        bank, rounded, whole = self._way(site, weight) == "bank", rows.scales is not None, folds_into_rows(weight)
        sizes = tile_sizes(bank=bank, tokens_left=rounded and not whole and not site.endswith("grad"))
        # the fastest of the gate's gradients would have fewer of its steps beside each other
        saves = not bank and not (gated and rounded and whole)
        return tokens_of_tile(routing.num_rows / weight.num_experts, sizes, saves=saves)

    @staticmethod
    def _banks(weight: Float8Weight, routing: Routing, like: Tensor) -> Iterator[Bank]:
        """Chunks of dequantized experts, one after the other in one buffer."""
        from octavo.ops.kernels.weights import dequantize

        num_experts, shape = weight.num_experts, (weight.out_features, weight.in_features)
        chunks = -(-num_experts * 2 * math.prod(shape) // CHUNK_BYTES)
        size = -(-num_experts // chunks)
        values = like.new_empty((size, *shape))
        for first in range(0, num_experts, size):
            chunk = values[: min(size, num_experts - first)]
            dequantize(weight, routing.offsets_E, first, chunk, interleaved=True)
            yield Bank(chunk, first)


# How much longer a tile takes than its tokens say, against one of 128. Measured on an H200 with 128 to 2048 rows per
# expert, see docs/log.md.
_PRICE = {192: 1.0, 160: 1.08, 128: 1.0, 64: 1.3}
_SAVING = 0.95
"""Price of 160 tokens, for which a weight is read (and widened) once: at 2048 rows per expert, where that decides."""


def tile_sizes(*, bank: bool = False, tokens_left: bool = False) -> tuple[int, ...]:
    """Of which tokens there are tiles: registers hold the sums, and beside them words of the weight. ``tokens_left``:
    of E4M3 rows against blocks, not flipped, which come by 64.
    """
    if bank:
        return (192, 160, 128, 64)
    return (192, 128, 64) if tokens_left else (160, 128, 64)


def tokens_of_tile(rows: float, sizes: tuple[int, ...], *, saves: bool = False) -> int:
    """The cheapest tile for experts of ``rows`` rows, give or take what random routing gives. ``saves``: whether 160
    tokens have the price of :data:`_SAVING`.
    """
    spread = math.sqrt(rows)

    def price(tokens: int) -> float:
        padded = (-(-max(1.0, rows + by) // tokens) * tokens for by in (-spread, -0.5, 0.5, spread))
        return (_SAVING if saves and tokens == 160 else _PRICE[tokens]) * sum(padded)

    return min(sizes, key=price)


# by (bfloat16 rows, flip)
_SCALES = {
    (True, False): (COLUMN, TABLE),
    (True, True): (TABLE,),
    (False, False): (COLUMN, SLAB),
    (False, True): (NONE, SLAB),
}


def modes() -> Iterator[Mode]:
    """Every kind of product that the engine can ask for."""
    for (wide, flip), scales in _SCALES.items():
        for stage in (STORE, GRADIENT if flip else SWIGLU):
            for scale in scales:
                yield from (
                    Mode(wide, flip, scale, stage, tokens, outer=outer, peaks=peaks)
                    for tokens in tile_sizes(tokens_left=scale == SLAB and not flip)
                    for outer in {False, stage == GRADIENT}
                    for peaks in {False, stage == GRADIENT and not wide}
                )
            if wide:
                yield from (Mode(wide, flip, NONE, stage, tokens, bank=True) for tokens in tile_sizes(bank=True))


def _codes(side: Projection) -> Float8Weight:
    assert isinstance(side.weight, Float8Weight)
    return side.weight


def _parts(down: Float8Weight) -> int:
    """Of a row's sums in the gate's gradient: one of each consumer."""
    return 2 * -(-down.in_features // FEATURES)


def _step(xa_MR: Tensor | None, factor_EFR: Tensor) -> LoraStep:
    """LoRA's part of a product; ranks are padded to rows of 16 bytes."""
    assert xa_MR is not None
    factor = factor_EFR.to(torch.bfloat16)
    if short := -xa_MR.shape[1] % 8:
        xa_MR, factor = F.pad(xa_MR, (0, short)), F.pad(factor, (0, short))
    return LoraStep(xa_MR, factor.contiguous())
