"""One MoE layer, forward and backward with LoRA on both projections: time, share of the floor, memory, error.

    python -m benchmarks.layer --out benchmarks/results/layer-h200.json

The rows of ``octavo bench layer`` for both models at three sizes, in one run: kernels are compiled in a pool first, and
the ratios are over the floors of one H200, on whatever GPU. Weights of one layer (0.6 GB) exceed the L2, so replays
find it cold. The file is whole after every row.
"""

import argparse
import json
import subprocess
from functools import partial
from pathlib import Path

import torch

from benchmarks.compiling import in_pool
from benchmarks.shapes import FLOOR_MS, MODELS, TOKENS
from octavo.bench.layer import LayerCase
from octavo.bench.run import Measured, measure, ways
from octavo.bench.timing import Step
from octavo.ops.engines import Engine
from octavo.ops.hopper.engine import HopperEngine

SLOW = "reference"
"""An engine that is right everywhere and fast nowhere: minutes at these sizes."""


def engines() -> list[tuple[str, str, Engine]]:
    """(numerics, engine, the engine) of every way to compute the layer."""
    names = (("exact", "dequant"), ("exact", "fused"), ("fp8_grad", "scaled"), ("fp8", "scaled"))
    return [(numerics, name, HopperEngine(name, numerics, wide=False)) for numerics, name in names]


def blank_case(model: str, tokens: int) -> LayerCase:
    """A layer to compile for."""
    return LayerCase(MODELS[model], tokens, torch.device("cpu"), blank=True)


def compile_one(job: tuple[str, int, int]) -> None:
    """The Triton kernels of one engine; the products for Hopper are compiled by NVRTC, at first use."""
    import octavo.ops.hopper.engine as hopper

    model, tokens, number = job
    hopper.product = lambda *args, **kwargs: None  # type: ignore[assignment]
    case, engine = blank_case(model, tokens), engines()[number][2]
    case.step(lambda: case.octavo(engine))


def kernels_us(step: Step) -> list[tuple[str, float]]:
    """Every kernel of a step in order, with its time in microseconds."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    events = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    events.sort(key=lambda e: e.time_range.start)
    return [(e.name[:48], e.device_time) for e in events]


def over_floor(row: dict[str, object], commit: str) -> dict[str, object]:
    """``row`` with the ratio that is promised: over the H200's constant for the model and size."""
    if row["pass"] == "fwd+bwd":
        floor = FLOOR_MS[str(row["model"]), int(str(row["tokens"]))]
        row = row | {"floor_ms": floor, "ratio": round(float(str(row["ms"])) / floor, 3)}
    return row | {"commit": commit}


def line(found: Measured, row: dict[str, object] | None) -> str:
    """What is printed of a way."""
    if row is None:
        return found.problem.upper() if found.problem.startswith("wrong") else found.problem
    ratio = "" if row["ratio"] is None else f"x{row['ratio']:5.2f}"
    return (
        f"{row['ms']:8.3f} ms  {ratio:6s}  busy {row['busy_ms'] or 0:8.3f}  eager {row['eager_ms']:8.3f}  "
        f"err {row['rel_err']:.1e}  {row['peak_transient_mib']:.0f} MiB  {row['pass']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--tokens", nargs="*", type=int, default=list(TOKENS))
    parser.add_argument("--kernels", type=Path, help="write every kernel's time here")
    parser.add_argument("--commit", default="")
    args = parser.parse_args()
    sizes = sorted({min(args.tokens), max(args.tokens), *args.tokens})
    in_pool(compile_one, [(m, t, n) for m in args.models for t in sizes for n in range(len(engines()))])
    commit = args.commit or subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    rows: list[dict[str, object]] = []
    profiles = {}
    for name in args.models:
        for tokens in args.tokens:
            case = LayerCase(MODELS[name], tokens, torch.device("cuda"))
            chosen, left = ways(case)
            for found in measure(case, [way for way in chosen if way.engine != SLOW]):
                way = found.way
                label = f"{name:6s} {tokens:6d} {way.numerics:9s} {way.engine:12s}"
                row = None if found.row is None else over_floor(found.row, commit)
                print(label, line(found, row), flush=True)
                if row is None:
                    continue
                rows.append(row)
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps(rows, indent=1) + "\n")
                if args.kernels:
                    profiles[label] = kernels_us(partial((way.case or case).step, way.forward, way.gradients))
                    args.kernels.write_text(json.dumps(profiles))
            for numerics, engine, why in left:
                print(f"{name:6s} {tokens:6d} {numerics:9s} {engine:12s} not run: {why}", flush=True)
            del case, chosen
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
