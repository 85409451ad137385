"""The headers of safetensors files, read strictly and without loading a tensor.

Format: an unsigned 64-bit little-endian length, that many bytes of JSON, then the data
(https://huggingface.co/docs/safetensors, section Format).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file: its safetensors dtype name and the absolute byte range of its data."""

    key: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start
