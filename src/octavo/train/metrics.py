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
}


def record(step: int, logs: Mapping[str, Any]) -> dict[str, float]:
    """The line for one log of a trainer; empty if the log has neither a loss nor an evaluation."""
    if "loss" not in logs and "eval_loss" not in logs:
        return {}
    return {"step": step} | {ours: logs[theirs] for theirs, ours in _NAMES.items() if theirs in logs}


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
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)


def _line(values: Mapping[str, Any]) -> str:
    # JSON has no NaN; a loss that is none is written as null.
    finite = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in values.items()}
    return json.dumps(finite) + "\n"
