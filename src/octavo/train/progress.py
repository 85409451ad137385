"""What a person sees while a run trains: one live line on a terminal, plain lines in a file or a pipe."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from octavo.train.metrics import record

# (key of a metrics record, how it is shown), in the order of the line.
_SHOWN = (
    ("reward", "reward {:.3f}"),
    ("loss", "loss {:.4f}"),
    ("eval_loss", "eval loss {:.4f}"),
    ("lr", "lr {:.2e}"),
    ("grad_norm", "grad {:.2f}"),
    ("kl", "kl {:.4f}"),
    ("agreement_mean", "agreement {:.4f}"),
    ("agreement_worst", "worst {:.3f} nats"),
    ("tokens_per_second", "{:,.0f} tok/s"),
    ("peak_memory_gb", "peak {:.2f} GB"),
    ("plan_gb", "planned {:.2f} GB"),
    ("expert_load", "expert load max/mean {:.2f}"),
)


def metrics_text(line: Mapping[str, Any]) -> str:
    """A metrics record as a person reads it."""
    # A reward is None where no function applied to any completion.
    return "  ".join(form.format(line[key]) for key, form in _SHOWN if line.get(key) is not None)


class PlainProgress(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """One line per log."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any],
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and (line := record(state.global_step, logs)):
            text = f"step {state.global_step}/{state.max_steps}  {metrics_text(line)}"
            self._console.print(text, highlight=False, soft_wrap=True)


class LiveProgress(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """A progress bar over the last figures; evaluations and the messages of others scroll above it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._task = self._progress.add_task("train", total=None)
        # A line of their own: beside the bar they would be cut off on 80 columns.
        self._figures = Text()
        self._live = Live(Group(self._progress, self._figures), console=console)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self._progress.update(self._task, total=state.max_steps, completed=state.global_step)
            self._live.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._progress.update(self._task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any],
        **kwargs: Any,
    ) -> None:
        line = record(state.global_step, logs)
        if "eval_loss" in line and state.is_world_process_zero:
            self._console.print(f"step {state.global_step}: {metrics_text(line)}", highlight=False)
        elif line:
            self._figures.plain = metrics_text(line)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the terminal back; also after a run that raised."""
        self._live.stop()


def progress_for(console: Console) -> PlainProgress | LiveProgress:
    """The live line where ``console`` is a terminal, else plain lines."""
    return LiveProgress(console) if console.is_terminal else PlainProgress(console)
