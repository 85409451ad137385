"""Passes over frozen codes: exactly the bytes and the one rounding that they promise."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.formats.scheme import ScaleLayout
from octavo.ops.kernels.interleave import interleave
from octavo.ops.kernels.weights import dequantize, transpose
from octavo.ops.weights import storage
from tests.ops.kernels.cases import ACTIVATIONS, DEVICE, Rows, seeds

# gate and up restart their grids, also where a part ends inside a block
LAYOUTS = [ScaleLayout("channel"), ScaleLayout("tensor")] + [
    ScaleLayout("block", block) for block in ((128, 128), (32, 64), (7, 5), (1, 32), (64, 1))
]
sizes = {"parts": st.integers(1, 2), "rows": st.integers(1, 150), "columns": st.integers(1, 140)}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@given(counts=st.lists(st.sampled_from((0, 1, 3)), min_size=1, max_size=4), data=st.data(), seed=seeds, **sizes)
@settings(max_examples=8, deadline=None)
def test_dequantizes_a_range_of_experts(
    layout: ScaleLayout, counts: list[int], parts: int, rows: int, columns: int, data: st.DataObject, seed: int
) -> None:
    case = Rows(counts, 0, seed)
    weight = case.weight(layout, parts, rows, columns)
    first = data.draw(st.integers(0, len(counts) - 1))
    last = data.draw(st.integers(first + 1, len(counts)))
    bank = torch.empty((last - first, parts * rows, columns), dtype=ACTIVATIONS, device=DEVICE)
    dequantize(weight, case.offsets_E, first, bank)
    want = weight.dequantize(ACTIVATIONS)
    for e in range(first, last):
        # an expert without rows is skipped: nothing reads its slot
        assert torch.equal(bank[e - first], want[e]) if counts[e] else bool(bank[e - first].isnan().all())


def in_order(columns: int) -> list[int]:
    """Of every 16 columns the even ones first."""
    return [start + i for start in range(0, columns, 16) for i in (*range(0, 16, 2), *range(1, 16, 2))]


@pytest.mark.parametrize("layout", [ScaleLayout("channel"), ScaleLayout("block", (128, 128))], ids=str)
@pytest.mark.parametrize("columns", [16, 48, 272, 1040])
def test_dequantizes_interleaved(layout: ScaleLayout, columns: int) -> None:
    case = Rows([2, 1], 0, 0)
    weight = case.weight(layout, 2, 24, columns)
    bank = torch.empty((2, 48, columns), dtype=ACTIVATIONS, device=DEVICE)
    dequantize(weight, case.offsets_E, 0, bank, interleaved=True)
    assert torch.equal(bank, weight.dequantize(ACTIVATIONS)[..., in_order(columns)])


@pytest.mark.parametrize("exponent", [0, 60, -60])
@pytest.mark.parametrize("shape", [(3, 48), (2, 5, 16), (0, 32)])
def test_interleaves_exactly(shape: tuple[int, ...], exponent: int) -> None:
    x = torch.randn(shape, device=DEVICE).to(ACTIVATIONS)
    want = (x.double() * 2.0**exponent).to(ACTIVATIONS)[..., in_order(shape[-1])]
    assert torch.equal(interleave(x, exponent), want)


@given(counts=st.lists(st.sampled_from((0, 1, 3)), min_size=1, max_size=4), seed=seeds, **sizes)
@settings(max_examples=15, deadline=None)
def test_transposes_codes(counts: list[int], parts: int, rows: int, columns: int, seed: int) -> None:
    case = Rows(counts, 0, seed)
    weight = case.weight(ScaleLayout("channel"), parts, rows, columns)
    out = torch.full((len(counts), columns, parts * rows), 0x7F, dtype=torch.uint8, device=DEVICE)
    transpose(weight, case.offsets_E, out)
    codes = storage(weight)[0].view(torch.uint8)
    for e, count in enumerate(counts):
        assert torch.equal(out[e], codes[e].T) if count else bool((out[e] == 0x7F).all())
