"""Fine-tuning in FP8 follows fine-tuning of the dequantized model; `benchmarks/curves.py` does 200 steps and plots
them.
"""

from pathlib import Path

import pytest

from tests.curves import both, worst_difference


@pytest.mark.parametrize("name", ["glm-tiny", "qwen-tiny"])
def test_twenty_steps_of_real_models_agree(name: str, tmp_path: Path) -> None:
    fp8, plain = both(name, 20, tmp_path)
    assert worst_difference(fp8, plain) < 0.01
    # both learned: a model whose adapter gets no gradient would agree with its like
    assert sum(fp8[-5:]) < 0.85 * sum(fp8[:5])
