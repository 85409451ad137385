"""Where the tests of kernels run: on a GPU in bfloat16, or in Triton's interpreter on the CPU in float32.

TRITON_INTERPRET=1 python -m pytest -m gpu tests/gpu/test_linear.py tests/gpu/test_decode.py
"""

import importlib.util

import pytest
import torch


def interpreted() -> bool:
    if not importlib.util.find_spec("triton"):
        return False
    from octavo.ops.kernels.common import INTERPRETED

    return INTERPRETED


CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if CUDA else torch.device("cpu")
# the interpreter's dot of bfloat16 is garbage without a word
DTYPE = torch.bfloat16 if CUDA else torch.float32
needs_kernels = [pytest.mark.gpu, pytest.mark.skipif(not CUDA and not interpreted(), reason="needs a GPU")]
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a GPU")]
