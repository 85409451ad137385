"""Turn the rows of ``benchmarks/results/layer-*.json`` into the rules of ``src/octavo/ops/choice.json``.

    python -m benchmarks.choice benchmarks/results/layer-h200.json --architecture sm90

Prints the rules; with ``--write`` puts them in the place of the expert rules of that architecture. Per numerics and
layout, by the times of a GPU that never rests, the engine changes half-way (geometrically) between two measured sizes
whose fastest engines differ. The other rules, and those that nobody measured, stay as they are.
"""

import argparse
import json
import math
from itertools import groupby, pairwise
from pathlib import Path

from benchmarks.shapes import MODELS
from octavo.ops.choice import ENGINES, NUMERICS

RULES = Path(__file__).parent.parent / "src" / "octavo" / "ops" / "choice.json"


def rows_per_expert(row: dict) -> float:
    model = MODELS[row["model"]]
    return row["tokens"] * model.top_k / model.experts


def steps(rows: list[dict]) -> list[list]:
    """[[most rows per expert, engine], …] from rows of one numerics and layout."""
    rows = sorted(rows, key=rows_per_expert)
    fastest = []
    for size, some in groupby(rows, rows_per_expert):
        # training does not rest between steps
        ms = {row["engine"]: row.get("busy_ms") or row["ms"] for row in some}
        best = min(ms, key=ms.__getitem__)
        # no change of engine for less than the spread of two runs
        if fastest and ms.get(fastest[-1][1], math.inf) <= 1.03 * ms[best]:
            best = fastest[-1][1]
        fastest.append((size, best))
    found = []
    for (size, engine), (larger, other) in pairwise(fastest):
        if engine != other:
            found.append([round(math.sqrt(size * larger)), engine])
    return [*found, [None, fastest[-1][1]]]


def rules(rows: list[dict], architecture: str, source: str) -> list[dict]:
    rows = [row for row in rows if row["engine"] in ENGINES and row["numerics"] in NUMERICS]
    found = []
    for numerics in NUMERICS:
        for layout in sorted({row["layout"] for row in rows}):
            same = [row for row in rows if (row["numerics"], row["layout"]) == (numerics, layout)]
            # one scale per tensor is read as one per channel is
            layouts = ["channel", "tensor"] if layout == "channel" else [layout]
            if same:
                found.append({
                    "architecture": [architecture], "kind": ["experts"], "numerics": [numerics], "layout": layouts,
                    "steps": steps(same), "measured": True, "source": source,
                })  # fmt: skip
    return found


def merged(data: dict, new: list[dict], architecture: str) -> dict:
    """``data`` with ``new`` first, without the expert rules of the architecture that they replace whole."""
    covered = {(rule["numerics"][0], layout) for rule in new for layout in rule["layout"]}

    def replaced(rule: dict) -> bool:
        if rule["architecture"] != [architecture] or rule["kind"] != ["experts"]:
            return False
        layouts = ["channel", "tensor", "block"] if rule["layout"] == ["any"] else rule["layout"]
        return all((numerics, layout) in covered for numerics in rule["numerics"] for layout in layouts)

    return data | {"rules": [*new, *(rule for rule in data["rules"] if not replaced(rule))]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--architecture", required=True)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    rows = json.loads(args.results.read_text())
    first = rows[0]
    source = f"{args.results.name}: {first['device']}, torch {first['torch']}, triton {first['triton']}"
    source += f", commit {str(first['commit'])[:12]}, LoRA r={first['lora_rank']}, GPU time under graph replay."
    new = rules(rows, args.architecture, source)
    for rule in new:
        print(json.dumps(rule))
    if args.write:
        data = merged(json.loads(RULES.read_text()), new, args.architecture)
        RULES.write_text(json.dumps(data, indent=2) + "\n")


if __name__ == "__main__":
    main()
