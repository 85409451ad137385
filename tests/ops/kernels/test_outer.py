"""LoRA's factor gradients against float64."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.ops.kernels.outer import outer, sum_tiles
from tests.ops.kernels.cases import ACTIVATIONS, Rows, assert_sums, grouped_outer, ragged
from tests.ops.kernels.test_rows import poisoned_tokens


@given(
    drawn=ragged,
    width=st.sampled_from((16, 48, 96, 130)),
    rank=st.sampled_from((1, 4, 16, 24)),
    rank_first=st.booleans(),
    gather=st.booleans(),
    weighted=st.booleans(),
    dtype=st.sampled_from((ACTIVATIONS, torch.float32)),
)
@settings(max_examples=30, deadline=None)
def test_sum_of_outer_products(
    drawn: tuple[list[int], int, int], width: int, rank: int, rank_first: bool, gather: bool, weighted: bool,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    """Per expert, zero for one without rows; either order of the axes; either dtype of the factor."""
    rows = Rows(*drawn)
    a = poisoned_tokens(rows, width) if gather else rows.rows(width)
    b_MR = rows.rows(rank)
    p_M = rows.rows(1)[:, 0].contiguous() if weighted else None
    token_M = rows.token_M if gather else None
    first, again = (
        outer(a, b_MR, rows.offsets_E, rank_first=rank_first, dtype=dtype, token_M=token_M, p_M=p_M) for _ in range(2)
    )
    assert first.dtype == dtype
    right = b_MR.double() if p_M is None else b_MR.double() * p_M.double()[:, None]
    want, magnitude = grouped_outer(rows, a[rows.token_M] if gather else a, right)
    got = first.transpose(1, 2) if rank_first else first
    # p·b is rounded to the activations' dtype for the product
    terms = max(rows.counts)
    slack = torch.finfo(ACTIVATIONS).eps / 2 * 1.01 * magnitude if weighted else 0.0
    assert_sums("outer", got, want, magnitude, terms, slack=slack)
    assert torch.equal(first, again)


@given(drawn=ragged, width=st.sampled_from((16, 48, 130)), rank=st.sampled_from((4, 16)))
@settings(max_examples=15, deadline=None)
def test_h_is_computed_again_from_z(drawn: tuple[list[int], int, int], width: int, rank: int) -> None:
    """With ``gated`` the rows are z = [g, u] and what is summed is silu(g)·u, rounded as forward rounded it."""
    rows = Rows(*drawn)
    z_MG, b_MR = rows.rows(2 * width), rows.rows(rank)
    g, u = z_MG.double().chunk(2, 1)
    want, magnitude = grouped_outer(rows, g * torch.sigmoid(g) * u, b_MR)
    got = outer(z_MG, b_MR, rows.offsets_E, rank_first=True, dtype=torch.float32, gated=True)
    # silu in float32 (an exponential, a division, two products), then one rounding of h
    slack = (16 * 2**-24 + torch.finfo(ACTIVATIONS).eps / 2) * 1.01 * magnitude
    assert_sums("outer", got.transpose(1, 2), want, magnitude, max(rows.counts), slack=slack)


@given(
    drawn=ragged, width=st.sampled_from((16, 70, 130)), rank=st.sampled_from((3, 16)), tokens=st.sampled_from((16, 32))
)
@settings(max_examples=15, deadline=None)
def test_sums_the_tiles_of_each_expert(drawn: tuple[list[int], int, int], width: int, rank: int, tokens: int) -> None:
    """In order, zero for an expert without rows; ranks beyond those of the factor are padding, and so are tiles."""
    rows = Rows(*drawn)
    tiles = [-(-count // tokens) for count in rows.counts]
    sums = rows.draw(sum(tiles) + 2, width, 16, dtype=torch.float32)
    sums[sum(tiles) :] = float("nan")
    like = rows.draw(len(tiles), rank, width, dtype=torch.float32)
    got = sum_tiles(sums, rows.offsets_E, tokens, like)
    first = 0
    for expert, count in enumerate(tiles):
        want = torch.zeros(width, 16, device=sums.device)
        for tile in sums[first : first + count]:
            want += tile
        first += count
        assert torch.equal(got[expert], want[:, :rank].T)
