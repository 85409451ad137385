"""A run that fails keeps what it has learned: the state after its last whole step becomes a checkpoint."""

import random
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from octavo.train.folder import is_whole
from octavo.train.watched import SavingError, TrainingError


class SaveOnFailure(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """As a context manager around a training, saves a checkpoint of the last whole step where that fails.

    It remembers where random numbers stood after each step, so that what it saves resumes as an interrupted run does.
    """

    def __init__(self) -> None:
        self._trainer: Any = None
        self._report: Callable[[Path], None] = lambda saved: None
        self._random: dict[str, Any] | None = None
        self._in_step = False

    def watching(self, trainer: Any, report: Callable[[Path], None]) -> Self:
        """Of which training; ``report`` gets the checkpoint that was saved."""
        self._trainer, self._report = trainer, report
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> None:
        # A second ctrl-C asks to stop at once.
        if isinstance(error, Exception) and (saved := self._save(error)) is not None:
            self._report(saved)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # A step that fails halfway leaves weights of two steps.
        self._in_step = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._random = {"python": random.getstate(), "cpu": torch.get_rng_state()}
        if args.device.type == "cuda":
            self._random["cuda"] = torch.cuda.get_rng_state()
        self._in_step = False

    def _save(self, error: Exception) -> Path | None:
        """The checkpoint of the last whole step; None where none was taken since the last one, or it cannot be had.

        Nothing is saved of a loss that is not finite, whose cause may lie in the weights; nor where several processes
        train, of which others may wait in a reduction.
        """
        trainer = self._trainer
        if self._random is None or self._in_step or trainer.args.world_size > 1:
            return None
        folder = Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}"
        try:
            finite = all(bool(p.isfinite().all()) for p in trainer.model.parameters() if p.requires_grad)
        except RuntimeError:
            # A GPU that failed answers nothing any more; what it failed of is the error to tell.
            return None
        if isinstance(error, TrainingError) or not finite or is_whole(folder):
            return None
        random.setstate(self._random["python"])
        torch.set_rng_state(self._random["cpu"])
        if "cuda" in self._random:
            torch.cuda.set_rng_state(self._random["cuda"])
        try:
            trainer._save_checkpoint(trainer.model, trial=None)
        except SavingError:
            # The run's own error is the one to tell; a checkpoint that is not whole is passed over.
            return None
        return folder
