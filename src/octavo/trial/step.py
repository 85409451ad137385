"""One row: load a model, put LoRA on it, train a few steps on random tokens, and say what that took.

``python -m octavo.trial.step '{"checkpoint": …}'`` prints the row as JSON on its last line. A process of its own: what
another row left in caches and in the allocator would be measured too.
"""

import contextlib
import gc
import json
import statistics
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import peft
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights
from trl.trainer.utils import add_fused_lm_head

import octavo
from octavo.errors import OctavoError, first_line
from octavo.integrations.graphs import graphs_state
from octavo.integrations.quantizer import Residence
from octavo.plan.skeleton import Adapters
from octavo.plan.terms import Optimizer, Planner, Request
from octavo.train.adamw_8bit import fused_adamw_8bit
from octavo.train.offload import HiddenStatesOnHost
from octavo.train.offloaded_optimizer import offloaded
from octavo.trial.profile import profiled

GB = 1e9
_SAMPLE_SECONDS = 0.01
_TARGETS = {"attention": ("attention",), "experts": ("attention", "experts")}


@dataclass(frozen=True)
class Row:
    """What to measure. ``numerics`` ``bf16``: the plain model of the same config on transformers' own experts, made in
    memory, never compiled; the others are octavo's, on the checkpoint. ``compile`` and ``graphs``: on a GPU, as
    `octavo sft` does. ``cap_gb``: what torch may have of the GPU, from before loading on.
    """

    checkpoint: str
    model: str
    numerics: Literal["bf16", "exact", "fp8_grad", "fp8"] = "exact"
    engine: str = "auto"
    seq: int = 2048
    batch: int = 1
    attention_rank: int = 16
    expert_rank: int = 16
    adapter_dtype: Literal["float32", "bfloat16"] = "float32"
    optimizer: Optimizer = "adamw"
    offload_hidden_states: bool = False
    offload_optimizer: bool = False
    experts: Residence = "resident"
    cap_gb: float | None = None
    compile: bool = True
    graphs: bool = False
    steps: int = 6
    profile: bool = False
    with_plan: bool = True

    @property
    def label(self) -> str:
        """In one line."""
        experts = f"+experts r={self.expert_rank}" if self.expert_rank else ""
        return (
            f"{self.model} {self.numerics} {self.batch}x{self.seq} attention r={self.attention_rank}{experts} "
            f"{self.adapter_dtype} {self.optimizer}{' on host' if self.offload_optimizer else ''}"
            f"{' offloaded' if self.offload_hidden_states else ''}"
            f"{' experts on host' if self.experts == 'host' else ''}{f' in {self.cap_gb:g} GB' if self.cap_gb else ''}"
        )


def device() -> torch.device:
    """Where rows run."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if found is None else torch.device(found.type, torch.accelerator.current_device_index())


def measure(row: Row) -> dict[str, Any]:
    """The row with its figures.

    Raises:
        OctavoError: the model cannot be loaded or planned as asked.
    """
    return step_on(load(row), row)


@dataclass(frozen=True)
class Loaded:
    """A model under its adapters, for the rows that share them, and what loading took."""

    model: PreTrainedModel
    tuned: nn.Module
    seconds: float
    bytes: int
    weights: int
    host_peak: int


def shared(row: Row) -> tuple[Any, ...]:
    """What rows have in common that can be measured on one loaded model."""
    weights = row.checkpoint, row.numerics == "bf16", row.engine, row.experts, row.cap_gb
    return *weights, row.attention_rank, row.expert_rank, row.adapter_dtype


def load(row: Row) -> Loaded:
    """The row's model with its adapters, neither compiled nor recorded."""
    where = device()
    _cap(row.cap_gb, where)
    with _host_peak() as host:
        start = time.perf_counter()
        model = _plain(row.checkpoint, where) if row.numerics == "bf16" else _load(row)
        _wait(where)
        seconds = time.perf_counter() - start
    taken = _allocated(where)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return Loaded(model, _adapted(model, row), seconds, taken, weights, host.peak)


def step_on(loaded: Loaded, row: Row) -> dict[str, Any]:
    """The row with its figures, on a model that was loaded for it or for one that shares it."""
    where, model, tuned = device(), loaded.model, loaded.tuned
    ours = row.numerics != "bf16"
    compiled, recorded = (asked and ours and where.type == "cuda" for asked in (row.compile, row.graphs))
    if ours:
        octavo.compile_layers(tuned, on=False)
        octavo.graph_layers(tuned, on=False)
        octavo.configure(model, numerics=row.numerics)
    if compiled:
        octavo.compile_layers(tuned, shape=(row.batch, row.seq))
    if recorded:
        octavo.graph_layers(tuned)
    optimizer = _optimizer(row, [p for p in tuned.parameters() if p.requires_grad])
    if row.offload_optimizer:
        optimizer = offloaded(optimizer, row.optimizer)
    offload = HiddenStatesOnHost(tuned.parameters(), where) if row.offload_hidden_states else None
    generator = torch.Generator(where).manual_seed(0)
    losses: list[torch.Tensor] = []

    def step() -> None:
        tokens_BS = torch.randint(
            0, model.config.get_text_config().vocab_size, (row.batch, row.seq), generator=generator, device=where
        )
        with torch.autocast(where.type, dtype=torch.bfloat16), offload or contextlib.nullcontext():
            loss = tuned(input_ids=tokens_BS, labels=tokens_BS, use_cache=False, fused_lm_head=True).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())

    # Those of a row that failed on this model.
    tuned.zero_grad(set_to_none=True)
    gc.collect()
    if where.type == "cuda":
        # What loading took at its highest is not the step's.
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = _allocated(where)
    seconds = []
    for _ in range(row.steps):
        start = time.perf_counter()
        step()
        _wait(where)
        seconds.append(time.perf_counter() - start)
    # The first steps compile, tune and allocate, and the third records.
    typical = statistics.median(seconds[min(3, len(seconds) - 1) :])
    graphs = graphs_state(tuned)
    figures: dict[str, Any] = {
        "model": row.model,
        "numerics": row.numerics,
        "engine": "transformers" if row.numerics == "bf16" else row.engine,
        "experts": row.experts,
        "cap_gb": row.cap_gb,
        "batch": row.batch,
        "seq": row.seq,
        "lora": {"attention": row.attention_rank, "experts": row.expert_rank},
        "optimizer": row.optimizer,
        "adapter_dtype": row.adapter_dtype,
        "offload_hidden_states": row.offload_hidden_states,
        "offload_optimizer": row.offload_optimizer,
        "compile": compiled,
        "graphs": None if graphs is None else str(graphs),
        "tokens_per_s": row.batch * row.seq / typical,
        "step_ms": 1e3 * typical,
        "step_ms_all": [1e3 * second for second in seconds],
        "loaded_gb": loaded.bytes / GB,
        "before_gb": before / GB,
        "peak_allocated_gb": torch.cuda.max_memory_allocated() / GB if where.type == "cuda" else None,
        "peak_reserved_gb": torch.cuda.max_memory_reserved() / GB if where.type == "cuda" else None,
        "plan_gb": None,
        "load_s": loaded.seconds,
        "load_gb_per_s": loaded.weights / GB / loaded.seconds,
        "host_peak_gb": loaded.host_peak / GB,
        "first_loss": float(losses[0]),
        "last_loss": float(losses[-1]),
        "device": torch.cuda.get_device_name() if where.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "commit": _commit(),
    }
    if row.profile:
        figures["profile"] = profiled(step, where)
    if row.with_plan and row.numerics != "bf16":
        figures["plan_gb"] = _plan(row) / GB
    return figures


def _load(row: Row) -> PreTrainedModel:
    return octavo.load_model(row.checkpoint, numerics=row.numerics, engine=row.engine, experts=row.experts)


def _cap(gigabytes: float | None, where: torch.device) -> None:
    """Let torch have ``gigabytes`` of the GPU at most, as on a smaller one; ``None``: all of it."""
    if where.type != "cuda":
        if gigabytes is not None:
            raise OctavoError(f"cap_gb caps a CUDA GPU, and rows run on {where.type} here. Leave it away.")
        return
    total = torch.cuda.get_device_properties(where).total_memory
    share = 1.0 if gigabytes is None else min(1.0, gigabytes * GB / total)
    torch.cuda.set_per_process_memory_fraction(share, where)


def _plain(checkpoint: str, where: torch.device) -> PreTrainedModel:
    """The bfloat16 model of the checkpoint's config with drawn weights, as plain transformers runs it."""
    config = AutoConfig.from_pretrained(checkpoint)
    for part in (config, config.get_text_config()):
        if getattr(part, "quantization_config", None) is not None:
            del part.quantization_config
    config._experts_implementation = "grouped_mm"
    with torch.device(where), no_init_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    generator = torch.Generator(where).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.02, generator=generator)
            else:
                parameter.fill_(1.0)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.zero_()
    return model


def _adapted(model: PreTrainedModel, row: Row) -> nn.Module:
    """Under LoRA, checkpointing and trl's output head, as octavo sft has it; the plain model under stock peft."""
    # First: trl wants the bare model.
    add_fused_lm_head(model)
    lora = octavo.lora_config(
        model,
        r=row.attention_rank,
        expert_rank=row.expert_rank or None,
        targets=_TARGETS["experts" if row.expert_rank else "attention"],
    )
    tuned: nn.Module = peft.get_peft_model(model, lora)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(getattr(torch, row.adapter_dtype))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    tuned.train()
    return tuned


def _optimizer(row: Row, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if row.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=1e-4, fused=parameters[0].device.type == "cuda")
    if row.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=1e-4)
    if row.optimizer == "adamw_8bit":
        try:
            from torchao.optim import AdamW8bit
        except ModuleNotFoundError as error:
            raise OctavoError("optimizer adamw_8bit needs torchao. Run: pip install 'octavo[adamw8bit]'") from error
        return fused_adamw_8bit(AdamW8bit(parameters, lr=1e-4, bf16_stochastic_round=True))
    raise OctavoError(f"a bench of optimizer {row.optimizer} does not exist; choose adamw, adamw_8bit or sgd.")


def _plan(row: Row) -> int:
    adapters = Adapters(
        row.attention_rank,
        row.expert_rank or None,
        _TARGETS["experts" if row.expert_rank else "attention"],
        getattr(torch, row.adapter_dtype),
    )
    request = Request(
        row.checkpoint,
        adapters,
        batch=row.batch,
        seq=row.seq,
        optimizer=row.optimizer,
        offload_hidden_states=row.offload_hidden_states,
        offload_optimizer=row.offload_optimizer,
        graphs=row.graphs,
        experts=row.experts,
    )
    return Planner(row.checkpoint).plan(request).peak


@dataclass
class _Peak:
    peak: int = 0


@contextlib.contextmanager
def _host_peak() -> Iterator[_Peak]:
    """The most anonymous host memory above that at the start; pages of mapped files are the system's to drop."""
    found, done, start = _Peak(), threading.Event(), _anonymous()

    def sample() -> None:
        while not done.wait(_SAMPLE_SECONDS):
            found.peak = max(found.peak, _anonymous() - start)

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield found
    finally:
        done.set()
        sampler.join()


def _anonymous() -> int:
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    lines = status.read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon", "RssShmem")))


def _allocated(where: torch.device) -> int:
    return torch.cuda.memory_allocated() if where.type == "cuda" else 0


def _wait(where: torch.device) -> None:
    if where.type != "cpu":
        torch.accelerator.synchronize()


def _commit() -> str | None:
    source = Path(next(iter(octavo.__path__)))
    command = ["git", "-C", str(source), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def main() -> None:
    """Measure the row that is the one argument, or each row of a list, loading what neighbours share once; a line of
    JSON for each.
    """
    given = json.loads(sys.argv[1])
    rows = [Row(**fields) for fields in (given if isinstance(given, list) else [given])]
    warnings.filterwarnings("ignore", category=FutureWarning)
    loaded, before = None, None
    for row in rows:
        try:
            if loaded is None or before is None or shared(row) != shared(before):
                loaded, before = None, row
                gc.collect()
                if device().type == "cuda":
                    torch.cuda.empty_cache()
                loaded = load(row)
            result = step_on(loaded, row)
        except OctavoError as error:
            result = {"error": str(error), **asdict(row)}
        except torch.OutOfMemoryError as error:
            result = {"error": f"out of memory: {first_line(error)}", **asdict(row)}
        except RuntimeError as error:
            # Of torch's making: the rows that are left may do better.
            result = {"error": first_line(error), **asdict(row)}
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
