"""Typed reads of the fields that several families share; what has the wrong JSON type is named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octavo.errors import CheckpointError


def strings(found: object, name: str) -> list[str]:
    """A list of strings; null reads as empty. Raises: CheckpointError."""
    if found is None:
        return []
    if not isinstance(found, list) or not all(isinstance(entry, str) for entry in found):
        raise CheckpointError(f"{name} in the quantization_config is {found!r}, expected a list of module names.")
    return found


def mapping(found: object, name: str) -> Mapping[str, Any]:
    """A JSON object. Raises: CheckpointError."""
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{name} in the quantization_config is {found!r}, expected a JSON object.")
    return found


def block(found: object, name: str) -> tuple[int, int] | None:
    """Two positive integers, also as ``"128x128"``; null reads as None. Raises: CheckpointError."""
    if found is None:
        return None
    sizes: object = found
    if isinstance(found, str):
        sizes = [int(part) if part.isdecimal() else None for part in found.split("x")]
    if isinstance(sizes, list | tuple) and len(sizes) == 2:
        b_n, b_k = sizes
        # bool is an int in Python, and true is not a block size
        if type(b_n) is int and type(b_k) is int and b_n > 0 and b_k > 0:
            return b_n, b_k
    raise CheckpointError(f"{name} in the quantization_config is {found!r}, expected two positive integers or null.")
