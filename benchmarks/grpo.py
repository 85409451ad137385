"""GRPO at full size with drawn weights: memory, time by stage, bytes of a synchronization, and generation against bf16.

    python -m benchmarks.grpo glm --json benchmarks/results/grpo-h200.json
    python -m benchmarks.grpo qwen3-8b --json benchmarks/results/grpo-h200.json

``glm``: the shapes of GLM-4.7-Flash, a scale per channel. ``qwen3-8b``: dense, blocks of 128 x 128. A step is 8 prompts
x 8 completions x 512 tokens; the last of ``--steps`` is reported, and those before, which compile the kernels, sample
``--warm-up-tokens`` only. Then generation is timed by itself, as many sequences of ``--compared-tokens`` each, or of as
many as ``--compared-seconds`` allow, which the row states: by octavo with its adapter, as CUDA graphs and without, and
in the same process by the bf16 model of these shapes in plain transformers, alone and with the same LoRA by peft.
Tokens per second are new tokens of all sequences over the whole call, prompt and capture included. ``--layers`` makes a
shorter model, ``--small`` one that a CPU can run: to try the script, not to measure. The FP8 checkpoint (33 and 9 GB)
is made first, unless ``--checkpoint`` has it.
"""

import argparse
import gc
import io
import json
import platform
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peft
import torch
from rich.console import Console
from transformers import TrainerCallback

import octavo
from benchmarks.checkpoints import build_plain, write
from octavo.errors import EngineError
from octavo.integrations.generation import Graphs, why_no_graphs
from octavo.train.base import quiet
from octavo.train.config import check_config
from octavo.train.grpo import GrpoRun
from octavo.train.grpo_config import GrpoConfig
from octavo.train.grpo_trainer import GrpoTrainer
from octavo.train.metrics import read_metrics
from octavo.train.rollout.vllm import SamplingParameters, VllmServer
from tests.train.vllm_server import VllmLike, serving

GB = 1e9
WORDS = ("river", "walk", "happy", "stone", "paint", "quick", "chair", "sing")


def device() -> torch.device:
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def synchronize() -> None:
    if device().type != "cpu":
        torch.accelerator.synchronize()


def peak_gb() -> float | None:
    """The most that torch held on the accelerator since the last reset; None on a CPU."""
    return None if device().type == "cpu" else torch.accelerator.max_memory_allocated() / GB


def reset_peak() -> None:
    if device().type != "cpu":
        torch.accelerator.reset_peak_memory_stats()


class Stages:
    """Seconds spent in methods of a trainer, the device synchronized around each."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def time(self, stage: str, owner: Any, method: str) -> None:
        inner: Callable[..., Any] = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            synchronize()
            began = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                synchronize()
                self.seconds[stage] += time.perf_counter() - began

        setattr(owner, method, timed)


class OptimizerStage(TrainerCallback):
    """Adds the optimizer's own step to the stages: between the last check of gradients and its end."""

    def __init__(self, stages: Stages) -> None:
        self._stages, self._began = stages, 0.0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        synchronize()
        self._began = time.perf_counter()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        synchronize()
        self._stages.seconds["optimizer"] += time.perf_counter() - self._began


def run_config(checkpoint: Path, folder: Path, args: argparse.Namespace) -> GrpoConfig:
    data = folder / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": " ".join(random.choices(WORDS, k=64))}) + "\n" for _ in range(64)))
    reward = folder / "rewards.py"
    reward.write_text(
        "def even(completion_ids):\n    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]\n"
    )
    return check_config(
        GrpoConfig,
        {
            "model": {"path": str(checkpoint), "numerics": args.numerics, "engine": args.engine},
            "lora": {"r": 16},
            "data": str(data),
            "rewards": [f"{reward}:even"],
            "rollout": {
                "max_new_tokens": args.tokens,
                "stop_mean": None,
                "replay": args.replay,
                "graphs": "auto" if args.graphs == "auto" else args.graphs == "true",
            },
            "train": {
                "steps": args.steps,
                "prompts": args.prompts,
                "completions": args.completions,
                "batch_size": args.batch_size,
                "lr": 1e-5,
                "warmup": 0,
                "router_aux_loss": 0.0 if args.model == "glm" else None,
                "resume": "never",
            },
            "out": str(folder / "run"),
        },
    )


def measure_octavo(checkpoint: Path, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Load, train ``args.steps`` steps, and say what the last one took."""
    began = time.perf_counter()
    with quiet():
        run = GrpoRun(run_config(checkpoint, folder, args), Console(file=io.StringIO()))
        loaded = None if device().type == "cpu" else torch.accelerator.memory_allocated() / GB
        seconds_to_load = time.perf_counter() - began
        print(f"loaded in {seconds_to_load:.0f} s", flush=True)
        stages = Stages()
        trainer = run.trainer
        stages.time("rollout", trainer.sampler, "sample")
        stages.time("rewards", trainer, "_calculate_rewards")
        stages.time("forward and loss", trainer, "_compute_loss")
        stages.time("backward", trainer.accelerator, "backward")
        trainer.add_callback(OptimizerStage(stages))
        peaks = {}
        sample = trainer.sampler.sample

        def sampled(*given: Any) -> Any:
            # The last step alone is reported.
            stages.seconds.clear()
            is_last = trainer.state.global_step == args.steps - 1
            trainer.generation_config.max_new_tokens = args.tokens if is_last else args.warm_up_tokens
            reset_peak()
            result = sample(*given)
            peaks["rollout"] = peak_gb()
            print(f"step {trainer.state.global_step + 1}: rollout {stages.seconds['rollout']:.1f} s", flush=True)
            reset_peak()
            return result

        trainer.sampler.sample = sampled
        run.train()
        peaks["training"] = peak_gb()
        # The generations that follow take minutes.
        print(json.dumps({"seconds": dict(stages.seconds), "peak_gb": peaks}), flush=True)
        trainer.close()
        sent = measure_synchronization(trainer, checkpoint, folder)
        model = trainer.accelerator.unwrap_model(trainer.model).eval()
        graphs = why_no_graphs(model)
        generated = {
            "graphs": generation(model, args, graphs=True) if graphs is None else graphs,
            "eager": generation(model, args, graphs=False),
        }
    record = read_metrics(folder / "run" / "metrics.jsonl")[-1]
    return {
        "seconds_to_load": seconds_to_load,
        "gb_after_load": loaded,
        "peak_gb": peaks,
        "seconds": dict(stages.seconds),
        "seconds_of_these_stages": sum(stages.seconds.values()),
        "decoding": trainer.sampler.decoding,
        "generation": generated,
        "rollout_tokens_per_second": record["rollout_tokens_per_second"],
        "completion_tokens": record["completion_tokens"],
        "agreement_mean": record["agreement_mean"],
        "agreement_worst": record["agreement_worst"],
        "synchronization": {
            "own sampler": {"bytes": record["sync_bytes"], "seconds": record["sync_seconds"]},
            "vLLM client": sent,
        },
        "engines": sorted({row.engine for row in octavo.describe(trainer.model).rows if row.engine}),
    }


class AnyAdapter(VllmLike):
    """A server that takes every adapter without reading it: what is measured is the client."""

    def load(self, body: dict[str, Any]) -> str:
        self.adapters[body["lora_name"]] = None
        return "Success"


def measure_synchronization(trainer: GrpoTrainer, checkpoint: Path, folder: Path) -> dict[str, Any]:
    """Bytes that the client of a vLLM server writes and sends when the adapter has changed, and its seconds."""
    with serving(AnyAdapter(checkpoint)) as address:
        client = VllmServer(
            address,
            run="benchmark",
            folder=folder / "adapters",
            base_model=str(checkpoint),
            dtype=torch.bfloat16,
            parameters=SamplingParameters(1, 1.0, ()),
            timeout=60.0,
        )
        model = trainer.accelerator.unwrap_model(trainer.model)
        # The second also unloads the first, as in every later step of a run.
        client.synchronize(model, 0)
        moved = client.synchronize(model, 1)
        client.close()
    return {"bytes": moved.bytes, "seconds": moved.seconds}


def generation(model: Any, args: argparse.Namespace, graphs: Graphs) -> dict[str, Any]:
    """Seconds of one sampled generation, and how many tokens it had; ``graphs``: see `octavo.generate`."""
    ids = torch.randint(5, 4000, (args.prompts * args.completions, 64), device=device())
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pad_token_id": 0, "graphs": graphs}
    given |= {"do_sample": True, "top_k": 0, "temperature": 1.0, "top_p": 1.0}

    def generate(tokens: int, **limit: float) -> int:
        with torch.no_grad(), torch.autocast(device().type, torch.bfloat16):
            output = octavo.generate(model, **given, min_new_tokens=tokens, max_new_tokens=tokens, **limit)
        synchronize()
        return int(output.shape[1]) - ids.shape[1]

    try:
        generate(4)
        reset_peak()
        began = time.perf_counter()
        tokens = generate(args.compared_tokens, max_time=args.compared_seconds)
        seconds = time.perf_counter() - began
    except torch.OutOfMemoryError as error:
        return {"out_of_memory": str(error).partition(". ")[0]}
    except EngineError as error:
        return {"failed": str(error)}
    found = {
        "sequences": len(ids),
        "prompt_tokens": ids.shape[1],
        "tokens_per_sequence": tokens,
        "seconds": seconds,
        "tokens_per_second": len(ids) * tokens / seconds,
        "peak_gb": peak_gb(),
    }
    print(json.dumps(found), flush=True)
    return found


def measure_bf16(args: argparse.Namespace) -> dict[str, Any]:
    """Generation by plain transformers with the bf16 model of the same shapes, without and with peft's LoRA."""
    try:
        model = build_plain(args.model, layers=args.layers, tiny=args.small).eval()
        weights = sum(parameter.nbytes for parameter in model.parameters()) / GB
        found = {"weights_gb": weights, "alone": generation(model, args, graphs=False)}
        adapted = peft.get_peft_model(model, octavo.lora_config(model, r=16)).eval()
    except torch.OutOfMemoryError as error:
        return {"out_of_memory": str(error).partition(". ")[0]}
    return found | {"with LoRA": generation(adapted, args, graphs=False)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["glm", "qwen3-8b"])
    parser.add_argument("--layers", type=int)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--warm-up-tokens", type=int, default=16, help="completion tokens of the steps before the last")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--completions", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--compared-tokens", type=int, default=128, help="new tokens per sequence, octavo against bf16")
    parser.add_argument("--compared-seconds", type=float, default=20.0, help="each generation stops after these")
    parser.add_argument("--graphs", choices=["auto", "true", "false"], default="auto", help="`rollout.graphs`")
    parser.add_argument("--batch-size", type=int, default=8, help="completions per training forward")
    parser.add_argument("--numerics", default="exact")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--replay", action="store_true")
    parser.add_argument("--no-bf16", action="store_true", help="leave the comparison out")
    parser.add_argument("--checkpoint", type=Path, help="a folder of benchmarks.checkpoints; made here if not there")
    parser.add_argument("--folder", type=Path, help="where the run writes; a temporary folder unless given")
    parser.add_argument("--json", type=Path, help="append the row to the list in this file")
    args = parser.parse_args()
    random.seed(0)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = Path(temporary)
        checkpoint = args.checkpoint or folder / "checkpoint"
        if not (checkpoint / "model.safetensors.index.json").exists():
            began = time.perf_counter()
            size = write(args.model, checkpoint, layers=args.layers, tiny=args.small)
            print(f"{size / GB:.2f} GB written in {time.perf_counter() - began:.0f} s", flush=True)
        config = json.loads((checkpoint / "config.json").read_text())
        index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
        found = measure_octavo(checkpoint, folder, args)
    gc.collect()
    if device().type == "cuda":
        torch.cuda.empty_cache()
    row = {
        "model": args.model,
        "layers": config["num_hidden_layers"],
        "small": args.small,
        "step": f"{args.prompts} prompts x {args.completions} completions x {args.tokens} tokens",
        "completions_per_forward": args.batch_size,
        "numerics": args.numerics,
        "replay": args.replay,
        "checkpoint_gb": index["metadata"]["total_size"] / GB,
        "octavo": found,
        "bf16_generation": None,
        "device": torch.cuda.get_device_name() if device().type == "cuda" else platform.machine(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "trl")},
    }
    rows = json.loads(args.json.read_text()) if args.json and args.json.exists() else []
    # Before the comparison, which may run out of memory or of time.
    report([*rows, row], args.json)
    if not args.no_bf16:
        row["bf16_generation"] = measure_bf16(args)
        report([*rows, row], args.json)


def report(rows: list[dict[str, Any]], file: Path | None) -> None:
    """Print the last row, and write all."""
    print(json.dumps(rows[-1], indent=1), flush=True)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
