"""``octavo sft CONFIG.yaml``."""

import json
import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from octavo.cli.memory import let_segments_grow
from octavo.train.config import load_config
from octavo.train.outcome import as_json, farewell


def sft(
    config: Annotated[Path, typer.Argument(help="The run as YAML: model, lora, data, train, out.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replace one value, e.g. train.lr=1e-4.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would train, and stop before it does.")] = False,
    as_json_output: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON; progress goes to stderr.")
    ] = False,
) -> None:
    """Fine-tune an FP8 mixture-of-experts checkpoint with LoRA, as a YAML file says.

    The same command runs under torchrun and accelerate launch. Ctrl-C saves a checkpoint, and the same command resumes.
    """
    run = load_config(config, overrides or ())
    let_segments_grow()
    # Imported after the configuration was found good: an error in it should not wait for torch.
    from octavo.cli.processes import leave
    from octavo.train.run import sft as train

    console = Console(stderr=as_json_output)
    # trackio prints to stdout, which is for the JSON alone.
    with redirect_stdout(sys.stderr) if as_json_output else nullcontext():
        result = train(run, console, dry_run=dry_run)
    if result.main_process:
        console.print(farewell(result, dry_run=dry_run), highlight=False, soft_wrap=True)
        if as_json_output:
            print(json.dumps(as_json(result)))
    code = 0 if result.signal is None else 128 + result.signal
    leave(code)
    if code:
        raise typer.Exit(code)
