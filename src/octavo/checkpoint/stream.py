"""Tensors of safetensors files, each byte read once and in the order of the files, put where they belong.

Threads read pieces of the files, straight into host memory, or into a few fixed buffers that are copied to a GPU. Those
are pinned: a copy out of pinned memory runs beside the reads, at the rate of the bus (55 GB/s on an H200, against 3 to
4 out of pageable memory), so a load takes about as long as reading the files does.
"""

from __future__ import annotations

import os
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from octavo.checkpoint.headers import TensorEntry
from octavo.errors import CheckpointError

TORCH_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "F16": torch.float16,
    "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip
# On the way to a GPU each thread fills one buffer while the other is copied out of: 8 x 2 x 16 MiB, 0.27 GB of host
# memory.
PIECE_BYTES = 16 << 20
_NUM_THREADS = 8
_BUFFERS = 2
# POSIX lets a system take as few as 16 at once; Linux and macOS take 1024.
_VECTORS = 1024


@dataclass(frozen=True, slots=True)
class _Segment:
    """The part of a tensor that lies in a piece: its bytes ``start`` to ``end``."""

    key: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class _Piece:
    """Adjacent bytes of a file, read at once; ``segments`` are all of them, in order."""

    file: Path
    start: int
    nbytes: int
    segments: tuple[_Segment, ...]


def _pieces(entries: Iterable[TensorEntry], limit: int) -> Iterator[_Piece]:
    """``entries`` in pieces of at most ``limit`` bytes, file by file in the order given, by offset within each."""
    files: dict[Path, list[TensorEntry]] = defaultdict(list)
    for entry in entries:
        files[entry.file].append(entry)
    for file, inside in files.items():
        segments: list[_Segment] = []
        first = position = 0
        for entry in sorted(inside, key=lambda entry: entry.start):
            at = entry.start
            while at < entry.end:
                if segments and (at != position or position - first >= limit):
                    yield _Piece(file, first, position - first, tuple(segments))
                    segments = []
                if not segments:
                    first = at
                until = min(entry.end, first + limit)
                segments.append(_Segment(entry.key, at - entry.start, until - entry.start))
                at = position = until
        if segments:
            yield _Piece(file, first, position - first, tuple(segments))


class Buffers:
    """The buffers of one thread, and how what is in them gets to its place. In plain host memory, copied at once."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self._device = device
        self._all = self._memory(nbytes)
        self._next = 0

    def _memory(self, nbytes: int) -> list[Tensor]:
        return [torch.empty(nbytes, dtype=torch.uint8) for _ in range(_BUFFERS)]

    def free(self) -> Tensor:
        """A buffer that nothing reads any more."""
        self._next = (self._next + 1) % len(self._all)
        return self._all[self._next]

    def copy(self, parts: list[tuple[Tensor, Tensor]]) -> torch.cuda.Event | None:
        """Copy each (place, bytes) of the last buffer; the event after which they are there, if that is not now."""
        for place, found in parts:
            place.copy_(found)
        return None


class PinnedBuffers(Buffers):
    """Pinned ones, copied to a GPU on a stream of their own."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        super().__init__(nbytes, device)
        self._stream = torch.cuda.Stream(device)
        self._read: list[torch.cuda.Event | None] = [None] * _BUFFERS

    def _memory(self, nbytes: int) -> list[Tensor]:
        return [torch.empty(nbytes, dtype=torch.uint8, pin_memory=True) for _ in range(_BUFFERS)]

    def free(self) -> Tensor:
        buffer = super().free()
        event = self._read[self._next]
        if event is not None:
            event.synchronize()
        return buffer

    def copy(self, parts: list[tuple[Tensor, Tensor]]) -> torch.cuda.Event | None:
        # A place may be memory that work of the computing stream still uses.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for place, found in parts:
                place.copy_(found, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._read[self._next] = event
        return event


class Stream:
    """Reads ``entries`` in the background, from the moment it is entered, until it is left.

    ``places``: by key, a contiguous tensor of the entry's bytes, on any device, that it is read into; others get memory
    on ``device`` once their turn comes. Reading never waits for :meth:`take`. ``buffers``: for what does not go to host
    memory, which is read into directly.
    """

    def __init__(
        self,
        entries: Iterable[TensorEntry],
        device: torch.device,
        places: Mapping[str, Tensor] | None = None,
        *,
        piece_bytes: int = PIECE_BYTES,
        num_threads: int = _NUM_THREADS,
        buffers: type[Buffers] | None = None,
    ) -> None:
        self._entries = {entry.key: entry for entry in entries}
        self._device = device
        self._places = {key: place.view(torch.uint8).view(-1) for key, place in (places or {}).items()}
        self._pieces = list(_pieces(self._entries.values(), piece_bytes))
        self._left = Counter(segment.key for piece in self._pieces for segment in piece.segments)
        self._events: dict[str, list[torch.cuda.Event]] = defaultdict(list)
        self._turn = iter(self._pieces)
        self._changed = threading.Condition()
        self._failed: Future[None] | None = None
        self._stopped = False
        self._piece_bytes = piece_bytes
        self._buffers = buffers or (PinnedBuffers if device.type == "cuda" else None)
        self._num_threads = min(num_threads, max(1, len(self._pieces)))
        self._pool = ThreadPoolExecutor(self._num_threads, thread_name_prefix="octavo-load")

    def __enter__(self) -> Self:
        for _ in range(self._num_threads):
            self._pool.submit(self._work).add_done_callback(self._ended)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._pool.shutdown()
        if self._device.type == "cuda":
            # Nothing is written any more into memory that may be given back now.
            torch.cuda.synchronize(self._device)
        self._places.clear()

    def take(self, key: str) -> Tensor:
        """The tensor ``key``, once it is there; for work of the current stream. To be asked for once.

        Raises :class:`CheckpointError` when a file cannot be read to the end.
        """
        entry = self._entries[key]
        with self._changed:
            self._changed.wait_for(lambda: self._left[key] == 0 or self._stopped)
            if self._failed is not None:
                self._failed.result()
            assert self._left[key] == 0, f"the stream was left before {key!r} was read"
            events = self._events.pop(key, [])
            place = self._places.pop(key, None)
        for event in events:
            torch.cuda.current_stream(self._device).wait_event(event)
        if place is None:
            # It has no bytes.
            place = torch.empty(0, dtype=torch.uint8, device=self._device)
        return place.view(TORCH_DTYPES[entry.dtype]).view(entry.shape)

    def _work(self) -> None:
        with torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext():
            try:
                self._read_pieces()
            except OSError as error:
                raise CheckpointError(f"{error.filename} cannot be read: {error.strerror}.") from error

    def _ended(self, worker: Future[None]) -> None:
        with self._changed:
            if worker.exception() is not None:
                self._failed = self._failed or worker
                self._stopped = True
            self._changed.notify_all()

    def _read_pieces(self) -> None:
        buffers = None if self._buffers is None else self._buffers(self._piece_bytes, self._device)
        handles: dict[Path, int] = {}
        try:
            while (piece := self._next_piece()) is not None:
                handle = handles.get(piece.file)
                if handle is None:
                    # A handle for each thread: the kernel reads ahead by handle.
                    handle = handles[piece.file] = os.open(piece.file, os.O_RDONLY)
                places = [self._place(segment.key)[segment.start : segment.end] for segment in piece.segments]
                if buffers is None or all(map(_is_on_host, places)):
                    _read(handle, piece, places)
                    self._arrived(piece, None)
                else:
                    buffer = buffers.free()[: piece.nbytes]
                    _read(handle, piece, [buffer])
                    parts = buffer.split([place.numel() for place in places])
                    self._arrived(piece, buffers.copy(list(zip(places, parts, strict=True))))
        finally:
            for handle in handles.values():
                os.close(handle)

    def _next_piece(self) -> _Piece | None:
        with self._changed:
            return None if self._stopped else next(self._turn, None)

    def _place(self, key: str) -> Tensor:
        place = self._places.get(key)
        if place is None:
            with self._changed:
                place = self._places.get(key)
                if place is None:
                    place = torch.empty(self._entries[key].nbytes, dtype=torch.uint8, device=self._device)
                    self._places[key] = place
        return place

    def _arrived(self, piece: _Piece, event: torch.cuda.Event | None) -> None:
        with self._changed:
            for segment in piece.segments:
                self._left[segment.key] -= 1
                if event is not None:
                    self._events[segment.key].append(event)
            self._changed.notify_all()


def _is_on_host(place: Tensor) -> bool:
    return place.device.type == "cpu"


def _read(handle: int, piece: _Piece, into: list[Tensor]) -> None:
    """Fill ``into``, host memory one after another, with the bytes of ``piece``."""
    views = [memoryview(tensor.numpy().data) for tensor in into]
    position, end = piece.start, piece.start + piece.nbytes
    while position < end:
        count = os.preadv(handle, views[:_VECTORS], position)
        if count == 0:
            raise CheckpointError(
                f"{piece.file} ends at byte {position}, and its header speaks of {end}: it became shorter while it was "
                "read. Load it again once it is complete."
            )
        position += count
        while views and count >= len(views[0]):
            count -= len(views.pop(0))
        if count:
            views[0] = views[0][count:]
