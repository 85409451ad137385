"""``octavo grpo CONFIG.yaml``."""

import json
import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from octavo.train.config import read_config
from octavo.train.grpo_config import GrpoConfig
from octavo.train.outcome import as_json, farewell


def grpo(
    config: Annotated[Path, typer.Argument(help="The run as YAML: model, lora, data, rewards, rollout, train, out.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replace one value, e.g. train.lr=1e-4.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would train, and stop before it does.")] = False,
    as_json_output: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON; progress goes to stderr.")
    ] = False,
) -> None:
    """Train an FP8 checkpoint on rewards (GRPO) with LoRA, as a YAML file says.

    Every step samples completions, scores them with your reward functions and raises the probability of the better
    ones. Completions go to completions.jsonl, curves to metrics.jsonl. Ctrl-C saves a checkpoint, and the same command
    resumes.
    """
    run = read_config(GrpoConfig, config, overrides or ())
    # Imported after the configuration was found good: an error in it should not wait for torch.
    from octavo.cli.processes import leave
    from octavo.train.grpo import grpo as train

    console = Console(stderr=as_json_output)
    # trackio and reward functions may print to stdout, which is for the JSON alone.
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
