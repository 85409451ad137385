"""Short runs of ``octavo grpo`` on the tiny model."""

from pathlib import Path
from typing import Any

from rich.console import Console

from octavo.train.config import check_config
from octavo.train.grpo import grpo
from octavo.train.grpo_config import GrpoConfig
from octavo.train.outcome import RunResult

from .tiny import Screen, write_jsonl


def prompts(path: Path, count: int = 12) -> Path:
    return write_jsonl(path, [{"prompt": f"say {index}", "answer": "ab" * (index % 3)} for index in range(count)])


def tree(checkpoint: Path, data: Path, out: Path, **train_section: object) -> dict[str, Any]:
    """A short float32 run on the CPU, as a mapping that tests change: the reward is the share of vowels."""
    return {
        "model": {"path": str(checkpoint), "dtype": "float32"},
        "lora": {"r": 4},
        "data": {"train": str(data)},
        "rewards": [f"{Path(__file__).with_name('own_rewards.py')}:vowels"],
        "rollout": {"max_new_tokens": 8},
        "train": {
            "steps": 3,
            "prompts": 2,
            "completions": 4,
            "lr": 2e-2,
            "warmup": 0,
            "scheduler": "constant",
            "precision": "float32",
            "gradient_checkpointing": "none",
            "router_aux_loss": 0.0,
            **train_section,
        },
        "out": str(out),
    }


def run(screen: Screen | None = None, *, dry_run: bool = False, **tree: object) -> RunResult:
    """Run ``octavo grpo`` on a configuration given as a mapping."""
    console = Console(file=screen or Screen(), width=200)
    return grpo(check_config(GrpoConfig, tree), console, dry_run=dry_run)
