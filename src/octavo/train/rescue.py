"""A run that fails keeps what it has learned: the state after its last whole step becomes a checkpoint."""

import random
from pathlib import Path
from typing import Any

import numpy
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from octavo.train.folder import is_whole
from octavo.train.watched import SavingError, TrainingError


class SaveOnFailure(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Remembers where random numbers stood after each step, so that what it saves resumes as an interrupted run."""

    def __init__(self) -> None:
        self._random: dict[str, Any] | None = None
        self._steps = False

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # A step that fails halfway leaves weights of two steps.
        self._steps = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._random = {"python": random.getstate(), "numpy": numpy.random.get_state(), "cpu": torch.get_rng_state()}
        if args.device.type == "cuda":
            self._random["cuda"] = torch.cuda.get_rng_state()
        self._steps = False

    def save(self, trainer: Any, error: Exception) -> Path | None:
        """The checkpoint of the last whole step; None where none was taken since the last one, or it cannot be had.

        Nothing is saved of a loss that is not finite, whose cause may lie in the weights; nor where several processes
        train, of which others may wait in a reduction.
        """
        step = trainer.state.global_step
        folder = Path(trainer.args.output_dir) / f"checkpoint-{step}"
        spoilt = isinstance(error, TrainingError) or not all(
            bool(p.isfinite().all()) for p in trainer.model.parameters() if p.requires_grad
        )
        if self._random is None or self._steps or spoilt or trainer.args.world_size > 1 or is_whole(folder):
            return None
        random.setstate(self._random["python"])
        numpy.random.set_state(self._random["numpy"])
        torch.set_rng_state(self._random["cpu"])
        if "cuda" in self._random:
            torch.cuda.set_rng_state(self._random["cuda"])
        try:
            trainer._save_checkpoint(trainer.model, trial=None)
        except SavingError:
            # The run's own error is the one to tell; a checkpoint that is not whole is passed over.
            return None
        return folder
