"""What a recording is made of: CUDA graphs that share one memory, and the fixed buffers that they read and write."""

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from octavo.errors import first_line
from octavo.ops.capture import capture_stream, capturing


class Unrecordable(RuntimeError):
    """A layer that cannot be recorded; the message goes on from "not recorded: "."""


class Recorder(Protocol):
    """A way to record work on buffers and to do it again."""

    kept_bytes: int
    """Of all recordings so far: memory from inside of one that was still in use when it ended; 0 is right."""

    def warm(self, work: Callable[[], None]) -> None:
        """Do ``work`` as often as it takes before it can be recorded; raises :class:`Unrecordable`."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record ``work`` without doing it: what is returned does it."""


class CudaRecorder:
    """CUDA graphs in one memory pool.

    What a graph allocates is free again when its recording ends, so the next one gets the same memory: all of them
    together take what the largest takes. Results must be copied to buffers from outside before the recording ends.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        # One stream for all: the pool hands memory to the stream that freed it.
        self._stream = capture_stream(device)
        self.kept_bytes = 0

    def warm(self, work: Callable[[], None]) -> None:
        """Twice, on the stream of the recording: libraries load, and cuBLAS gets its workspaces, outside of a graph.

        The second time nothing may wait for the GPU, which a recording could not.
        """
        torch.cuda.synchronize(self._device)
        # What the layers before left in reserve for their stream is of no use to this one.
        torch.cuda.empty_cache()
        generator = torch.cuda.default_generators[self._device.index]
        start = generator.get_state()
        try:
            with self._in_pool():
                self._on_stream(work)
            # Not the first time: a compiler that tunes draws random numbers too.
            before = generator.get_state()
            try:
                with self._in_pool(), _no_waiting():
                    self._on_stream(work)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                # It went well a moment ago, so this is what is not allowed now.
                raise Unrecordable(f"it waits for the GPU ({first_line(error)})") from error
            after = generator.get_state()
        finally:
            generator.set_state(start)
        if not torch.equal(before, after):
            raise Unrecordable("it draws random numbers, as dropout does, and each of its recordings would draw others")

    @contextmanager
    def _in_pool(self) -> Iterator[None]:
        """Inside the block memory comes from the graphs' pool, once there is one: a layer that warms up needs as much
        as the pool holds for recordings, and would have it a second time.
        """
        if not self._graphs:
            yield
            return
        index = self._device.index
        torch._C._cuda_beginAllocateToPool(index, self._pool)
        try:
            yield
        finally:
            torch._C._cuda_endAllocateToPool(index, self._pool)
            torch._C._cuda_releasePool(index, self._pool)

    def _on_stream(self, work: Callable[[], None]) -> None:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                work()
        finally:
            current.wait_stream(self._stream)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """See :class:`Recorder`."""
        torch.cuda.synchronize(self._device)
        # The pool cannot use what other pools hold in reserve, and warming left a layer's worth there.
        torch.cuda.empty_cache()
        if not self._graphs:
            # A pool ends with its last graph, whether or not its memory could be given back.
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with capturing(graph, self._pool, self._stream):
            # Not earlier: with the first graph of all torch allocates the generator's seed and offset.
            before = torch.cuda.memory_allocated(self._device)
            work()
        if torch.cuda.memory_allocated(self._device) > before:
            gc.collect()
        self._graphs.add(graph)
        self.kept_bytes += max(0, torch.cuda.memory_allocated(self._device) - before)
        replay: Callable[[], None] = graph.replay
        return replay


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Inside the block an operator that waits for the GPU raises."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        # torch says once that it does not detect them all; recording detects the rest
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


RECORDERS: dict[str, Callable[[torch.device], Recorder]] = {"cuda": CudaRecorder}
"""By type of device."""


class Slot:
    """A fixed buffer, and which tensor it was last filled from: that one need not be copied again."""

    def __init__(self, like: Tensor) -> None:
        self.buffer = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
        _dense(self.buffer).zero_()
        # Held, so that no other tensor can come to lie at its address.
        self._held: Tensor | None = None
        self._version = -1

    def put(self, tensor: Tensor) -> None:
        """Fill the buffer, unless it holds ``tensor`` as it is now."""
        held = self._held
        same = held is not None and held.data_ptr() == tensor.data_ptr() and held.stride() == tensor.stride()
        if not same or tensor._version != self._version:
            _dense(self.buffer).copy_(_dense(tensor))
            self._remember(tensor)

    def zero(self) -> None:
        """Fill the buffer with zeros."""
        self._held = None
        self.buffer.zero_()

    def give(self) -> Tensor:
        """A copy of what a recording wrote."""
        found = self.buffer.clone()
        self._remember(found)
        return found

    def write(self, tensor: Tensor) -> None:
        """From inside a recording."""
        _dense(self.buffer).copy_(_dense(tensor))
        self._held = None

    def forget(self) -> None:
        """A recording wrote the buffer."""
        self._held = None

    def _remember(self, tensor: Tensor) -> None:
        # detached: it shares the memory and the version, and holds no graph
        self._held, self._version = tensor.detach(), tensor._version


def _dense(tensor: Tensor) -> Tensor:
    """``tensor`` without its repetitions: dimensions of stride 0, as of an expanded mask, have one element."""
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[dim] > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


class Slots:
    """The buffers of all recordings of a model: recordings that are alike share theirs."""

    def __init__(self) -> None:
        self._slots: dict[tuple[object, ...], Slot] = {}

    def get(self, role: object, like: Tensor) -> Slot:
        """The slot for tensors like this one in this ``role``."""
        key = (role, like.shape, like.stride(), like.dtype, like.device)
        if key not in self._slots:
            self._slots[key] = Slot(like)
        return self._slots[key]

    def forget(self) -> None:
        """Their buffers were written by something else than `Slot.put`."""
        for slot in self._slots.values():
            slot.forget()

    @property
    def bytes(self) -> int:
        """What the buffers take."""
        return sum(slot.buffer.untyped_storage().nbytes() for slot in self._slots.values())
