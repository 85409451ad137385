"""How exact the sums of the products for Hopper are: against float64 sums of the same E4M3 codes and scales.

    python -m benchmarks.sums

``bias``: how much of the sum is cut off, in the mean. ``rounding``: what E4M3 costs before any sum, for comparison.
bfloat16 results alone are off by 1.7e-3.
"""

import torch

from octavo.formats.scheme import ScaleLayout
from octavo.formats.weight import quantize
from octavo.ops.hopper.product import Rows, product
from octavo.ops.reference import folds_into_rows

ROWS, FEATURES = 512, 1024
LAYOUTS = (ScaleLayout("block", (128, 128)), ScaleLayout("channel"))


def main() -> None:
    torch.manual_seed(0)
    for layout in LAYOUTS:
        for flip in (False, True):
            for terms in (768, 2048, 7168, 16384):
                shape = (1, terms, FEATURES) if flip else (1, FEATURES, terms)
                weight = quantize(torch.randn(shape, device="cuda") * 0.02, layout)
                x = torch.randn(ROWS, terms, device="cuda")
                group = terms if flip or folds_into_rows(weight) else weight.block[1]
                grouped = x.unflatten(1, (-1, group))
                scales = grouped.abs().amax(-1) / 448
                codes = (grouped / scales[..., None]).to(torch.float8_e4m3fn)
                # a scale per row of the weight is in the rows of an input gradient already
                folded = flip and folds_into_rows(weight)
                dense = weight.codes.double().flatten(1, 2)[0] if folded else weight.dequantize(torch.float64)[0]
                right = dense if flip else dense.T
                want = (codes.double() * scales[..., None].double()).flatten(1) @ right
                true = x.double() @ right
                out = torch.empty(ROWS, FEATURES, device="cuda", dtype=torch.bfloat16)
                ends = torch.tensor([ROWS], device="cuda", dtype=torch.int32)
                product(Rows(codes.flatten(1).contiguous(), None, scales.contiguous()), weight, ends, out, flip=flip)
                got = out.double()
                error, bias = (got - want).norm() / want.norm(), (got * want).sum() / want.square().sum() - 1
                rounding = (want - true).norm() / true.norm()
                way = "input gradient" if flip else "forward"
                print(
                    f"{layout.kind:8s} {way:15s} {terms:6d} terms  error {error:.2e}  bias {bias:+.2e}  "
                    f"rounding {rounding:.2e}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
