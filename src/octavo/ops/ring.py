"""Experts' codes that stay in host memory: a ring of device buffers that layers take turns in, filled ahead of use.

A layer *takes* its buffer for as long as its products read it and *releases* it; copies run on a stream of their own,
into a buffer that was released, for the layers that followed this one last time. Which these are is learned: forward
goes up, backward comes down, and a recomputation and the gradient of the same layer share one copy. Nothing of a ring
is ever kept for backward; there the layer is taken again.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NoReturn

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from octavo.errors import EngineError

# Rows of the widest load that a kernel issues (tensor maps: 128 bytes), and more.
_ALIGNMENT = 512
SLOTS = 2
"""One layer computes while the next one comes."""

# (layer, whether in a backward pass)
_Visit = tuple[int, bool]


@dataclass(eq=False)
class _Slot:
    """A buffer of the ring, and the layer in it."""

    buffer: Tensor
    layer: int | None = None
    versions: tuple[int, ...] = ()
    views: list[Tensor] = field(default_factory=list)
    users: int = 0
    touched: int = 0
    ready: torch.cuda.Event | None = None
    released: torch.cuda.Event | None = None


class _Copies:
    """Copies from pinned memory on a stream beside the one that computes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def buffer(self, nbytes: int) -> _Slot:
        buffer = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        # A copy may still run when the ring is dropped.
        buffer.record_stream(self._stream)
        slot = _Slot(buffer)
        self.release(slot)
        return slot

    def fill(self, slot: _Slot, sources: Sequence[Tensor]) -> None:
        assert slot.released is not None
        self._stream.wait_event(slot.released)
        with torch.cuda.stream(self._stream):
            for place, source in zip(slot.views, sources, strict=True):
                place.copy_(source, non_blocking=True)
            slot.ready = self._stream.record_event()

    def wait(self, slot: _Slot) -> None:
        assert slot.ready is not None
        torch.cuda.current_stream(self._device).wait_event(slot.ready)

    def release(self, slot: _Slot) -> None:
        slot.released = torch.cuda.current_stream(self._device).record_event()

    def settle(self) -> None:
        """Nothing that the computing stream does from now on overlaps with a copy."""
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def synchronize(self) -> None:
        """Have the host wait until nothing is copied out of its memory any more."""
        self._stream.synchronize()


class _PlainCopies:
    """The same on the host alone, for machines without a GPU."""

    def buffer(self, nbytes: int) -> _Slot:
        return _Slot(torch.empty(nbytes, dtype=torch.uint8))

    def fill(self, slot: _Slot, sources: Sequence[Tensor]) -> None:
        for place, source in zip(slot.views, sources, strict=True):
            place.copy_(source)

    def wait(self, slot: _Slot) -> None:
        pass

    def release(self, slot: _Slot) -> None:
        pass

    def settle(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


class HostRing:
    """The ring of one model. ``num_slots`` buffers, each as large as the largest layer, from the first use on.

    ``device``: where layers compute; it follows the activations. ``copied``: layers copied so far.
    """

    def __init__(self, device: torch.device, num_slots: int = SLOTS) -> None:
        if num_slots < 1:
            raise EngineError(f"a ring of {num_slots} buffers holds no layer; give it 2, or more.")
        self.device = device
        self.num_slots = num_slots
        self.copied = 0
        self._layers: dict[int, tuple[Tensor, ...]] = {}
        self._slots: list[_Slot] = []
        self._copies: _Copies | _PlainCopies | None = None
        self._after: dict[_Visit, _Visit] = {}
        self._last: _Visit | None = None
        self._clock = 0

    def __deepcopy__(self, memo: dict[int, object]) -> NoReturn:
        raise EngineError(
            "A model with experts in host memory cannot be copied: the copy's experts would be neither pinned nor in "
            "its ring. Load it a second time, or load it with experts='resident'."
        )

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Let ``tensors``, the contiguous codes and scales of a layer in host memory, take turns in the ring.

        The layer is known by the memory of the first one. int32 tensors, bits of float32, arrive as float32.
        """
        key = tensors[0].data_ptr()
        self._layers[key] = tuple(tensors)
        _rings[key] = self

    @property
    def layer_nbytes(self) -> int:
        """Bytes of a buffer."""
        return max((_packed(tensors) for tensors in self._layers.values()), default=0)

    @property
    def buffers(self) -> list[Tensor]:
        """The ring's memory on the device; empty before the first use."""
        return [slot.buffer for slot in self._slots]

    @contextmanager
    def taken(self, layer: int, device: torch.device) -> Iterator[list[Tensor]]:
        """The tensors of ``layer`` on ``device``, for work that the current stream gets inside the block."""
        slot = self._take(layer, device)
        try:
            yield slot.views
        finally:
            slot.users -= 1
            self._copier().release(slot)

    def _take(self, layer: int, device: torch.device) -> _Slot:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise EngineError(
                "Experts in host memory cannot be captured in a CUDA graph: each layer waits for its copy. Turn graphs "
                "off, or load the model with experts='resident'."
            )
        self._settle(device)
        visit = (layer, torch._C._current_graph_task_id() != -1)
        slot = self._resident(layer) or self._fetch(layer)
        if slot is None:
            raise EngineError(f"all {self.num_slots} buffers of the ring are in use at once; give it more.")
        slot.users += 1
        self._touch(slot)
        self._copier().wait(slot)
        self._learn(visit)
        self._fetch_ahead(visit)
        return slot

    def _settle(self, device: torch.device) -> None:
        """Have buffers on ``device`` that every layer fits in."""
        if self._slots and self._slots[0].buffer.device == device and self._slots[0].buffer.nbytes >= self.layer_nbytes:
            return
        if self._copies is not None:
            self._copies.settle()
        self._slots.clear()
        self.device = device
        self._copies = _Copies(device) if device.type == "cuda" else _PlainCopies()
        # torch knows of no copy out of the middle of a pinned block, and would hand the block out again.
        weakref.finalize(self, self._copies.synchronize).atexit = False
        self._slots = [self._copies.buffer(self.layer_nbytes) for _ in range(self.num_slots)]

    def _copier(self) -> "_Copies | _PlainCopies":
        assert self._copies is not None
        return self._copies

    def _resident(self, layer: int) -> _Slot | None:
        """The buffer that holds ``layer`` as it is now in host memory."""
        versions = _versions(self._layers[layer])
        return next((slot for slot in self._slots if slot.layer == layer and slot.versions == versions), None)

    def _fetch(self, layer: int) -> _Slot | None:
        """Begin to copy ``layer`` into the buffer that was longest without use; ``None`` where all are in use."""
        free = [slot for slot in self._slots if slot.users == 0]
        if not free:
            return None
        slot, sources = min(free, key=lambda slot: slot.touched), self._layers[layer]
        slot.layer, slot.versions = layer, _versions(sources)
        slot.views = _carved(slot.buffer, sources)
        self._copier().fill(slot, sources)
        slot.views = [view.view(torch.float32) if view.dtype == torch.int32 else view for view in slot.views]
        self._touch(slot)
        self.copied += 1
        return slot

    def _fetch_ahead(self, visit: _Visit) -> None:
        for _ in range(self.num_slots - 1):
            following = self._after.get(visit)
            if following is None:
                return
            visit = following
            slot = self._resident(visit[0])
            if slot is not None:
                self._touch(slot)
            elif self._fetch(visit[0]) is None:
                return

    def _learn(self, visit: _Visit) -> None:
        before, self._last = self._last, visit
        if before is None or before == visit:
            return
        if before[0] == visit[0]:
            # The turn, where backward begins or ended: the layer is here already.
            self._after.pop(before, None)
        else:
            self._after[before] = visit

    def _touch(self, slot: _Slot) -> None:
        self._clock += 1
        slot.touched = self._clock


# Rings by the memory of their layers' first tensors: an operator gets tensors and nothing else.
_rings: "weakref.WeakValueDictionary[int, HostRing]" = weakref.WeakValueDictionary()


@contextmanager
def on_device(sides: Sequence[Tensor | None], device: torch.device) -> Iterator[list[Tensor | None]]:
    """``sides`` of an expert MLP, ``[weight, scales, bias, lora_A, lora_B]`` of up and of down, for work that the
    current stream gets inside the block: codes and scales in host memory are in the ring's buffers.

    Raises :class:`octavo.errors.EngineError` for codes in host memory that are in no ring.
    """
    codes = sides[0]
    assert codes is not None
    # tensors without numbers have no memory to be known by
    ring = None if not _rings or isinstance(codes, FakeTensor) else _rings.get(codes.data_ptr())
    if ring is None:
        if codes.device != device:
            raise EngineError(
                f"The experts' weights are on {codes.device} and the activations on {device}. Move both to one device; "
                "experts that stay in host memory come from octavo.load_model(..., experts='host')."
            )
        yield list(sides)
        return
    half = len(sides) // 2
    with ring.taken(codes.data_ptr(), device) as (up, up_scales, down, down_scales):
        yield [up, up_scales, *sides[2:half], down, down_scales, *sides[half + 2 :]]


def _versions(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(tensor._version for tensor in tensors)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _packed(tensors: Sequence[Tensor]) -> int:
    return sum(_aligned(tensor.nbytes) for tensor in tensors)


def _carved(buffer: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of ``buffer`` in the shapes and dtypes of ``like``."""
    views, start = [], 0
    for tensor in like:
        views.append(buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
        start += _aligned(tensor.nbytes)
    return views
