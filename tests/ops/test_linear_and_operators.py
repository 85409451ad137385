"""The FP8 linear product, and what PyTorch asks of custom operators."""

import pytest
import torch

from octavo.errors import EngineError
from octavo.formats.weight import quantize
from octavo.ops import dequant, operators, reference
from octavo.ops.choice import select
from octavo.ops.gates import SWIGLU
from octavo.ops.linear import float8_linear
from octavo.ops.routing import combine, route
from octavo.ops.weights import WeightSpec, storage
from tests.ops.cases import BLOCK, LAYOUTS, TOLERANCE, Case, random_index, relative_error


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("engine", ["reference", "dequant"])
def test_linear_matches_float64(engine: str, layout: object, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = quantize(torch.randn(80, 100), layout)
    codes, scales = (tensor[0] for tensor in storage(weight))
    x = torch.randn(3, 7, 100, dtype=torch.float64).to(dtype).requires_grad_()
    dy = torch.randn(3, 7, 80, dtype=torch.float64).to(dtype)
    y = float8_linear(x, codes.view(torch.uint8), scales, WeightSpec(True, 1, weight.block), select(engine, "exact"))
    (dx,) = torch.autograd.grad(y, x, dy)
    dense = weight.dequantize()[0].double()
    assert y.shape == (3, 7, 80)
    assert y.dtype == dtype
    assert relative_error(x.detach().double() @ dense.T, y.detach()) < TOLERANCE[engine, dtype]
    assert relative_error(dy.double() @ dense, dx) < TOLERANCE[engine, dtype]


@pytest.mark.parametrize("engine", ["reference", "dequant"])
@pytest.mark.parametrize("rank", [3, None])
def test_operators_keep_their_contracts(engine: str, rank: int | None) -> None:
    """Schemas, fakes and their shapes and strides, as torch checks them."""
    case = Case(random_index(7, 2, 6), layout=BLOCK, rank=rank, bias=True)
    x, p = case.inputs["x"].detach(), case.inputs["p"].detach()
    up, down = case.side("up", case.up), case.side("down", case.down)
    sides = [None if t is None else t.detach() for t in (*up.tensors, *down.tensors)]
    specs = operators.flatten(up.spec) + operators.flatten(down.spec)
    how = (engine, "exact")
    check = torch.library.opcheck
    check(operators.mlp, (x, case.index_TK, p, sides, specs, "swiglu", *how))
    check(operators.mlp_inference, (x, case.index_TK, p, sides, specs, "swiglu", *how))
    _, z, xa, ha, *routing = operators.mlp(x, case.index_TK, p, sides, specs, "swiglu", *how)
    lora = rank is not None
    half = [False, False, True, lora, lora]
    check(operators.mlp_backward, (
        case.dy, x, p, [z, xa, ha], routing, sides, specs, [True, True, *half, *half], "swiglu", *how
    ))  # fmt: skip
    check(operators.up, (x, case.index_TK, sides, specs, *how))
    check(operators.up_backward, (z, x, xa, routing, sides, specs, [True, *half], *how))
    h = SWIGLU.forward(z)
    check(operators.down, (h, p, routing, sides, specs, *how))
    check(operators.down_backward, (case.dy, h, ha, p, routing, sides, specs, [True, True, *half], *how))
    flat = (down.weight[0], down.scales[0], list(down.spec.block))
    check(operators.linear, (h, *flat, False, *how))
    check(operators.linear, (case.dy, *flat, True, *how))


@pytest.mark.parametrize("engine", ["reference", "dequant"])
def test_rows_past_the_last_offset_are_zero(engine: str) -> None:
    weight = quantize(torch.randn(2, 10, 12), LAYOUTS[0])
    if engine == "dequant":
        y = dequant.grouped_product(torch.randn(5, 12), weight, [1, 3], transposed=False)
    else:
        y = reference.grouped_product(torch.randn(5, 12), weight, [1, 3], "exact")
    assert torch.equal(y[3:], torch.zeros(2, 10))
    assert bool((y[:3] != 0).all())


def test_routing_is_stable_and_complete() -> None:
    index = torch.tensor([[2, 0], [1, 2], [2, 5]])
    routing = route(index, 4)
    assert routing.offsets_E.tolist() == [1, 2, 5, 5]
    assert routing.offsets_E.dtype == torch.int32
    assert routing.token_M.tolist() == [0, 1, 0, 1, 2, 2]
    rows = torch.arange(6.0)[:, None]
    assert combine(rows, routing, None, torch.float32)[:, 0].tolist() == [2 + 0, 1 + 3, 4 + 5]


@pytest.mark.parametrize(
    ("engine", "numerics", "says"),
    [
        ("fused9", "exact", "engine 'fused9' does not exist; choose auto or one of reference, dequant, fused, scaled"),
        ("auto", "int4", "numerics 'int4' does not exist; choose one of exact, fp8_grad, fp8"),
        ("dequant", "fp8", "engine 'dequant' cannot compute numerics 'fp8'.*Usable: reference"),
        ("fused", "fp8", "engine 'fused' cannot compute numerics 'fp8'.*Usable: reference, scaled"),
        ("scaled", "exact", "engine 'scaled' cannot compute numerics 'exact'.*Usable: reference, dequant, fused"),
        ("fused", "exact", "engine 'fused' cannot run this layer: its kernels need a GPU. Choose engine 'auto'"),
    ],
)
def test_an_engine_that_cannot_run_says_why(engine: str, numerics: str, says: str) -> None:
    with pytest.raises(EngineError, match=says):
        select(engine, numerics)
