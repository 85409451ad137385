"""The kernels of few rows, by the tests that tests/gpu runs compiled."""

from tests.gpu.test_decode import (  # noqa: F401
    test_a_models_own_gate,
    test_plain_stacks,
    test_rounded_as_the_reference_rounds,
)
from tests.gpu.test_decode import test_exact as test_decode_exact  # noqa: F401
from tests.gpu.test_decode import test_rounded_rows as test_decode_rounded_rows  # noqa: F401
from tests.gpu.test_linear import (  # noqa: F401
    test_exact,
    test_fp8_grad_leaves_the_forward_exact,
    test_is_deterministic,
    test_other_blocks,
    test_rounded,
    test_rounded_rows,
)
