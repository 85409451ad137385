"""The headers of safetensors files, read strictly and without loading a tensor.

Format: an unsigned 64-bit little-endian length, that many bytes of JSON, then the data
(https://huggingface.co/docs/safetensors, section Format).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from octavo.errors import CheckpointError

# Bits per element, by the names that safetensors writes.
DTYPE_BITS: dict[str, int] = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
# The limit of the safetensors library: a length beyond it is damage.
_LARGEST_HEADER = 100_000_000
_AGAIN = "The file is damaged or was cut off: download or write it again."


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


def read_header(file: Path) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file, by key, in the order of the header.

    Everything the header says is checked against the file: each range has the bytes of its dtype and shape, the ranges
    follow one another without a gap or an overlap, and they end where the file does.

    Raises: CheckpointError naming the file, the tensor, and what was found and expected.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or not 2 <= length <= min(_LARGEST_HEADER, size - 8):
                raise CheckpointError(
                    f"{file} has {size} bytes and says that {length} of them are its header, which cannot be. {_AGAIN}"
                )
            text = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}.") from error
    header = _parse(file, text)
    header.pop("__metadata__", None)
    data = 8 + length
    entries = {key: _entry(file, key, fields, data) for key, fields in header.items()}
    _check_ranges(file, entries.values(), data, size)
    return entries


def _parse(file: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text)
        # Each tensor has this field once, so a key given twice shows as a count that differs. Looking at every pair
        # while parsing costs as much as the rest of it.
        if isinstance(header, dict) and text.count(b'"data_offsets"') != len(header) - ("__metadata__" in header):
            json.loads(text, object_pairs_hook=lambda pairs: _unique(file, pairs))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"the header of {file} is not JSON ({error}). {_AGAIN}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"the header of {file} is a JSON {type(header).__name__}, expected an object. {_AGAIN}")
    return header


def _unique(file: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise CheckpointError(f"the header of {file} has the key {twice!r} twice. {_AGAIN}")
    return found


def _are_sizes(numbers: Iterable[object]) -> bool:
    # A loop: `all` over a generator takes three times as long, 75 000 times over. A bool is an int, and no size.
    for number in numbers:  # noqa: SIM110
        if type(number) is not int or number < 0:
            return False
    return True


def _entry(file: Path, key: str, fields: Any, data: int) -> TensorEntry:
    try:
        dtype, shape, (start, end) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
        well_formed = _are_sizes(shape) and _are_sizes((start, end))
    except (TypeError, KeyError, ValueError):
        well_formed = False
    if not well_formed:
        raise CheckpointError(
            f"{file}: the header gives {key!r} as {fields!r}, expected dtype, shape and data_offsets. {_AGAIN}"
        )
    bits = DTYPE_BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None:
        raise CheckpointError(f"{file}: {key!r} has the dtype {dtype!r}, which safetensors does not define. {_AGAIN}")
    if (end - start) * 8 != math.prod(shape) * bits:
        raise CheckpointError(
            f"{file}: {key!r} is {dtype} of shape {list(shape)}, {math.prod(shape) * bits / 8:g} bytes, and the "
            f"header gives it {end - start}. {_AGAIN}"
        )
    return TensorEntry(key, file, dtype, shape, data + start, data + end)


def _check_ranges(file: Path, entries: Iterable[TensorEntry], data: int, size: int) -> None:
    position, before = data, "the header"
    for entry in sorted(entries, key=attrgetter("start", "end")):
        if entry.start != position:
            what = "overlaps" if entry.start < position else "leaves a gap after"
            raise CheckpointError(
                f"{file}: {entry.key!r} begins at byte {entry.start} and {what} {before}, which ends at "
                f"{position}. {_AGAIN}"
            )
        position, before = entry.end, entry.key
    if position != size:
        found = "is cut off" if position > size else "has bytes that belong to no tensor"
        raise CheckpointError(
            f"{file} {found}: its header accounts for {position} bytes, the file has {size}. {_AGAIN}"
        )
