"""The interface between a trainer and whoever samples completions for it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from octavo.errors import OctavoError


class RolloutError(OctavoError):
    """A sampler that cannot answer, or answers in a way that cannot be used."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One completion: its tokens, with the end-of-text token if there is one, and the natural logarithm of the
    probability with which each was sampled, at the sampling temperature and over the whole vocabulary.
    """

    ids: list[int]
    logprobs: list[float]


@dataclass(frozen=True, slots=True)
class Synchronization:
    """What it took to give the sampler the adapter as it is now."""

    bytes: int
    seconds: float


class Sampler(Protocol):
    """Samples completions with the adapter of the last synchronisation, never with other weights."""

    def synchronize(self, model: Any, step: int) -> Synchronization:
        """Take over the adapter of ``model`` (a peft model) after ``step`` optimizer steps; called on every rank."""
        ...

    def sample(self, prompts: Sequence[Sequence[int]]) -> list[Sample]:
        """One completion for each prompt (token ids), in their order; a prompt that is there twice is sampled twice.

        Raises:
            RolloutError: it cannot.
        """
        ...

    def close(self) -> None:
        """Give back what the sampler holds."""
        ...
