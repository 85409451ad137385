"""``quant_method: fbgemm_fp8``: one scale a row, activations per token under an upper bound.

https://huggingface.co/docs/transformers/quantization/fbgemm_fp8
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octavo.formats.facts import QuantScheme, ScaleLayout
from octavo.formats.finegrained import SkipListJudge, skip_list


def declares_fp8(raw: Mapping[str, Any]) -> bool:
    """The method has no other weights."""
    return True


def read(raw: Mapping[str, Any]) -> QuantScheme:
    """The scheme of a ``quantization_config`` with method ``fbgemm_fp8``. Raises: CheckpointError."""
    return QuantScheme(
        method="fbgemm_fp8",
        raw=raw,
        scale_suffix="weight_scale",
        activation_suffix=None,
        scale_format="float",
        activation="dynamic-token",
        judge=SkipListJudge(ScaleLayout("channel"), "dynamic-token", "fbgemm_fp8", skip_list(raw)),
        ignored_suffixes={"input_scale_ub": "upper bound of dynamic activation scales (fbgemm_fp8)"},
    )
