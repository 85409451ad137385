"""How a step is timed: GPU time under CUDA-graph replay, wall time, and the memory it takes for a while."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from octavo.ops.capture import capture_stream, capturing

Step = Callable[[], object]

REST_SECONDS = 0.5
"""Before a captured step is timed. A GPU that has been busy for a tenth of a second holds its clock down for its power:
without a rest a step would be timed by what ran before it.
"""
BUSY_SECONDS = 0.5
"""For how long it is replayed until it is timed as one that never rests."""


@dataclass(frozen=True)
class Replayed:
    """Milliseconds of a step on the GPU: ``ms`` after a rest, ``busy_ms`` when it has been replayed for a while."""

    ms: float
    busy_ms: float


def graph_ms(step: Step, repeats: int = 9) -> Replayed:
    """Median GPU times of a captured ``step``: launches cost nothing, as in a compiled or captured model."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    device, graph = torch.device("cuda", torch.cuda.current_device()), torch.cuda.CUDAGraph()
    with capturing(graph, torch.cuda.graph_pool_handle(), capture_stream(device)):
        kept = step()
    found = rested_and_busy(graph.replay, repeats)
    del kept
    return found


def rested_and_busy(step: Step, repeats: int = 9) -> Replayed:
    """Median GPU times of ``step``, which the host launches ahead of the GPU."""
    torch.cuda.synchronize()
    time.sleep(REST_SECONDS)
    rested = launched_ms(step, repeats)
    until = time.perf_counter() + BUSY_SECONDS
    while time.perf_counter() < until:
        for _ in range(repeats):
            step()
        torch.cuda.synchronize()
    return Replayed(rested, launched_ms(step, repeats))


def launched_ms(step: Step, repeats: int = 9) -> float:
    """Median GPU time of ``step`` from one event to the next, after two that are not counted: what launching it costs
    the host shows where the GPU is done sooner.
    """
    for _ in range(2):
        step()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        start.record()
        step()
        end.record()
    torch.cuda.synchronize()
    times: list[float] = sorted(start.elapsed_time(end) for start, end in events)
    return times[repeats // 2]


def wall_ms(step: Step, device: torch.device, repeats: int = 5) -> float:
    """Median wall time of ``step`` as Python runs it."""
    times = []
    for _ in range(repeats):
        _wait(device)
        began = time.perf_counter()
        step()
        _wait(device)
        times.append((time.perf_counter() - began) * 1e3)
    return sorted(times)[repeats // 2]


def transient_mib(step: Step, device: torch.device) -> float | None:
    """Most memory of a ``step`` above what is held before it; ``None`` on the CPU, where torch does not count."""
    if device.type != "cuda":
        return None
    _wait(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    _wait(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
