"""Linear layers on kernels against float64: each way to multiply, forward and input gradient, few rows and many."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from octavo.formats.scheme import ScaleLayout
from octavo.formats.weight import Float8Weight, quantize
from octavo.nn.settings import Settings
from octavo.ops import reference
from octavo.ops.capability import architecture_of
from octavo.ops.kernels.few import restore, rows_by_matrix
from octavo.ops.kernels.rows import Rounded
from octavo.ops.linear import float8_linear
from octavo.ops.matrix import MatrixEngine
from octavo.ops.weights import WeightSpec, storage
from tests.gpu.device import CUDA, DEVICE, DTYPE, needs_gpu, needs_kernels
from tests.ops.cases import relative_error

pytestmark = needs_kernels

# small in the interpreter; no multiple of a tile or of a block anywhere
FEATURES, COLUMNS, BLOCK = (208, 272, 128) if CUDA else (80, 112, 32)
LAYOUTS = [ScaleLayout("channel"), ScaleLayout("tensor"), ScaleLayout("block", (BLOCK, BLOCK))]
ROWS = (0, 1, 3, 16, 17, 40, 130) if CUDA else (0, 1, 17, 65)
# bfloat16: operands and output are rounded once each, and the bank's weights too; float32 in the interpreter
EXACT = 6e-3 if CUDA else 1e-5
# what rounding both operands to E4M3 costs, as in test_kernel_engines
ROUNDED = 4.5e-2
# against the reference's own rounding: the same codes but for ties, then bfloat16
SAME_CODES = 1e-2
MANY = 1 << 62


def weight_of(layout: ScaleLayout, rows: int = FEATURES, cols: int = COLUMNS) -> Float8Weight:
    generator = torch.Generator().manual_seed(rows + cols)
    values = torch.randn(rows, cols, generator=generator) * torch.rand(rows, 1, generator=generator).mul(4).exp()
    return quantize(values, layout)


def on_device(weight: Float8Weight) -> Float8Weight:
    return Float8Weight(weight.codes.view(torch.uint8).to(DEVICE), weight.scales.to(DEVICE), weight.block)


def product(engine: MatrixEngine, x: Tensor, weight: Float8Weight, transposed: bool) -> Tensor:
    return engine.linear(x.to(DEVICE), on_device(weight), transposed=transposed).cpu()


@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "input gradient"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("few", [MANY, 0], ids=["few", "bank"])
def test_exact(few: int, layout: ScaleLayout, transposed: bool) -> None:
    weight = weight_of(layout)
    dense = weight.dequantize()[0].double()
    engine = MatrixEngine("dequant", "exact", False, few, False)
    for rows in ROWS:
        x = torch.randn(rows, FEATURES if transposed else COLUMNS).to(DTYPE)
        want = x.double() @ (dense if transposed else dense.T)
        got = product(engine, x, weight, transposed)
        assert got.dtype == DTYPE
        assert relative_error(want, got) < EXACT, rows


def rounded(x: Tensor, group: int) -> tuple[Rounded, Tensor]:
    """Rows as E4M3 codes with scales, and the float64 values that these are."""
    groups = x.double().split(group, 1)
    scales = torch.stack([part.abs().amax(1) / 448 for part in groups], 1).float()
    codes = torch.cat([(part / scales[:, i, None]).to(torch.float8_e4m3fn) for i, part in enumerate(groups)], 1)
    values = codes.double() * scales.double().repeat_interleave(group, 1)[:, : x.shape[1]]
    return Rounded(codes.to(DEVICE), scales.to(DEVICE)), values


@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "input gradient"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_rounded_rows(layout: ScaleLayout, transposed: bool) -> None:
    """The product of given codes, whose own rounding is not in question here: exact but for the output's."""
    weight = weight_of(layout)
    dense = weight.dequantize()[0].double()
    whole = weight.block[1] >= COLUMNS
    group = FEATURES if transposed else COLUMNS if whole else weight.block[1]
    for rows in ROWS[1:]:
        x = torch.randn(rows, FEATURES if transposed else COLUMNS)
        codes, values = rounded(x, group)
        folded = whole and transposed
        right = weight.codes[0, 0].double() if folded else dense
        want = values @ (right if transposed else right.T)
        got = rows_by_matrix(codes, on_device(weight), DTYPE, transposed=transposed, folded=folded).cpu()
        assert relative_error(want, got) < (3e-3 if CUDA else 1e-5), rows
        back = restore(codes, group, DTYPE).cpu()
        assert relative_error(values, back) < (3e-3 if CUDA else 1e-6), rows


WAYS = {"few": (MANY, False), "bank": (0, False)}
WAYS |= {"scaled_mm": (0, True), "hopper": (0, False, True)} if CUDA else {}


@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "input gradient"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_rounded(way: str, layout: ScaleLayout, transposed: bool) -> None:
    """fp8: within what E4M3 costs of float64, and within bfloat16 of the reference, which rounds to the same codes."""
    if way == "scaled_mm" and architecture_of(DEVICE).scaled_mm.runs != "yes":
        pytest.skip(architecture_of(DEVICE).scaled_mm.why)
    weight = weight_of(layout)
    if way == "hopper":
        if architecture_of(DEVICE).name != "sm90":
            pytest.skip("it is built for Hopper")
        # of 32, and whole blocks: the last tile of features and of the contraction is not whole
        weight = weight_of(layout, 3 * BLOCK, 5 * BLOCK) if layout.kind == "block" else weight_of(layout, 224, 288)
    dense = weight.dequantize()[0].double()
    engine = MatrixEngine("scaled", "fp8", False, *WAYS[way])
    function = reference.product_transposed if transposed else reference.product
    for rows in ROWS[1:]:
        x = torch.randn(rows, weight.out_features if transposed else weight.in_features).to(DTYPE)
        got = product(engine, x, weight, transposed)
        # one row has too few terms for the mean error
        within = ROUNDED * (2 if rows == 1 else 1)
        assert relative_error(x.double() @ (dense if transposed else dense.T), got) < within, rows
        assert relative_error(function(x.float(), weight, 0, "fp8"), got) < SAME_CODES, rows


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_fp8_grad_leaves_the_forward_exact(layout: ScaleLayout) -> None:
    weight, x = weight_of(layout), torch.randn(40, COLUMNS).to(DTYPE)
    engine = MatrixEngine("scaled", "fp8_grad", False, 256, False)
    assert relative_error(x.double() @ weight.dequantize()[0].double().T, product(engine, x, weight, False)) < EXACT


@pytest.mark.parametrize("block", [(32, 64), (48, 20)], ids=str)
def test_other_blocks(block: tuple[int, int]) -> None:
    """Blocks cut off by both edges, and blocks that no step of the product divides."""
    weight = weight_of(ScaleLayout("block", block))
    dense = weight.dequantize()[0].double()
    engine = MatrixEngine("fused", "exact", False, MANY, False)
    for transposed in (False, True):
        x = torch.randn(20, FEATURES if transposed else COLUMNS).to(DTYPE)
        want = x.double() @ (dense if transposed else dense.T)
        assert relative_error(want, product(engine, x, weight, transposed)) < EXACT


def test_is_deterministic() -> None:
    weight, x = weight_of(LAYOUTS[2]), torch.randn(40, COLUMNS).to(DTYPE)
    for engine in (MatrixEngine("fused", "exact", False, MANY, False), MatrixEngine("scaled", "fp8", False, 0, False)):
        assert torch.equal(product(engine, x, weight, False), product(engine, x, weight, False))


@pytest.mark.parametrize("numerics", ["exact", "fp8_grad", "fp8"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("rows", [1, 40, 1000])
class TestOnTheGpu:
    pytestmark = needs_gpu

    def test_auto_chooses_and_captures(self, rows: int, layout: ScaleLayout, numerics: str) -> None:
        """Forward and gradient through the layer's own route, replayed from a CUDA graph: no host synchronisation."""
        weight = on_device(weight_of(layout, 576, 2048))
        codes, scales = (tensor[0] for tensor in storage(weight))
        spec = WeightSpec(True, 1, weight.block)
        x = torch.randn(rows, 2048, device=DEVICE, dtype=DTYPE, requires_grad=True)
        dy = torch.randn(rows, 576, device=DEVICE, dtype=DTYPE)

        def step() -> tuple[Tensor, Tensor]:
            y = float8_linear(x, codes, scales, spec, Settings(numerics).request)
            return y.detach(), torch.autograd.grad(y, x, dy)[0]

        dense = weight.dequantize()[0].double()
        wants = x.detach().double() @ dense.T, dy.double() @ dense
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = step()
        graph.replay()
        torch.cuda.synchronize()
        for want, found, codes in zip(wants, got, (numerics == "fp8", numerics != "exact"), strict=True):
            assert relative_error(want, found) < (2 * ROUNDED if codes else EXACT)
