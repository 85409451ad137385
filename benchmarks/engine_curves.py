"""Fine-tune small models on a fast engine and on the reference, from one start on the same batches; plot the losses.

    python -m benchmarks.engine_curves --out benchmarks/results

On a GPU ``exact`` runs on ``fused`` and ``fp8`` on ``scaled``; on a CPU ``exact`` runs on ``dequant``. A layer that the
engine cannot compute runs on what auto picks; what ran where is written beside the losses. glm-tiny and qwen-tiny are
the small real models; glm-drawn and qwen3-drawn have drawn weights, and widths that the products for Hopper take. The
largest difference of running means over 10 steps is at most 1 % in exact numerics and 2 % in fp8. The file is whole
after every engine, and keeps what the same commit gave on the same device for others: ``--models`` cuts a long run.
"""

import argparse
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

import octavo
from benchmarks.checkpoints import KINDS, TINY, write_kind
from octavo.bench.run import commit, default_device, device_name
from octavo.nn.experts import OctavoExperts
from octavo.nn.linear import Float8Linear
from octavo.nn.settings import Settings
from octavo.ops.choice import why_not
from tests.curves import worst_difference

WINDOW = 10
LIMIT = {"exact": 0.01, "fp8_grad": 0.02, "fp8": 0.02}
REAL = ("glm-tiny", "qwen-tiny")
# Widths that are multiples of 128, which the grouped products for Hopper take with every layout of scales.
DRAWN = {
    "glm-drawn": ("glm", {"hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 128}),
    "qwen3-drawn": ("qwen3-coder", {"hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 128}),
}


def checkpoint(name: str, folder: Path) -> Path:
    """The folder of a model by name; a drawn one is written into ``folder``."""
    if name in REAL:
        return octavo.demo.checkpoint(name)
    base, sizes = DRAWN[name]
    kind = KINDS[base].resized(**{**TINY[base], **sizes})
    # every layer of experts in FP8
    write_kind(replace(kind, plain_layers=()), folder / name)
    return folder / name


def batches(path: Path, steps: int, size: int, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """``steps`` batches of the bundled definitions, the loss on the assistant's words, the same at every call."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    lines = [json.loads(line) for line in octavo.demo.data("train").read_text().splitlines()]
    draw = random.Random(0)
    for _ in range(steps):
        rows = [
            tokenizer.apply_chat_template(
                line["messages"], return_dict=True, return_assistant_tokens_mask=True, truncation=True, max_length=128
            )
            for line in draw.sample(lines, size)
        ]
        width = -(-max(len(row["input_ids"]) for row in rows) // 16) * 16
        ids = torch.zeros(size, width, dtype=torch.int64)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for number, row in enumerate(rows):
            tokens = torch.tensor(row["input_ids"])
            ids[number, : len(tokens)], mask[number, : len(tokens)] = tokens, 1
            answers = torch.tensor(row["assistant_masks"], dtype=torch.bool)
            labels[number, : len(tokens)] = torch.where(answers, tokens, -100)
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        yield {key: value.to(device) for key, value in batch.items()}


def put_on(model: PreTrainedModel, engine: str, numerics: str) -> dict[str, int]:
    """Give every layer ``engine`` where it can compute the layer, else auto; how many layers run on what."""
    device = next(model.parameters()).device
    ran: Counter[str] = Counter()
    for module in model.modules():
        if not isinstance(module, OctavoExperts | Float8Linear):
            continue
        experts = isinstance(module, OctavoExperts)
        layer = module.layer(device, torch.bfloat16) if experts else module.layer(torch.bfloat16)
        module.settings = Settings(numerics, "auto" if why_not(engine, layer) else engine)
        chosen = module.settings.choose(layer).largest
        ran[f"{'experts' if experts else 'linear'} on {chosen.name} ({type(chosen).__name__})"] += 1
    return dict(ran)


def train(path: Path, engine: str, numerics: str, steps: int, size: int) -> tuple[list[float], dict[str, int]]:
    """(the loss of each step, what ran on what)."""
    torch.manual_seed(0)
    device = default_device()
    model = octavo.load_model(path)
    ran = put_on(model, engine, numerics)
    tuned = peft.get_peft_model(model, octavo.lora_config(model, r=8, expert_rank=4))
    trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
    losses = []
    for batch in batches(path, steps, size, device):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = tuned(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses).tolist(), ran


def others(file: Path, asked: list[tuple[str, ...]], here: dict[str, str | None]) -> list[dict[str, Any]]:
    """What ``file`` holds of the same device and commit beside the (model, numerics, engine) in ``asked``."""
    held: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
    return [
        one
        for one in held
        if (one["model"], one["numerics"], one["engine"]) not in asked and here.items() <= one.items()
    ]


def main() -> None:
    """Write ``engine-curves.json`` and ``engine-curves.png``; fail where curves part by more than is allowed."""
    gpu = default_device().type == "cuda"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=[*REAL, *DRAWN], default=[*REAL, *DRAWN] if gpu else [*REAL])
    parser.add_argument(
        "--engines",
        nargs="+",
        metavar="NUMERICS:ENGINE",
        default=["exact:fused", "fp8:scaled"] if gpu else ["exact:dequant"],
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--plot", action="store_true", help="only draw what engine-curves.json in OUT holds")
    args = parser.parse_args()
    if args.plot:
        plot(json.loads((args.out / "engine-curves.json").read_text()), args.out / "engine-curves.png")
        return
    file, here = args.out / "engine-curves.json", {"device": device_name(default_device()), "commit": commit()}
    asked = [(name, *one.split(":")) for name in args.models for one in args.engines]
    results = [*others(file, asked, here)]
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models:
            path = checkpoint(name, Path(folder))
            for numerics, engine in (one.split(":") for one in args.engines):
                began = time.perf_counter()
                want, _ = train(path, "reference", numerics, args.steps, args.batch_size)
                middle = time.perf_counter()
                got, ran = train(path, engine, numerics, args.steps, args.batch_size)
                apart = worst_difference(got, want, WINDOW)
                results.append(
                    {"model": name, "numerics": numerics, "engine": engine, "ran": ran, "steps": args.steps,
                     "reference": want, "losses": got, "worst_difference": apart, "limit": LIMIT[numerics],
                     "torch": torch.__version__, **here}
                )  # fmt: skip
                last = sum(want[-WINDOW:]) / WINDOW
                print(
                    f"{name:12s} {numerics:8s} {engine:8s} loss {want[0]:.3f} to {last:.3f}, apart by {apart:.3%} "
                    f"of at most {LIMIT[numerics]:.0%}; reference {middle - began:.0f} s, {engine} "
                    f"{time.perf_counter() - middle:.0f} s; {ran}",
                    flush=True,
                )
                args.out.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(results) + "\n")
    if find_spec("matplotlib"):
        plot(results, args.out / "engine-curves.png")
    else:
        print("no plot: matplotlib is not installed; run with --plot where it is")
    if any(result["worst_difference"] > result["limit"] for result in results):
        raise SystemExit("curves part by more than is allowed")


def plot(results: list[dict], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(result["model"] for result in results))
    kinds = list(dict.fromkeys(result["numerics"] for result in results))
    size = (3.4 * len(names), 3.0 * len(kinds))
    figure, axes = pyplot.subplots(len(kinds), len(names), figsize=size, squeeze=False)
    for result in results:
        axis = axes[kinds.index(result["numerics"])][names.index(result["model"])]
        styles = (("reference", "reference", 3, "0.75"), ("losses", result["engine"], 1.2, "tab:blue"))
        for key, label, width, color in styles:
            losses = result[key]
            means = [sum(losses[i : i + WINDOW]) / WINDOW for i in range(len(losses) - WINDOW + 1)]
            axis.plot(range(WINDOW, len(losses) + 1), means, label=label, linewidth=width, color=color)
        axis.set_title(f"{result['model']}, {result['numerics']}: {result['worst_difference']:.2%}", fontsize=9)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.supxlabel("step")
    figure.supylabel(f"loss, mean of {WINDOW} steps")
    figure.tight_layout()
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main()
