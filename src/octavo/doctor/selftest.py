"""One engine against float64, as lines of JSON: ``python -m octavo.doctor.selftest DEVICE ENGINE NUMERICS THREADS
LAYOUT...``, a layout being ``channel``, ``tensor`` or ``block``.

A process of its own: a kernel that breaks the CUDA context, or hangs, takes nothing with it.
"""

import json
import sys
from dataclasses import asdict, dataclass

import torch

from octavo.bench.layer import TOLERANCE, LayerCase, errors
from octavo.bench.shapes import LayerShape
from octavo.errors import OctavoError
from octavo.formats.scheme import ScaleLayout
from octavo.ops.choice import choose, linear_layer
from octavo.ops.linear import float8_linear
from octavo.ops.weights import WeightSpec, storage

# 300 tokens on 8 experts: rows per expert that are no multiple of a tile
SHAPE = (8, 2, 256, 128)
TOKENS = 300
LAYOUTS = (ScaleLayout("channel"), ScaleLayout("tensor"), ScaleLayout("block", (128, 128)))
# twice what a layer of a real model may have: sums are shorter here, and a wrong scale is off by far more
_MARGIN = 2


@dataclass(frozen=True)
class Check:
    """One comparison. ``error``: the worst relative error of ``worst``, against at most ``limit``; ``problem``: why it
    did not come to that.
    """

    what: str
    layout: str
    error: float | None
    worst: str
    limit: float
    problem: str = ""

    @property
    def right(self) -> bool:
        """Whether it ran and was within its limit."""
        return self.error is not None and self.error <= self.limit


def check_experts(layout: ScaleLayout, engine: str, numerics: str, device: torch.device) -> Check:
    """An expert MLP with LoRA: its output, every gradient, and a forward of two tokens without gradient."""
    limit = _limit(engine, numerics)
    case = LayerCase(LayerShape("self-test", *SHAPE, layout), TOKENS, device)
    chosen = choose(engine, numerics, case.facts)
    found = errors(case.exact(), case.step(lambda: case.octavo(chosen.at(case.rows_per_expert))))
    few = LayerCase(LayerShape("self-test", *SHAPE, layout), 2, device, seed=1)
    with torch.no_grad():
        y = few.octavo(chosen.at(few.rows_per_expert))
    found["y of two tokens"] = errors({"y": few.exact()["y"]}, {"y": y})["y"]
    worst = max(found, key=lambda name: found[name])
    return Check("experts", str(layout), found[worst], worst, limit)


def check_linear(layout: ScaleLayout, engine: str, numerics: str, device: torch.device) -> Check:
    """A linear layer: output and input gradient, for few rows and for many."""
    case = LayerCase(LayerShape("self-test", *SHAPE, layout), TOKENS, device)
    weight = case.down.expert(0)
    codes, scales = (tensor[0] for tensor in storage(weight))
    spec = WeightSpec(True, 1, weight.block)
    chosen = choose(engine, numerics, linear_layer(device, torch.bfloat16, spec, codes.shape))
    dense = weight.dequantize()[0].double()
    found: dict[str, float] = {}
    for rows in (5, TOKENS):
        x = torch.randn(rows, codes.shape[1], device=device).to(torch.bfloat16).requires_grad_()
        dy = torch.randn(rows, codes.shape[0], device=device).to(torch.bfloat16)
        y = float8_linear(x, codes.view(torch.uint8), scales, spec, chosen.at(rows))
        (dx,) = torch.autograd.grad(y, x, dy)
        want = {f"y of {rows} rows": x.detach().double() @ dense.T, f"dx of {rows} rows": dy.double() @ dense}
        found |= errors(want, dict(zip(want, (y.detach(), dx), strict=True)))
    worst = max(found, key=lambda name: found[name])
    return Check("linear", str(layout), found[worst], worst, _limit(engine, numerics))


def _limit(engine: str, numerics: str) -> float:
    return _MARGIN * TOLERANCE["bf16" if engine == "dequant" else numerics]


CHECKS = {"experts": check_experts, "linear": check_linear}


def main() -> None:
    """Print a :class:`Check` for each kind of layer and scale layout."""
    device, engine, numerics, threads, *kinds = torch.device(sys.argv[1]), *sys.argv[2:]
    torch.set_num_threads(int(threads))
    for what, check in CHECKS.items():
        for layout in LAYOUTS:
            if layout.kind not in kinds:
                continue
            try:
                done = check(layout, engine, numerics, device)
            except OctavoError as error:
                done = Check(what, str(layout), None, "", _limit(engine, numerics), str(error))
            print(json.dumps(asdict(done)), flush=True)


if __name__ == "__main__":
    main()
