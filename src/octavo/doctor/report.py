"""The machine, the versions, what ``auto`` picks, and each engine that can run, tested in processes of its own.

Processes run side by side. Most of a first test is compiling kernels, each for one layout of scales, so where there are
cores for it an engine that compiles has a process for each layout.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version

import torch

import octavo
from octavo.bench.run import default_device, device_name
from octavo.doctor.selftest import CHECKS, LAYOUTS, Check
from octavo.ops.capability import architecture_of, triton_missing
from octavo.ops.choice import ENGINES, NUMERICS, Layer, choose, computes, why_not

PACKAGES = ("torch", "triton", "transformers", "peft", "trl", "accelerate", "safetensors")
# a first run compiles its kernels
_SECONDS = 300
# GPU memory that a test's process is given room for: a CUDA context, cuBLAS and the layer
_PROCESS_GB = 1.0
_ALL = tuple(layout.kind for layout in LAYOUTS)


@dataclass(frozen=True)
class Machine:
    """Where this runs. ``driver`` and what follows: of the GPU, ``None`` without one."""

    system: str
    python: str
    device: str
    architecture: str
    octavo: str
    packages: dict[str, str | None]
    driver: str | None = None
    cuda: str | None = None
    gpus: int = 0
    memory_gb: float | None = None


@dataclass(frozen=True)
class EngineReport:
    """One engine for one numerics mode: whether auto picks it, why it cannot run, and what its self-test found."""

    engine: str
    numerics: str
    auto: bool
    why_not: str | None
    checks: tuple[Check, ...] = ()
    crash: str = ""
    seconds: float = 0.0
    """Of its longest process, starting and compiling included."""

    @property
    def right(self) -> bool:
        """Whether every check of it passed; an engine that cannot run is not wrong."""
        return self.why_not is not None or (not self.crash and all(check.right for check in self.checks))


@dataclass(frozen=True)
class Report:
    """What ``octavo doctor`` found."""

    machine: Machine
    engines: tuple[EngineReport, ...]

    @property
    def healthy(self) -> bool:
        """Whether everything that auto picks here computes the right thing."""
        return all(report.right for report in self.engines if report.auto)

    def as_json(self) -> dict[str, object]:
        """What ``--json`` prints."""
        engines = [asdict(report) | {"right": report.right} for report in self.engines]
        return {"machine": asdict(self.machine), "engines": engines, "healthy": self.healthy}


@dataclass(frozen=True)
class _Test:
    """What one process tests of one engine: its checks on these layouts."""

    engine: str
    numerics: str
    layouts: tuple[str, ...]

    def __str__(self) -> str:
        part = "" if self.layouts == _ALL else f", {' and '.join(self.layouts)} scales"
        return f"{self.numerics} on {self.engine}{part}"


@dataclass(frozen=True)
class _Found:
    """What came of a :class:`_Test`."""

    checks: tuple[Check, ...]
    crash: str
    seconds: float


def examine(progress: Callable[[str], None] = lambda text: None) -> Report:
    """Look at the machine and test every engine that can run on it. ``progress``: told how far it is."""
    device = default_device()
    reports = []
    for numerics in NUMERICS:
        layers = [Layer(kind, device, torch.bfloat16) for kind in ("experts", "linear")]
        picked = {engine.name for layer in layers for _, engine in choose("auto", numerics, layer).steps}
        for name in ENGINES:
            if computes(name, numerics):
                reason = why_not(name, layers[0])
                reports.append(EngineReport(name, numerics, reason is None and name in picked, reason))
    tests = _split([report for report in reports if report.why_not is None], device)
    found: dict[tuple[str, str], list[_Found]] = defaultdict(list)
    for test, one in _run(tests, device, progress):
        found[test.engine, test.numerics].append(one)
    return Report(machine(device), tuple(_joined(report, found[report.engine, report.numerics]) for report in reports))


def _split(reports: Sequence[EngineReport], device: torch.device) -> list[_Test]:
    """The tests of these engines, those that compile first: they take longest."""
    compiling = [report for report in reports if device.type != "cpu" and report.engine != "reference"]
    others = [report for report in reports if report not in compiling]
    parts = [(kind,) for kind in _ALL] if len(compiling) * len(_ALL) <= _workers(device) else [_ALL]
    return [
        *(_Test(report.engine, report.numerics, part) for report in compiling for part in parts),
        *(_Test(report.engine, report.numerics, _ALL) for report in others),
    ]


def _workers(device: torch.device) -> int:
    """How many processes may run at once: one for each core, and as many as the GPU has room for."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if device.type != "cuda":
        return cores
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, min(cores, int(free / 1e9 / _PROCESS_GB)))


def _run(
    tests: Sequence[_Test], device: torch.device, progress: Callable[[str], None]
) -> Iterator[tuple[_Test, _Found]]:
    """Each test with what came of it, in the order in which they end."""
    if not tests:
        return
    workers = min(_workers(device), len(tests))

    def timed(test: _Test) -> _Found:
        began = time.perf_counter()
        checks, crash = self_test(device, test.engine, test.numerics, test.layouts, processes=workers)
        return _Found(checks, crash, time.perf_counter() - began)

    with ThreadPoolExecutor(workers) as pool:
        waiting = {pool.submit(timed, test): test for test in tests}
        for done in as_completed(list(waiting)):
            test = waiting.pop(done)
            yield test, done.result()
            left = f", now {next(iter(waiting.values()))}" if waiting else ""
            progress(f"{len(tests) - len(waiting)} of {len(tests)} tests done{left}")


def _joined(report: EngineReport, found: Sequence[_Found]) -> EngineReport:
    """``report`` with the results of its engine's processes, in the order of the layouts."""
    if not found:
        return report
    order = [(what, str(layout)) for what in CHECKS for layout in LAYOUTS]
    checks = sorted((check for one in found for check in one.checks), key=lambda c: order.index((c.what, c.layout)))
    crash = next((one.crash for one in found if one.crash), "")
    return replace(report, checks=tuple(checks), crash=crash, seconds=round(max(one.seconds for one in found), 1))


def self_test(
    device: torch.device, engine: str, numerics: str, layouts: Sequence[str] = _ALL, *, processes: int = 1
) -> tuple[tuple[Check, ...], str]:
    """(the checks of one engine on ``layouts``, how its process ended where it did not end well).

    ``processes``: as many share the cores.
    """
    threads = max(1, (os.cpu_count() or 1) // processes)
    what = [str(device), engine, numerics, str(threads), *layouts]
    command = [sys.executable, "-m", "octavo.doctor.selftest", *what]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return (), f"no answer within {_SECONDS} s"
    checks = tuple(Check(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith("{"))
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return checks, f"its process ended with {done.returncode}: {last}"
    if len(checks) != (expected := len(CHECKS) * len(layouts)):
        return checks, f"{len(checks)} of {expected} checks were made"
    return checks, ""


def machine(device: torch.device) -> Machine:
    """Where this runs, without running anything on the GPU."""
    packages = {name: _version(name) for name in PACKAGES}
    facts = Machine(
        f"{platform.system()} {platform.release()} {platform.machine()}",
        platform.python_version(),
        device_name(device),
        architecture_of(device).title,
        octavo.__version__,
        packages,
    )
    if device.type != "cuda":
        return facts
    memory = torch.cuda.get_device_properties(device).total_memory / 1e9
    cuda = torch.version.cuda or torch.version.hip
    return Machine(**asdict(facts) | {
        "driver": _driver(), "cuda": cuda, "gpus": torch.cuda.device_count(), "memory_gb": round(memory, 1)
    })  # fmt: skip


def _version(package: str) -> str | None:
    # torch of ROCm and of some platforms brings triton under another name
    if package == "triton" and triton_missing() is None:
        import triton

        return str(triton.__version__)
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    """The driver's version as its own tool tells it; ``None`` where that tool is missing or fails."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.split("\n")[0].strip() or None if done.returncode == 0 else None
