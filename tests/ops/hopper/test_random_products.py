"""Products of random widths, rows, ranks, scale layouts and tiles: what nobody thought of."""

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from octavo.formats.scheme import ScaleLayout
from octavo.ops.hopper.compiler import Mode
from octavo.ops.hopper.product import RANKS, ROWS_UP, GateGradient, product, straddles
from tests.ops.hopper.test_product import CHANNEL, ROUNDED, TABLE_ROUNDED, TENSOR, Case, close, plain

LAYOUTS = [
    CHANNEL,
    TENSOR,
    *(ScaleLayout("block", block) for block in ((128, 128), (256, 128), (128, 256), (384, 256))),
]
WIDTHS = st.integers(1, 13).map(lambda count: 32 * count)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    layout, rounded = draw(st.sampled_from(LAYOUTS)), draw(st.booleans())
    rows, cols = draw(WIDTHS), draw(WIDTHS)
    if rounded and layout.block is not None:
        # blocks of the scaled engine divide the widths
        rows, cols = (size * draw(st.integers(1, 2)) for size in layout.block)
    rows_of = tuple(draw(st.lists(st.sampled_from((0, 1, 3, 8, 31, 64, 65, 129)), min_size=1, max_size=5)))
    return Case(
        rows_of, rows, cols, layout,
        flip=draw(st.booleans()), parts=draw(st.sampled_from((1, 2))), rank=draw(st.sampled_from((0, 8, 16, 24, 72))),
        gathers=draw(st.booleans()), rounded=rounded, seed=draw(st.integers(0, 2**20)),
    )  # fmt: skip


RANDOM = settings(
    max_examples=25, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip


def tolerance(case: Case) -> float:
    """Codes are exact; a table's scales round the weight as well."""
    return ROUNDED if case.rounded or (case.layout.kind != "block" and not case.flip) else 1.5 * TABLE_ROUNDED


@RANDOM
@given(case=cases(), tokens=st.sampled_from((64, 128)))
def test_store(launched: list[Mode], case: Case, tokens: int) -> None:
    if not case.flip and straddles(case.weight):
        return
    out = case.empty(case.features)
    product(case.operand, case.weight, case.offsets_E, out, flip=case.flip, lora=case.lora, tokens=tokens)
    if case.live:
        close(out, case.expected(), tolerance(case))


@RANDOM
@given(case=cases(), tokens=st.sampled_from((64, 128)))
def test_gates(launched: list[Mode], case: Case, tokens: int) -> None:
    """SwiGLU, and its gradient, with the gradient of A where there are ranks for it."""
    if not case.live or (not case.flip and case.parts == 1):
        return
    if not case.flip:
        z, h = case.empty(case.features), case.empty(case.rows)
        product(case.operand, case.weight, case.offsets_E, z, h=h, lora=case.lora, tokens=tokens)
        close(z, case.expected(), tolerance(case))
        gates, ups = z[: case.live].double().chunk(2, -1)
        close(h if case.rounded else plain(h) * 2.0**-ROWS_UP, F.silu(gates) * ups, ROUNDED)
        return
    z, p_M = torch.randn(case.num_rows, 2 * case.features).bfloat16(), torch.rand(case.num_rows)
    shares, sums = torch.full((2 * -(-case.features // 256), case.num_rows), float("nan")), None
    if 0 < case.rank <= RANKS:
        tiles = sum(-(-count // tokens) for count in case.rows_of)
        sums = torch.full((tiles, case.features, RANKS), float("nan"))
    dz = case.empty(2 * case.features)
    gradient = GateGradient(z, p_M, shares, sums)
    product(case.operand, case.weight, case.offsets_E, dz, flip=True, lora=case.lora, gradient=gradient, tokens=tokens)
    dh, wide = case.expected(), z[: case.live].double().requires_grad_()
    gates, ups = wide.chunk(2, -1)
    h = F.silu(gates) * ups
    [want] = torch.autograd.grad(h, wide, dh * p_M[: case.live, None].double())
    close(dz, want, tolerance(case))
    found = shares[:, : case.live].double().sum(0)
    products = (dh * h).detach()
    assert ((found - products.sum(-1)).abs() / products.norm(dim=-1)).max() <= 2 * TABLE_ROUNDED
    if sums is not None and case.lora is not None:
        weighted = (h.detach() * p_M[: case.live, None]).T @ case.lora.xa[: case.live].double()
        assert (sums.double().sum(0)[:, : case.rank] - weighted).norm() <= ROUNDED * weighted.norm()
