"""Whole models on one GPU: the rows of ``benchmarks/results/train-h200.json``, made checkpoint included.

    python -m benchmarks.train glm --rows memory --out benchmarks/results/train-h200.json --budget 540
    python -m benchmarks.train qwen3-coder --rows speed

Sets of rows: ``memory`` (the six peaks that are promised, and float32 masters beside them), ``speed`` (against the
bfloat16 model at 2k and 8k tokens), ``attention`` (attention alone), ``long`` (32k, offloaded or not), ``host`` (16k:
experts resident, and in host memory with 24 and 16 GB of the GPU), ``profile``.
The checkpoint is made in ``--folder`` unless it is there, each row has its own process, and the file is whole after
every one: run the command again with ``--skip`` for rows that did not fit the budget.
"""

import argparse
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.checkpoints import KINDS, write
from octavo.plan.terms import replays_by_itself
from octavo.trial.step import Row
from octavo.trial.suite import run_rows

SETS = ("memory", "speed", "attention", "long", "host", "profile")


def rows_of(what: str, base: Row) -> list[Row]:
    narrow = replace(base, adapter_dtype="bfloat16", optimizer="adamw_8bit")
    plain = replace(base, numerics="bf16", with_plan=False)
    if what == "memory":
        return [
            replace(narrow, seq=4096), replace(base, seq=4096), replace(narrow, seq=2048, expert_rank=0),
            replace(base, seq=2048, expert_rank=0), replace(narrow, seq=32_768),
            replace(narrow, seq=32_768, offload_hidden_states=True),
        ]  # fmt: skip
    if what == "speed":
        return [
            replace(row, seq=seq)
            for seq in (8192, 2048)
            for row in (plain, base, replace(base, numerics="fp8_grad"), replace(base, numerics="fp8"))
        ]
    if what == "attention":
        return [replace(row, seq=seq, expert_rank=0) for seq in (8192, 2048) for row in (plain, base)]
    if what == "long":
        rows = [replace(narrow, seq=32_768), replace(narrow, seq=32_768, offload_hidden_states=True)]
        return [*rows, replace(narrow, seq=16_384), replace(base, seq=32_768)]
    if what == "host":
        wide = replace(narrow, seq=16_384, offload_hidden_states=True)
        return [wide, *(replace(wide, experts="host", cap_gb=gigabytes) for gigabytes in (24, 16))]
    return [replace(row, seq=seq, profile=True) for seq in (8192, 2048) for row in (plain, base)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=KINDS)
    parser.add_argument("--rows", choices=SETS, default="memory")
    parser.add_argument("--skip", type=int, default=0, help="rows of the set that are done already")
    parser.add_argument("--folder", type=Path, help="where the checkpoint is or will be; /tmp/octavo-MODEL")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/train-h200.json"))
    parser.add_argument("--budget", type=float, default=540.0, help="seconds, the checkpoint included")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--no-graphs", action="store_true", help="layers of octavo's rows not replayed as CUDA graphs")
    parser.add_argument("--no-compile", action="store_true", help="layers of octavo's rows not compiled")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU, rows of 64 tokens")
    parser.add_argument("--layers", type=int)
    args = parser.parse_args()
    began = time.monotonic()
    folder = args.folder or Path(f"/tmp/octavo-{args.model}")
    if not (folder / "model.safetensors.index.json").exists():
        size = write(args.model, folder, layers=args.layers, tiny=args.tiny)
        print(f"{folder}: {size / 1e9:.2f} GB made in {time.monotonic() - began:.0f} s", flush=True)
    base = Row(str(folder), args.model, engine=args.engine, steps=args.steps, compile=not args.no_compile)
    rows = [
        replace(row, graphs=not args.no_graphs and replays_by_itself(row.seq, row.experts))
        for row in rows_of(args.rows, base)[args.skip :]
    ]
    if args.tiny:
        rows = [replace(row, seq=64, cap_gb=None) for row in rows]
    environment = {"PYTORCH_ALLOC_CONF": "expandable_segments:True", **os.environ}
    left = args.budget - (time.monotonic() - began)
    found = run_rows(
        rows, out=args.out, budget_s=left, say=lambda text: print(text, flush=True), environment=environment
    )
    if any("error" in row for row in found):
        sys.exit(1)


if __name__ == "__main__":
    main()
