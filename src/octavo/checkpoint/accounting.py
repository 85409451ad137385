"""The ledger of a checkpoint: what every tensor of every file is, or why it cannot be said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octavo.checkpoint.headers import TensorEntry
from octavo.formats.facts import QuantScheme, ScaleLayout


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """An FP8 weight with all that belongs to it, by the module's name on disk (without ``.weight``)."""

    module: str
    weight: TensorEntry
    scale: TensorEntry
    activation: TensorEntry | None
    layout: ScaleLayout


@dataclass(frozen=True)
class Ledger:
    """Every tensor of a checkpoint under what it is.

    ``quantized``: by module. ``plain``: by key. ``ignored``: key to reason. Together with the scales of ``quantized``
    they are ``entries``, every key of every file, once.
    """

    folder: Path
    config: Mapping[str, Any]
    scheme: QuantScheme | None
    files: tuple[Path, ...]
    entries: dict[str, TensorEntry]
    quantized: dict[str, QuantizedWeight]
    plain: dict[str, TensorEntry]
    ignored: dict[str, str]
