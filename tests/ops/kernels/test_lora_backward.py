"""``d·B`` and ``dB`` from one read of d, against float64, and the codes and scales of d, against those of a pass of
their own: experts of no, one and several chunks.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from octavo.ops.engines import RowMaxima
from octavo.ops.kernels.common import INTERPRETED, Cut
from octavo.ops.kernels.lora_backward import CUT, FEW, lora_backward
from octavo.ops.kernels.rows import round_rows
from tests.ops.kernels.cases import ACTIVATIONS, DEVICE, Rows, assert_sums, grouped, grouped_outer, ragged
from tests.ops.kernels.test_rows import poisoned_tokens


def maxima_of(rows: Rows, source: Tensor, parts: int, folds: bool) -> RowMaxima:
    """Of the live rows, by ``parts`` runs of columns, some of them without any; poison in the others."""
    width = source.shape[1]
    fold_EN = torch.exp2(rows.draw(rows.num_experts, width, dtype=torch.float32) * 2) if folds else None
    parts_PM = torch.full((parts, rows.num_rows), float("nan"), device=DEVICE)
    each = -(-width // parts)
    for e, span in rows.spans():
        value = (source[span].float() * (1 if fold_EN is None else fold_EN[e])).abs()
        for part in range(parts):
            columns = value[:, part * each : (part + 1) * each]
            parts_PM[part, span] = columns.amax(1) if columns.shape[1] else 0.0
    return RowMaxima(fold_EN, parts_PM)


def check(
    rows: Rows, width: int, rank: int, gather: bool, weighted: bool, dtype: torch.dtype, cut: Cut | None,
    parts: int = 0, folds: bool = True,
) -> None:  # fmt: skip
    d = poisoned_tokens(rows, width) if gather else rows.rows(width)
    token_M = rows.token_M if gather else None
    p_M = rows.rows(1)[:, 0].contiguous() if weighted else None
    # values of the activations' dtype, so that no rounding of the factor comes in
    factor = rows.draw(rows.num_experts, width, rank).to(dtype)
    xa_MR = rows.rows(rank)
    maxima = maxima_of(rows, d if token_M is None else d[token_M], parts, folds) if parts else None
    (yb_MR, dB_ENR, rounded), again = (
        lora_backward(d, factor, xa_MR, rows.offsets_E, token_M=token_M, p_M=p_M, maxima=maxima, cut=cut)
        for _ in range(2)
    )
    source, live = d if token_M is None else d[token_M], rows.live
    assert dB_ENR.dtype == dtype
    assert_sums("yb", yb_MR[:live], *grouped(rows, source, factor), terms=width)
    assert bool(yb_MR[live:].isnan().all())
    right = xa_MR.double() if p_M is None else xa_MR.double() * p_M.double()[:, None]
    want, magnitude = grouped_outer(rows, source, right)
    # p·xa is rounded to the activations' dtype for the product
    slack = torch.finfo(ACTIVATIONS).eps / 2 * 1.01 * magnitude if weighted else 0.0
    assert_sums("dB", dB_ENR, want, magnitude, terms=max(rows.counts), slack=slack)
    assert torch.equal(yb_MR[:live], again[0][:live])
    assert torch.equal(dB_ENR, again[1])
    if maxima is None:
        assert rounded is None
        return
    assert rounded is not None
    alone = round_rows(d, width, offsets_E=rows.offsets_E, token_M=token_M, fold_EK=maxima.fold_EG)
    assert rounded.scales.shape == (rows.num_rows, 1)
    for got, want in ((rounded.codes.view(torch.uint8), alone.codes.view(torch.uint8)), (rounded.scales, alone.scales)):
        assert torch.equal(got[:live], want[:live])
    # poison, not written
    assert bool(rounded.scales[live:].isnan().all())
    assert bool(rounded.codes[live:].float().isnan().all())


@given(
    drawn=ragged,
    width=st.sampled_from((16, 48, 96, 130)),
    rank=st.sampled_from((1, 4, 16, 24)),
    gather=st.booleans(),
    weighted=st.booleans(),
    dtype=st.sampled_from((ACTIVATIONS, torch.float32)),
    cut=st.sampled_from((CUT, Cut(16, 32, 4, 1), Cut(64, 16, 4, 2))),
)
@settings(max_examples=25, deadline=None)
def test_matches_float64(
    drawn: tuple[list[int], int, int], width: int, rank: int, gather: bool, weighted: bool, dtype: torch.dtype,
    cut: Cut,
) -> None:  # fmt: skip
    if cut is not CUT and not INTERPRETED:
        # a tensor core takes no less than 64 rows
        cut = Cut(64, 64, 4, cut.stages)
    check(Rows(*drawn), width, rank, gather, weighted, dtype, cut)


@pytest.mark.parametrize("counts", [[300, 0, 0], [0, 0, 300], [0], [0, 31, 32, 33, 64, 65]], ids=str)
def test_whole_and_broken_chunks(counts: list[int]) -> None:
    check(Rows(counts, 3, 0), 48, 16, True, True, torch.float32, CUT)


@given(
    drawn=ragged,
    width=st.sampled_from((16, 48, 96, 130, 160)),
    rank=st.sampled_from((4, 16, 24)),
    gather=st.booleans(),
    parts=st.sampled_from((1, 2, 6, 12)),
    folds=st.booleans(),
    cut=st.sampled_from((None, CUT, FEW, Cut(16, 16, 4, 1), Cut(64, 64, 4, 2))),
)
@settings(max_examples=40, deadline=None)
def test_rounds_whole_rows_by_their_maxima(
    drawn: tuple[list[int], int, int], width: int, rank: int, gather: bool, parts: int, folds: bool, cut: Cut | None
) -> None:
    if cut is not None and not INTERPRETED:
        cut = Cut(max(64, cut.rows), max(64, cut.columns), cut.warps, cut.stages)
    check(Rows(*drawn), width, rank, gather, gather, torch.float32, cut, parts, folds)


def test_rows_of_zeros_have_a_scale_of_one() -> None:
    rows = Rows([3, 1], 1, 0)
    d = torch.zeros_like(rows.rows(64))
    factor, xa_MR = rows.draw(2, 64, 4), rows.rows(4)
    maxima = maxima_of(rows, d, 2, folds=False)
    _, _, rounded = lora_backward(d, factor, xa_MR, rows.offsets_E, maxima=maxima)
    assert rounded is not None
    assert bool((rounded.scales[: rows.live] == 1).all())
    assert bool((rounded.codes[: rows.live].float() == 0).all())


@pytest.mark.skipif(INTERPRETED, reason="takes a GPU")
@pytest.mark.parametrize("rows_per_expert", [100, 1000])
def test_rows_of_real_layers(rows_per_expert: int) -> None:
    counts = [rows_per_expert, 0, 2 * rows_per_expert + 1, 1]
    for gather in (False, True):
        check(Rows(counts, 0, 0), 2048, 16, gather, gather, torch.bfloat16, CUT)
        for cut in (CUT, FEW):
            for folds in (False, True):
                check(Rows(counts, 0, 0), 3072, 16, gather, gather, torch.bfloat16, cut, 12, folds)
