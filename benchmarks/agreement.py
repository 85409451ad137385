"""How far training and sampler are apart, by the numerics of each, on the small real models.

python -m benchmarks.agreement --out docs

Each row is one step of ``octavo grpo``: 32 completions of dictionary entries, sampled with one arithmetic of the FP8
products and scored by the training forward with another, with and without routing replay. The adapter is the same on
both sides (B is zero). Differences are of log-probabilities of sampled tokens, in nats.
"""

import argparse
import io
import json
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import octavo
from benchmarks.rewards import config, prompts
from octavo.train.config import check_config
from octavo.train.grpo import grpo
from octavo.train.grpo_config import GrpoConfig
from octavo.train.metrics import read_metrics

# Whether there are experts to replay.
MODELS = {"glm-tiny": True, "qwen-tiny": True, "dense-tiny": False}
NUMERICS = ("exact", "fp8")
# Whether replay is measured too.
DTYPES = {"bfloat16": True, "float32": False}


def measure(name: str, *, training: str, sampler: str, replay: bool, dtype: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        tree = config(octavo.demo.checkpoint(name), prompts(Path(folder)), out, seed=0, steps=1)
        tree["model"] |= {"numerics": training, "dtype": dtype}
        tree["rollout"] = {"max_new_tokens": 16, "numerics": sampler, "replay": replay, "stop_mean": None}
        tree["train"] |= {"completions": 4, "batch_size": 32, "precision": "bf16" if dtype == "bfloat16" else "float32"}
        grpo(check_config(GrpoConfig, tree), Console(file=io.StringIO()))
        (record,) = read_metrics(out / "metrics.jsonl")
    return {
        "model": name,
        "dtype": dtype,
        "training": training,
        "sampler": sampler,
        "replay": replay,
        "mean": record["agreement_mean"],
        "worst": record["agreement_worst"],
        "tokens": round(record["completion_tokens"] * 32),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    path = arguments.out / "agreement.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    for name in arguments.models:
        for dtype in arguments.dtypes:
            rows = [row for row in rows if (row["model"], row["dtype"]) != (name, dtype)]
            for training in NUMERICS:
                for sampler in NUMERICS:
                    for replay in (False, True) if MODELS[name] and DTYPES[dtype] else (False,):
                        row = measure(name, training=training, sampler=sampler, replay=replay, dtype=dtype)
                        rows.append(row)
                        print(json.dumps(row), flush=True)
    found = {
        "rows": rows,
        "device": f"one core of {platform.processor() or platform.machine()}",
        "versions": {package: version(package) for package in ("torch", "transformers", "peft", "trl")},
    }
    path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
