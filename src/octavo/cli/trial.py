"""``octavo bench model CHECKPOINT``: tokens per second, memory and where the time goes, against the bfloat16 model."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from octavo.cli.memory import let_segments_grow


def trial(
    checkpoint: Annotated[str, typer.Argument(help="A folder or a hub id.")],
    seq: Annotated[list[int] | None, typer.Option(help="Tokens of a row; repeat it. 2048 and 8192 by default.")] = None,
    numerics: Annotated[
        list[str] | None, typer.Option(help="bf16 (the baseline), exact, fp8_grad, fp8; repeat it. bf16 and exact.")
    ] = None,
    engine: Annotated[str, typer.Option(help="Engine of octavo's rows.")] = "auto",
    rank: Annotated[int, typer.Option(min=1, help="LoRA rank of attention.")] = 16,
    expert_rank: Annotated[int, typer.Option(min=0, help="LoRA rank of routed experts; 0: attention alone.")] = 16,
    adapter_dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    optimizer: Annotated[str, typer.Option(help="adamw, adamw_8bit or sgd.")] = "adamw",
    offload_hidden_states: Annotated[bool, typer.Option(help="Keep hidden states in host memory.")] = False,
    offload_optimizer: Annotated[bool, typer.Option(help="Keep optimizer states in host memory.")] = False,
    experts: Annotated[str, typer.Option(help="resident, or host: streamed from host memory by layer.")] = "resident",
    cap: Annotated[float | None, typer.Option(min=1, help="Decimal GB that torch may have of the GPU.")] = None,
    compile_layers: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Compile the decoder layers of octavo's rows, on a GPU.")
    ] = True,
    graph_layers: Annotated[
        bool | None,
        typer.Option(
            "--graphs/--no-graphs", help="Replay the layers of octavo's rows as CUDA graphs; as octavo sft does."
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of a row; the first three are not counted.")] = 6,
    profile: Annotated[bool, typer.Option(help="Say by kind of kernel where a step's time goes.")] = False,
    budget: Annotated[float, typer.Option(min=1, help="Seconds for all rows.")] = 3600.0,
    out: Annotated[Path | None, typer.Option(help="JSON file to which every row is appended.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON; progress goes to stderr.")] = False,
) -> None:
    """Measure whole training steps: tokens per second, memory, where the time goes, against the bfloat16 model.

    Every row runs in a process of its own. The baseline is the plain model of the same config, with transformers'
    grouped experts and stock peft, the same loss and checkpointing, and drawn weights.
    """
    let_segments_grow()
    # Imported late: help and a wrong call should not wait for torch.
    from octavo.integrations.transformers import find_checkpoint
    from octavo.plan.terms import replays_by_itself
    from octavo.trial.step import Row
    from octavo.trial.suite import run_rows

    folder = find_checkpoint(checkpoint)
    rows = [
        Row(
            str(folder),
            folder.name,
            numerics=mode,  # type: ignore[arg-type]
            engine=engine,
            seq=length,
            attention_rank=rank,
            expert_rank=expert_rank,
            adapter_dtype=adapter_dtype,  # type: ignore[arg-type]
            optimizer=optimizer,  # type: ignore[arg-type]
            offload_hidden_states=offload_hidden_states,
            offload_optimizer=offload_optimizer,
            experts="resident" if mode == "bf16" else experts,  # type: ignore[arg-type]
            cap_gb=cap,
            compile=compile_layers,
            graphs=replays_by_itself(length, experts) if graph_layers is None else graph_layers,  # type: ignore[arg-type]
            steps=steps,
            profile=profile,
        )
        for length in (seq or [2048, 8192])
        for mode in (numerics or ["bf16", "exact"])
    ]
    console = Console(stderr=as_json)
    found = run_rows(
        rows, out=out, budget_s=budget, say=lambda text: console.print(text, highlight=False, soft_wrap=True)
    )
    if as_json:
        print(json.dumps(found, indent=2))
    if profile:
        for result in found:
            if stages := result.get("profile", {}).get("stages_ms"):
                console.print(f"{result['numerics']} {result['seq']}: idle {result['profile']['idle_share']:.0%}")
                for stage, spent in stages.items():
                    console.print(f"  {stage:26} {spent:8.1f} ms")
    if any("error" in result for result in found):
        raise typer.Exit(1)
