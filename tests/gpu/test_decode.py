"""Decoding: an expert MLP of few pairs against float64, from the routed experts alone."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from octavo.formats.scheme import ScaleLayout
from octavo.formats.weight import Float8Weight
from octavo.ops import decode, stages
from octavo.ops.choice import decode_limit, experts_layer, select
from octavo.ops.engines import ProductEngine
from octavo.ops.experts import expert_mlp
from octavo.ops.gates import SWIGLU, Gate, ModelGate
from octavo.ops.kernels.few import pairs
from octavo.ops.weights import WeightSpec
from tests.gpu.device import CUDA, DEVICE, DTYPE, needs_gpu, needs_kernels
from tests.gpu.test_linear import rounded
from tests.ops.cases import CHANNEL, TENSOR, Case, exact, random_index, relative_error

pytestmark = needs_kernels

# small in the interpreter; no multiple of a tile or of a block anywhere
HIDDEN, WIDTH = (272, 208) if CUDA else (80, 48)
LAYOUTS = [CHANNEL, TENSOR, *([ScaleLayout("block", (128, 128))] if CUDA else []), ScaleLayout("block", (32, 64))]
TOLERANCE = {"exact": 6e-3 if CUDA else 1e-5, "fp8": 6.5e-2}
SAME_CODES = 1e-2
OWN = ModelGate("own", lambda z: torch.nn.functional.silu(z.chunk(2, -1)[0]) * z.chunk(2, -1)[1])
INDEX = {
    "one token": torch.tensor([[4, 0]]),
    "two tokens share an expert": torch.tensor([[2, 3], [3, 1]]),
    "an expert twice": torch.tensor([[2, 2]]),
    "off-rank": torch.tensor([[0, 6], [9, -1], [7, 5]]),
    "no token": torch.empty(0, 2, dtype=torch.int64),
}


def moved(side: list[Tensor | None]) -> list[Tensor | None]:
    return [None if tensor is None else tensor.detach().to(DEVICE) for tensor in side]


def run(case: Case, numerics: str = "exact", gate: Gate = SWIGLU) -> Tensor:
    up, down = case.side("up", case.up), case.side("down", case.down)
    halves = (stages.projection(side.spec, moved(side.tensors)) for side in (up, down))
    x, p = (case.inputs[name].detach().to(DEVICE) for name in ("x", "p"))
    return decode.expert_mlp(x, case.index_TK.to(DEVICE), p, *halves, gate, numerics).cpu()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("index", INDEX.values(), ids=INDEX)
def test_exact(index: Tensor, layout: ScaleLayout) -> None:
    for bias, rank in ((False, None), (True, 5)):
        case = Case(index, DTYPE, layout, hidden=HIDDEN, intermediate=WIDTH, bias=bias, rank=rank)
        assert relative_error(exact(case)["y"], run(case)) < TOLERANCE["exact"], (bias, rank)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_rounded_rows(layout: ScaleLayout, weighted: bool) -> None:
    """The product of given codes: exact but for the output's rounding."""
    index = torch.tensor([[4, 0], [0, 6], [3, 1]])
    case = Case(index, torch.float32, layout, hidden=HIDDEN, intermediate=WIDTH)
    weight, num_rows = (case.down, 6) if weighted else (case.up, 3)
    x, p = torch.randn(num_rows, weight.in_features), case.inputs["p"].detach()
    codes, values = rounded(x, min(weight.block[1], weight.in_features))
    there = Float8Weight(weight.codes.to(DEVICE), weight.scales.to(DEVICE), weight.block)
    got = pairs(codes, index.to(DEVICE), there, DTYPE, p_TK=p.to(DEVICE) if weighted else None).cpu()
    dense = torch.cat([weight.dequantize().double(), torch.zeros(1, weight.out_features, weight.in_features)])
    rows = values if weighted else values.repeat_interleave(2, 0)
    want = torch.einsum("pk,pnk->pn", rows, dense[index.reshape(-1)])
    if weighted:
        want = (want.view(3, 2, -1) * p.double()[..., None]).sum(1)
    assert relative_error(want, got) < (3e-3 if CUDA else 1e-5)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_rounded_as_the_reference_rounds(layout: ScaleLayout) -> None:
    case = Case(random_index(3, 2, 6), DTYPE, layout, hidden=HIDDEN, intermediate=WIDTH, rank=5)
    got = run(case, "fp8")
    assert relative_error(exact(case)["y"], got) < TOLERANCE["fp8"]
    sides = case.side("up", case.up), case.side("down", case.down)
    engine = ProductEngine("reference", "fp8", wide=True)
    want = expert_mlp(case.inputs["x"], case.index_TK, case.inputs["p"], *sides, SWIGLU, engine)
    assert relative_error(want.detach(), got) < SAME_CODES


def test_a_models_own_gate() -> None:
    case = Case(random_index(3, 2, 6), DTYPE, CHANNEL, hidden=96, intermediate=80)
    assert relative_error(exact(case)["y"], run(case, gate=OWN)) < 2 * TOLERANCE["exact"]


@pytest.mark.parametrize("transposed", [False, True])
def test_plain_stacks(transposed: bool) -> None:
    """The unquantized layers of a mixed checkpoint."""
    case = Case(random_index(3, 2, 6), DTYPE, TENSOR, hidden=96, intermediate=80)
    halves = []
    for name, weight in (("up", case.up), ("down", case.down)):
        dense = weight.dequantize(DTYPE)
        side = replace(
            case.side(name, weight),
            spec=WeightSpec(False, weight.parts, transposed=transposed),
            weight=dense.transpose(1, 2).contiguous() if transposed else dense,
            scales=None,
        )
        halves.append(stages.projection(side.spec, moved(side.tensors)))
        stored = dense.float().view(weight.codes.shape)
        # the float64 maths of the test read these stored values
        setattr(case, name, _Plain(stored))
    x, p = (case.inputs[name].detach().to(DEVICE) for name in ("x", "p"))
    got = decode.expert_mlp(x, case.index_TK.to(DEVICE), p, *halves, SWIGLU, "exact").cpu()
    assert relative_error(exact(case)["y"], got) < TOLERANCE["exact"]


class _Plain:
    def __init__(self, stored: Tensor) -> None:
        self.stored = stored

    def dequantize(self) -> Tensor:
        return self.stored.flatten(1, 2)


class TestOnTheGpu:
    pytestmark = needs_gpu

    def test_a_forward_without_gradient_comes_here_and_can_be_captured(self) -> None:
        """Experts that nobody chose hold NaN: a byte of theirs in a sum would show."""
        experts, index = 128, torch.tensor([[5, 77, 3, 90, 12, 64, 8, 127]])
        case = Case(index, DTYPE, ScaleLayout("block", (128, 128)), experts, 256, 128, rank=16)
        x, p = (case.inputs[name].detach().to(DEVICE) for name in ("x", "p"))
        unused = torch.ones(experts, dtype=torch.bool)
        unused[index] = False
        sides = []
        for name, weight in (("up", case.up), ("down", case.down)):
            scales = weight.scales.clone()
            scales[unused] = float("nan")
            side = case.side(name, Float8Weight(weight.codes, scales, weight.block))
            sides.append(type(side)(side.spec, *moved(side.tensors)))
        layer = experts_layer(DEVICE, DTYPE, tuple((s.spec, s.weight) for s in sides), bias=False)
        assert decode_limit(DEVICE) * experts >= index.numel()
        engine = select("auto", "exact", layer, index.numel() / experts)
        there = index.to(DEVICE)
        with torch.no_grad():
            assert decode.applies(engine, x, there, experts)
            expert_mlp(x, there, p, *sides, SWIGLU, engine)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                got = expert_mlp(x, there, p, *sides, SWIGLU, engine)
            graph.replay()
            torch.cuda.synchronize()
        assert relative_error(exact(case)["y"], got.cpu()) < TOLERANCE["exact"]
