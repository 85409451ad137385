"""Captures that fail leave torch's allocator as it was. What torch does in C++ stands here in a few lines."""

import gc
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from octavo.integrations.recorder import CudaRecorder
from octavo.ops import capture
from octavo.ops.capture import capturing

POOL = (0, 7)


class Allocator:
    """Captures that take memory for their pool, and how many uses of a pool nobody gave back."""

    def __init__(self) -> None:
        self.underway: list[tuple[int, int]] = []
        self.uses = 0
        self.bytes = 0
        self.handles = 0
        self.captured: list[tuple[int, int]] = []

    def handle(self) -> tuple[int, int]:
        self.handles += 1
        return (0, self.handles)

    def end(self, device: int, pool: tuple[int, int]) -> None:
        if pool not in self.underway:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.underway.remove(pool)

    def release(self, device: int, pool: tuple[int, int]) -> None:
        self.uses -= 1


class Graph:
    """``given_up``: CUDA ended the capture by itself. ``too_large``: it is captured, and cannot be made to run."""

    def __init__(self, allocator: Allocator, *, given_up: bool = False, too_large: bool = False) -> None:
        self._allocator, self._given_up, self._too_large = allocator, given_up, too_large
        self.ended = False

    def capture_begin(self, pool: tuple[int, int], capture_error_mode: str) -> None:
        # of the generator, once
        self._allocator.bytes += 1024
        self._pool = pool
        self._allocator.captured.append(pool)
        self._allocator.underway.append(pool)
        self._allocator.uses += 1

    def capture_end(self) -> None:
        if self._given_up or self.ended:
            raise RuntimeError("operation failed due to a previous error during capture")
        self._allocator.end(0, self._pool)
        self.ended = True
        if self._too_large:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def replay(self) -> None:
        pass


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> Allocator:
    made = Allocator()
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", made.end)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", made.release)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: made.bytes)
    for name in ("synchronize", "empty_cache", "Stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: SimpleNamespace(device=torch.device("cuda", 0)))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", made.handle)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(made))
    monkeypatch.setattr(capture, "_failed", [])
    return made


def captured(graph: Graph, work: Callable[[], None]) -> None:
    with capturing(graph, POOL, torch.cuda.Stream()):  # type: ignore[arg-type]
        assert not gc.isenabled()
        work()


def waits() -> None:
    raise RuntimeError("it waits")


def nothing() -> None:
    pass


@pytest.mark.parametrize(("work", "error"), [(waits, "it waits"), (nothing, "previous error")])
def test_a_capture_that_cuda_gave_up_is_ended(allocator: Allocator, work: Callable[[], None], error: str) -> None:
    graph = Graph(allocator, given_up=True)
    with pytest.raises(RuntimeError, match=error):
        captured(graph, work)
    assert allocator.underway == []
    assert allocator.uses == 0
    # the allocator may hold its address
    assert capture._failed == [graph]
    assert gc.isenabled()


@pytest.mark.parametrize(("work", "too_large", "error"), [(waits, False, "it waits"), (nothing, True, "out of memory")])
def test_a_graph_that_was_captured_gives_its_own_pool_back(
    allocator: Allocator, work: Callable[[], None], too_large: bool, error: str
) -> None:
    with pytest.raises(RuntimeError, match=error):
        captured(Graph(allocator, too_large=too_large), work)
    assert allocator.underway == []
    assert allocator.uses == 1


def test_memory_of_the_generator_is_not_kept_from_inside(allocator: Allocator) -> None:
    recorder = CudaRecorder(torch.device("cuda", 0))
    recorder.record(nothing)
    assert recorder.kept_bytes == 0

    def keeps() -> None:
        allocator.bytes += 512

    recorder.record(keeps)
    assert recorder.kept_bytes == 512


def test_recordings_share_a_pool_while_there_is_one(allocator: Allocator) -> None:
    recorder = CudaRecorder(torch.device("cuda", 0))
    held = [recorder.record(nothing) for _ in range(3)]
    assert len(set(allocator.captured)) == 1
    held.clear()
    recorder.record(nothing)
    assert allocator.captured[-1] != allocator.captured[0]
