"""FP8 weights and the checks of their values on a GPU: the same bits, the same refusals."""

from __future__ import annotations

import math

import pytest
import torch

from octavo.checkpoint.values import check_codes, check_scales
from octavo.errors import CheckpointError
from octavo.formats.weight import quantize
from tests.formats.test_weight import LAYOUTS

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("scale_format", ["float", "ue8m0"])
def test_a_gpu_gives_the_same_bits(layout, scale_format):
    weight = torch.randn(3, 140, 130) * torch.exp2(torch.randint(-20, 20, (3, 140, 130)).float())
    here = quantize(weight, layout, parts=2, scale_format=scale_format)
    there = quantize(weight.cuda(), layout, parts=2, scale_format=scale_format)
    assert torch.equal(there.scales.cpu(), here.scales)
    assert torch.equal(there.codes.view(torch.uint8).cpu(), here.codes.view(torch.uint8))
    picked = torch.tensor([2, 0])
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(there.dequantize(dtype).cpu(), here.dequantize(dtype))
        assert torch.equal(there.dequantize(dtype, experts=picked.cuda()).cpu(), here.dequantize(dtype, experts=picked))


@pytest.mark.parametrize("bad", [0x7F, 0xFF])
@pytest.mark.parametrize("view", [torch.uint8, torch.float8_e4m3fn])
def test_on_a_gpu(view, bad):
    codes = torch.zeros(3, 2048, 768, dtype=torch.uint8, device="cuda")
    check_codes("x", codes.view(view))
    codes[2, 100, 5] = bad
    with pytest.raises(CheckpointError, match=r"1 of 4718592 FP8 codes .* at \[2, 100, 5\]"):
        check_codes("x", codes.view(view))
    for stored in (torch.ones(7, 1), torch.ones(7, 1).bfloat16(), torch.ones(7, 1).to(torch.float8_e8m0fnu)):
        check_scales("x", stored.cuda())
    with pytest.raises(CheckpointError, match="1 of 7 scales"):
        check_scales("x", torch.tensor([1, 1, 1, 1, 1, 1, math.nan], device="cuda"))
