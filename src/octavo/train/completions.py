"""``completions.jsonl``: every completion that was trained on, with its rewards and advantage."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from octavo.train.metrics import read_metrics


class CompletionsFile(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Appends from the main process; a run that resumes from step n writes the steps after it again."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            kept = [line for line in read_metrics(self._path) if line["step"] <= state.global_step]
            self._path.write_text("".join(map(_line, kept)), encoding="utf-8")

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Write one line for each completion: step, prompt, completion, rewards by name, advantage."""
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(map(_line, records))


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"
