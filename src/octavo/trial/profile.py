"""Where a step's GPU time goes: by kind of kernel, and the share in which the GPU waits."""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

# Tried in order on the name of a kernel.
_STAGES = (
    ("attention", r"flash|fmha|attention|cudnn.*sdpa|mem_eff"),
    (
        "experts",
        r"^product$|grouped|expert|_product|^(product|rows|round|both|outer|combine|dequantize|interleave|count|place|pairs|"
        r"dots|transpose)_kernel|^sum_(parts|chunks|tiles)_kernel|moe",
    ),
    ("products", r"gemm|cutlass|cublas|nvjet|matmul|splitKreduce"),
    ("optimizer", r"adam|multi_tensor|foreach"),
    ("loss", r"_forward_kernel|_backward_kernel|softmax|nll|cross_entropy"),
    ("sort and scatter", r"sort|scatter|gather|index|topk|scan|radix|histogram"),
    ("reductions", r"reduce|norm"),
    ("copies and concatenations", r"memcpy|memset|copy|cat|transpose"),
    ("elementwise", r"elementwise|vectorized|unrolled|fused|triton_poi"),
)


def stage_of(kernel: str) -> str:
    """The stage that a kernel of this name belongs to."""
    for name, pattern in _STAGES:
        if re.search(pattern, kernel, re.IGNORECASE):
            return name
    return "other"


def profiled(step: Callable[[], None], where: torch.device) -> dict[str, Any]:
    """One step under torch's profiler: milliseconds by stage, the longest kernels, and the idle share of the GPU.

    The profiler slows the host, so the idle share is an upper bound. Empty where there is no GPU.
    """
    if where.type != "cuda":
        return {}
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        step()
        torch.cuda.synchronize()
    kernels = [
        event for event in recorded.events() or [] if event.device_type.name == "CUDA" and not event.is_user_annotation
    ]
    stages: dict[str, float] = {}
    names: dict[str, float] = {}
    for event in kernels:
        spent = event.time_range.elapsed_us() / 1e3
        stages[stage_of(event.name)] = stages.get(stage_of(event.name), 0.0) + spent
        names[event.name] = names.get(event.name, 0.0) + spent
    if not kernels:
        return {}
    spans = sorted((event.time_range.start, event.time_range.end) for event in kernels)
    busy = _union(spans) / 1e3
    wall = (max(end for _, end in spans) - spans[0][0]) / 1e3
    longest = sorted(names.items(), key=lambda item: -item[1])[:20]
    return {
        "wall_ms": wall,
        "busy_ms": busy,
        "idle_share": 1 - busy / wall,
        "kernels": len(kernels),
        "stages_ms": dict(sorted(stages.items(), key=lambda item: -item[1])),
        "longest_ms": {name[:120]: spent for name, spent in longest},
    }


def _union(spans: list[tuple[float, float]]) -> float:
    """The length that sorted spans cover together."""
    total, reached = 0.0, float("-inf")
    for start, end in spans:
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
