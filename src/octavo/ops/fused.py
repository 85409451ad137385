"""The stages of an expert MLP on Triton kernels: gather in the loads, LoRA in the accumulator, the gate in the
epilogue.

One engine, three ways to multiply, chosen per product:

``bank``    a chunk of experts is dequantized into one reusable bfloat16 buffer (at most :data:`CHUNK_BYTES`), then
            multiplied; the range of experts is applied on the device. A stack that is not quantized is such a buffer
            as it is stored, either way round, and is multiplied whole, by any engine in any numerics.
``codes``   E4M3 tiles are widened inside the product (W8A16).
``scaled``  E4M3 by E4M3 on the FP8 tensor cores (W8A8), the numerics ``fp8`` and ``fp8_grad``.

Biases are added in the products. No stage asks the device for a value, so a layer can be captured in a CUDA graph
(but for the gradient of an unquantized weight itself, which :class:`ProductEngine` computes); every sum has a fixed
order.

Legend: ``T`` tokens, ``M`` rows sorted by expert, ``H`` hidden, ``G`` width of the up product (2I with SwiGLU), ``I``
expert intermediate size, ``R`` LoRA rank, ``E`` experts.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from octavo.errors import EngineError
from octavo.formats.weight import Float8Weight
from octavo.ops.dequant import CHUNK_BYTES
from octavo.ops.engines import ProductEngine, Projection, ProjectionGrads, Wants
from octavo.ops.gates import Gate, SwiGlu
from octavo.ops.reference import folds_into_rows
from octavo.ops.routing import Routing
from octavo.ops.weights import DenseWeight, Weight, storage

if TYPE_CHECKING:
    from octavo.ops.kernels.product import Gradient, Lora, Operand, Stack
    from octavo.ops.kernels.rows import Rounded

Way = Literal["bank", "codes", "scaled"]
ROUNDED_WITH_LORA = 193
"""Rows per expert from which one pass both rounds rows and multiplies them by LoRA's factors: of a layer's time in fp8
it saves 1 % at 512 rows and at 2048, and costs 1 to 2 % at 128 (one H200, docs/log.md).
"""

Site = Literal["up", "down", "down_grad", "up_grad"]


@cache
def triton_missing() -> str | None:
    """Why Triton kernels cannot be used in this process, or ``None``."""
    return None if importlib.util.find_spec("triton") else "triton is not installed"


def _runs_on(device: torch.device) -> bool:
    from octavo.ops.kernels.common import INTERPRETED

    return device.type == "cuda" or INTERPRETED


def unsupported(x: Tensor, *sides: Projection) -> str | None:
    """Why the kernels cannot compute these operands, or ``None``."""
    if reason := triton_missing():
        return reason
    from octavo.ops.kernels.common import INTERPRETED

    if not _runs_on(x.device):
        return f"its kernels need a CUDA device and the activations are on {x.device.type}"
    # the interpreter's own rounding to bfloat16 truncates, so it is given float32
    if x.dtype != (torch.float32 if INTERPRETED else torch.bfloat16):
        return f"its kernels take bfloat16 activations, not {x.dtype}"
    for side in sides:
        if isinstance(side.weight, DenseWeight) and (reason := _why_not_stored(side.weight.weight_ENK, x.dtype)):
            return reason
        if side.weight.in_features % 16 or side.weight.out_features % 16:
            shape = [side.weight.out_features, side.weight.in_features]
            return f"rows of 16 bytes are needed, and the weight is {shape}"
    return None


def _why_not_stored(weight_ENK: Tensor, dtype: torch.dtype) -> str | None:
    """Why a plain stack cannot be multiplied where it lies, or ``None``."""
    if weight_ENK.dtype != dtype:
        return f"its kernels take unquantized weights in {dtype} as the activations, and these are {weight_ENK.dtype}"
    stored = _stored(weight_ENK)[0]
    size = weight_ENK.element_size()
    if stored.stride(2) != 1 or any(stride * size % 16 for stride in stored.stride()[:2]) or stored.data_ptr() % 16:
        return f"its kernels need contiguous rows at multiples of 16 bytes, and the strides are {weight_ENK.stride()}"
    return None


def _stored(weight_ENK: Tensor) -> tuple[Tensor, bool]:
    """A plain stack as it is stored, with contiguous rows, and whether it is [E, in, out]."""
    transposed = weight_ENK.stride(2) != 1
    return (weight_ENK.transpose(1, 2) if transposed else weight_ENK), transposed


@dataclass(frozen=True)
class KernelEngine(ProductEngine):
    """See the module's docstring. ``dequant`` computes what its kernels do not take through :class:`ProductEngine`,
    which dequantizes in chunks as well; ``fused`` and ``scaled`` raise.
    """

    def _kernels(self, x: Tensor, *sides: Projection) -> bool:
        reason = unsupported(x, *sides)
        if reason and self.name != "dequant":
            raise EngineError(f"engine {self.name!r} cannot run this layer: {reason}. Choose engine 'auto'.")
        return reason is None

    def route(self, index_TK: Tensor, num_experts: int) -> Routing:
        if triton_missing() or not _runs_on(index_TK.device):
            return super().route(index_TK, num_experts)
        from octavo.ops.kernels.sort import sort_pairs

        return Routing(*sort_pairs(index_TK, num_experts))

    def _way(self, site: Site, weight: Weight) -> Way:
        if isinstance(weight, DenseWeight):
            return "bank"
        rounded = self.numerics == "fp8" or (self.numerics == "fp8_grad" and site.endswith("grad"))
        if rounded:
            return "scaled"
        return "bank" if self.name == "dequant" else "codes"

    def up(
        self, x_TH: Tensor, routing: Routing, up: Projection, gate: Gate, down: Projection
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        if not self._kernels(x_TH, up):
            return super().up(x_TH, routing, up, gate, down)
        from octavo.ops.kernels.product import Operand
        from octavo.ops.kernels.rows import pass_rows

        weight, x_TH = up.weight, x_TH.contiguous()
        xa_MR = _skinny(x_TH, up, routing, routing.token_M)
        z_MG = x_TH.new_empty((routing.num_rows, weight.out_features))
        operand = Operand(x_TH, routing.token_M)
        if self._way("up", weight) == "scaled":
            # each token once, before the gather
            _, rounded = pass_rows(x_TH, group=min(_codes(up).block[1], weight.in_features))
            operand = _rounded(rounded, routing.token_M)
        lora = _lora(xa_MR, up, transposed=False)
        if isinstance(gate, SwiGlu):
            h_MI = x_TH.new_empty((routing.num_rows, weight.out_features // 2))
            self._multiply("up", operand, up, routing, z_MG, lora, h=h_MI)
        else:
            self._multiply("down", operand, up, routing, z_MG, lora)
            h_MI = self._gate(z_MG, gate)
        return z_MG, h_MI, xa_MR

    def down(self, h_MI: Tensor, p_TK: Tensor, routing: Routing, down: Projection) -> tuple[Tensor, Tensor | None]:
        if not self._kernels(h_MI, down):
            return super().down(h_MI, p_TK, routing, down)
        from octavo.ops.kernels.product import Operand
        from octavo.ops.kernels.rows import combine, pass_rows

        weight = down.weight
        if self._way("down", weight) == "scaled":
            group = min(_codes(down).block[1], weight.in_features)
            factor = None if down.lora is None else down.lora.A_ERK
            ha_MR, rounded = pass_rows(h_MI, offsets_E=routing.offsets_E, factor=factor, group=group)
            operand = _rounded(rounded, None)
        else:
            ha_MR = _skinny(h_MI, down, routing, None)
            operand = Operand(h_MI)
        y_MH = h_MI.new_empty((routing.num_rows, weight.out_features))
        self._multiply("down", operand, down, routing, y_MH, _lora(ha_MR, down, transposed=False))
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
        if wants.weight or not self._kernels(dy_TH, down):
            # z may be from a kernel
            return super().down_backward(dy_TH, _live(z_MG, routing), ha_MR, p_M, routing, down, gate, wants)
        from octavo.ops.kernels.outer import outer
        from octavo.ops.kernels.product import Gradient
        from octavo.ops.kernels.rows import sum_parts

        weight, offsets_E = down.weight, routing.offsets_E
        trained_MR = ha_MR if wants.lora else None
        operand, yb_MR, lora_B = self._incoming(dy_TH, down, routing, routing.token_M, trained_MR, p_M)
        lora = _lora(yb_MR, down, transposed=True)
        swiglu = isinstance(gate, SwiGlu)
        if swiglu:
            dz_MG = torch.empty_like(z_MG)
            columns = self._tiles("down_grad", weight, routing).columns
            shares = dy_TH.new_empty((-(-weight.in_features // columns), routing.num_rows), dtype=torch.float32)
            self._multiply("down_grad", operand, down, routing, dz_MG, lora, gradient=Gradient(z_MG, p_M, shares))
            dp_M, rows_h = sum_parts(shares, offsets_E), z_MG
        else:
            dh_MI = dy_TH.new_empty((routing.num_rows, weight.in_features))
            self._multiply("up_grad", operand, down, routing, dh_MI, lora)
            dh_MI, z_MG = _live(dh_MI, routing), _live(z_MG, routing)
            rows_h = self._gate(z_MG, gate)
            dp_M = (dh_MI.float() * rows_h.float()).sum(-1)
            dz_MG = gate.backward(z_MG, (dh_MI * p_M[:, None]).to(z_MG.dtype))
        lora_A = None
        if wants.lora and down.lora is not None:
            assert yb_MR is not None
            A = down.lora.A_ERK.dtype
            lora_A = outer(rows_h, yb_MR, offsets_E, rank_first=True, dtype=A, p_M=p_M, gated=swiglu)
        bias = self._through_bias(dp_M, dy_TH, p_M, routing, down, wants)
        return dz_MG, dp_M, ProjectionGrads(None, bias, lora_A, lora_B)

    @staticmethod
    def _through_bias(
        dp_M: Tensor, dy_TH: Tensor, p_M: Tensor, routing: Routing, down: Projection, wants: Wants
    ) -> Tensor | None:
        """Add ``<dy, b>`` to ``dp_M`` in place; the gradient of the down projection's bias."""
        from octavo.ops.kernels.biases import add_dots

        if down.bias is None:
            return None
        add_dots(dp_M, dy_TH, down.bias.contiguous(), routing.offsets_E, routing.token_M)
        return _bias_gradient(dy_TH, routing, down, routing.token_M, p_M) if wants.bias else None

    def up_backward(
        self, dz_MG: Tensor, x_TH: Tensor, xa_MR: Tensor | None, routing: Routing, up: Projection, wants: Wants
    ) -> tuple[Tensor | None, ProjectionGrads]:
        if wants.weight or not self._kernels(dz_MG, up):
            return super().up_backward(dz_MG, x_TH, xa_MR, routing, up, wants)
        from octavo.ops.kernels.outer import outer
        from octavo.ops.kernels.rows import combine

        weight, offsets_E = up.weight, routing.offsets_E
        operand, yb_MR, lora_B = self._incoming(dz_MG, up, routing, None, xa_MR if wants.lora else None, None)
        lora_A = dx_TH = None
        if wants.lora and up.lora is not None:
            assert yb_MR is not None
            x_TH, A = x_TH.contiguous(), up.lora.A_ERK.dtype
            lora_A = outer(x_TH, yb_MR, offsets_E, rank_first=True, dtype=A, token_M=routing.token_M)
        if wants.x:
            dx_MH = x_TH.new_empty((routing.num_rows, weight.in_features))
            self._multiply("up_grad", operand, up, routing, dx_MH, _lora(yb_MR, up, transposed=True))
            dx_TH = combine(dx_MH, routing.row_TK, offsets_E, None)
        bias = _bias_gradient(dz_MG, routing, up, None, None) if wants.bias else None
        return dx_TH, ProjectionGrads(None, bias, lora_A, lora_B)

    def _incoming(
        self,
        dy: Tensor,
        side: Projection,
        routing: Routing,
        token_M: Tensor | None,
        xa_MR: Tensor | None,
        p_M: Tensor | None,
    ) -> tuple[Operand, Tensor | None, Tensor | None]:
        """The input gradient's operand (rounded where the numerics say), ``dy·B`` [M, R], and with ``xa_MR`` the
        gradient of B, its rows weighted by ``p_M``.
        """
        from octavo.ops.kernels.lora_backward import MOST_RANK, lora_backward
        from octavo.ops.kernels.outer import outer
        from octavo.ops.kernels.product import Operand

        factor, offsets_E = None if side.lora is None else side.lora.B_ENR, routing.offsets_E
        if factor is None or xa_MR is None:
            return *self._rounded_incoming(dy, side, routing, token_M), None
        if self._way("up_grad", side.weight) != "scaled" and factor.shape[2] <= MOST_RANK:
            yb_MR, lora_B, _ = lora_backward(dy, factor, xa_MR, offsets_E, token_M=token_M, p_M=p_M)
            return Operand(dy, token_M), yb_MR, lora_B
        lora_B = outer(dy, xa_MR, offsets_E, rank_first=False, dtype=factor.dtype, token_M=token_M, p_M=p_M)
        return *self._rounded_incoming(dy, side, routing, token_M), lora_B

    @staticmethod
    def _rounds_with_lora(side: Projection, routing: Routing) -> bool:
        return routing.num_rows >= ROUNDED_WITH_LORA * side.weight.num_experts

    def _rounded_incoming(
        self, dy: Tensor, side: Projection, routing: Routing, token_M: Tensor | None
    ) -> tuple[Operand, Tensor | None]:
        from octavo.ops.kernels.product import Operand
        from octavo.ops.kernels.rows import pass_rows

        factor = None if side.lora is None else side.lora.B_ENR
        if self._way("up_grad", side.weight) != "scaled":
            yb_MR = None
            if factor is not None:
                yb_MR, _ = pass_rows(dy, offsets_E=routing.offsets_E, token_M=token_M, factor=factor, contract=1)
            return Operand(dy, token_M), yb_MR
        weight = _codes(side)
        group = weight.out_features
        if folds_into_rows(weight):
            yb_MR, rounded = pass_rows(
                dy, offsets_E=routing.offsets_E, token_M=token_M, factor=factor, contract=1,
                fold_EK=scale_of_features(weight), group=group,
            )  # fmt: skip
            return _rounded(rounded, None), yb_MR
        # nothing is folded: gathered tokens are rounded once each, not once for every expert
        if token_M is None or factor is None:
            yb_MR, rounded = pass_rows(dy, offsets_E=routing.offsets_E, factor=factor, contract=1, group=group)
            return _rounded(rounded, token_M), yb_MR
        yb_MR, _ = pass_rows(dy, offsets_E=routing.offsets_E, token_M=token_M, factor=factor, contract=1)
        _, rounded = pass_rows(dy, group=group)
        return _rounded(rounded, token_M), yb_MR

    def _tiles(self, site: Site, weight: Weight, routing: Routing):  # type: ignore[no-untyped-def]
        from octavo.ops.kernels.tiles import tiles_for

        way = self._way(site, weight)
        step = None
        if way == "scaled" and isinstance(weight, Float8Weight) and not folds_into_rows(weight):
            step = weight.block[0] if site.endswith("grad") else weight.block[1]
        return tiles_for(f"{way}.{site}", -(-routing.num_rows // weight.num_experts), step)

    def _multiply(
        self,
        site: Site,
        operand: Operand,
        side: Projection,
        routing: Routing,
        out: Tensor,
        lora: Lora | None,
        *,
        h: Tensor | None = None,
        gradient: Gradient | None = None,
    ) -> None:
        from octavo.ops.kernels import product as kernel
        from octavo.ops.kernels import weights

        tiles, offsets_E = self._tiles(site, side.weight, routing), routing.offsets_E
        flip = site.endswith("grad")
        bias_EN = None if flip or side.bias is None else side.bias.contiguous()

        def multiply(stack: Stack, scales: int = kernel.NONE.value) -> None:
            kernel.product(
                operand, stack, offsets_E, out, tiles, scales=scales, lora=lora, bias_EN=bias_EN, h=h,
                gradient=gradient,
            )  # fmt: skip

        if isinstance(side.weight, DenseWeight):
            values, transposed = _stored(side.weight.weight_ENK)
            multiply(kernel.Stack(values, side.weight, 0, side.weight.num_experts, flip=flip != transposed))
            return
        weight, way, num_experts = side.weight, self._way(site, side.weight), side.weight.num_experts
        if way == "bank":
            expert_bytes = 2 * weight.out_features * weight.in_features
            chunks = -(-num_experts * expert_bytes // CHUNK_BYTES)
            chunk = -(-num_experts // chunks)
            bank = out.new_empty((chunk, weight.out_features, weight.in_features))
            for first in range(0, num_experts, chunk):
                last = min(first + chunk, num_experts)
                weights.dequantize(weight, offsets_E, first, bank[: last - first])
                multiply(kernel.Stack(bank[: last - first], weight, first, last, flip=flip))
            return
        codes = storage(weight)[0].view(torch.float8_e4m3fn)
        channel = folds_into_rows(weight)
        if way == "codes":
            scales = kernel.COLUMN.value if channel and not flip else kernel.TILE.value
            multiply(kernel.Stack(codes, weight, 0, num_experts, flip=flip, widen=True), scales)
            return
        if flip:
            turned = torch.empty(
                (num_experts, weight.in_features, weight.out_features), dtype=codes.dtype, device=codes.device
            )
            weights.transpose(weight, offsets_E, turned)
            codes = turned
        scales = kernel.SLAB.value if not channel else kernel.NONE.value if flip else kernel.COLUMN.value
        multiply(kernel.Stack(codes, weight, 0, num_experts, turned=flip), scales)


def _codes(side: Projection) -> Float8Weight:
    assert isinstance(side.weight, Float8Weight)
    return side.weight


def _live(rows_M: Tensor, routing: Routing) -> Tensor:
    """The rows with zeros past the last offset, where no kernel has written."""
    live_M1 = torch.arange(routing.num_rows, device=rows_M.device)[:, None] < routing.offsets_E[-1]
    return torch.where(live_M1, rows_M, 0)


def _bias_gradient(
    d: Tensor, routing: Routing, side: Projection, token_M: Tensor | None, p_M: Tensor | None
) -> Tensor | None:
    """``Σ_m (p_m) d_m`` per expert, [E, N] in the dtype of the bias."""
    from octavo.ops.kernels.outer import outer

    if side.bias is None:
        return None
    ones_M1 = d.new_ones((routing.num_rows, 1))
    dtype = side.bias.dtype
    return outer(d, ones_M1, routing.offsets_E, rank_first=False, dtype=dtype, token_M=token_M, p_M=p_M)[..., 0]


def _rounded(rounded: Rounded | None, token_M: Tensor | None) -> Operand:
    from octavo.ops.kernels.product import Operand

    assert rounded is not None
    return Operand(rounded.codes, token_M, rounded.scales)


def _skinny(x: Tensor, side: Projection, routing: Routing, token_M: Tensor | None) -> Tensor | None:
    """``x·Aᵀ`` of the rows, [M, R]."""
    from octavo.ops.kernels.rows import pass_rows

    if side.lora is None:
        return None
    return pass_rows(x, offsets_E=routing.offsets_E, token_M=token_M, factor=side.lora.A_ERK)[0]


def _lora(xa_MR: Tensor | None, side: Projection, *, transposed: bool) -> Lora | None:
    from octavo.ops.kernels.product import Lora

    if xa_MR is None or side.lora is None:
        return None
    return Lora(xa_MR, side.lora.A_ERK, 1) if transposed else Lora(xa_MR, side.lora.B_ENR, 2)


def scale_of_features(weight: Float8Weight) -> Tensor:
    """The scale of each output feature, float32 [E, N], of a weight whose scales cover whole rows."""
    grid = weight.scales[..., 0]
    if weight.block[0] > 1:
        grid = grid.repeat_interleave(weight.block[0], 2)[:, :, : weight.rows]
    return grid.reshape(weight.num_experts, weight.out_features)
