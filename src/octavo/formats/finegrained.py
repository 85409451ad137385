"""``quant_method: fp8``: the DeepSeek family. Scales per block of the weight, or one per tensor.

https://huggingface.co/docs/transformers/quantization/finegrained_fp8 and the DeepSeek-V3 report (arXiv 2412.19437,
section 3.3). ``weight_scale_inv`` is the multiplier: weight = code x weight_scale_inv.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from octavo.errors import CheckpointError
from octavo.formats import fields
from octavo.formats.facts import Activation, QuantScheme, ScaleLayout, Verdict
from octavo.formats.matching import SkipList

# transformers' default where the config is silent; null in the config means one scale per tensor.
_DEFAULT_BLOCK = (128, 128)


def declares_fp8(raw: Mapping[str, Any]) -> bool:
    """The method has FP8 weights and nothing else, DeepSeek-V4's FP4 experts apart, which ``read`` refuses by name."""
    return True


@dataclass(frozen=True)
class SkipListJudge:
    """One layout for every module, apart from those that a skip list covers."""

    layout: ScaleLayout
    activation: Activation
    method: str
    skip: SkipList

    def __call__(self, module: str) -> Verdict:
        if entry := self.skip.entry_for(module):
            return Verdict(None, f"ignored: {entry!r}")
        return Verdict(self.layout, f"{self.layout} FP8 by {self.method}", self.activation)


def skip_list(raw: Mapping[str, Any]) -> SkipList:
    """``modules_to_not_convert``, or the name other writers give it. Without a list the output head stays as it is."""
    for name in ("modules_to_not_convert", "ignored_layers"):
        if raw.get(name) is not None:
            return SkipList(fields.strings(raw[name], name), name)
    return SkipList(["lm_head"], "modules_to_not_convert")


def read(raw: Mapping[str, Any]) -> QuantScheme:
    """The scheme of a ``quantization_config`` with method ``fp8``. Raises: CheckpointError."""
    if (expert_dtype := raw.get("expert_dtype", "fp8")) != "fp8":
        raise CheckpointError(f"quant_method 'fp8' with expert_dtype {expert_dtype!r}: octavo reads FP8 experts only.")
    if str(fmt := raw.get("fmt", "e4m3")).lower() not in ("e4m3", "float8_e4m3fn"):
        raise CheckpointError(f"quant_method 'fp8' with fmt {fmt!r}: octavo reads e4m3 codes only.")
    scale_format = _scale_format(raw.get("scale_fmt"))
    activation_scheme = str(raw.get("activation_scheme", "dynamic")).lower()
    if activation_scheme not in ("dynamic", "static"):
        raise CheckpointError(
            f"activation_scheme is {activation_scheme!r} in the quantization_config, expected 'dynamic' or 'static'."
        )
    block = fields.block(raw.get("weight_block_size", _DEFAULT_BLOCK), "weight_block_size")
    layout = ScaleLayout("block", block) if block else ScaleLayout("tensor")
    activation: Activation = "dynamic-group" if block else "dynamic-token"
    if activation_scheme == "static":
        activation = "static-tensor"
    return QuantScheme(
        method="fp8",
        raw=raw,
        scale_suffix="weight_scale_inv",
        scale_aliases=("scale", "qscale_weight"),
        activation_suffix="activation_scale" if activation_scheme == "static" else None,
        scale_format=scale_format,
        activation=activation,
        judge=SkipListJudge(layout, activation, "fp8", skip_list(raw)),
    )


def _scale_format(found: object) -> Literal["float", "ue8m0"]:
    if found in (None, "float", "float32"):
        return "float"
    if found == "ue8m0":
        return "ue8m0"
    raise CheckpointError(f"scale_fmt is {found!r} in the quantization_config, expected 'float' or 'ue8m0'.")
