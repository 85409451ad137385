"""The router's gradient through a bias, against float64."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.ops.kernels.biases import add_dots
from tests.ops.kernels.cases import Rows, assert_sums, grouped, ragged
from tests.ops.kernels.test_rows import poisoned_tokens


@given(drawn=ragged, width=st.sampled_from((16, 48, 130)), dtype=st.sampled_from((torch.float32, torch.bfloat16)))
@settings(max_examples=20, deadline=None)
def test_adds_each_rows_product_with_its_experts_bias(
    drawn: tuple[list[int], int, int], width: int, dtype: torch.dtype
) -> None:
    """To what is there; rows of other ranks stay as they are."""
    rows = Rows(*drawn)
    d, bias_EN = poisoned_tokens(rows, width), rows.draw(rows.num_experts, width, dtype=dtype)
    before = rows.draw(rows.num_rows, dtype=torch.float32)
    dp_M = before.clone()
    add_dots(dp_M, d, bias_EN, rows.offsets_E, rows.token_M)
    want, magnitude = grouped(rows, d[rows.token_M], bias_EN[:, :, None])
    there = before[: rows.live].double()
    assert_sums("dp", dp_M[: rows.live], want[:, 0] + there, magnitude[:, 0] + there.abs(), width + 1)
    assert torch.equal(dp_M[rows.live :], before[rows.live :])
