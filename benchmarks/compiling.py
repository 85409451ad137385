"""Compile Triton kernels for sm_90 in a pool of processes without touching the GPU, so that a run finds them
compiled.
"""

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from typing import Any


class _Utils:
    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132}

    def load_binary(self, *args: object) -> tuple[int, ...]:
        return (1, 1, 0, 0, 1024)


class CompileOnly:
    """A driver for which a launch is a compilation; operands may be CPU tensors that nobody ever fills."""

    utils = _Utils()
    launcher_cls = staticmethod(lambda source, metadata: lambda *a, **k: None)

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only() -> None:
    """Launch nothing from here on, in this process."""
    import triton

    from octavo.ops import fused
    from octavo.ops.kernels import product, sort

    sort_pairs = sort.sort_pairs

    def sort_to_zero(*args: Any) -> Any:
        # nothing was computed, and torch's own indexing must stay in range
        return tuple(tensor.zero_() for tensor in sort_pairs(*args))

    sort.sort_pairs = sort_to_zero
    triton.runtime.driver.set_active(CompileOnly())
    product.num_multiprocessors = lambda device: 132
    fused._runs_on = lambda device: True


def _guarded(task: tuple[Callable[[Any], None], Any]) -> str | None:
    function, job = task
    try:
        function(job)
    except Exception as error:  # noqa: BLE001  one tile that does not compile must not stop the others
        return f"{job}: {str(error)[:200]}"
    return None


def in_pool(function: Callable[[Any], None], jobs: Sequence[Any]) -> set[Any]:
    """Run ``function`` on every job with launches turned into compilations; returns (and prints) the jobs that
    failed.
    """
    began, failed = time.time(), set()
    workers = min(15, os.cpu_count() or 1, len(jobs))
    with multiprocessing.get_context("spawn").Pool(workers, initializer=compile_only) as pool:
        for job, problem in zip(jobs, pool.imap(_guarded, [(function, job) for job in jobs]), strict=True):
            if problem:
                print(problem)
                failed.add(job)
    print(f"compiled {len(jobs)} jobs in {time.time() - began:.0f} s", flush=True)
    return failed
