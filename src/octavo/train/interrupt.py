"""Ctrl-C and SIGTERM end a run after the step at hand, with a checkpoint to resume from."""

import os
import signal
import threading
from types import FrameType
from typing import Any, Self

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class SaveOnInterrupt(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """As a context manager, turns the first signal into "save and stop after this step"; a second one acts as usual.

    ``received`` is the signal that ended the run, agreed on by all ranks, or None.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._pending = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if number := self._agreed(args.device):
            self.received = signal.Signals(number)
            # Steps since the last log would be averaged with others after a resume.
            control.should_log = True
            control.should_save = True
            control.should_training_stop = True
        return control

    def _agreed(self, device: torch.device) -> int:
        """The largest signal that any rank got: a terminal reaches them at different steps."""
        if not (dist.is_available() and dist.is_initialized()):
            return self._pending
        pending = torch.tensor(self._pending, device=device)
        dist.all_reduce(pending, dist.ReduceOp.MAX)
        return int(pending)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._pending = number
        self._restore()
        # Not print: a handler may run in the middle of one.
        os.write(2, b"\nInterrupted: finishing this step, then saving a checkpoint. Again to stop at once.\n")

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
