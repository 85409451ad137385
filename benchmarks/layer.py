"""One MoE layer, forward and backward with LoRA on both projections: time, share of the floor, memory, error.

    python -m benchmarks.layer --out benchmarks/results/layer-h200.json

GPU time under CUDA-graph replay, eager wall time beside it; every engine is compared with float64 first, and no time is
printed for a wrong one. Weights of one layer (0.6 GB) exceed the L2, so replays find it cold. Baselines in the same
run: bfloat16 weights with ``F.grouped_mm`` and split LoRA, the same over a bank that is dequantized whole (one Triton
pass, or eager torch), and transformers' own FP8 experts without LoRA, in blocks, eager, where they can be had.
"""

import argparse
import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.compiling import in_pool
from benchmarks.shapes import FLOOR_MS, MODELS, TOKENS, Model
from octavo.bench.layer import LayerCase
from octavo.bench.run import measure, upstream_way
from octavo.bench.shapes import LayerShape
from octavo.errors import EngineError
from octavo.formats.weight import Float8Weight, quantize
from octavo.ops.engines import Engine
from octavo.ops.experts import Side, expert_mlp
from octavo.ops.gates import SWIGLU
from octavo.ops.weights import WeightSpec, storage

RANK = 16
TOLERANCE = {"exact": 5e-3, "fp8_grad": 4.5e-2, "fp8": 5.5e-2, "bf16": 1e-2}
NAMES = ("x", "p", "up_A", "up_B", "down_A", "down_B")


@dataclass
class Layer:
    """Random weights, inputs and the gradient that comes in."""

    model: Model
    tokens: int
    device: str = "cuda"

    def __post_init__(self) -> None:
        E, H, I, T = self.model.experts, self.model.hidden, self.model.intermediate, self.tokens  # noqa: E741
        torch.manual_seed(0)
        real = self.device == "cuda"

        def rand(*shape: int, scale: float = 1.0) -> Tensor:
            make = torch.randn if real else torch.empty
            values = make(*shape, dtype=torch.bfloat16, device=self.device)
            return values.mul_(scale) if real else values

        def weight(parts: int, rows: int, cols: int) -> Float8Weight:
            if real:
                return quantize(rand(E, parts * rows, cols, scale=0.02), self.model.layout, parts=parts)
            block = self.model.layout.block_of(rows, cols)
            grid = (E, parts, -(-rows // block[0]), -(-cols // block[1]))
            codes = torch.empty((E, parts, rows, cols), dtype=torch.float8_e4m3fn)
            return Float8Weight(codes, torch.empty(grid), block)

        self.up, self.down = weight(2, I, H), weight(1, H, I)
        self.inputs = {
            "x": rand(T, H),
            "p": rand(T, self.model.top_k).abs(),
            "up_A": rand(E, RANK, H, scale=0.02),
            "up_B": rand(E, 2 * I, RANK, scale=0.02),
            "down_A": rand(E, RANK, I, scale=0.02),
            "down_B": rand(E, H, RANK, scale=0.02),
        }
        for tensor in self.inputs.values():
            tensor.requires_grad_()
        self.dy = rand(T, H)
        if real:
            self.index = torch.rand(T, E, device=self.device).topk(self.model.top_k, dim=1).indices
        else:
            self.index = torch.empty((T, self.model.top_k), dtype=torch.int64)

    def side(self, name: str, weight: Float8Weight) -> Side:
        codes, scales = storage(weight)
        spec = WeightSpec(True, weight.parts, weight.block)
        return Side(spec, codes.view(torch.uint8), scales, None, self.inputs[f"{name}_A"], self.inputs[f"{name}_B"])

    def octavo(self, engine: Engine) -> Tensor:
        sides = self.side("up", self.up), self.side("down", self.down)
        return expert_mlp(self.inputs["x"], self.index, self.inputs["p"], *sides, SWIGLU, engine)

    def step(self, forward: Callable[[], Tensor]) -> dict[str, Tensor]:
        y = forward()
        grads = torch.autograd.grad(y, list(self.inputs.values()), self.dy)
        return {"y": y.detach()} | {f"d{name}": grad for name, grad in zip(self.inputs, grads, strict=True)}

    def exact(self) -> dict[str, Tensor]:
        """Float64, one expert at a time."""
        wide = {name: t.detach().double().requires_grad_() for name, t in self.inputs.items()}
        y = torch.zeros(self.tokens, self.model.hidden, dtype=torch.float64, device=self.device)
        for e in range(self.model.experts):
            tokens, slots = torch.where(self.index == e)
            up = self.up.expert(e).dequantize()[0].double() + wide["up_B"][e] @ wide["up_A"][e]
            down = self.down.expert(e).dequantize()[0].double() + wide["down_B"][e] @ wide["down_A"][e]
            g, u = (wide["x"][tokens] @ up.T).chunk(2, -1)
            y = y.index_add(0, tokens, (F.silu(g) * u) @ down.T * wide["p"][tokens, slots, None])
        grads = torch.autograd.grad(y, list(wide.values()), self.dy.double())
        return {"y": y.detach()} | {f"d{name}": grad for name, grad in zip(wide, grads, strict=True)}


class _Bank(torch.autograd.Function):
    """A product with a bank that is dequantized whole, in forward and again in backward."""

    @staticmethod
    def forward(ctx, x, weight, offsets, eager):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(offsets)
        ctx.weight, ctx.eager = weight, eager
        return F.grouped_mm(x, _dequantized(weight, offsets, eager).transpose(-2, -1), offs=offsets)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        (offsets,) = ctx.saved_tensors
        return F.grouped_mm(dy.contiguous(), _dequantized(ctx.weight, offsets, ctx.eager), offs=offsets), *[None] * 3


def _dequantized(weight: Float8Weight, offsets: Tensor, eager: bool) -> Tensor:
    if eager:
        codes, scales = storage(weight)
        if weight.block[0] > 1:
            scales = scales.repeat_interleave(weight.block[0], 1).repeat_interleave(weight.block[1], 2)
        return codes.to(torch.bfloat16) * scales.to(torch.bfloat16)
    from octavo.ops.kernels.weights import dequantize

    codes = storage(weight)[0]
    bank = torch.empty(codes.shape, dtype=torch.bfloat16, device=codes.device)
    dequantize(weight, offsets, 0, bank)
    return bank


def stock(layer: Layer, banks: tuple[Tensor, Tensor] | None, eager: bool) -> Tensor:
    """The layer on ``F.grouped_mm`` with split LoRA; bfloat16 ``banks``, or the codes dequantized whole."""
    index, inputs = layer.index, layer.inputs
    ids, order = torch.sort(index.reshape(-1))
    experts = layer.model.experts
    offsets = torch.histc(ids.int(), bins=experts, min=0, max=experts - 1).cumsum(0, dtype=torch.int32)

    def project(rows: Tensor, number: int, name: str, weight: Float8Weight) -> Tensor:
        if banks is None:
            y = _Bank.apply(rows, weight, offsets, eager)
        else:
            y = F.grouped_mm(rows, banks[number].transpose(-2, -1), offs=offsets)
        A, B = inputs[f"{name}_A"], inputs[f"{name}_B"]
        skinny = F.grouped_mm(rows, A.transpose(-2, -1), offs=offsets)
        return y + F.grouped_mm(skinny, B.transpose(-2, -1), offs=offsets)

    g, u = project(inputs["x"][order // layer.model.top_k], 0, "up", layer.up).chunk(2, -1)
    y = project(F.silu(g) * u, 1, "down", layer.down) * inputs["p"].reshape(-1)[order][:, None]
    back = torch.empty_like(order)
    back[order] = torch.arange(order.numel(), device=order.device)
    return y[back].view(layer.tokens, layer.model.top_k, -1).sum(1)


def errors(want: dict[str, Tensor], got: dict[str, Tensor]) -> dict[str, float]:
    """Relative error of the output and each gradient; infinite where something is not finite."""
    out = {}
    for name, exact in want.items():
        error = ((got[name].double() - exact).norm() / exact.norm()).item()
        out[name] = error if error == error else float("inf")
    return out


def eager_ms(step: Callable[[], object], repeats: int = 5) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / repeats * 1e3


def graph_ms(step: Callable[[], object], repeats: int = 9) -> float:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = step()
    graph.replay()
    graph.replay()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    del kept
    return sorted(start.elapsed_time(end) for start, end in events)[repeats // 2]


def transient_mib(step: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def kernels_us(step: Callable[[], object]) -> list[tuple[str, float]]:
    """Every kernel of a step in order, with its time in microseconds."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    events = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    events.sort(key=lambda e: e.time_range.start)
    return [(e.name[:48], e.device_time) for e in events]


def engines() -> list[tuple[str, str, Engine]]:
    """(numerics, engine, the engine) of every way to compute the layer."""
    from octavo.ops.hopper.engine import HopperEngine

    names = (("exact", "dequant"), ("exact", "fused"), ("fp8_grad", "scaled"), ("fp8", "scaled"))
    return [(numerics, name, HopperEngine(name, numerics, wide=False)) for numerics, name in names]


def compile_one(job: tuple[str, int, int]) -> None:
    model, tokens, number = job
    layer = Layer(MODELS[model], tokens, "cpu")
    engine = engines()[number][2]
    # its products are compiled by NVRTC, at first use
    import octavo.ops.hopper.engine as hopper

    hopper.product = lambda *args, **kwargs: None  # type: ignore[assignment]
    layer.step(lambda: layer.octavo(engine))


def upstream_row(model: Model, tokens: int, commit: str) -> dict[str, object] | None:
    """transformers' own FP8 experts, or None with a line that says why not."""
    shape = LayerShape(model.name, model.experts, model.top_k, model.hidden, model.intermediate, model.layout)
    label = f"{model.name:6s} {tokens:6d} {'fp8':9s} {'transformers':12s}"
    case = LayerCase(shape, tokens, torch.device("cuda"), rank=0)
    try:
        way = upstream_way(case)
    except EngineError as error:
        print(f"{label} not run: {error}", flush=True)
        return None
    [found] = measure(case, [way])
    if found.row is None:
        print(f"{label} {found.problem}", flush=True)
        return None
    row = found.row | {"commit": commit}
    print(
        f"{label} eager {row['eager_ms']:7.3f}  err {row['rel_err']:.1e}  {row['peak_transient_mib']:.0f} MiB  "
        f"({row['pass']}, {row['layout']} scales, no LoRA)",
        flush=True,
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--tokens", nargs="*", type=int, default=list(TOKENS))
    parser.add_argument("--kernels", type=Path, help="write every kernel's time here")
    parser.add_argument("--commit", default="")
    args = parser.parse_args()
    sizes = sorted({min(args.tokens), max(args.tokens), *args.tokens})
    in_pool(compile_one, [(m, t, n) for m in args.models for t in sizes for n in range(len(engines()))])

    import triton

    commit = args.commit or subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    rows, profiles = [], {}
    for name in args.models:
        model = MODELS[name]
        for tokens in args.tokens:
            layer = Layer(model, tokens)
            want = layer.exact()
            banks = layer.up.dequantize(torch.bfloat16), layer.down.dequantize(torch.bfloat16)
            ways: list[tuple[str, str, Callable[[], Tensor]]] = [
                ("bf16", "grouped_mm", lambda layer=layer, banks=banks: stock(layer, banks, False)),
                ("bf16", "bank-triton", lambda layer=layer: stock(layer, None, False)),
                ("bf16", "bank-eager", lambda layer=layer: stock(layer, None, True)),
            ]
            for numerics, engine, instance in engines():
                ways.append((numerics, engine, lambda layer=layer, engine=instance: layer.octavo(engine)))
            for numerics, engine, forward in ways:

                def step(forward: Callable[[], Tensor] = forward, layer: Layer = layer) -> dict[str, Tensor]:
                    return layer.step(forward)

                wrong = errors(want, step())
                worst = max(wrong.values())
                label = f"{name:6s} {tokens:6d} {numerics:9s} {engine:12s}"
                if not worst <= TOLERANCE[numerics]:
                    print(f"{label} WRONG {', '.join(f'{k} {v:.1e}' for k, v in wrong.items())}", flush=True)
                    continue
                ms, floor = graph_ms(step), FLOOR_MS[name, tokens]
                shared = 0.0
                if engine == "dequant":
                    shared = 384.0
                row = {
                    "model": name, "layout": model.layout.kind, "tokens": tokens, "numerics": numerics,
                    "engine": engine,
                    "lora_rank": RANK, "pass": "fwd+bwd", "ms": round(ms, 4), "eager_ms": round(eager_ms(step), 4),
                    "floor_ms": floor, "ratio": round(ms / floor, 3),
                    "transposed": "none",
                    "peak_transient_mib": round(transient_mib(step), 1), "shared_buffer_mib": shared,
                    "rel_err": float(f"{worst:.3e}"), "device": torch.cuda.get_device_name(),
                    "torch": torch.__version__,
                    "triton": triton.__version__, "commit": commit,
                }  # fmt: skip
                rows.append(row)
                print(
                    f"{label} {ms:7.3f} ms  x{ms / floor:5.2f}  eager {row['eager_ms']:7.3f}  err {worst:.1e}"
                    f"  {row['peak_transient_mib']:.0f} MiB",
                    flush=True,
                )
                if args.kernels:
                    profiles[label] = kernels_us(step)
            if row := upstream_row(model, tokens, commit):
                rows.append(row)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(rows, indent=1) + "\n")
            if args.kernels:
                args.kernels.write_text(json.dumps(profiles))
            del layer, want, banks, ways, step
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
