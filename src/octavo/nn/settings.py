"""How a module computes: a frozen value on each module, shown in its ``repr`` and changed by ``octavo.configure``."""

from dataclasses import dataclass

import torch

from octavo.errors import EngineError
from octavo.ops.choice import Choice, Layer, Request, check, choose
from octavo.ops.kept import ACTIVATIONS, Activations


@dataclass(frozen=True)
class Settings:
    """``numerics`` (exact, fp8_grad, fp8), the ``engine`` asked for (auto, or one by name), and in what routed experts
    keep their ``activations`` for backward: ``bf16`` as they were computed, ``fp8`` in E4M3.

    Raises :class:`octavo.errors.EngineError` when no such engine computes these numerics anywhere; whether it can on a
    layer is known with the layer's device, see :meth:`choose`.
    """

    numerics: str = "exact"
    engine: str = "auto"
    activations: Activations = "bf16"

    def __post_init__(self) -> None:
        if self.activations not in ACTIVATIONS:
            raise EngineError(f"activations {self.activations!r} is none of {', '.join(ACTIVATIONS)}.")
        check(self.engine, self.numerics)

    def choose(self, layer: Layer) -> Choice:
        """The engines that will compute ``layer``, by rows per expert.

        Raises :class:`octavo.errors.EngineError` when the one asked for cannot.
        """
        return choose(self.engine, self.numerics, layer)

    @property
    def request(self) -> Request:
        """The same for a compiled graph, which chooses when it runs."""
        return Request(self.engine, self.numerics)

    def shown(self, layer: Layer) -> str:
        """For the ``repr`` of a module with this layer."""
        try:
            chosen = str(self.choose(layer)) + (" (auto)" if self.engine == "auto" else "")
        except EngineError as error:
            chosen = f"{self.engine} ({error})"
        kept = ", activations=fp8" if self.activations == "fp8" and layer.kind == "experts" else ""
        return f"numerics={self.numerics}, engine={chosen}{kept}"


@dataclass
class Chosen:
    """The last choice of a module, so that a forward need not look its layer up again."""

    key: tuple[Settings, torch.device, torch.dtype]
    choice: Choice
