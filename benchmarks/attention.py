"""Time torch's attention kernels on the shapes of real models: which one a step should use, and how far from the floor.

    python -m benchmarks.attention --out attention.json

Causal, bfloat16, forward, and forward with backward, by backend; ``default`` is what torch picks by itself. TFLOP/s
count half of the square, and a backward of 2.5 forwards. A backend that does not take a shape says so.
"""

import argparse
import json
import warnings
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from octavo.bench.timing import launched_ms

# query heads, key and value heads, head size
SHAPES = {"glm": (20, 20, 256), "qwen3-coder": (32, 4, 128), "qwen3-8b": (32, 8, 128)}
TOKENS = (2048, 8192, 32768)
BACKENDS = {
    "default": None,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def measured(model: str, tokens: int, backend: str, repeats: int) -> dict[str, object]:
    """One row; ``problem`` in the place of times where the backend does not run."""
    heads, shared, size = SHAPES[model]
    row: dict[str, object] = {
        "model": model,
        "tokens": tokens,
        "backend": backend,
        "device": torch.cuda.get_device_name(),
    }
    generator = torch.Generator("cuda").manual_seed(0)

    def drawn(count: int) -> torch.Tensor:
        # as a projection gives it: heads inside of tokens
        values = torch.randn(1, tokens, count, size, device="cuda", dtype=torch.bfloat16, generator=generator)
        return values.transpose(1, 2).requires_grad_()

    query, key, value = drawn(heads), drawn(shared), drawn(shared)
    flops = 2 * 2 * tokens * tokens / 2 * heads * size

    def forward() -> torch.Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=heads != shared)

    chosen = BACKENDS[backend]
    try:
        with nullcontext() if chosen is None else sdpa_kernel(chosen):
            out = forward()
            grad = torch.randn_like(out)
            with torch.no_grad():
                ahead = launched_ms(forward, repeats)
            both = launched_ms(lambda: torch.autograd.grad(forward(), (query, key, value), grad), repeats)
    except RuntimeError as error:
        return row | {"problem": str(error).splitlines()[0]}
    return row | {
        "forward_ms": round(ahead, 4), "both_ms": round(both, 4),
        "forward_tflops": round(flops / ahead / 1e9), "both_tflops": round(3.5 * flops / both / 1e9),
        "torch": torch.__version__, "cudnn": torch.backends.cudnn.version(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--models", nargs="*", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", nargs="*", type=int, default=list(TOKENS))
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    # why a backend is refused comes as warnings too
    warnings.simplefilter("ignore")
    rows = []
    for model in args.models:
        for tokens in args.tokens:
            for backend in BACKENDS:
                row = measured(model, tokens, backend, args.repeats)
                rows.append(row)
                times = row.get("problem") or (
                    f"forward {row['forward_ms']:8.3f} ms {row['forward_tflops']:4d} TFLOP/s, with backward "
                    f"{row['both_ms']:8.3f} ms {row['both_tflops']:4d} TFLOP/s"
                )
                print(f"{model:12s} {tokens:6d} {backend:10s} {times}", flush=True)
            if args.out:
                args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
