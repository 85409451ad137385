"""Every way to compute the layer, in one run: first whether it is right, then how long it takes."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from octavo.bench import upstream
from octavo.bench.layer import TOLERANCE, LayerCase, Results, baseline, errors
from octavo.bench.shapes import LayerShape, floor_ms
from octavo.bench.timing import graph_ms, transient_mib, wall_ms
from octavo.errors import EngineError, first_line
from octavo.ops.capability import triton_missing
from octavo.ops.choice import ENGINES, NUMERICS, choose, computes, why_not
from octavo.ops.dequant import CHUNK_BYTES
from octavo.ops.engines import Engine, ProductEngine
from octavo.ops.hopper.engine import HopperEngine


@dataclass(frozen=True)
class Way:
    """One line of the table: ``engine`` is octavo's, or a baseline's name with numerics ``bf16``. ``picked``: by auto.
    ``captures``: asks the device for no value, so that a CUDA graph takes it. ``case``: the layer, where it is another
    than that of the others; ``gradients``: of these inputs alone, and with none a forward.
    """

    numerics: str
    engine: str
    forward: Callable[[], Tensor]
    shared_buffer_mib: float = 0.0
    transposed: str = "none"
    picked: bool = False
    captures: bool = True
    case: LayerCase | None = None
    gradients: tuple[str, ...] | None = None

    @property
    def passes(self) -> str:
        """What is timed, in the schema of ``benchmarks/results``."""
        if self.gradients is None:
            return "fwd+bwd"
        return "fwd+dx" if self.gradients else "fwd"

    @property
    def tolerance(self) -> float:
        """Most relative error. ``dequant`` on torch's code rounds every partial result to bfloat16, as a bf16 layer."""
        return TOLERANCE["bf16" if self.engine == "dequant" and not self.captures else self.numerics]


@dataclass(frozen=True)
class Measured:
    """A way that was right, with its times; or why there are none."""

    way: Way
    row: dict[str, object] | None
    problem: str = ""


def ways(case: LayerCase, numerics: tuple[str, ...] = NUMERICS) -> tuple[list[Way], list[tuple[str, str, str]]]:
    """(baselines and every engine that can run the case, (numerics, engine, why not) of the others)."""
    banks = case.up.dequantize(torch.bfloat16), case.down.dequantize(torch.bfloat16)
    found = [Way("bf16", "grouped_mm" if case.device.type == "cuda" else "expert-loop", lambda: baseline(case, banks))]
    left = []
    if case.device.type == "cuda" and triton_missing() is None:
        found.append(Way("bf16", "bank-triton", lambda: baseline(case, None, triton=True)))
    else:
        left.append(("bf16", "bank-triton", "it needs a GPU and triton"))
    found.append(Way("bf16", "bank-eager", lambda: baseline(case, None)))
    try:
        found.append(upstream_way(case))
    except EngineError as error:
        left.append(("fp8", upstream.NAME, str(error)))
    facts = case.facts
    for mode in numerics:
        auto = choose("auto", mode, facts).at(case.rows_per_expert).name
        for name in ENGINES:
            if not computes(name, mode):
                continue
            if reason := why_not(name, facts):
                left.append((mode, name, reason))
                continue
            engine = choose(name, mode, facts).largest
            shared, transposed = 0.0, "none"
            if name == "dequant":
                shared = min(CHUNK_BYTES, 2 * case.up.codes.numel()) / 2**20
            elif name == "scaled" and not isinstance(engine, HopperEngine):
                shared, transposed = case.up.codes.numel() / 2**20, "built"
            forward = _forward(case, engine)
            # torch's own code asks for the offsets
            captures = type(engine) is not ProductEngine
            found.append(Way(mode, name, forward, round(shared, 1), transposed, name == auto, captures))
    return found, left


def _forward(case: LayerCase, engine: Engine) -> Callable[[], Tensor]:
    return lambda: case.octavo(engine)


def upstream_way(case: LayerCase) -> Way:
    """transformers' own FP8 experts; eager, because their kernel tunes itself as it runs.

    Raises:
        EngineError: they cannot be had here.
    """
    theirs = upstream.experts_case(case)
    forward = upstream.forward(theirs)
    return Way(
        "fp8", upstream.NAME, forward, captures=False, case=theirs, gradients=upstream.gradients(theirs, forward)
    )


def measure(case: LayerCase, chosen: list[Way]) -> Iterator[Measured]:
    """Each way in turn: compared with float64, and timed only where it is right. One that fails leaves the others."""
    exact, failures = case.exact(), _failures()
    for way in chosen:
        try:
            found = _measured(case, way, exact)
        except failures as error:
            found = Measured(way, None, f"failed: {type(error).__name__}: {first_line(error)}")
        yield found


def _failures() -> tuple[type[Exception], ...]:
    """What a way may end in: an engine's own words, torch's (out of memory, CUDA errors), and Triton's."""
    if triton_missing() is not None:
        return EngineError, RuntimeError
    from octavo.ops.kernels.common import FAILURE

    return EngineError, RuntimeError, FAILURE


def _measured(case: LayerCase, way: Way, exact: Results) -> Measured:
    case, want = (case, exact) if way.case is None else (way.case, way.case.exact())

    def step() -> Results:
        return case.step(way.forward, way.gradients)

    found = errors(want, step())
    worst = max(found, key=lambda name: found[name])
    if not found[worst] <= way.tolerance:
        limit = f"at most {way.tolerance:.1e}"
        return Measured(way, None, f"wrong: relative error {found[worst]:.1e} in {worst}, {limit}")
    return Measured(way, _row(case, way, step, found[worst]))


def _row(case: LayerCase, way: Way, step: Callable[[], object], error: float) -> dict[str, object]:
    """In the schema of ``benchmarks/results``; on the CPU ``ms`` is wall time, for there is no graph to replay."""
    device, name = case.device, device_name(case.device)
    eager = wall_ms(step, device)
    captures = device.type == "cuda" and way.captures
    replayed = graph_ms(step) if captures else None
    ms = eager if replayed is None else replayed.ms
    floor = floor_ms(case.shape, case.tokens, name) if way.gradients is None else None
    peak = transient_mib(step, device)
    return {
        "model": case.shape.name,
        "layout": case.shape.layout.kind,
        "tokens": case.tokens,
        "numerics": way.numerics,
        "engine": way.engine,
        "lora_rank": case.rank,
        "pass": way.passes,
        "ms": round(ms, 4),
        "eager_ms": round(eager, 4),
        "busy_ms": None if replayed is None else round(replayed.busy_ms, 4),
        "floor_ms": None if floor is None else round(floor, 4),
        "ratio": None if floor is None else round(ms / floor, 3),
        "transposed": way.transposed,
        "peak_transient_mib": None if peak is None else round(peak, 1),
        "shared_buffer_mib": way.shared_buffer_mib,
        "rel_err": float(f"{error:.3e}"),
        "device": name,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "commit": commit(),
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of the source tree that this runs from; ``None`` for an installed package."""
    source = Path(__file__).parents[3]
    if not (source / ".git").exists():
        return None
    done = subprocess.run(["git", "-C", str(source), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def default_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def headline(shape: LayerShape, tokens: int, rank: int, device: torch.device) -> str:
    """What is being measured, and on what."""
    how = "GPU time under graph replay" if device.type == "cuda" else "wall time; a CPU says nothing about a GPU"
    return (
        f"{shape.name}: {shape.experts} experts, top-{shape.top_k}, hidden {shape.hidden}, intermediate "
        f"{shape.intermediate}, {shape.layout} scales; {tokens} tokens, LoRA r={rank}, forward and backward; "
        f"{device_name(device)}, torch {torch.__version__}; {how}"
    )
