"""Decoding: tokens/s of ``octavo.generate`` on full-width layers of a model in FP8, as CUDA graphs and without,
beside bf16 in transformers, both with and without LoRA; and the expert layer alone under CUDA-graph replay, beside the
bytes that it must read.

    python -m benchmarks.decode --layers 2 --json result.json
    python -m benchmarks.decode --model glm --layers 4 --batches 64 --profile

Correctness first: the logits of a decoding step against those of the same model with gradient, which run the training
engine. ``--profile``: which kernels a token takes. Needs a GPU, and some 4 GB of disk for two layers of Qwen3.
"""

import argparse
import gc
import json
import tempfile
import time
from pathlib import Path

import peft
import torch
from torch import nn

import octavo
from benchmarks.checkpoints import KINDS, QWEN3_CODER, build_plain, write
from octavo.bench.run import commit
from octavo.bench.timing import graph_ms
from octavo.nn.experts import OctavoExperts

# device copy of one H200
BYTES_PER_SECOND = 4.3e12
# a decoding step rounds less than the training engine, which rounds every intermediate to bfloat16
TOLERANCE = 2e-2
# every model of benchmarks.checkpoints has these tokens
VOCABULARY = 4096


def tokens_per_second(model: nn.Module, batch: int, new: int, *, graphs: bool, repeats: int = 2) -> float:
    """Greedy, from 16 tokens of prompt, over the whole call; the best of ``repeats`` after a first."""
    prompt = torch.randint(0, VOCABULARY, (batch, 16), device="cuda")
    best = 0.0
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        began = time.perf_counter()
        given = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        with torch.no_grad():
            octavo.generate(model, graphs=graphs, input_ids=prompt, **given)
        torch.cuda.synchronize()
        best = max(best, batch * new / (time.perf_counter() - began))
    return best


def step_error(model: nn.Module, batch: int) -> float:
    """Relative error of one token's logits without gradient against the same with gradient."""
    tokens = torch.randint(0, VOCABULARY, (batch, 1), device="cuda")
    with torch.no_grad():
        got = model(input_ids=tokens).logits.float()
    embeds = model.get_input_embeddings()(tokens).detach().requires_grad_()
    want = model(inputs_embeds=embeds).logits.float().detach()
    return ((got - want).norm() / want.norm()).item()


def profile(model: nn.Module, batch: int) -> str:
    """Kernels by time on the device, over 32 tokens as graphs."""
    prompt = torch.randint(0, VOCABULARY, (batch, 16), device="cuda")
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.no_grad(), torch.profiler.profile(activities=activities) as found:
        octavo.generate(model, graphs=True, input_ids=prompt, max_new_tokens=32, min_new_tokens=32, pad_token_id=0)
        torch.cuda.synchronize()
    averages = found.key_averages()
    return str(averages.table(sort_by="cuda_time_total", row_limit=30, max_name_column_width=70))


def expert_layer_us(model: nn.Module, tokens: int) -> tuple[float, float]:
    """(microseconds of one experts module under graph replay, those of reading its routed experts' codes once)."""
    experts = next(module for module in model.modules() if isinstance(module, OctavoExperts))
    sizes = model.config
    top_k = sizes.num_experts_per_tok
    x = torch.randn(tokens, sizes.hidden_size, device="cuda", dtype=torch.bfloat16)
    index = torch.rand(tokens, experts.num_experts, device="cuda").topk(top_k, 1).indices
    p = torch.rand(tokens, top_k, device="cuda", dtype=torch.bfloat16)
    # 80 calls in turn, so that launches of one graph do not show; the codes of one call stay in the L2 for the next
    calls = 80
    with torch.no_grad():
        ms = graph_ms(lambda: [experts(x, index, p) for _ in range(calls)]).ms
    routed = index.unique().numel() * 3 * sizes.hidden_size * sizes.moe_intermediate_size
    return ms * 1e3 / calls, routed / BYTES_PER_SECOND * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=KINDS, default=QWEN3_CODER.name)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--new", type=int, default=64, help="tokens to generate")
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8, 64])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, object]] = []

    def row(model: str, batch: int, **figures: float) -> None:
        facts = {"checkpoint": args.model, "model": model, "layers": args.layers, "batch": batch}
        rows.append(facts | figures | {"device": torch.cuda.get_device_name(), "torch": torch.__version__})
        print(f"{model:24s} batch {batch:3d}  " + "  ".join(f"{k} {v:.4g}" for k, v in figures.items()), flush=True)

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        write(args.model, Path(folder), layers=args.layers)
        model = octavo.load_model(folder).cuda().eval()
    print(octavo.describe(model))
    for name in ("fp8", "fp8 + LoRA r=16"):
        if name != "fp8":
            model = peft.get_peft_model(model, octavo.lora_config(model, r=16)).eval()
        for batch in args.batches:
            error = step_error(model, batch)
            if not error <= TOLERANCE:
                print(f"{name:14s} batch {batch:3d}  WRONG: logits differ by {error:.1e} from the training engine's")
                continue
            for graphs in (True, False):
                rate = tokens_per_second(model, batch, args.new, graphs=graphs)
                row(f"{name}{', graphs' if graphs else ''}", batch, tokens_per_second=rate, error=error)
            if args.profile:
                print(profile(model, batch), flush=True)
        if name == "fp8" and not KINDS[args.model].is_dense:
            for tokens in (1, 2, 4, 8, 16, 64):
                us, floor = expert_layer_us(model, tokens)
                row("fp8 experts", tokens, layer_us=us, read_once_us=floor)
    del model
    gc.collect()
    torch.cuda.empty_cache()
    plain = build_plain(args.model, layers=args.layers, tiny=False).eval()
    for name in ("bf16", "bf16 + LoRA r=16"):
        if name != "bf16":
            plain = peft.get_peft_model(plain, octavo.lora_config(plain, r=16)).eval()
        for batch in args.batches:
            row(name, batch, tokens_per_second=tokens_per_second(plain, batch, args.new, graphs=False))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps([one | {"commit": commit()} for one in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
