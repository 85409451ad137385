"""Train the small real models on a verifiable reward with ``octavo grpo``, three seeds each, and plot the rewards.

python -m benchmarks.rewards --out docs

The prompt is a common word, as a dictionary would begin its entry: ``river,``. The reward is 1 where the entry that
follows is one for a verb (``v.`` and a capital letter), else 0. On one core.
"""

import argparse
import io
import json
import platform
import re
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib
import torch
from rich.console import Console

import octavo
from octavo.train.config import check_config
from octavo.train.grpo import grpo
from octavo.train.grpo_config import GrpoConfig
from octavo.train.metrics import read_metrics

matplotlib.use("Agg")

MODELS = ("glm-tiny", "qwen-tiny")
SEEDS = (0, 1, 2)
PATTERN = r"v\. (\d\. )?[A-Z(].*"
# The reward must end at this many times its start.
FACTOR = 2
LAST = 5


def prompts(folder: Path) -> Path:
    """The words of the shipped definitions, one prompt each."""
    words = []
    for line in octavo.demo.data("train").read_text(encoding="utf-8").splitlines():
        question = json.loads(line)["messages"][0]["content"]
        found = re.search(r"'(\w+)'", question)
        assert found is not None, question
        words.append(found[1])
    path = folder / "words.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{word},"}) + "\n" for word in dict.fromkeys(words)))
    return path


def config(checkpoint: Path, data: Path, out: Path, *, seed: int, steps: int) -> dict[str, Any]:
    """The run as YAML would say it."""
    return {
        "model": {"path": str(checkpoint), "dtype": "float32"},
        "lora": {"r": 8},
        "data": str(data),
        "rewards": [{"function": "format", "arguments": {"pattern": PATTERN}}],
        "rollout": {"max_new_tokens": 8},
        "train": {
            "steps": steps,
            "prompts": 8,
            "completions": 8,
            "batch_size": 64,
            "lr": 2e-3,
            "scheduler": "constant",
            "warmup": 0,
            "seed": seed,
            "precision": "float32",
            "gradient_checkpointing": "none",
            "resume": "never",
        },
        "out": str(out),
    }


def measure(checkpoint: Path, *, seed: int, steps: int) -> dict[str, Any]:
    """One run: its rewards by step, its time, and how far training and sampler were apart."""
    with tempfile.TemporaryDirectory() as folder:
        data = prompts(Path(folder))
        tree = config(checkpoint, data, Path(folder) / "run", seed=seed, steps=steps)
        cpu, wall = time.process_time(), time.perf_counter()
        grpo(check_config(GrpoConfig, tree), Console(file=io.StringIO()))
        records = read_metrics(Path(folder) / "run" / "metrics.jsonl")
    rewards = [record["reward"] for record in records]
    return {
        "seed": seed,
        "rewards": rewards,
        "start": rewards[0],
        "end": sum(rewards[-LAST:]) / LAST,
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "agreement_mean": max(record["agreement_mean"] for record in records),
        "agreement_worst": max(record["agreement_worst"] for record in records),
    }


def main() -> None:
    """Write ``rewards.json`` and ``rewards.png``; fail where a reward did not rise by the factor."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    path = arguments.out / "rewards.json"
    results = json.loads(path.read_text()) if path.exists() else {"models": {}}
    for name in arguments.models:
        runs = [measure(octavo.demo.checkpoint(name), seed=seed, steps=arguments.steps) for seed in SEEDS]
        results["models"][name] = runs
        for run in runs:
            print(
                f"{name} seed {run['seed']}: reward {run['start']:.3f} at step 1, {run['end']:.3f} at the end, "
                f"{run['seconds']:.0f} s, {run['cpu_seconds']:.0f} s of one core",
                flush=True,
            )
    results |= {
        "reward": f"the completion of a word and a comma matches {PATTERN!r}",
        "config": config(Path("MODEL"), Path("words.jsonl"), Path("run"), seed=0, steps=arguments.steps),
        "device": f"one core of {platform.processor() or platform.machine()}",
        "versions": {package: version(package) for package in ("torch", "transformers", "peft", "trl")},
    }
    path.write_text(json.dumps(results, indent=1) + "\n")
    plot(results["models"], arguments.out / "rewards.png")
    if flat := [
        f"{name} seed {run['seed']}"
        for name, runs in results["models"].items()
        for run in runs
        if not run["end"] >= FACTOR * run["start"] > 0
    ]:
        raise SystemExit(f"the reward did not rise by {FACTOR}: {', '.join(flat)}")


def plot(models: dict[str, list[dict[str, Any]]], out: Path) -> None:
    """Reward over steps, a panel for each model and a line for each seed."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(models), figsize=(4.2 * len(models), 3.6), sharey=True, squeeze=False)
    for axis, (name, runs) in zip(axes[0], models.items(), strict=True):
        for run in runs:
            axis.plot(range(1, len(run["rewards"]) + 1), run["rewards"], label=f"seed {run['seed']}")
        axis.set_title(f"{name}, {max(run['cpu_seconds'] for run in runs):.0f} s of one core at most")
        axis.set_xlabel("step (8 prompts x 8 completions)")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("mean reward")
    axes[0][0].set_ylim(0, 1.02)
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main()
