"""``metrics.jsonl``: one JSON object per log, in the order of the steps, also across a resume."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

# The trainers' names, and ours where a shorter one says as much.
_NAMES = {
    "loss": "loss",
    "learning_rate": "lr",
    "grad_norm": "grad_norm",
    "tokens_per_second": "tokens_per_second",
    "peak_memory_gb": "peak_memory_gb",
    "plan_gb": "plan_gb",
    "expert_load": "expert_load",
    "expert_load_worst": "expert_load_worst",
    "mean_token_accuracy": "token_accuracy",
    "entropy": "entropy",
    "aux_loss": "aux_loss",
    "num_tokens": "tokens",
    "epoch": "epoch",
    "eval_loss": "eval_loss",
    "eval_mean_token_accuracy": "eval_token_accuracy",
    "reward": "reward",
    "reward_std": "reward_std",
    "frac_reward_zero_std": "groups_without_signal",
    "kl": "kl",
    "clip_ratio/region_mean": "clip_ratio",
    "clip_ratio/low_mean": "clip_ratio_low",
    "clip_ratio/high_mean": "clip_ratio_high",
    "completions/mean_length": "completion_tokens",
    "completions/clipped_ratio": "completions_truncated",
    "agreement/mean": "agreement_mean",
    "agreement/worst": "agreement_worst",
    "sync/bytes": "sync_bytes",
    "sync/seconds": "sync_seconds",
    "rollout/seconds": "rollout_seconds",
    "rollout/tokens_per_second": "rollout_tokens_per_second",
}
# `rewards/NAME/mean` of each reward function is `reward_NAME`.
_REWARD, _MEAN = "rewards/", "/mean"
# What a reward function cannot be called, because `reward_NAME` is something else.
TAKEN_NAMES = frozenset(name.removeprefix("reward_") for name in _NAMES.values() if name.startswith("reward_"))


def record(step: int, logs: Mapping[str, Any]) -> dict[str, float]:
    """The line for one log of a trainer; empty if the log has neither a loss nor an evaluation."""
    if "loss" not in logs and "eval_loss" not in logs:
        return {}
    rewards = {
        f"reward_{name.removeprefix(_REWARD).removesuffix(_MEAN)}": value
        for name, value in logs.items()
        if name.startswith(_REWARD) and name.endswith(_MEAN)
    }
    return {"step": step} | {ours: logs[theirs] for theirs, ours in _NAMES.items() if theirs in logs} | rewards


class MetricsFile(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Appends to the file from the main process, flushed line by line."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            # A run that resumes from step n does the steps after it again.
            kept = [line for line in read_metrics(self._path) if line["step"] <= state.global_step]
            self._path.write_text("".join(map(_line, kept)), encoding="utf-8")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any],
        **kwargs: Any,
    ) -> None:
        line = record(state.global_step, logs)
        if line and state.is_world_process_zero:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(_line(line))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file; none if it is not there. A last line that was cut off by a crash is skipped."""
    return list(_records(path)) if path.exists() else []


def _records(path: Path) -> Iterator[dict[str, Any]]:
    # Bytes, because a crash may cut a character in two, and text has other ends of lines within it, such as U+2028.
    *whole, _ = path.read_bytes().split(b"\n")
    yield from map(json.loads, whole)


def _line(values: Mapping[str, Any]) -> str:
    # JSON has no NaN; a loss that is none is written as null.
    finite = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in values.items()}
    return json.dumps(finite) + "\n"
