"""The FP8 linear product, and the operators' contracts with torch.library."""

import pytest
import torch

from octavo.errors import EngineError
from octavo.formats.weight import quantize
from octavo.ops import operators
from octavo.ops.engines import select
from octavo.ops.linear import float8_linear
from octavo.ops.routing import combine, route
from octavo.ops.weights import WeightSpec, storage
from tests.ops.cases import LAYOUTS, TOLERANCE, relative_error


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


def test_operators_keep_their_contracts() -> None:
    weight = quantize(torch.randn(3, 10, 12), LAYOUTS[2])
    codes, scales = storage(weight)
    codes = codes.view(torch.uint8)
    offsets = torch.tensor([2, 2, 5], dtype=torch.int32)
    x, dy = torch.randn(6, 12), torch.randn(6, 10)
    for engine in ("reference", "dequant"):
        static = (1, list(weight.block), False)
        torch.library.opcheck(operators.grouped_product, (x, codes, scales, offsets, *static, False, engine, "exact"))
        torch.library.opcheck(operators.grouped_product, (dy, codes, scales, offsets, *static, True, engine, "exact"))
        flat = (codes[0], scales[0], list(weight.block))
        torch.library.opcheck(operators.product, (x, *flat, False, engine, "exact"))
        torch.library.opcheck(operators.product, (dy, *flat, True, engine, "exact"))
    torch.library.opcheck(operators.grouped_outer, (dy, x, offsets))


def test_rows_past_the_last_offset_are_zero() -> None:
    weight = quantize(torch.randn(2, 10, 12), LAYOUTS[0])
    offsets = torch.tensor([1, 3], dtype=torch.int32)
    for engine in ("reference", "dequant"):
        y = operators.grouped_product(
            torch.randn(5, 12), *storage(weight), offsets, 1, [1, 12], False, False, engine, "exact"
        )
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
        ("fused9", "exact", "engine 'fused9' does not exist; choose auto or one of reference, dequant"),
        ("auto", "int4", "numerics 'int4' does not exist; choose one of exact, fp8_grad, fp8"),
        ("dequant", "fp8", "engine 'dequant' cannot compute numerics 'fp8'.*Usable: reference"),
    ],
)
def test_an_engine_that_cannot_run_says_why(engine: str, numerics: str, says: str) -> None:
    with pytest.raises(EngineError, match=says):
        select(engine, numerics)
