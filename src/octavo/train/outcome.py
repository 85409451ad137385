"""What a run came to, for a person and for a program."""

import dataclasses
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True)
class RunResult:
    """The end of a run, or where a dry run stopped."""

    out: Path
    # None where the run was interrupted before its end, or dry.
    adapter: Path | None
    step: int
    max_steps: int
    loss: float | None
    eval_loss: float | None
    # The mean reward of the last logged steps of `octavo grpo`.
    reward: float | None
    seconds: float
    peak_memory_gb: float
    resumed_from: Path | None
    # The signal that ended it early: 2 for ctrl-C, 15 for a request to terminate.
    signal: int | None
    main_process: bool


def as_json(result: RunResult) -> dict[str, Any]:
    """The result as ``--json`` prints it."""
    values = dataclasses.asdict(result)
    del values["main_process"]
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def farewell(result: RunResult, *, dry_run: bool) -> str:
    """The last sentence for a person: where things are, and what to do next."""
    if dry_run:
        return "Dry run: nothing was trained."
    if result.signal is not None:
        return (
            f"Interrupted after step {result.step} of {result.max_steps}; saved "
            f"{result.out / f'checkpoint-{result.step}'}. Run the same command again to resume from it."
        )
    figures = [f"{result.step} steps in {result.seconds:.0f} s"]
    figures += [f"loss {result.loss:.4f}"] if result.loss is not None else []
    figures += [f"eval loss {result.eval_loss:.4f}"] if result.eval_loss is not None else []
    figures += [f"reward {result.reward:.3f}"] if result.reward is not None else []
    figures += [f"peak memory {result.peak_memory_gb:.2f} GB"]
    return f"{', '.join(figures)}\nadapter: {result.adapter}\ntry it: octavo chat {result.adapter}"
