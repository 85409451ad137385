"""What a product multiplies with: FP8 codes and scales, or a plain stack of weights, and the LoRA factors beside it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.formats.weight import Float8Weight


@dataclass(frozen=True)
class DenseWeight:
    """A stack of weights that is not quantized: ``weight_ENK`` [E, out, in], any float dtype, any strides."""

    weight_ENK: Tensor

    @property
    def num_experts(self) -> int:
        return self.weight_ENK.shape[0]

    @property
    def out_features(self) -> int:
        return self.weight_ENK.shape[1]

    @property
    def in_features(self) -> int:
        return self.weight_ENK.shape[2]

    def dequantize(self, dtype: torch.dtype = torch.float32, experts: Tensor | slice | None = None) -> Tensor:
        """The weights of ``experts`` (all by default) in ``dtype``, [E', out, in]."""
        weight = self.weight_ENK if experts is None else self.weight_ENK[experts]
        return weight.to(dtype)


Weight = Float8Weight | DenseWeight


@dataclass(frozen=True)
class WeightSpec:
    """How to read a weight from flat tensors: the static half of a :data:`Weight`, hashable.

    ``float8``: codes and scales, with ``parts`` grids per expert of ``block``; else a plain stack, stored
    ``[E, in, out]`` when ``transposed``.
    """

    float8: bool
    parts: int = 1
    block: tuple[int, int] = (1, 1)
    transposed: bool = False

    def assemble(self, tensor: Tensor, scales: Tensor | None) -> Weight:
        """The weight over ``tensor`` (one-byte codes or floats) and float32 ``scales``; nothing is copied."""
        if self.float8:
            assert scales is not None
            return Float8Weight.from_storage(tensor, scales, parts=self.parts, block=self.block)
        return DenseWeight(tensor.transpose(-1, -2) if self.transposed else tensor)


def storage(weight: Float8Weight) -> tuple[Tensor, Tensor]:
    """The flat tensors behind ``weight``: codes [E, out, in] and scales [E, parts·n, k], views."""
    codes, scales = weight.codes, weight.scales
    return codes.flatten(1, 2), scales.flatten(1, 2)


@dataclass(frozen=True)
class Factors:
    """LoRA factors of a stack: ``A_ERK`` [E, R, in] and ``B_ENR`` [E, out, R] with the scaling folded into B."""

    A_ERK: Tensor
    B_ENR: Tensor
