"""Time the grouped product alone under many tiles: where the table in octavo/ops/kernels/tiles.py comes from.

python benchmarks/products.py OUT.json            on a GPU; compiles in a pool first
"""

import json
import sys
from pathlib import Path

import torch

from benchmarks.compiling import in_pool
from benchmarks.shapes import MODELS, TOKENS
from octavo.bench.shapes import LayerShape
from octavo.bench.timing import launched_ms
from octavo.formats.weight import Float8Weight
from octavo.ops.kernels import product as kernel
from octavo.ops.kernels.product import Gradient, Lora, Operand, Stack, Tiles, product

T = Tiles
BANK = [
    T(128, 256, 64, 8, 3),
    T(128, 256, 64, 8, 4),
    T(256, 128, 64, 8, 3),
    T(256, 128, 64, 8, 4),
    T(128, 128, 64, 8, 4),
    T(128, 128, 64, 4, 3, 2),
    T(64, 256, 64, 8, 4),
    T(64, 256, 64, 4, 4),
    T(64, 128, 64, 4, 4, 2),
    T(64, 128, 128, 4, 3),
    T(128, 128, 128, 8, 3),
    T(64, 256, 128, 8, 2),
]
BANK_UP = [
    T(128, 128, 64, 8, 3),
    T(128, 128, 64, 8, 4),
    T(64, 128, 64, 8, 4),
    T(64, 128, 64, 4, 4),
    T(64, 64, 64, 4, 4, 2),
    T(128, 64, 64, 8, 4),
    T(128, 64, 64, 4, 3, 2),
    T(256, 64, 64, 8, 4),
    T(128, 128, 128, 8, 2),
]
LEFT = [
    T(t.rows, t.columns, t.step, t.warps, t.stages, t.resident, True)
    for t in (
        T(128, 128, 64, 8, 3),
        T(128, 128, 64, 8, 4),
        T(64, 128, 64, 8, 4),
        T(64, 128, 128, 8, 3),
        T(128, 64, 128, 4, 3),
        T(64, 128, 128, 4, 3),
        T(256, 64, 64, 8, 4),
        T(256, 64, 128, 4, 3),
        T(256, 128, 64, 8, 3),
        T(64, 256, 64, 8, 3),
        T(128, 256, 64, 8, 3),
        T(64, 64, 128, 4, 4, 2),
        T(128, 128, 128, 8, 3),
        T(64, 128, 64, 4, 4, 2),
    )
]
LEFT_UP = [
    T(t.rows, t.columns, t.step, t.warps, t.stages, t.resident, True)
    for t in (
        T(64, 128, 64, 8, 4),
        T(128, 128, 64, 8, 3),
        T(128, 128, 64, 8, 4),
        T(128, 64, 64, 4, 4),
        T(64, 64, 64, 4, 4, 2),
        T(64, 64, 128, 4, 3),
        T(128, 64, 128, 4, 3),
        T(256, 64, 64, 8, 4),
        T(64, 128, 128, 8, 2),
        T(128, 128, 128, 8, 2),
    )
]
CODES_GRAD = [
    T(128, 128, 64, 8, 3),
    T(128, 128, 64, 8, 4),
    T(64, 128, 64, 8, 4),
    T(64, 128, 64, 4, 4),
    T(64, 128, 64, 4, 4, 2),
    T(128, 128, 64, 4, 3),
    T(256, 128, 64, 8, 3),
    T(128, 128, 32, 8, 4),
    T(64, 128, 128, 8, 3),
    T(128, 64, 64, 4, 4, 2),
    T(128, 128, 64, 8, 3, 1, True),
    T(64, 128, 64, 8, 3, 1, True),
]
SCALED = [
    T(128, 128, 128, 8, 3),
    T(128, 128, 128, 8, 4),
    T(128, 128, 128, 4, 3),
    T(64, 128, 128, 4, 4, 2),
    T(64, 128, 128, 8, 4),
    T(128, 256, 128, 8, 3),
    T(128, 256, 128, 8, 4),
    T(256, 128, 128, 8, 3),
    T(64, 256, 128, 8, 4),
    T(64, 256, 128, 4, 4),
    T(128, 128, 128, 8, 3, 2),
]
SCALED_UP = [
    T(128, 128, 128, 8, 3),
    T(128, 128, 128, 8, 4),
    T(64, 128, 128, 8, 4),
    T(64, 128, 128, 4, 4),
    T(64, 64, 128, 4, 4, 2),
    T(128, 64, 128, 8, 4),
    T(128, 64, 128, 4, 3, 2),
]
SITES = {"up": BANK_UP, "down": BANK, "down_grad": BANK, "up_grad": BANK}


def candidates(way: str, site: str) -> list[Tiles]:
    if way == "bank":
        return BANK_UP if site == "up" else BANK
    if way == "codes":
        return LEFT_UP if site == "up" else LEFT if site == "down" else CODES_GRAD
    return SCALED_UP if site == "up" else SCALED


class Problem:
    """The operands of one product, random on a GPU and never touched where only compilation is wanted."""

    def __init__(self, model: LayerShape, tokens: int, way: str, site: str, device: str) -> None:
        E, H, I = model.experts, model.hidden, model.intermediate  # noqa: E741
        M = tokens * model.top_k
        bf16 = {"dtype": torch.bfloat16, "device": device}

        def rand(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return torch.randn(*shape, **bf16) * scale if device == "cuda" else torch.empty(*shape, **bf16)

        up = site.startswith("up")
        parts, rows, cols = (2, I, H) if up else (1, H, I)
        block = model.layout.block_of(rows, cols)
        codes = torch.empty((E, parts, rows, cols), dtype=torch.float8_e4m3fn, device=device)
        scales = torch.empty((E, parts, -(-rows // block[0]), -(-cols // block[1])), device=device)
        if device == "cuda":
            codes.view(torch.uint8).random_(0, 0x60)
            scales.uniform_(1e-3, 2e-3)
        self.weight = Float8Weight(codes, scales, block)
        channel, flip = block[1] >= cols, site.endswith("grad")
        token_M = torch.arange(M, device=device) if device != "cuda" else None
        if device == "cuda":
            index = torch.rand(tokens, E, device=device).topk(model.top_k, dim=1).indices.reshape(-1)
            order = torch.sort(index, stable=True).indices
            token_M = order // model.top_k
            self.offsets = torch.bincount(index, minlength=E).cumsum(0).int()
        else:
            self.offsets = torch.empty(E, dtype=torch.int32)
        K, N = (parts * rows, cols) if flip else (cols, parts * rows)
        self.gather = token_M if site in ("up", "down_grad") else None
        num_values = tokens if self.gather is not None else M
        fp8 = way == "scaled"
        values = rand(num_values, K)
        a_scales = None
        if fp8:
            values = (
                values.to(torch.float8_e4m3fn)
                if device == "cuda"
                else torch.empty((num_values, K), dtype=torch.float8_e4m3fn)
            )
            group = K if channel else block[0 if flip else 1]
            a_scales = torch.ones((num_values, -(-K // group)), device=device)
            if flip and channel and self.gather is not None:
                # folded per expert, so already gathered
                values, a_scales, self.gather = (
                    values[:1].expand(M, K).contiguous(),
                    a_scales[:1].expand(M, 1).contiguous(),
                    None,
                )
        self.operand = Operand(values, self.gather, a_scales)
        flat = codes.flatten(1, 2)
        if way == "bank":
            self.stack = Stack(rand(E, parts * rows, cols, scale=0.02), self.weight, 0, E, flip=flip)
            self.scales = kernel.NONE.value
        elif way == "codes":
            self.stack = Stack(flat, self.weight, 0, E, flip=flip, widen=True)
            self.scales = kernel.COLUMN.value if channel and not flip else kernel.TILE.value
        else:
            self.scales = kernel.SLAB.value if not channel else kernel.NONE.value if flip else kernel.COLUMN.value
            self.stack = Stack(flat.view(E, cols, parts * rows) if flip else flat, self.weight, 0, E, turned=flip)
        R = 16
        factor = rand(E, R, N, scale=0.02) if flip else rand(E, N, R, scale=0.02)
        self.more = {"lora": Lora(rand(M, R), factor, 1 if flip else 2)}
        self.out = rand(M, N)
        if site == "up":
            self.more["h"] = rand(M, I)
        if site == "down_grad":
            self.out = rand(M, 2 * I)
            shares = torch.empty((I // 64 + 1, M), dtype=torch.float32, device=device)
            self.more["gradient"] = Gradient(rand(M, 2 * I), rand(M), shares)
        self.flops = 2.0 * M * N * K

    def run(self, tiles: Tiles) -> None:
        product(self.operand, self.stack, self.offsets, self.out, tiles, scales=self.scales, **self.more)


CASES = [(m, way, site) for m in MODELS for way in ("bank", "codes", "scaled") for site in SITES]


def compile_one(job: tuple[str, str, str, Tiles]) -> None:
    model, way, site, tiles = job
    Problem(MODELS[model], 2048, way, site, "cpu").run(tiles)


def main(out: str, only: list[str]) -> None:
    cases = [c for c in CASES if not only or any(o in f"{c[0]}.{c[1]}.{c[2]}" for o in only)]
    jobs = [(*case, tiles) for case in cases for tiles in candidates(case[1], case[2])]
    bad = in_pool(compile_one, jobs)
    rows = []
    for model, way, site in cases:
        for tokens in TOKENS:
            problem = Problem(MODELS[model], tokens, way, site, "cuda")
            found = []
            for tiles in candidates(way, site):
                if (model, way, site, tiles) in bad:
                    continue
                try:
                    ms = launched_ms(lambda p=problem, t=tiles: p.run(t), 5)
                except Exception as error:
                    print(model, way, site, tiles, str(error)[:120])
                    if "illegal" in str(error):
                        raise
                    continue
                found.append((ms, tiles))
                rows.append({"model": model, "way": way, "site": site, "tokens": tokens, "ms": ms, "tiles": str(tiles)})
            found.sort(key=lambda f: f[0])
            best = "  ".join(
                f"{problem.flops / ms / 1e9:.0f}:{t.rows}x{t.columns}x{t.step}w{t.warps}s{t.stages}r{t.resident}"
                + "L" * t.left
                for ms, t in found[:3]
            )
            print(f"{model:5s} {way:6s} {site:9s} {tokens:5d} {found[0][0]:7.3f} ms  {best}", flush=True)
            del problem
            torch.cuda.empty_cache()
        Path(out).write_text(json.dumps(rows))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
