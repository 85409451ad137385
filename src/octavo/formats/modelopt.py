"""``quant_method: modelopt``: NVIDIA ModelOpt's FP8 checkpoints, one scale per weight and one per input.

https://nvidia.github.io/Model-Optimizer/ ("unified Hugging Face checkpoint"). Older exports keep the facts in
``hf_quant_config.json`` beside ``config.json``; ``from_hf_quant_config`` gives them the newer form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from octavo.errors import CheckpointError
from octavo.formats import fields
from octavo.formats.facts import QuantScheme, ScaleLayout, Verdict
from octavo.formats.matching import GlobList

_LAYOUT = ScaleLayout("tensor")


def declares_fp8(raw: Mapping[str, Any]) -> bool:
    """Whether the algorithm has FP8 weights, per tensor or otherwise."""
    return _algorithm(raw).startswith("FP8")


def from_hf_quant_config(found: object) -> dict[str, Any]:
    """The ``quantization_config`` that the content of ``hf_quant_config.json`` amounts to. Raises: CheckpointError."""
    if not isinstance(found, Mapping) or not isinstance(found.get("quantization"), Mapping):
        raise CheckpointError("hf_quant_config.json has no object 'quantization', where ModelOpt writes its settings.")
    return {"quant_method": "modelopt", **found["quantization"]}


@dataclass(frozen=True)
class _Judge:
    exclude: GlobList

    def __call__(self, module: str) -> Verdict:
        if entry := self.exclude.entry_for(module):
            return Verdict(None, f"ignored: {entry!r}")
        return Verdict(_LAYOUT, f"{_LAYOUT} FP8 by modelopt", "static-tensor")


def read(raw: Mapping[str, Any]) -> QuantScheme:
    """The scheme of a ``quantization_config`` with method ``modelopt``. Raises: CheckpointError."""
    if (algorithm := _algorithm(raw)) != "FP8":
        raise CheckpointError(
            f"quant_method 'modelopt' with quant_algo {algorithm or None!r}: octavo reads 'FP8', one scale per tensor."
        )
    ignored = {}
    if raw.get("kv_cache_scheme") is not None or raw.get("kv_cache_quant_algo") is not None:
        ignored = dict.fromkeys(("k_scale", "v_scale"), "scale of the key-value cache (modelopt's kv-cache setting)")
    excluded = [entry for name in ("exclude_modules", "ignore") for entry in fields.strings(raw.get(name), name)]
    return QuantScheme(
        method="modelopt",
        raw=raw,
        scale_suffix="weight_scale",
        activation_suffix="input_scale",
        scale_format="float",
        activation="static-tensor",
        judge=_Judge(GlobList(excluded)),
        ignored_suffixes=ignored,
    )


def _algorithm(raw: Mapping[str, Any]) -> str:
    nested = raw.get("quantization")
    found = raw.get("quant_algo") or (nested.get("quant_algo") if isinstance(nested, Mapping) else None)
    return str(found or "").upper()
