"""The activation between an expert's two products: ``h = gate(z)`` and its gradient.

The named gate has an explicit gradient that fused engines can put in an epilogue. Any other gate of a model (a clamped
one, an interleaved one, a bare activation) runs as the model wrote it and is differentiated by autograd.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Gate(Protocol):
    """``z_MG → h_MI``, row by row."""

    @property
    def name(self) -> str: ...

    def forward(self, z_MG: Tensor) -> Tensor:
        """``h_MI`` in the dtype of ``z_MG``."""
        ...

    def backward(self, z_MG: Tensor, dh_MI: Tensor) -> Tensor:
        """``dz_MG`` in the dtype of ``z_MG``."""
        ...


@dataclass(frozen=True)
class SwiGlu:
    """``h = silu(g) · u`` with ``z = [g, u]``."""

    name: str = "swiglu"

    def forward(self, z_MG: Tensor) -> Tensor:
        g_MI, u_MI = z_MG.chunk(2, dim=-1)
        return F.silu(g_MI) * u_MI

    def backward(self, z_MG: Tensor, dh_MI: Tensor) -> Tensor:
        g_MI, u_MI = z_MG.chunk(2, dim=-1)
        sigmoid = torch.sigmoid(g_MI)
        dg_MI = dh_MI * u_MI * sigmoid * (1 + g_MI * (1 - sigmoid))
        return torch.cat([dg_MI, dh_MI * g_MI * sigmoid], dim=-1)


@dataclass(frozen=True)
class Identity:
    """``h = z``: for a stage whose gate is applied outside it."""

    name: str = "identity"

    def forward(self, z_MG: Tensor) -> Tensor:
        return z_MG

    def backward(self, z_MG: Tensor, dh_MI: Tensor) -> Tensor:
        return dh_MI


@dataclass(frozen=True)
class ModelGate:
    """The gate as the model's own class computes it, differentiated by autograd. It must act row by row and hold
    nothing that trains."""

    name: str
    function: Callable[[Tensor], Tensor]

    def forward(self, z_MG: Tensor) -> Tensor:
        return self.function(z_MG)

    def backward(self, z_MG: Tensor, dh_MI: Tensor) -> Tensor:
        with torch.enable_grad():
            z_MG = z_MG.detach().requires_grad_()
            h_MI = self.function(z_MG)
        (dz_MG,) = torch.autograd.grad(h_MI, z_MG, dh_MI.to(h_MI.dtype))
        return dz_MG


SWIGLU = SwiGlu()
IDENTITY = Identity()
