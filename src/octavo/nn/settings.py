"""How a module computes: a frozen value on each module, shown in its ``repr`` and changed by ``octavo.configure``."""

from dataclasses import dataclass

from octavo.ops.engines import Engine, select


@dataclass(frozen=True)
class Settings:
    """``numerics`` (exact, fp8_grad, fp8) and the ``engine`` asked for (auto, or one by name).

    Raises :class:`octavo.errors.EngineError` when no such engine computes these numerics.
    """

    numerics: str = "exact"
    engine: str = "auto"

    def __post_init__(self) -> None:
        self.resolve()

    def resolve(self) -> Engine:
        """The engine that will compute."""
        return select(self.engine, self.numerics)

    def __str__(self) -> str:
        chosen = self.resolve().name
        return f"numerics={self.numerics}, engine={chosen}" + (" (auto)" if self.engine == "auto" else "")
