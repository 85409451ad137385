"""What is wrong with a checkpoint, collected by kind, so that one error can say how much and give the first example."""

from __future__ import annotations

from enum import Enum

from octavo.errors import CheckpointError


class Kind(Enum):
    """Kinds of problems, in the order in which they are reported: (plural, what to do about it)."""

    DUPLICATE = "tensors are in two files", "Download the checkpoint again into an empty folder."
    INDEX = (
        "tensors are not where model.safetensors.index.json says",
        "The index and the shards are of different versions: download the checkpoint again.",
    )
    DTYPE = "weights have another dtype than the config declares", "Quantize the checkpoint again, to e4m3."
    STACKED = (
        "FP8 tensors are not two-dimensional weights",
        "octavo reads one FP8 matrix per expert and projection, with a scale beside each.",
    )
    UNDECLARED = (
        "FP8 weights are in layers that the config leaves unquantized",
        "Correct the list of unquantized modules in config.json, or quantize again.",
    )
    UNEXPLAINED = (
        "tensors are FP8 in a checkpoint that says it is not quantized",
        "config.json lost its quantization_config: get the checkpoint's own.",
    )
    MISSING_SCALE = (
        "FP8 weights have no scale",
        "Without its scale a weight is off by orders of magnitude: get the file that has it, or quantize again.",
    )
    MISSING_ACTIVATION = (
        "FP8 weights have no activation scale",
        "The config says that activations are quantized statically: correct it, or get the file that has the scale.",
    )
    SHAPE = (
        "scales do not have the shape of the declared layout",
        "The config and the file disagree about the layout: correct the config, or quantize again.",
    )
    SCALE_DTYPE = "scales have a dtype that is not a scale's", "Store scales as float32, bfloat16, or e8m0 for ue8m0."
    ORPHAN = (
        "scales belong to no FP8 weight",
        "Nothing would read such a scale: get the complete checkpoint, and one of a single version.",
    )
    UNKNOWN = (
        "tensors of a quantization that the config does not declare",
        "Nothing would read them: correct config.json, or use the checkpoint with the tool that wrote it.",
    )
    EXPERTS = "layers lack experts", "Download the missing shards or convert the checkpoint again."
    PARTIAL = (
        "expert layers are quantized in part",
        "The experts of a layer are stacked: quantize all of them, with one layout, or none.",
    )


class Problems:
    """A list for each kind."""

    def __init__(self) -> None:
        self._found: dict[Kind, list[str]] = {}

    def add(self, kind: Kind, detail: str) -> None:
        """``detail``: file, tensor, what was found and expected, as a clause without a full stop."""
        self._found.setdefault(kind, []).append(detail)

    def raise_first(self, where: str) -> None:
        """Raises: CheckpointError about the first kind that has problems, with the others counted."""
        found = [(kind, self._found[kind]) for kind in Kind if kind in self._found]
        if not found:
            return
        (kind, details), *others = found
        plural, advice = kind.value
        first = details[0] if len(details) == 1 else f"{len(details)} {plural}; first, {details[0]}"
        also = "".join(f" Also: {other.value[0]} ({len(more)})." for other, more in others)
        raise CheckpointError(f"{where}: {first}. {advice}{also}")
