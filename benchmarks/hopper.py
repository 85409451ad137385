"""Time the products for Hopper one by one, as a layer asks for them: microseconds, TFLOP/s, bytes that a tile brings.

    python -m benchmarks.hopper --out hopper.json
    ncu --set full -k regex:product -s 3 -c 1 python -m benchmarks.hopper --only qwen3.8192.fp8.up --repeats 1

A layer's step is run once with the products written down; then each is launched again with the operands that it had.
``--only`` takes parts of MODEL.TOKENS.NUMERICS.SITE. ``--tokens 128``: with tiles of that many tokens, where there are
such. Each product is timed after a rest, and (busy) as one of many in a row: large ones are slower then, held by the
card's power. The file is whole after every product.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import octavo.ops.hopper.engine as hopper
from benchmarks.layer import engines
from benchmarks.shapes import MODELS, TOKENS
from octavo.bench.layer import LayerCase
from octavo.bench.timing import rested_and_busy
from octavo.ops.engines import Engine
from octavo.ops.reference import folds_into_rows

SITES = ("up", "down", "down_grad", "up_grad")
Call = tuple[tuple[Any, ...], dict[str, Any]]


def calls(case: LayerCase, engine: Engine) -> list[Call]:
    """The products of one step, in order."""
    product, found = hopper.product, []

    def written(*args: Any, **kwargs: Any) -> None:
        found.append((args, kwargs))
        product(*args, **kwargs)

    hopper.product = written  # type: ignore[assignment]
    try:
        case.step(lambda: case.octavo(engine))
    finally:
        hopper.product = product  # type: ignore[assignment]
    return found


def with_tokens(options: dict[str, Any], tokens: int | None) -> dict[str, Any]:
    """``options`` of a product with tiles of ``tokens``, and room for what each of them sums."""
    if not tokens:
        return options
    gradient: hopper.GateGradient | None = options["gradient"]
    if gradient is not None and gradient.sums is not None:
        # no expert has more tiles than these more
        most = gradient.sums.shape[0] * max(1, -(-options["tokens"] // tokens))
        gradient = replace(gradient, sums=gradient.sums.new_empty((most, *gradient.sums.shape[1:])))
    return options | {"tokens": tokens, "gradient": gradient}


def measured(case: LayerCase, numerics: str, engine: Engine, only: str, args: argparse.Namespace) -> Iterator[dict]:
    found = calls(case, engine)
    chunks = len(found) // len(SITES)
    for number, site in enumerate(SITES):
        name = f"{case.shape.name}.{case.tokens}.{numerics}.{site}"
        if only not in name:
            continue
        given, options = found[number * chunks]
        rows, weight = given[:2]
        left = rows.scales is not None and not options["flip"] and not folds_into_rows(weight)
        banked = options.get("bank") is not None
        if args.tokens and args.tokens not in hopper.tile_sizes(bank=banked, tokens_left=left):
            continue
        us = busy_us = 0.0
        for given, options in found[number * chunks : (number + 1) * chunks]:
            options = with_tokens(options, args.tokens)
            if args.without_maxima and options["gradient"] is not None:
                options["gradient"] = replace(options["gradient"], fold=None, peaks=None)
            found_ms = rested_and_busy(partial(hopper.product, *given, **options), args.repeats)
            us, busy_us = us + 1e3 * found_ms.ms, busy_us + 1e3 * found_ms.busy_ms
        flops = case.shape.flops(case.tokens) / 4 * (4 / 3 if "up" in site else 2 / 3)
        yield {
            "product": name, "us": round(us, 1), "busy_us": round(busy_us, 1), "tflops": round(flops / us / 1e6),
            "chunks": chunks, "tokens_of_tile": args.tokens or options["tokens"],
            "device": torch.cuda.get_device_name(),
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--tokens", type=int, help="of a tile, in the place of the engine's choice")
    parser.add_argument("--without-maxima", action="store_true", help="of the rows of the gate's gradient")
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    rows = []
    for model, shape in MODELS.items():
        for size in TOKENS:
            ways = [(n, engine) for n, name, engine in engines() if name != "dequant" and n != "fp8_grad"]
            if not any(args.only in f"{model}.{size}.{n}.{site}" for n, _ in ways for site in SITES):
                continue
            case = LayerCase(shape, size, torch.device("cuda"))
            for numerics, engine in ways:
                for row in measured(case, numerics, engine, args.only, args):
                    rows.append(row)
                    times = f"{row['us']:9.1f} us {row['tflops']:5d} TFLOP/s, busy {row['busy_us']:9.1f} us"
                    print(f"{row['product']:32s} {times}", flush=True)
                    if args.out:
                        args.out.write_text(json.dumps(rows, indent=1) + "\n")
            del case


if __name__ == "__main__":
    main()
