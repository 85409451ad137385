"""The machine, the versions, what ``auto`` picks, and each engine that can run, tested in a process of its own."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

import octavo
from octavo.bench.run import default_device, device_name
from octavo.doctor.selftest import Check
from octavo.ops.capability import architecture_of, triton_missing
from octavo.ops.choice import ENGINES, NUMERICS, Layer, choose, computes, why_not

PACKAGES = ("torch", "triton", "transformers", "peft", "trl", "accelerate", "safetensors")
# a first run compiles its kernels
_SECONDS = 300
_CHECKS = 6


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


def examine(progress: Callable[[str], None] = lambda text: None) -> Report:
    """Look at the machine and test every engine that can run on it. ``progress``: told what is being tested."""
    device = default_device()
    reports = []
    for numerics in NUMERICS:
        layers = [Layer(kind, device, torch.bfloat16) for kind in ("experts", "linear")]
        picked = {engine.name for layer in layers for _, engine in choose("auto", numerics, layer).steps}
        for name in ENGINES:
            if not computes(name, numerics):
                continue
            if reason := why_not(name, layers[0]):
                reports.append(EngineReport(name, numerics, False, reason))
                continue
            progress(f"{numerics} on {name}")
            checks, crash = self_test(device, name, numerics)
            reports.append(EngineReport(name, numerics, name in picked, None, checks, crash))
    return Report(machine(device), tuple(reports))


def self_test(device: torch.device, engine: str, numerics: str) -> tuple[tuple[Check, ...], str]:
    """(the checks of one engine, how its process ended where it did not end well)."""
    command = [sys.executable, "-m", "octavo.doctor.selftest", str(device), engine, numerics]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return (), f"no answer within {_SECONDS} s"
    checks = tuple(Check(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith("{"))
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return checks, f"its process ended with {done.returncode}: {last}"
    if len(checks) != _CHECKS:
        return checks, f"{len(checks)} of {_CHECKS} checks were made"
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
