"""Compile the kernels of whole layers for sm_90, on any machine, and say what each takes: one line of JSON per kernel.

python -m tests.ops.kernels.compiled MODEL:TOKENS:ENGINE-NUMERICS ...     without TRITON_INTERPRET

ENGINE-NUMERICS may be ``few``: decoding, and linear layers; or ``plain``: weights that are not quantized, stored either
way round, with biases.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.compiling import compile_only


@dataclass(frozen=True)
class Usage:
    """One compiled kernel. ``stack``: bytes per thread that did not fit the registers."""

    kernel: str
    warps: int
    registers: int
    stack: int
    shared: int


def compiled_kernels() -> Iterator[tuple[str, Any]]:
    """Everything that this process has compiled."""
    from triton.runtime.jit import JITFunction

    for name, module in sorted(sys.modules.items()):
        if name.startswith("octavo.ops.kernels."):
            for function in vars(module).values():
                if isinstance(function, JITFunction) and function.fn.__module__ == name:
                    for cache in function.device_caches.values():
                        yield from ((function.fn.__name__, kernel) for kernel in cache[0].values())


def usage(name: str, kernel: Any) -> Usage:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        printed = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.findall(rf"\b{what}:(\d+)", printed)[-1]) for what in ("REG", "STACK"))
    return Usage(name, kernel.metadata.num_warps, registers, stack, kernel.metadata.shared)


def compile_few(model: str, tokens: int) -> None:
    """Decoding in each numerics, and every way of a linear layer that has kernels."""
    import torch

    from benchmarks.layer import blank_case
    from octavo.ops import decode, stages
    from octavo.ops.gates import SWIGLU
    from octavo.ops.matrix import MatrixEngine

    layer = blank_case(model, tokens)
    halves = [stages.projection(side.spec, side.tensors) for side in layer.sides()]
    weight = layer.down.expert(0)
    with torch.no_grad():
        for numerics in ("exact", "fp8"):
            decode.expert_mlp(layer.inputs["x"], layer.index, layer.inputs["p"], *halves, SWIGLU, numerics)
        for rows in (1, 300):
            for engine in (
                MatrixEngine("fused", "exact", False, 1 << 62, False),
                MatrixEngine("scaled", "fp8", False, 1 << 62, False),
                MatrixEngine("dequant", "exact", False, 0, False),
                MatrixEngine("scaled", "fp8", False, 0, False),
            ):
                for transposed in (False, True):
                    columns = weight.out_features if transposed else weight.in_features
                    engine.linear(torch.empty(rows, columns, dtype=torch.bfloat16), weight, transposed=transposed)


def compile_plain(model: str, tokens: int) -> None:
    """Plain stacks [E, out, in] and [E, in, out] with biases, in forward and backward."""
    import torch

    from benchmarks.layer import blank_case
    from octavo.ops.experts import Side, expert_mlp
    from octavo.ops.fused import KernelEngine
    from octavo.ops.gates import SWIGLU
    from octavo.ops.weights import WeightSpec

    layer = blank_case(model, tokens)
    engine = KernelEngine("dequant", "exact", wide=False)
    for transposed in (False, True):
        sides = []
        for name, weight in (("up", layer.up), ("down", layer.down)):
            features, columns = weight.out_features, weight.in_features
            shape = (columns, features) if transposed else (features, columns)
            stack = torch.empty((weight.num_experts, *shape), dtype=torch.bfloat16)
            bias = torch.empty((weight.num_experts, features), dtype=torch.bfloat16)
            factors = layer.inputs[f"{name}_A"], layer.inputs[f"{name}_B"]
            sides.append(Side(WeightSpec(False, weight.parts, transposed=transposed), stack, None, bias, *factors))

        def forward(up: Side = sides[0], down: Side = sides[1]) -> torch.Tensor:
            return expert_mlp(layer.inputs["x"], layer.index, layer.inputs["p"], up, down, SWIGLU, engine)

        layer.step(forward)


def compile_adamw_8bit() -> None:
    """The optimizer's step, of either dtype."""
    import torch

    from octavo.ops.kernels.adamw_8bit import Moment, Numbers, Tensors, step

    for dtype in (torch.float32, torch.bfloat16):
        p = torch.empty(8, 256, dtype=dtype)
        moment = Moment(torch.empty(8, 256, dtype=torch.uint8), torch.empty(8), torch.empty(256))
        for stochastic in (False, True):
            numbers = Numbers(1e-4, 1e-6, (0.1, 0.001), (0.1, 0.03), 1e-8)
            step([Tensors(p, p, moment, moment)], numbers, stochastic=stochastic)


def main(jobs: list[str]) -> None:
    compile_only()
    from benchmarks.layer import blank_case, compile_one, engines
    from octavo.ops.fused import KernelEngine

    numbers = {f"{name}-{numerics}": number for number, (numerics, name, _) in enumerate(engines())}
    for job in jobs:
        model, tokens, engine = job.split(":")
        if engine == "adamw_8bit":
            compile_adamw_8bit()
            continue
        if engine == "few":
            compile_few(model, int(tokens))
            continue
        if engine == "plain":
            compile_plain(model, int(tokens))
            continue
        compile_one((model, int(tokens), numbers[engine]))
        if engine.startswith("dequant"):
            # and Triton's own product, which other GPUs have
            layer = blank_case(model, int(tokens))
            layer.step(lambda layer=layer: layer.octavo(KernelEngine("dequant", "exact", wide=False)))
    for name, kernel in compiled_kernels():
        print(json.dumps(asdict(usage(name, kernel))))


if __name__ == "__main__":
    main(sys.argv[1:])
