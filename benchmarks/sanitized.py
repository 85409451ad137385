"""Every kernel of an expert layer once, on a small ragged case and checked: what to run under compute-sanitizer.

    compute-sanitizer --tool memcheck --error-exitcode 1 python -m benchmarks.sanitized
    compute-sanitizer --tool racecheck --error-exitcode 1 python -m benchmarks.sanitized --only HopperEngine

All engines, numerics and scale layouts, forward and backward with LoRA: sorting, rounding, the products, gates, LoRA's
passes, combining, and the few tokens of decoding. ``--only`` takes a part of a name. torch's own memory is not cached,
so that an access past the end of a tensor is one outside of an allocation: set PYTORCH_NO_CUDA_MEMORY_CACHING=1.
"""

import argparse
import sys
from collections.abc import Iterator

import torch

from octavo.bench.layer import TOLERANCE, LayerCase, errors
from octavo.bench.shapes import LayerShape
from octavo.formats.scheme import ScaleLayout
from octavo.ops.fused import KernelEngine
from octavo.ops.hopper.engine import HopperEngine

# a last tile of features and of the contraction that is not whole; experts of few rows, of many, and of none
EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 8, 2, 320, 192
TOKENS = 333
FEW = 3
LAYOUTS = {
    "channel": ScaleLayout("channel"),
    "tensor": ScaleLayout("tensor"),
    "block": ScaleLayout("block", (128, 128)),
}
MODES = (("dequant", "exact"), ("fused", "exact"), ("scaled", "fp8_grad"), ("scaled", "fp8"))


def ragged(case: LayerCase) -> LayerCase:
    """``case`` with half of the tokens at the first expert and none at the last two."""
    index = case.index % (EXPERTS - 2)
    index[: case.tokens // 2, 0] = 0
    same = index[:, 0] == index[:, 1]
    index[same, 1] = (index[same, 1] + 1) % (EXPERTS - 2)
    case.index = index
    return case


def cases(device: torch.device) -> Iterator[tuple[str, LayerCase, KernelEngine, list[str] | None]]:
    """(name, the layer, the engine, the inputs whose gradients are wanted: none for a forward alone)."""
    for layout_name, layout in LAYOUTS.items():
        shape = LayerShape(layout_name, EXPERTS, TOP_K, HIDDEN, INTERMEDIATE, layout)
        many, few = ragged(LayerCase(shape, TOKENS, device)), LayerCase(shape, FEW, device)
        for kind in (KernelEngine, HopperEngine):
            for engine, numerics in MODES:
                made = kind(engine, numerics, wide=False)
                name = f"{kind.__name__}.{engine}.{numerics}.{layout_name}"
                yield name, many, made, None
                yield f"{name}.few", few, made, []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a part of KIND.ENGINE.NUMERICS.LAYOUT")
    args = parser.parse_args()
    wrong = []
    for name, case, engine, names in cases(torch.device("cuda")):
        if args.only not in name:
            continue
        got = case.step(lambda case=case, engine=engine: case.octavo(engine), names)  # type: ignore[misc]
        torch.cuda.synchronize()
        worst = max(errors(case.exact(), got).values())
        if not worst <= TOLERANCE[engine.numerics]:
            wrong.append(name)
        print(f"{name:44s} error {worst:.1e}{' WRONG' if name in wrong else ''}", flush=True)
    if wrong:
        sys.exit(f"wrong: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
