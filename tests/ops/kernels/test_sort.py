"""The counting sort against torch's stable sort: integers, so exactly."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from octavo.ops.kernels import sort
from octavo.ops.kernels.common import INTERPRETED
from octavo.ops.kernels.sort import sort_pairs
from octavo.ops.routing import route
from tests.ops.kernels.cases import DEVICE, seeds


def check(index_TK: Tensor, num_experts: int) -> None:
    want = route(index_TK, num_experts)
    token_M, row_TK, offsets_E = (tensor.cpu() for tensor in sort_pairs(index_TK.to(DEVICE), num_experts))
    assert (token_M.dtype, row_TK.dtype, offsets_E.dtype) == (torch.int64, torch.int64, torch.int32)
    assert torch.equal(offsets_E, want.offsets_E)
    assert torch.equal(row_TK, want.row_TK)
    assert torch.equal(token_M, want.token_M)


@given(
    tokens=st.integers(0, 300),
    top_k=st.integers(1, 8),
    experts=st.integers(1, 130),
    # ids ≥ E and below 0 are off-rank
    least=st.sampled_from((0, 0, -2)),
    beyond=st.sampled_from((0, 0, 1, 1000)),
    dtype=st.sampled_from((torch.int32, torch.int64)),
    seed=seeds,
)
@example(tokens=0, top_k=2, experts=3, least=0, beyond=0, dtype=torch.int64, seed=0)
@settings(max_examples=30, deadline=None)
def test_sorts_as_torch_does(
    tokens: int, top_k: int, experts: int, least: int, beyond: int, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    check(torch.randint(least, experts + beyond, (tokens, top_k), generator=generator).to(dtype), experts)


@pytest.mark.parametrize("expert", [0, 4, 5, 2**31 - 1, 2**32, 2**40, -1, -(2**32)])
def test_one_id_has_every_pair(expert: int) -> None:
    check(torch.full((40, 3), expert), 5)


def test_ids_need_not_be_contiguous() -> None:
    check(torch.randint(0, 9, (5, 70)).T, 8)


@pytest.mark.parametrize("pairs", [0, 1, 127, 128, 129, 700, 3000])
def test_three_launches(pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many pairs are counted per chunk first, and more chunks summed than at once."""
    monkeypatch.setattr(sort, "ONE_LAUNCH", 0)
    monkeypatch.setattr(sort, "SCAN_STEP", 16)
    check(torch.randint(-1, 42, (pairs, 1)), 40)


@pytest.mark.skipif(INTERPRETED, reason="takes a GPU")
@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(2048, 8, 128), (8192, 4, 64), (32768, 8, 128), (5, 1, 512)])
def test_sizes_of_real_layers(tokens: int, top_k: int, experts: int) -> None:
    check(torch.randint(0, experts + 2, (tokens, top_k)), experts)
