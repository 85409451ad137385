"""What a run costs while it runs: tokens per second, peak memory, and how evenly the experts are used."""

import resource
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from octavo.train.routing import ExpertTokens

GB = 1e9


class Meter(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Measures optimizer steps from their first forward to their end; evaluation and saving are not in the time."""

    def __init__(self, model: nn.Module) -> None:
        # Bytes that a plan gave for `peak_memory`, where there is one.
        self.plan: int | None = None
        self._experts = ExpertTokens(model, padding=False)
        self._seconds = 0.0
        self._began = time.perf_counter()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._seconds += time.perf_counter() - self._began

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._experts.close()

    def read(self) -> dict[str, float]:
        """The figures since the last reading, over all ranks. Call it on every rank.

        ``expert_load``: the busiest expert's tokens over the mean, averaged over layers; 1 is even.
        ``expert_load_worst``: the same in the layer where it is largest.
        ``peak_memory_gb``: of this rank, in units of 10^9 bytes; ``plan_gb``: what was planned for it.
        """
        tokens = torch.tensor(self._experts.tokens, device=_device())
        counts = [count.clone() for count in self._experts.counts.values()]
        self._experts.reset()
        if dist.is_available() and dist.is_initialized():
            for value in (tokens, *counts):
                dist.all_reduce(value)
        figures = {"peak_memory_gb": peak_memory() / GB}
        if self.plan is not None:
            figures["plan_gb"] = self.plan / GB
        if self._seconds > 0:
            figures["tokens_per_second"] = float(tokens) / self._seconds
        loads = [float(count.max() / count.double().mean()) for count in counts if count.any()]
        if loads:
            figures["expert_load"] = sum(loads) / len(loads)
            figures["expert_load_worst"] = max(loads)
        self._seconds = 0.0
        return figures


def peak_memory() -> int:
    """Most bytes this process held so far: allocated on its GPU if it has one, resident otherwise."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
