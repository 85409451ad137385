"""``octavo plan CHECKPOINT``: memory of a run by term, whether it fits a GPU, and what to change. Reads no weights."""

import json
import re
from enum import StrEnum
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table

from octavo.errors import ConfigError

GB = 1e9
# What the driver and the kernels' code take outside torch's allocator on a data centre GPU.
CONTEXT = 500_000_000
_UNITS = {"GB": 1e9, "GIB": 2**30}
_WHAT = {
    "codes": "FP8 codes",
    "scales": "scales, float32",
    "plain": "everything else of the model, bfloat16",
    "ring": "buffers for layers of experts on the host",
    "recordings": "layers as CUDA graphs",
    "adapters": "adapters",
    "optimizer": "optimizer states",
    "gradients": "gradients",
    "kept": "activations kept for backward",
    "transient": "one layer, recomputed and differentiated",
    "loss": "loss",
    "allocator": "allocator's slack",
}
_ON_HOST = {"experts": "experts", "optimizer": "optimizer states"}


class Optimizer(StrEnum):
    """As in ``train.optimizer``."""

    ADAMW = "adamw"
    ADAMW_8BIT = "adamw_8bit"
    ADAFACTOR = "adafactor"
    SGD = "sgd"


class Activations(StrEnum):
    """As in ``model.activations``."""

    BF16 = "bf16"
    FP8 = "fp8"


class Experts(StrEnum):
    """As in ``model.experts``."""

    RESIDENT = "resident"
    HOST = "host"


class Dtype(StrEnum):
    """As in ``lora.dtype``."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


def plan(
    checkpoint: Annotated[str, typer.Argument(help="A folder, of which config.json is enough, or a hub id.")],
    gpu: Annotated[str | None, typer.Option(help="Memory of the GPU, as 40GB or 80GiB; says whether it fits.")] = None,
    seq: Annotated[int, typer.Option(min=8, help="Tokens of a row.")] = 2048,
    batch: Annotated[int, typer.Option(min=1, help="Rows of a forward.")] = 1,
    rank: Annotated[int, typer.Option(min=1, help="LoRA rank of attention, dense and shared layers.")] = 16,
    expert_rank: Annotated[int | None, typer.Option(min=1, help="Of routed experts; max(1, rank // top_k).")] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="attention, mlp, shared_experts or experts; all by default. Repeat it.")
    ] = None,
    adapter_dtype: Annotated[Dtype, typer.Option(help="Dtype of the adapters.")] = Dtype.FLOAT32,
    optimizer: Annotated[Optimizer, typer.Option(help="Optimizer.")] = Optimizer.ADAMW,
    grad_accumulation: Annotated[int, typer.Option(min=1, help="Forwards per optimizer step.")] = 1,
    activations: Annotated[
        Activations, typer.Option(help="What routed experts keep for backward; fp8 goes with --no-checkpointing.")
    ] = Activations.BF16,
    experts: Annotated[
        Experts, typer.Option(help="Where FP8 experts are kept: on the GPU, or in host memory, streamed by layer.")
    ] = Experts.RESIDENT,
    checkpointing: Annotated[bool, typer.Option(help="Recompute activations in the backward pass.")] = True,
    offload_hidden_states: Annotated[bool, typer.Option(help="Keep hidden states in host memory.")] = False,
    offload_optimizer: Annotated[bool, typer.Option(help="Keep optimizer states in host memory.")] = False,
    graphs: Annotated[
        bool | None, typer.Option(help="Replay checkpointed layers as CUDA graphs; up to 12,288 tokens unless given.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Memory of a run by term, in decimal GB, whether it fits a GPU, and what to change. Reads no weights."""
    limit = None if gpu is None else gpu_bytes(gpu)
    if adapter_dtype == Dtype.BFLOAT16 and optimizer != Optimizer.ADAMW_8BIT:
        raise ConfigError("--adapter-dtype bfloat16 needs --optimizer adamw_8bit, which rounds stochastically.")
    if activations == Activations.FP8 and checkpointing:
        raise ConfigError(
            "--activations fp8 shrinks what is kept with --no-checkpointing alone; give both, or neither."
        )
    if offload_optimizer and optimizer == Optimizer.SGD:
        raise ConfigError("--offload-optimizer moves the optimizer's states, and sgd keeps none; leave it out.")
    if graphs and not checkpointing:
        raise ConfigError("--graphs take the place of gradient checkpointing; leave out --no-checkpointing.")
    if graphs and experts == Experts.HOST:
        raise ConfigError("--graphs cannot wait for experts that come from the host; leave out one of the two.")
    # Imported late: help and a wrong call should not wait for torch.
    import torch

    from octavo.plan.skeleton import Adapters
    from octavo.plan.terms import Planner, Request

    adapters = Adapters(
        r=rank,
        expert_rank=expert_rank,
        targets=tuple(dict.fromkeys(target)) if target else Adapters.targets,
        dtype=getattr(torch, adapter_dtype.value),
    )
    request = Request(
        checkpoint,
        adapters,
        batch=batch,
        seq=seq,
        grad_accumulation=grad_accumulation,
        optimizer=optimizer.value,
        activations=activations.value,
        experts=experts.value,
        checkpointing=checkpointing,
        offload_hidden_states=offload_hidden_states,
        offload_optimizer=offload_optimizer,
        graphs="auto" if graphs is None else graphs,
    )
    planner = Planner(checkpoint)
    found = planner.plan(request)
    fits = None if limit is None else found.peak + CONTEXT <= limit
    changes = [] if fits else planner.changes(request)
    result: dict[str, Any] = {
        "checkpoint": checkpoint,
        "terms_gb": {name: value / GB for name, value in found.terms.items()},
        "loaded_gb": found.loaded / GB,
        "peak_gb": found.peak / GB,
        "peak_allocated_gb": found.allocated / GB,
        "host_gb": (found.host + found.host_optimizer) / GB,
        "host_terms_gb": {"experts": found.host / GB, "optimizer": found.host_optimizer / GB},
        "moment": found.moment,
        "context_gb": CONTEXT / GB,
        "gpu_gb": None if limit is None else limit / GB,
        "fits": fits,
        "changes": [
            {
                "change": change.says,
                "saves_gb": change.saves / GB,
                "same_run": change.same_run,
                "fits": None if limit is None else found.peak - change.saves + CONTEXT <= limit,
            }
            for change in changes
        ],
    }
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        Console().print(to_table(result))


def gpu_bytes(text: str) -> float:
    """``40GB``, ``40`` or ``80GiB`` in bytes.

    Raises:
        ConfigError: it is none of these.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(GB|GiB)?\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise ConfigError(f"--gpu {text!r} is no amount of memory; write 40GB, or 80GiB.")
    return float(match[1]) * _UNITS[(match[2] or "GB").upper()]


def to_table(result: dict[str, Any]) -> Group:
    """The same for a person."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("at the peak")
    table.add_column("GB", justify="right")
    for name, value in result["terms_gb"].items():
        if value or name not in ("ring", "recordings"):
            table.add_row(_WHAT[name], f"{value:.2f}")
    table.add_section()
    table.add_row("peak", f"{result['peak_gb']:.2f}")
    lines = [f"Highest in {result['moment']}; {result['loaded_gb']:.2f} GB once loaded."]
    hosted = {_ON_HOST[name]: value for name, value in result["host_terms_gb"].items() if value}
    if hosted:
        what = " and ".join(f"{value:.2f} GB of {name}" for name, value in hosted.items())
        lines.append(f"{what} are in pinned host memory.")
    if result["gpu_gb"] is not None:
        verdict = "fits" if result["fits"] else "does not fit"
        lines.append(
            f"It {verdict} in {result['gpu_gb']:.0f} GB, of which the driver takes about {result['context_gb']:.1f}."
        )
    if result["changes"]:
        lines.append("What would lower it, the most helpful first:")
    for change in result["changes"]:
        enough = "; then it fits" if change["fits"] else ""
        lines.append(f"  {escape(change['change'])}: {change['saves_gb']:.2f} GB less{enough}")
    return Group(table, *lines)
