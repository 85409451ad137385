"""What every trainer says about itself: a loss that is not finite, speed, memory, and how evenly experts are used."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from octavo.errors import OctavoError, first_line
from octavo.train.meter import Meter


class TrainingError(OctavoError):
    """A run that cannot go on: its loss is not a number any more."""


class SavingError(OctavoError):
    """A checkpoint or an adapter that cannot be written, for want of space mostly."""


@contextmanager
def saving(what: str, folder: Path | str) -> Iterator[None]:
    """Tell a failure to write ``what`` into ``folder`` in one sentence.

    Raises:
        SavingError: it failed.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch and safetensors have errors of their own for a disk that is full.
        raise SavingError(
            f"{what} cannot be written to {folder}: {first_line(error)}. Make room there; the same command "
            "goes on from the last checkpoint that is whole."
        ) from error


class Watched:
    """To be inherited before a trainer of transformers or trl, whose ``__init__`` then calls `watch`."""

    model: Any
    state: Any
    args: Any
    accelerator: Any
    add_callback: Any

    def watch(self, *, stop_on_nan: bool) -> None:
        """Measure from now on; ``stop_on_nan``: raise `TrainingError` at the first loss that is NaN or infinite."""
        self._stops_on_nan = stop_on_nan
        self.meter = Meter(self.model)
        self.add_callback(self.meter)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One forward and backward; stops before the optimizer takes a loss that is not finite."""
        loss: torch.Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        if self._stops_on_nan:
            # Every rank must stop at the same step, or the others wait for it in the next reduction.
            worst = float(self.accelerator.reduce(loss.detach().clone(), reduction="sum"))
            if not math.isfinite(worst):
                raise TrainingError(
                    f"The loss of step {self.state.global_step + 1} is {worst}, so the run stopped before the "
                    "optimizer used it. The last checkpoint is unharmed. Lower `train.lr`, or set "
                    "`train.stop_on_nan: false` to go on regardless."
                )
        return loss

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with saving(f"The checkpoint of step {self.state.global_step}", self.args.output_dir):
            super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add tokens per second, peak memory and expert load to every training record, for all reporters."""
        if "loss" in logs:
            logs.update(self.meter.read())
        super().log(logs, start_time)  # type: ignore[misc]
