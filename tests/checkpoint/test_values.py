"""Values of scales and codes: everything that no honest quantizer writes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from octavo.checkpoint import values
from octavo.checkpoint.values import check_codes, check_numbers, check_scales
from octavo.errors import CheckpointError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (7, 1), (3, 5)], ids=str)
def test_good_scales(dtype, shape):
    check_scales("x", torch.full(shape, 0.25).to(dtype))


def test_the_smallest_and_largest_scales():
    info = torch.finfo(torch.float32)
    check_scales("x", torch.tensor([info.smallest_normal, 1e-45, info.max]))
    check_scales("x", torch.tensor([0, 254], dtype=torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 0.0, -0.0, -0.25])
@pytest.mark.parametrize("where", [(0, 0), (6, 0), (3, 4)])
def test_a_bad_scale_is_named_with_its_place(dtype, bad, where):
    scale = torch.rand(7, 5).add(0.1).to(dtype)
    scale[where] = bad
    with pytest.raises(
        CheckpointError, match=rf"'a\.weight_scale' has 1 of 35 scales .* at \[{where[0]}, {where[1]}\]"
    ):
        check_scales("a.weight_scale", scale)


def test_bad_scales_are_counted():
    with pytest.raises(CheckpointError, match=r"has 3 of 4 scales .* first nan at \[1\]"):
        check_scales("x", torch.tensor([1, math.nan, 0, -1]))


@pytest.mark.parametrize("view", [torch.uint8, torch.float8_e8m0fnu])
def test_nan_of_e8m0(view):
    with pytest.raises(CheckpointError, match="1 of 2 scales"):
        check_scales("x", torch.tensor([127, 255], dtype=torch.uint8).view(view))


@pytest.mark.parametrize("view", [torch.uint8, torch.float8_e4m3fn])
def test_every_other_code_is_good(view):
    codes = torch.tensor([byte for byte in range(256) if byte & 0x7F != 0x7F], dtype=torch.uint8)
    check_codes("x", codes.view(view))
    assert not codes.view(torch.float8_e4m3fn).float().isnan().any()


@pytest.mark.parametrize("view", [torch.uint8, torch.float8_e4m3fn])
@pytest.mark.parametrize("bad", [0x7F, 0xFF])
@given(at=st.tuples(st.integers(0, 10), st.integers(0, 12)))
def test_a_nan_code_is_named_with_its_place(view, bad, at):
    codes = torch.randint(0, 0x7F, (11, 13), dtype=torch.uint8) | (torch.randint(0, 2, (11, 13)) << 7).to(torch.uint8)
    codes[at] = bad
    with pytest.raises(CheckpointError, match=rf"'a\.weight' has 1 of 143 FP8 codes .* at \[{at[0]}, {at[1]}\]"):
        check_codes("a.weight", codes.view(view))


@pytest.mark.parametrize("place", [0, values._CHUNK - 1, values._CHUNK, 2 * values._CHUNK + 16])
def test_nan_codes_in_every_chunk(place):
    codes = torch.zeros(2 * values._CHUNK + 17, dtype=torch.uint8)
    check_codes("x", codes)
    codes[place] = 0x7F
    with pytest.raises(CheckpointError, match=rf"first at \[{place}\]"):
        check_codes("x", codes)


def test_views_and_nothing():
    codes = torch.zeros(8, 6, dtype=torch.uint8)
    check_codes("x", codes.T)
    check_codes("x", codes[:, ::2])
    check_codes("x", codes[:0])
    codes[3, 4] = 0xFF
    check_codes("x", codes[:, 1::2])
    with pytest.raises(CheckpointError, match=r"first at \[3, 2\]"):
        check_codes("x", codes[:, ::2])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_number_that_is_nan_is_named_with_its_place(dtype):
    weight = torch.randn(7, 5).to(dtype)
    named = [("codes", torch.full((3,), 255, dtype=torch.uint8)), ("empty", weight[:0]), ("a.weight", weight)]
    check_numbers(named)
    weight[3, 4] = weight[6, 0] = math.nan
    with pytest.raises(CheckpointError, match=r"'a\.weight' has 2 of 35 numbers that are NaN, first at \[3, 4\]"):
        check_numbers(named)


def test_infinities_and_large_sums_are_no_nan():
    check_numbers([("x", torch.tensor([math.inf, -math.inf, 1.0])), ("y", torch.full((9,), 6e4, dtype=torch.float16))])
