"""``octavo demo``."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console


def demo(
    out: Annotated[Path | None, typer.Option(help="Folder of the run; ./octavo-demo, numbered if it is there.")] = None,
    model: Annotated[
        Literal["glm-tiny", "qwen-tiny"], typer.Option(help="Which of the two small models.")
    ] = "glm-tiny",
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 60,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON; the rest goes to stderr.")] = False,
) -> None:
    """Fine-tune a small real FP8 mixture of experts on word definitions, and show that it learned.

    Exit code 1 if the loss on held-out words fell by less than 15 %.
    """
    # Imported here: --help should not wait for torch.
    from octavo.demo.run import run_demo

    result = run_demo(Console(stderr=as_json), model=model, out=out, steps=steps)
    if as_json:
        print(json.dumps(result.as_json()))
    if result.signal is not None:
        raise typer.Exit(128 + result.signal)
    if not result.learned:
        raise typer.Exit(1)
