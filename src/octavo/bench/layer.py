"""One MoE layer with LoRA on both projections, on random values: octavo's engines, the baselines, and float64.

Legend: ``T`` tokens, ``E`` experts, ``H`` hidden size, ``I`` expert intermediate size, ``R`` LoRA rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.bench.shapes import LayerShape
from octavo.formats.weight import Float8Weight, quantize
from octavo.ops.choice import Layer as Facts
from octavo.ops.choice import experts_layer
from octavo.ops.engines import Engine
from octavo.ops.experts import Side, expert_mlp
from octavo.ops.gates import SWIGLU
from octavo.ops.weights import WeightSpec, storage

Results = dict[str, Tensor]
# relative Frobenius error against float64, the worst of the output and each gradient: an ideal layer has 4.2e-3,
# 3.7e-2 and 4.6e-2, and a bf16 layer rounds every intermediate
TOLERANCE = {"exact": 5e-3, "fp8_grad": 4.5e-2, "fp8": 5.5e-2, "bf16": 1e-2}


@dataclass
class LayerCase:
    """Weights, inputs and the incoming gradient, drawn with ``seed``; activations and factors in bfloat16.

    ``blank``: of the same shapes but without values, to compile for, not to run.
    """

    shape: LayerShape
    tokens: int
    device: torch.device
    rank: int = 16
    seed: int = 0
    blank: bool = False
    inputs: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        generator = torch.Generator(self.device).manual_seed(self.seed)

        def draw(*sizes: int, scale: float = 1.0) -> Tensor:
            if self.blank:
                return torch.empty(*sizes, dtype=torch.bfloat16, device=self.device)
            values = torch.randn(*sizes, device=self.device, generator=generator)
            return (values * scale).to(torch.bfloat16)

        E, H, I = self.shape.experts, self.shape.hidden, self.shape.intermediate  # noqa: E741

        def weight(parts: int, rows: int, columns: int) -> Float8Weight:
            if not self.blank:
                return quantize(draw(E, parts * rows, columns, scale=0.02), self.shape.layout, parts=parts)
            block = self.shape.layout.block_of(rows, columns)
            codes = torch.empty((E, parts, rows, columns), dtype=torch.float8_e4m3fn, device=self.device)
            return Float8Weight(
                codes,
                codes.new_empty((E, parts, -(-rows // block[0]), -(-columns // block[1])), dtype=torch.float32),
                block,
            )

        self.up, self.down = weight(2, I, H), weight(1, H, I)
        self.inputs = {"x": draw(self.tokens, H), "p": draw(self.tokens, self.shape.top_k).abs()}
        if self.rank:
            self.inputs |= {
                "up_A": draw(E, self.rank, H, scale=0.02),
                "up_B": draw(E, 2 * I, self.rank, scale=0.02),
                "down_A": draw(E, self.rank, I, scale=0.02),
                "down_B": draw(E, H, self.rank, scale=0.02),
            }
        for tensor in self.inputs.values():
            tensor.requires_grad_()
        self.dy = draw(self.tokens, H)
        scores = torch.rand(self.tokens, E, device=self.device, generator=generator)
        self.index = scores.topk(self.shape.top_k, dim=1).indices

    @property
    def rows_per_expert(self) -> float:
        """On average."""
        return self.index.numel() / self.shape.experts

    @property
    def facts(self) -> Facts:
        """What a choice of engine depends on."""
        weights = tuple((side.spec, side.weight) for side in self.sides())
        return experts_layer(self.device, torch.bfloat16, weights, bias=False)

    def sides(self) -> tuple[Side, Side]:
        """Both projections as the operator takes them."""
        up, down = (self._side(name, weight) for name, weight in (("up", self.up), ("down", self.down)))
        return up, down

    def _side(self, name: str, weight: Float8Weight) -> Side:
        codes, scales = storage(weight)
        spec = WeightSpec(True, weight.parts, weight.block)
        factors = self.inputs.get(f"{name}_A"), self.inputs.get(f"{name}_B")
        return Side(spec, codes.view(torch.uint8), scales, None, *factors)

    def octavo(self, engine: Engine) -> Tensor:
        """The layer on ``engine``."""
        return expert_mlp(self.inputs["x"], self.index, self.inputs["p"], *self.sides(), SWIGLU, engine)

    def step(self, forward: Callable[[], Tensor], names: Sequence[str] | None = None) -> Results:
        """``y`` and the gradient ``d<input>`` of ``forward`` in each of ``names``, all inputs by default; with no name
        a forward without gradient.
        """
        names = list(self.inputs) if names is None else names
        with torch.set_grad_enabled(bool(names)):
            y = forward()
        grads = torch.autograd.grad(y, [self.inputs[name] for name in names], self.dy) if names else ()
        return {"y": y.detach()} | {f"d{name}": grad for name, grad in zip(names, grads, strict=True)}

    def exact(self) -> Results:
        """The same in float64, one expert at a time, differentiated by autograd through the dequantized weights."""
        wide = {name: tensor.detach().double().requires_grad_() for name, tensor in self.inputs.items()}
        y = torch.zeros(self.tokens, self.shape.hidden, dtype=torch.float64, device=self.device)
        for expert in range(self.shape.experts):
            tokens, slots = torch.where(self.index == expert)
            up, down = (self._effective(wide, name, expert) for name in ("up", "down"))
            g, u = (wide["x"][tokens] @ up.T).chunk(2, -1)
            y = y.index_add(0, tokens, (F.silu(g) * u) @ down.T * wide["p"][tokens, slots, None])
        grads = torch.autograd.grad(y, list(wide.values()), self.dy.double())
        return {"y": y.detach()} | {f"d{name}": grad for name, grad in zip(wide, grads, strict=True)}

    def _effective(self, wide: Results, name: str, expert: int) -> Tensor:
        weight = self.up if name == "up" else self.down
        dense = weight.expert(expert).dequantize()[0].double()
        return dense + wide[f"{name}_B"][expert] @ wide[f"{name}_A"][expert] if self.rank else dense


def errors(want: Results, got: Results) -> dict[str, float]:
    """Relative Frobenius error of everything in ``got``; infinite where something is not finite."""
    found = {}
    for name, value in got.items():
        error = ((value.double() - want[name]).norm() / want[name].norm()).item()
        found[name] = error if error == error else float("inf")
    return found


class _Bank(torch.autograd.Function):
    """A product with a stack that is dequantized whole, in forward and again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, offsets: Tensor, weight: Float8Weight, triton: bool) -> Tensor:
        ctx.save_for_backward(offsets)
        ctx.weight, ctx.triton = weight, triton
        return _grouped(x, _dequantized(weight, offsets, triton).transpose(-2, -1), offsets)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (offsets,) = ctx.saved_tensors
        return _grouped(dy.contiguous(), _dequantized(ctx.weight, offsets, ctx.triton), offsets), None, None, None


def _dequantized(weight: Float8Weight, offsets: Tensor, triton: bool) -> Tensor:
    if not triton:
        return weight.dequantize(torch.bfloat16)
    from octavo.ops.kernels.weights import dequantize

    bank = torch.empty(storage(weight)[0].shape, dtype=torch.bfloat16, device=offsets.device)
    dequantize(weight, offsets, 0, bank)
    return bank


def _grouped(x: Tensor, bank_EKN: Tensor, offsets: Tensor) -> Tensor:
    """``F.grouped_mm``; on the CPU one product for each expert."""
    if x.device.type == "cuda":
        return F.grouped_mm(x, bank_EKN, offs=offsets)
    ends = offsets.tolist()
    parts = [x[start:end] @ bank_EKN[e] for e, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True))]
    return torch.cat(parts)


def baseline(case: LayerCase, banks: tuple[Tensor, Tensor] | None, *, triton: bool = False) -> Tensor:
    """What a user has without octavo: grouped products with split LoRA, over bfloat16 ``banks``, or over stacks that
    are dequantized whole in each product (by one Triton pass, or by torch).
    """
    index, inputs, num_experts = case.index, case.inputs, case.shape.experts
    ids, order = torch.sort(index.reshape(-1))
    experts = torch.arange(num_experts, device=index.device)
    offsets = torch.searchsorted(ids, experts, right=True).to(torch.int32)

    def project(rows: Tensor, number: int, name: str, weight: Float8Weight) -> Tensor:
        if banks is None:
            y = cast(Tensor, _Bank.apply(rows, offsets, weight, triton))  # type: ignore[no-untyped-call]
        else:
            y = _grouped(rows, banks[number].transpose(-2, -1), offsets)
        if not case.rank:
            return y
        skinny = _grouped(rows, inputs[f"{name}_A"].transpose(-2, -1), offsets)
        return y + _grouped(skinny, inputs[f"{name}_B"].transpose(-2, -1), offsets)

    g, u = project(inputs["x"][order // case.shape.top_k], 0, "up", case.up).chunk(2, -1)
    y = project(F.silu(g) * u, 1, "down", case.down) * inputs["p"].reshape(-1)[order][:, None]
    back = torch.empty_like(order)
    back[order] = torch.arange(order.numel(), device=order.device)
    return y[back].view(case.tokens, case.shape.top_k, -1).sum(1)
