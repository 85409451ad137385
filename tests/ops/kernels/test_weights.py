"""Passes over frozen codes: exactly the bytes and the one rounding that they promise."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.formats.scheme import ScaleLayout
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
