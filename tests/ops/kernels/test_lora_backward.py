"""``d·B`` and ``dB`` from one read of d, against float64: experts of no, one and several chunks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.ops.kernels.common import INTERPRETED, Cut
from octavo.ops.kernels.lora_backward import CUT, lora_backward
from tests.ops.kernels.cases import ACTIVATIONS, Rows, assert_sums, grouped, grouped_outer, ragged
from tests.ops.kernels.test_rows import poisoned_tokens


def check(rows: Rows, width: int, rank: int, gather: bool, weighted: bool, dtype: torch.dtype, cut: Cut) -> None:
    d = poisoned_tokens(rows, width) if gather else rows.rows(width)
    token_M = rows.token_M if gather else None
    p_M = rows.rows(1)[:, 0].contiguous() if weighted else None
    # values of the activations' dtype, so that no rounding of the factor comes in
    factor = rows.draw(rows.num_experts, width, rank).to(dtype)
    xa_MR = rows.rows(rank)
    (yb_MR, dB_ENR), again = (
        lora_backward(d, factor, xa_MR, rows.offsets_E, token_M=token_M, p_M=p_M, cut=cut) for _ in range(2)
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


@pytest.mark.skipif(INTERPRETED, reason="takes a GPU")
@pytest.mark.parametrize("rows_per_expert", [100, 1000])
def test_rows_of_real_layers(rows_per_expert: int) -> None:
    counts = [rows_per_expert, 0, 2 * rows_per_expert + 1, 1]
    for gather in (False, True):
        check(Rows(counts, 0, 0), 2048, 16, gather, gather, torch.bfloat16, CUT)
