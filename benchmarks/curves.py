"""Fine-tune both small real models for 200 steps in FP8 and dequantized to bf16, and plot the losses.

    python -m benchmarks.curves --out docs

``benchmarks.engine_curves`` compares engines with the reference in the same way.
"""

import argparse
import json
import tempfile
from pathlib import Path

import matplotlib

from tests.curves import both, worst_difference

matplotlib.use("Agg")
WINDOW = 10


def main() -> None:
    """Write ``curves.json`` and ``curves.png``; fail when the curves part by more than 1 %."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    results = {}
    for name in ("glm-tiny", "qwen-tiny"):
        with tempfile.TemporaryDirectory() as folder:
            fp8, plain = both(name, arguments.steps, Path(folder))
        apart = worst_difference(fp8, plain, WINDOW)
        results[name] = {"fp8": fp8, "bf16": plain, "worst_difference": apart}
        print(f"{name}: loss {fp8[0]:.3f} to {sum(fp8[-WINDOW:]) / WINDOW:.3f}, apart by {apart:.3%}")
    (arguments.out / "curves.json").write_text(json.dumps(results) + "\n")
    plot(results, arguments.out / "curves.png")
    if any(result["worst_difference"] > 0.01 for result in results.values()):
        raise SystemExit("the curves part by more than 1 %")


def plot(results: dict, out: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(results), figsize=(10, 3.6), sharey=True)
    for axis, (name, result) in zip(axes, results.items(), strict=True):
        for label, style in (
            ("bf16", {"linewidth": 3, "color": "0.75"}),
            ("fp8", {"linewidth": 1.2, "color": "tab:blue"}),
        ):
            losses = result[label]
            means = [sum(losses[i : i + WINDOW]) / WINDOW for i in range(len(losses) - WINDOW + 1)]
            axis.plot(
                range(WINDOW, len(losses) + 1), means, label="dequantized, bf16" if label == "bf16" else "FP8", **style
            )
        axis.set_title(f"{name}: at most {result['worst_difference']:.2%} apart")
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"loss, mean of {WINDOW} steps")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main()
