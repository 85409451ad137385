"""The tests of tests/ops/kernels on a GPU: the same kernels compiled, with bfloat16 activations."""

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# Triton is there where a GPU is; the names are tests and their fixture, which pytest finds in this module.
if torch.cuda.is_available():
    from tests.ops.kernels.conftest import poisoned_memory  # noqa: F401
    from tests.ops.kernels.test_adamw_8bit import *  # noqa: F403
    from tests.ops.kernels.test_biases import *  # noqa: F403
    from tests.ops.kernels.test_large import *  # noqa: F403
    from tests.ops.kernels.test_lora_backward import *  # noqa: F403
    from tests.ops.kernels.test_outer import *  # noqa: F403
    from tests.ops.kernels.test_product import *  # noqa: F403
    from tests.ops.kernels.test_rows import *  # noqa: F403
    from tests.ops.kernels.test_sort import *  # noqa: F403
    from tests.ops.kernels.test_weights import *  # noqa: F403
