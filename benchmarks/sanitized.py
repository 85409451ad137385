"""Every kernel of an expert layer once, on a small ragged case and checked: what to run under compute-sanitizer.

    compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 1 python -m benchmarks.sanitized
    compute-sanitizer --tool racecheck --error-exitcode 1 python -m benchmarks.sanitized --tokens 70 --every-lane

All engines, numerics and scale layouts, forward and backward with LoRA: sorting, rounding, the products, gates, LoRA's
passes, combining, and the few tokens of decoding. ``--only`` takes a part of a name. torch's own memory is not cached,
so that an access past the end of a tensor is one outside of an allocation: set PYTORCH_NO_CUDA_MEMORY_CACHING=1.

racecheck takes minutes for what takes a second, hence fewer tokens. It follows an mbarrier from lane to lane: where one
lane arrives for its warp, as the products for Hopper have it, it reports every slot that is used again, in the simplest
right program too. With ``--every-lane`` all of them arrive. API errors are cuda-bindings looking for functions.
"""

import argparse
import sys
from functools import cache, partial
from itertools import product

import torch

from octavo.bench.layer import TOLERANCE, LayerCase, errors
from octavo.bench.shapes import LayerShape
from octavo.formats.scheme import ScaleLayout
from octavo.ops.fused import KernelEngine
from octavo.ops.hopper import compiler
from octavo.ops.hopper.engine import HopperEngine

# a last tile of features and of the contraction that is not whole; experts of few rows, of many, and of none
EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 8, 2, 320, 192
# of engine `scaled`, which multiplies whole blocks
WHOLE = (384, 384)
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


@cache
def layers(layout: str, whole: bool, tokens: int, device: torch.device) -> tuple[LayerCase, LayerCase]:
    """Of many tokens, and of few."""
    widths = WHOLE if whole else (HIDDEN, INTERMEDIATE)
    shape = LayerShape(layout, EXPERTS, TOP_K, *widths, LAYOUTS[layout])
    return ragged(LayerCase(shape, tokens, device)), LayerCase(shape, FEW, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a part of KIND.ENGINE.NUMERICS.LAYOUT")
    parser.add_argument("--tokens", type=int, default=333)
    parser.add_argument("--every-lane", action="store_true")
    parser.add_argument("--blocks", type=int, default=2, help="of a product for Hopper, so that each has several tiles")
    args = parser.parse_args()
    compiler.EVERY_LANE, compiler.MOST_BLOCKS = args.every_lane, args.blocks
    wrong = []
    for layout, kind, (engine, numerics) in product(LAYOUTS, (KernelEngine, HopperEngine), MODES):
        name = f"{kind.__name__}.{engine}.{numerics}.{layout}"
        if args.only not in name and args.only not in f"{name}.few":
            continue
        made = kind(engine, numerics, wide=False)
        many, few = layers(layout, engine == "scaled" and layout == "block", args.tokens, torch.device("cuda"))
        # forward and backward; of few tokens a forward alone
        for label, case, wanted in ((name, many, None), (f"{name}.few", few, [])):
            if args.only not in label:
                continue
            got = case.step(partial(case.octavo, made), wanted)
            torch.cuda.synchronize()
            worst = max(errors(case.exact(), got).values())
            if not worst <= TOLERANCE[numerics]:
                wrong.append(label)
            print(f"{label:44s} error {worst:.1e}{' WRONG' if label in wrong else ''}", flush=True)
    if wrong:
        sys.exit(f"wrong: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
