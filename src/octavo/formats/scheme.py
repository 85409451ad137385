"""From ``config.json`` to a ``QuantScheme``: which family of formats, and what it says about each module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from octavo.errors import CheckpointError
from octavo.formats import compressed_tensors, fbgemm, finegrained, modelopt
from octavo.formats.facts import Activation, QuantScheme, ScaleLayout, Verdict

__all__ = ["Activation", "QuantScheme", "ScaleLayout", "Verdict", "is_fp8", "parse_scheme", "quantization_config"]

Reader = Callable[[Mapping[str, Any]], QuantScheme]

_READERS: dict[str, Reader] = {
    "fp8": finegrained.read,
    "compressed-tensors": compressed_tensors.read,
    "modelopt": modelopt.read,
    "fbgemm_fp8": fbgemm.read,
}
_DECLARES_FP8: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    "fp8": finegrained.declares_fp8,
    "compressed-tensors": compressed_tensors.declares_fp8,
    "modelopt": modelopt.declares_fp8,
    "fbgemm_fp8": fbgemm.declares_fp8,
}


def quantization_config(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The ``quantization_config`` of a whole ``config.json``, its ``text_config`` included; None where there is none.

    Raises: CheckpointError where it is not a JSON object.
    """
    found = config.get("quantization_config")
    if found is None and isinstance(config.get("text_config"), Mapping):
        found = config["text_config"].get("quantization_config")
    if found is not None and not isinstance(found, Mapping):
        raise CheckpointError(f"quantization_config in config.json is {type(found).__name__}, expected a JSON object.")
    return found


def is_fp8(quantization_config: Mapping[str, Any]) -> bool:
    """Whether a ``quantization_config`` declares FP8 weights in a family that octavo reads.

    False for other methods (awq, gptq, mxfp4 …) and for integer or FP4 variants of these families: they are not ours.
    True does not mean that ``parse_scheme`` takes every detail of it.
    """
    declares = _DECLARES_FP8.get(str(quantization_config.get("quant_method")))
    return declares is not None and declares(quantization_config)


def parse_scheme(config: Mapping[str, Any]) -> QuantScheme | None:
    """The scheme that a whole ``config.json`` declares; None for an unquantized checkpoint.

    Raises: CheckpointError naming the method, strategy, bit width, type or format that octavo does not read.
    """
    raw = quantization_config(config)
    if raw is None:
        return None
    method = raw.get("quant_method")
    if method not in _READERS:
        raise CheckpointError(
            f"quant_method is {method!r} in config.json, and octavo reads {', '.join(map(repr, _READERS))}. "
            "Load this checkpoint with plain transformers, or start from its FP8 or bf16 version."
        )
    return _READERS[method](raw)
