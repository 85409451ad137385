"""Work captured in a CUDA graph; what cannot be captured leaves torch's allocator as it was."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch.cuda import _POOL_HANDLE

# torch's allocators may go on asking a graph whose capture failed whether memory is for it: such graphs are kept.
_failed: list[torch.cuda.CUDAGraph] = []


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, pool: "_POOL_HANDLE", stream: torch.cuda.Stream) -> Iterator[None]:
    """Inside the block, what ``stream`` gets is not done but captured in ``graph``, with its memory in ``pool``.

    ``stream`` is the current one inside. The caller has synchronized the device. Raises what the block does, or
    RuntimeError of torch's where the work cannot be captured; then the graph is of no use.
    """
    collecting = gc.isenabled()
    # A collection could free a graph, or memory that waits for an event, in the middle.
    gc.disable()
    try:
        with torch.cuda.stream(stream):
            # Other threads (NCCL's, a logger, a loader that pins memory) may call CUDA meanwhile.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            done = False
            try:
                yield
                graph.capture_end()
                done = True
            finally:
                if not done:
                    _abandon(graph, pool, stream.device)
    finally:
        if collecting:
            gc.enable()


def _abandon(graph: torch.cuda.CUDAGraph, pool: "_POOL_HANDLE", device: torch.device) -> None:
    """End a capture that failed. torch ends none that CUDA has given up: its allocator would go on taking memory that
    other streams used for the graph's, and never give it out again.
    """
    _failed.append(graph)
    try:
        graph.capture_end()
    except RuntimeError:
        try:
            torch._C._cuda_endAllocateToPool(device.index, pool)
        except RuntimeError:
            # It was told before the failure.
            return
        torch._C._cuda_releasePool(device.index, pool)


@cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream of ``device`` for captures: cuBLAS keeps a workspace for each stream that it was ever used on."""
    return torch.cuda.Stream(device)
