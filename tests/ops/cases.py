"""Expert-MLP cases for every engine, and the float64 maths that they are compared with."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.formats.scheme import ScaleLayout
from octavo.formats.weight import Float8Weight, quantize
from octavo.ops.engines import Engine
from octavo.ops.experts import Side, expert_mlp
from octavo.ops.gates import SWIGLU, Gate
from octavo.ops.kept import Activations
from octavo.ops.weights import WeightSpec, storage

CHANNEL = ScaleLayout("channel")
TENSOR = ScaleLayout("tensor")
# cuts rows and columns of every case below off in the middle of a block
BLOCK = ScaleLayout("block", (32, 64))
LAYOUTS = [CHANNEL, TENSOR, BLOCK]

# Relative Frobenius error against float64 on the same stored values. float64 and float32: rounding of sums of some
# hundred terms. bfloat16: an ideal layer with bf16 operands and stored intermediates has 3.8e-3 (output) and 4.2e-3
# (gradients); `dequant` also rounds each weight and each partial sum to bf16, as a bf16 model does.
TOLERANCE = {
    ("reference", torch.float64): 1e-13,
    ("reference", torch.float32): 2e-6,
    ("reference", torch.bfloat16): 6e-3,
    ("dequant", torch.float64): 1e-13,
    ("dequant", torch.float32): 2e-6,
    ("dequant", torch.bfloat16): 1e-2,
}


@dataclass
class Case:
    """Inputs of one expert MLP. ``dtype``: of activations, factors, biases and probabilities.

    ``plain``: the projections whose weights are not quantized, in ``dtype``; stored [E, in, out] when ``transposed``,
    and trained when ``full``.
    """

    index_TK: Tensor
    dtype: torch.dtype = torch.float32
    layout: ScaleLayout = CHANNEL
    num_experts: int = 6
    hidden: int = 96
    intermediate: int = 80
    rank: int | None = 4
    bias: bool = False
    seed: int = 0
    plain: tuple[str, ...] = ()
    transposed: bool = False
    full: bool = False
    inputs: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)

        def draw(*shape: int, scale: float = 0.1) -> Tensor:
            values = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
            return values.to(self.dtype).requires_grad_()

        E, H, width = self.num_experts, self.hidden, self.intermediate
        with torch.no_grad():
            outliers = torch.ones(H).masked_fill(torch.rand(H, generator=generator) < 0.05, 8.0)
            self.up: Float8Weight = quantize(draw(E, 2 * width, H).float() * outliers, self.layout, parts=2)
            self.down: Float8Weight = quantize(draw(E, H, width).float(), self.layout)
        tokens, top_k = self.index_TK.shape
        self.inputs = {"x": draw(tokens, H, scale=1.0), "p": draw(tokens, top_k, scale=1.0)}
        if self.rank:
            self.inputs |= {
                "up_A": draw(E, self.rank, H),
                "up_B": draw(E, 2 * width, self.rank),
                "down_A": draw(E, self.rank, width),
                "down_B": draw(E, H, self.rank),
            }
        if self.bias:
            self.inputs |= {"up_bias": draw(E, 2 * width), "down_bias": draw(E, H)}
        self.dy = draw(tokens, H, scale=1.0).detach()
        self.stacks: dict[str, Tensor] = {}
        for name in self.plain:
            dense = (self.up if name == "up" else self.down).dequantize().to(self.dtype)
            stored = dense.transpose(1, 2).contiguous() if self.transposed else dense
            if self.full:
                self.inputs[f"{name}_weight"] = stored.requires_grad_()
            else:
                self.stacks[f"{name}_weight"] = stored

    def side(self, name: str, weight: Float8Weight) -> Side:
        codes, scales = storage(weight)
        spec = WeightSpec(True, weight.parts, weight.block)
        bias, lora_A, lora_B = (self.inputs.get(f"{name}_{part}") for part in ("bias", "A", "B"))
        if name in self.plain:
            spec = WeightSpec(False, weight.parts, transposed=self.transposed)
            return Side(spec, (self.inputs | self.stacks)[f"{name}_weight"], None, bias, lora_A, lora_B)
        return Side(spec, codes.view(torch.uint8), scales, bias, lora_A, lora_B)


def run(case: Case, engine: Engine, gate: Gate = SWIGLU, activations: Activations = "bf16") -> dict[str, Tensor]:
    """The output ``y`` and each gradient ``d<input>`` of octavo's expert MLP."""
    x, p = case.inputs["x"], case.inputs["p"]
    up, down = case.side("up", case.up), case.side("down", case.down)
    y = expert_mlp(x, case.index_TK, p, up, down, gate, engine, activations)
    grads = torch.autograd.grad(y, list(case.inputs.values()), case.dy)
    return {"y": y.detach()} | {f"d{name}": grad for name, grad in zip(case.inputs, grads, strict=True)}


def exact(case: Case) -> dict[str, Tensor]:
    """The same in float64, one expert at a time, differentiated by autograd through the dequantized weights."""
    wide = {name: tensor.detach().to(torch.float64).requires_grad_() for name, tensor in case.inputs.items()}
    up, down = (_effective(case, wide, name, weight) for name, weight in (("up", case.up), ("down", case.down)))
    y = torch.zeros(wide["x"].shape, dtype=torch.float64)
    for expert in range(case.num_experts):
        tokens, slots = torch.where(case.index_TK == expert)
        z = wide["x"][tokens] @ up[expert].T
        if case.bias:
            z = z + wide["up_bias"][expert]
        g, u = z.chunk(2, -1)
        out = (F.silu(g) * u) @ down[expert].T
        if case.bias:
            out = out + wide["down_bias"][expert]
        y = y.index_add(0, tokens, out * wide["p"][tokens, slots, None])
    grads = torch.autograd.grad(y, list(wide.values()), case.dy.to(torch.float64), allow_unused=True)
    zeros = [
        torch.zeros_like(tensor) if grad is None else grad for grad, tensor in zip(grads, wide.values(), strict=True)
    ]
    return {"y": y.detach()} | {f"d{name}": grad for name, grad in zip(wide, zeros, strict=True)}


def _effective(case: Case, wide: dict[str, Tensor], name: str, weight: Float8Weight) -> Tensor:
    dense = weight.dequantize()
    if name in case.plain:
        dense = (case.stacks | wide)[f"{name}_weight"]
        dense = dense.transpose(1, 2) if case.transposed else dense
    dense = dense.to(torch.float64)
    if f"{name}_A" in wide:
        dense = dense + wide[f"{name}_B"] @ wide[f"{name}_A"]
    return dense


def relative_error(want: Tensor, got: Tensor) -> float:
    """``‖got − want‖ / ‖want‖``; infinite for anything that is not finite, absolute where ``want`` is zero."""
    if not bool(torch.isfinite(got).all()):
        return float("inf")
    want = want.to(torch.float64)
    norm = want.norm().item()
    return (got.to(torch.float64) - want).norm().item() / (norm or 1.0)


def assert_close(want: dict[str, Tensor], got: dict[str, Tensor], tolerance: float) -> None:
    errors = {name: relative_error(want[name], got[name]) for name in want}
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}
    assert not wrong, f"relative errors above {tolerance}: {wrong}"


def random_index(tokens: int, top_k: int, num_experts: int, seed: int = 0) -> Tensor:
    """Distinct experts per token; the last expert never chosen."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(num_experts - 1, generator=generator)[:top_k] for _ in range(tokens)]
    return torch.stack(rows) if rows else torch.empty(0, top_k, dtype=torch.int64)
