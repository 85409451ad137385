"""Grouped products that do not ask the device where an expert's rows end."""

import pytest
import torch

from octavo.ops import dequant
from octavo.ops.weights import DenseWeight


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("ends", [[3, 3, 7, 9], [0, 0, 0, 0], [12, 12, 12, 12], [0, 5, 5, 12]])
def test_a_product_whose_ends_stay_on_the_device_is_that_whose_ends_are_known(ends, transposed):
    """Experts without rows, rows of other ranks, and a factor whose rank is no multiple of 8."""
    torch.manual_seed(0)
    weight = DenseWeight(torch.randn(4, 20, 24))
    x_MK = torch.randn(12, 20 if transposed else 24)
    offsets_E = torch.tensor(ends, dtype=torch.int32)
    got = dequant.unasked_product(x_MK, weight, offsets_E, transposed=transposed)
    want = dequant.grouped_product(x_MK, weight, ends, transposed=transposed)
    torch.testing.assert_close(got, want)
    assert not got[ends[-1] :].any()
