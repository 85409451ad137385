"""Load a checkpoint with the layer shapes of Qwen3-Coder-30B-A3B and train one step on it: seconds and peak memory.

python -m benchmarks --layers 4 --tokens 2048 --json result.json

Every engine that computes the numerics is measured in the same process. Host memory is what the process allocated
itself; pages of the mapped files, which the system may drop at any time, are not counted.
"""

import argparse
import gc
import json
import multiprocessing
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import peft
import torch

import octavo
from benchmarks.checkpoints import write
from octavo.checkpoint.values import check_codes, check_scales
from octavo.nn.experts import Float8Experts
from octavo.nn.linear import Float8Linear
from octavo.nn.storage import unsealed

GB = 1e9
ENGINES = ("dequant", "reference")
SAMPLE_SECONDS = 0.002


@dataclass
class Peak:
    """Bytes above what was held at the start, at the highest and at the end."""

    highest: int = 0
    final: int = 0


def allocated(device: torch.device) -> int:
    """Bytes held now: by torch on an accelerator, by the process itself on the host."""
    if device.type != "cpu":
        return torch.accelerator.memory_allocated(device)
    status = Path("/proc/self/status").read_text()
    return sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(("RssAnon", "RssShmem")))


@contextmanager
def watched(device: torch.device) -> Iterator[Peak]:
    """Fills the yielded value when the block ends."""
    gc.collect()
    start, peak, done = allocated(device), Peak(), threading.Event()

    def sample() -> None:
        while not done.wait(SAMPLE_SECONDS):
            peak.highest = max(peak.highest, allocated(device) - start)

    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield peak
    finally:
        done.set()
        sampler.join()
        peak.final = allocated(device) - start
        if device.type != "cpu":
            peak.highest = torch.accelerator.max_memory_allocated(device) - start


def check_values(model: torch.nn.Module) -> float:
    """Seconds to check every scale and code of ``model`` once more, as loading did."""
    start = time.perf_counter()
    for name, module in model.named_modules():
        if isinstance(module, Float8Experts | Float8Linear):
            for key, parameter in module.named_parameters(recurse=False):
                if parameter.dtype == torch.uint8:
                    check_codes(f"{name}.{key}", unsealed(parameter))
                elif parameter.dtype == torch.int32:
                    check_scales(f"{name}.{key}", unsealed(parameter))
    return time.perf_counter() - start


def step_seconds(model: torch.nn.Module, tokens_BS: torch.Tensor, repeats: int) -> float:
    """The median time of a forward and a backward, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        model(input_ids=tokens_BS, labels=tokens_BS, use_cache=False).loss.backward()
        if tokens_BS.device.type != "cpu":
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def measure(folder: Path, size: int, args: argparse.Namespace) -> dict[str, object]:
    """Load once, then one timing for each engine."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    start = time.perf_counter()
    with watched(device) as peak:
        model = octavo.load_model(folder)
    seconds = time.perf_counter() - start
    load = {
        "seconds": seconds,
        "of_which_value_checks": check_values(model),
        "peak": asdict(peak),
        "peak_over_final": peak.highest / peak.final,
    }
    tokens_BS = torch.randint(0, model.config.vocab_size, (1, args.tokens), device=device)
    tuned = peft.get_peft_model(model, octavo.lora_config(model, r=16))
    tuned.gradient_checkpointing_enable()
    tuned.enable_input_require_grads()
    steps = {}
    for engine in ENGINES:
        octavo.configure(model, engine=engine)
        with watched(device) as peak:
            seconds = step_seconds(tuned, tokens_BS, args.repeats)
        steps[engine] = {"seconds": seconds, "tokens_per_second": args.tokens / seconds, "peak": asdict(peak)}
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")}
        | {"octavo": octavo.__version__},
        "layers": args.layers,
        "bytes_on_disk": size,
        "load": load,
        "tokens": args.tokens,
        "steps": steps,
    }


def show(found: dict) -> None:
    load, versions = found["load"], ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    print(f"{found['device']}; {versions}")
    print(
        f"load  {found['layers']} layers, {found['bytes_on_disk'] / GB:.2f} GB on disk: {load['seconds']:.2f} s, of "
        f"which value checks {load['of_which_value_checks']:.2f} s; peak {load['peak']['highest'] / GB:.2f} GB, "
        f"{load['peak_over_final']:.2f} x what stays"
    )
    for engine, step in found["steps"].items():
        print(
            f"step  {engine:10} {found['tokens']} tokens, forward and backward, LoRA r=16, checkpointed: "
            f"{step['seconds']:.3f} s, {step['tokens_per_second']:.0f} tokens/s, "
            f"peak +{step['peak']['highest'] / GB:.2f} GB"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="each is 0.62 GB")
    parser.add_argument("--tokens", type=int, default=2048, help="length of the one sequence")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # In a process of its own, or the memory that it gives back would hide what loading takes.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            size = pool.apply(write, ("qwen3-coder", Path(folder)), {"layers": args.layers})
        found = measure(Path(folder), size, args)
    show(found)
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
