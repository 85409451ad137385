"""Quantize and dequantize: every layout, exact to one rounding, and the corners of the number formats."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from octavo.errors import CheckpointError
from octavo.formats.scheme import ScaleLayout
from octavo.formats.weight import Float8Weight, multipliers, quantize

CHANNEL, TENSOR = ScaleLayout("channel"), ScaleLayout("tensor")
# One that cuts nothing, DeepSeek's, and odd ones that leave partial blocks on both edges.
LAYOUTS = [
    CHANNEL,
    TENSOR,
    *(ScaleLayout("block", b) for b in ((1, 1), (128, 128), (32, 48), (7, 5), (1, 32), (64, 1))),
]
E4M3_VALUES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
E4M3_VALUES = E4M3_VALUES[~E4M3_VALUES.isnan()].unique()

layouts = st.sampled_from(LAYOUTS)
shapes = st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(1, 70), st.integers(1, 140))
seeds = st.integers(0, 2**31)
scale_kinds = st.sampled_from([("float", torch.float32), ("float", torch.bfloat16), ("ue8m0", torch.float32)])
# Magnitudes from float32's subnormals to near its largest: 2^-140 … 2^120.
exponents = st.integers(-140, 120)


def random_weight(seed: int, shape: tuple[int, ...], exponent: int) -> Tensor:
    """Values over many orders of magnitude around 2^exponent, with exact zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    weight *= torch.exp2(torch.randint(-12, 1, shape, generator=generator).double())
    weight[torch.rand(shape, generator=generator) < 0.1] = 0
    return (weight * 2.0**exponent).float()


def spread(weight: Float8Weight) -> Tensor:
    """The scale of every code, float64 [E, P, rows, K], by indexing: the definition, written out."""
    b_n, b_k = weight.block
    rows = torch.arange(weight.rows) // b_n
    cols = torch.arange(weight.in_features) // b_k
    return weight.scales.double()[:, :, rows][..., cols]


def values(weight: Float8Weight) -> Tensor:
    """The codes as float64."""
    return weight.codes.view(torch.float8_e4m3fn).double()


def half_ulp(magnitude: Tensor) -> Tensor:
    """Half the distance between e4m3 values around ``magnitude`` <= 448: 3 bits of mantissa, subnormal below 2^-6."""
    exponent = torch.frexp(magnitude)[1] - 1
    return torch.exp2(exponent.clamp(min=-6).double() - 4)


@settings(max_examples=150, deadline=None)
@given(layouts, shapes, seeds, exponents, scale_kinds)
def test_quantize_is_the_nearest_code(layout, shape, seed, exponent, kind):
    num_experts, parts, rows, cols = shape
    weight = random_weight(seed, (num_experts, parts * rows, cols), exponent)
    found = quantize(weight, layout, parts=parts, scale_format=kind[0], scale_dtype=kind[1])

    assert found.scales.shape == (num_experts, parts, *layout.grid(rows, cols))
    assert found.codes.shape == (num_experts, parts, rows, cols)
    assert (found.scales > 0).all()
    assert found.scales.isfinite().all()
    assert torch.equal(found.scales.to(kind[1]).float(), found.scales)
    if kind[0] == "ue8m0":
        assert (torch.frexp(found.scales)[0] == 0.5).all()
    scale, code = spread(found), values(found)
    assert not code.isnan().any()
    # The exact quotient. A bf16 scale may be rounded below amax / 448, by at most 2^-8: then 448 is the nearest code
    # there is, and further away than half an ulp of a wider format by that much.
    exact = weight.double().view_as(code) / scale
    saturated = exact.abs().clamp(min=448) - 448
    # 2^-23: the quotient is computed in float32 and then rounded to a code, so that a tie may fall on the other side.
    slack = 1 + 2.0**-23 * 16
    assert ((exact - code).abs() <= half_ulp(exact.abs().clamp(max=448)) * slack + saturated).all()
    assert (saturated <= 448 * 2.0**-8).all()


@settings(max_examples=100, deadline=None)
@given(layouts, shapes, seeds, exponents, scale_kinds)
def test_dequantize_is_the_float64_product_rounded_once(layout, shape, seed, exponent, kind):
    num_experts, parts, rows, cols = shape
    weight = random_weight(seed, (num_experts, parts * rows, cols), exponent)
    found = quantize(weight, layout, parts=parts, scale_format=kind[0], scale_dtype=kind[1])
    # 4 by 24 bits of mantissa: the float64 product is exact, so its rounding is the only one.
    want = (values(found) * spread(found)).float().view(num_experts, parts * rows, cols)
    got = found.dequantize()
    assert torch.equal(got, want)
    assert got.is_contiguous()
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(found.dequantize(dtype), want.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_are_rounded_once_where_the_product_fits_float32(dtype):
    # bf16 and e8m0 scales times a code have 12 bits: float32 holds the product, and what is left is one rounding.
    found = quantize(torch.randn(3, 70, 50), CHANNEL, scale_dtype=torch.bfloat16)
    exact = values(found) * spread(found)
    assert torch.equal(exact.float().double(), exact)
    assert torch.equal(found.dequantize(dtype).double(), nearest(exact, dtype).view(3, 70, 50))


def nearest(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Nearest value of ``dtype``, ties to even, without a cast: from the definition of a float with p bits."""
    bits = {torch.bfloat16: 8, torch.float16: 11}[dtype]
    smallest = math.frexp(torch.finfo(dtype).tiny)[1]
    exponent = torch.frexp(exact)[1].clamp(min=smallest)
    ulp = torch.exp2(exponent.double() - bits)
    return torch.round(exact / ulp) * ulp


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("scale", [2.0**-9, 0.0078125 * 1.125, 3.0], ids=str)
def test_representable_values_survive(layout, scale):
    """What FP8 holds comes back to the bit, where every group has a 448 to set the scale by."""
    generator = torch.Generator().manual_seed(0)
    codes = E4M3_VALUES[torch.randint(len(E4M3_VALUES), (2, 2, 70, 130), generator=generator)]
    rows, cols = torch.arange(70), torch.arange(130)
    b_n, b_k = layout.block_of(70, 130)
    first = (rows % b_n == 0)[:, None] & (cols % b_k == 0)[None]
    codes[:, :, first] = 448.0
    weight = (codes * scale).float().view(2, 140, 130)
    found = quantize(weight, layout, parts=2)
    assert (found.scales == scale).all()
    assert torch.equal(values(found), codes)
    assert torch.equal(found.dequantize(), weight)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("scale_format", ["float", "ue8m0"])
@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38, 3e38], ids=str)
def test_extremes_stay_finite(layout, scale_format, value):
    weight = torch.full((40, 60), value)
    found = quantize(weight, layout, scale_format=scale_format)
    assert (found.scales > 0).all()
    assert found.scales.isfinite().all()
    # Below 2^-126 x 2^-10 a value is nearer to zero than to the smallest code; everything else keeps 4 bits.
    assert torch.allclose(found.dequantize()[0], weight, rtol=2.0**-4, atol=2.0**-136)
    assert found.dequantize().isfinite().all()


def test_a_group_of_zeros_among_others():
    weight = torch.randn(64, 96)
    weight[:32, :48] = 0
    found = quantize(weight, ScaleLayout("block", (32, 48)))
    assert (found.scales > 0).all()
    assert (found.dequantize()[0, :32, :48] == 0).all()


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_nothing_infinite_is_quantized(layout, bad):
    weight = torch.randn(2, 70, 130)
    weight[1, 69, 129] = bad
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        quantize(weight, layout)


def test_a_scale_that_its_dtype_cannot_hold():
    with pytest.raises(CheckpointError, match="does not fit"):
        quantize(torch.full((4, 4), 1e30), CHANNEL, scale_dtype=torch.float16)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_parts_are_quantized_apart(layout):
    """Gate and up: 70 rows each, so that a grid over all 140 would straddle the seam."""
    gate, up = torch.randn(3, 70, 130), torch.randn(3, 70, 130) * 50
    fused = quantize(torch.cat([gate, up], 1), layout, parts=2)
    for part, weight in enumerate((gate, up)):
        alone = quantize(weight, layout)
        assert torch.equal(fused.codes[:, part].view(torch.uint8), alone.codes[:, 0].view(torch.uint8))
        assert torch.equal(fused.scales[:, part], alone.scales[:, 0])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_storage_is_viewed_and_experts_are_picked(layout):
    found = quantize(torch.randn(5, 140, 130), layout, parts=2)
    codes, scales = found.codes.reshape(5, 140, 130), found.scales.reshape(5, -1, found.scales.shape[-1])
    for stored in (codes, codes.view(torch.uint8)):
        seen = Float8Weight.from_storage(stored, scales, parts=2, block=found.block)
        assert seen.codes.data_ptr() == stored.data_ptr()
        assert seen.scales.data_ptr() == scales.data_ptr()
        assert (seen.num_experts, seen.parts, seen.rows, seen.out_features, seen.in_features) == (5, 2, 70, 140, 130)
        whole = found.dequantize()
        assert torch.equal(seen.dequantize(), whole)
        picked = torch.tensor([3, 0, 3])
        assert torch.equal(seen.dequantize(experts=picked), whole[picked])
        assert torch.equal(seen.dequantize(experts=slice(1, 3)), whole[1:3])
        assert seen.dequantize(experts=torch.tensor([], dtype=torch.long)).shape == (0, 140, 130)
        assert torch.equal(seen.expert(2).dequantize(), whole[2:3])


def test_a_linear_layer_is_one_expert():
    weight = torch.randn(70, 130)
    found = quantize(weight, ScaleLayout("block", (32, 48)))
    linear = Float8Weight.from_storage(found.codes[0, 0], found.scales[0, 0], block=found.block)
    assert linear.num_experts == 1
    assert torch.equal(linear.dequantize(), found.dequantize())


def test_dequantize_leaves_storage_alone():
    found = quantize(torch.randn(2, 33, 65), ScaleLayout("block", (16, 16)))
    before = found.codes.view(torch.uint8).clone(), found.scales.clone()
    found.dequantize().zero_()
    assert torch.equal(found.codes.view(torch.uint8), before[0])
    assert torch.equal(found.scales, before[1])


def test_what_is_no_code_is_refused():
    good = quantize(torch.randn(2, 64, 64), CHANNEL)
    with pytest.raises(TypeError, match="float8_e4m3fn or uint8"):
        Float8Weight(good.codes.to(torch.bfloat16), good.scales, good.block)
    with pytest.raises(TypeError, match="float8_e4m3fn or uint8"):
        Float8Weight(good.codes.to(torch.float8_e5m2), good.scales, good.block)
    with pytest.raises(TypeError, match="scales float32"):
        Float8Weight(good.codes, good.scales.bfloat16(), good.block)
    with pytest.raises(ValueError, match="need scales"):
        Float8Weight(good.codes, good.scales[:, :, :-1], good.block)
    with pytest.raises(ValueError, match="cannot be cut"):
        quantize(torch.randn(3, 5), CHANNEL, parts=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu])
def test_multipliers_are_exact(dtype):
    powers = torch.exp2(torch.arange(-14.0, 15.0))
    assert torch.equal(multipliers(powers.to(dtype)), powers)


def test_bytes_of_e8m0_are_read_as_exponents():
    stored = torch.arange(255, dtype=torch.uint8)
    want = torch.exp2(stored.double() - 127).float()
    assert torch.equal(multipliers(stored), want)
    assert multipliers(torch.tensor([255], dtype=torch.uint8)).isnan().all()


@pytest.mark.parametrize(
    ("layout", "grid", "shapes"),
    [
        (CHANNEL, (576, 1), ((576, 1), (576,))),
        (TENSOR, (1, 1), ((), (1,), (1, 1))),
        # 4.5 blocks of rows, as kv_a_proj_with_mqa has.
        (ScaleLayout("block", (128, 128)), (5, 16), ((5, 16),)),
    ],
    ids=str,
)
def test_grids_of_a_real_shape(layout, grid, shapes):
    assert layout.grid(576, 2048) == grid
    assert layout.shapes_on_disk(576, 2048) == shapes


def test_a_layout_has_a_block_size_or_none():
    with pytest.raises(ValueError, match="block size"):
        ScaleLayout("block")
    with pytest.raises(ValueError, match="block size"):
        ScaleLayout("channel", (1, 1))
    with pytest.raises(ValueError, match="positive"):
        ScaleLayout("block", (0, 128))
