"""One linear layer in fp8 by each way to multiply it, beside exact and beside bfloat16: microseconds, error.

    python -m benchmarks.linear

``bank`` multiplies rounded operands in bfloat16, ``hopper`` is the experts' product with one expert, ``scaled_mm``
torch's rowwise product. Rounding is in all three. The error is that against exact.
"""

from functools import partial

import torch

from octavo.bench.timing import graph_ms
from octavo.formats.scheme import ScaleLayout
from octavo.formats.weight import quantize
from octavo.ops.matrix import MatrixEngine

# q, k and v, o of Qwen3-Coder; gate and up, down of Qwen3-8B; out, in features
SIZES = ((4096, 2048), (512, 2048), (2048, 4096), (12288, 4096), (4096, 12288))
LAYOUTS = (ScaleLayout("block", (128, 128)), ScaleLayout("channel"))
ROWS = (2048, 8192)


def ways(layout: ScaleLayout) -> dict[str, MatrixEngine]:
    found = {
        "exact": MatrixEngine("dequant", "exact", False, 0, False),
        "bank": MatrixEngine("scaled", "fp8", False, 0, False),
    }
    if layout.kind == "block":
        return found | {"hopper": MatrixEngine("scaled", "fp8", False, 0, False, True)}
    return found | {"scaled_mm": MatrixEngine("scaled", "fp8", False, 0, True)}


def main() -> None:
    torch.manual_seed(0)
    for features, columns in SIZES:
        plain = torch.randn(features, columns, device="cuda", dtype=torch.bfloat16) * 0.02
        for layout in LAYOUTS:
            weight = quantize(plain.float(), layout)
            for rows in ROWS:
                for transposed in (False, True):
                    x = torch.randn(rows, features if transposed else columns, device="cuda", dtype=torch.bfloat16)
                    right = plain if transposed else plain.T
                    found, exact = [f"bfloat16 {1e3 * graph_ms(partial(torch.matmul, x, right)).ms:.0f}"], None
                    for name, engine in ways(layout).items():
                        run = partial(engine.linear, x, weight, transposed=transposed)
                        y = run().double()
                        exact = y if exact is None else exact
                        error = ((y - exact).norm() / exact.norm()).item()
                        found.append(f"{name} {1e3 * graph_ms(run).ms:.0f} ({error:.1e})")
                    way = "input gradient" if transposed else "forward"
                    print(f"{features:6d} x {columns:5d} {layout.kind:8s} {rows:5d} {way:15s}", *found, flush=True)


if __name__ == "__main__":
    main()
