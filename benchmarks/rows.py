"""Time the passes around an expert layer's products, each under a few cuts: microseconds and the bytes they move.

    python -m benchmarks.rows [--out rows.json]

Every pass is compared with torch first, and no time is printed for a wrong one. GPU time under CUDA-graph replay, over
copies of the operands that together exceed the L2. GB/s counts each byte that must move once: a row that several
experts gather counts for each of them. ``*`` marks the cut that is in use.
"""

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.compiling import in_pool
from benchmarks.shapes import MODELS, TOKENS
from octavo.bench.shapes import LayerShape
from octavo.ops.engines import RowMaxima
from octavo.ops.kernels import sort
from octavo.ops.kernels.common import Cut
from octavo.ops.kernels.lora_backward import lora_backward
from octavo.ops.kernels.outer import outer
from octavo.ops.kernels.rows import Rounded, combine, pass_rows, round_rows, sum_parts

RANK = 16
# columns of one scale in a checkpoint of blocks
GROUP = 128
# more than the L2 of any device so far, and few enough copies to capture quickly
COLD_BYTES, MOST_COPIES = 256 << 20, 8
# Relative to float32 sums of the same bfloat16 operands: one rounding of the result, and of p·xa or h on the way.
TOLERANCE = 6e-3

Result = tuple[Tensor, ...]


@dataclass
class Operands:
    """What one layer's passes read, at random; on the CPU uninitialised, for compiling only."""

    model: LayerShape
    tokens: int
    device: str
    generator: torch.Generator | None = field(init=False)

    def __post_init__(self) -> None:
        model, T = self.model, self.tokens
        E, H, I, M = model.experts, model.hidden, model.intermediate, T * model.top_k  # noqa: E741
        real = self.device == "cuda"

        def rand(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            make = torch.randn if real else torch.empty
            return make(*shape, dtype=dtype, device=self.device)

        if real:
            self.index_TK = torch.rand(T, E, device="cuda").topk(model.top_k, dim=1).indices
            flat = self.index_TK.reshape(-1)
            order = torch.sort(flat, stable=True).indices
            self.token_M = order // model.top_k
            self.row_TK = torch.empty_like(order).scatter_(0, order, torch.arange(M, device="cuda")).view(T, -1)
            self.offsets_E = torch.bincount(flat, minlength=E).cumsum(0).int()
        else:
            self.index_TK = torch.zeros((T, model.top_k), dtype=torch.int64)
            self.token_M = torch.zeros(M, dtype=torch.int64)
            self.row_TK = torch.zeros((T, model.top_k), dtype=torch.int64)
            self.offsets_E = torch.zeros(E, dtype=torch.int32)
        self.x_TH, self.y_MH = rand(T, H), rand(M, H)
        self.h_MI, self.z_MG = rand(M, I), rand(M, 2 * I)
        self.xa_MR, self.p_TK, self.p_M = rand(M, RANK), rand(T, model.top_k), rand(M)
        self.up_A, self.up_B = rand(E, RANK, H), rand(E, 2 * I, RANK)
        self.down_A, self.down_B = rand(E, RANK, I), rand(E, H, RANK)
        self.fold_EG = rand(E, 2 * I, dtype=torch.float32)
        # by parts as the gate's gradient leaves them
        self.maxima = RowMaxima(self.fold_EG, rand(2 * math.ceil(I / 256), M, dtype=torch.float32))
        if real:
            for e, span in enumerate(self.spans()):
                value = (self.z_MG[span].float() * self.fold_EG[e]).abs()
                self.maxima.parts_PM[:, span] = torch.stack(
                    [part.amax(1) for part in value.chunk(len(self.maxima.parts_PM), 1)]
                )
        self.parts_PM = rand(math.ceil(I / 128), M, dtype=torch.float32)

    def spans(self) -> list[slice]:
        ends = self.offsets_E.tolist()
        return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    def skinny(self, rows: Tensor, factor_EKR: Tensor) -> Tensor:
        return torch.cat([rows[s].float() @ factor_EKR[e].float() for e, s in enumerate(self.spans())])

    def outer(self, rows: Tensor, right: Tensor) -> Tensor:
        return torch.stack([rows[s].float().T @ right[s].float() for s in self.spans()])


@dataclass(frozen=True)
class Pass:
    """One pass: how it is run under a cut, what torch says, the bytes that must move, and the cuts to try."""

    run: Callable[[Operands, Cut | None], Result]
    want: Callable[[Operands], Result]
    bytes: Callable[[Operands], int]
    cuts: tuple[Cut | None, ...] = (None,)


def nbytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def gated(z_MG: Tensor) -> Tensor:
    g, u = z_MG.float().chunk(2, 1)
    return (g * torch.sigmoid(g) * u).bfloat16()


def sorted_pairs(o: Operands, most: int) -> Result:
    """With up to ``most`` pairs in one launch."""
    kept = sort.ONE_LAUNCH
    sort.ONE_LAUNCH = most
    try:
        return sort.sort_pairs(o.index_TK, o.model.experts)
    finally:
        sort.ONE_LAUNCH = kept


def two_reads(o: Operands, d: Tensor, factor: Tensor, token_M: Tensor | None, p_M: Tensor | None) -> Result:
    yb_MR, _ = pass_rows(d, offsets_E=o.offsets_E, token_M=token_M, factor=factor, contract=1)
    assert yb_MR is not None
    dB = outer(d, o.xa_MR, o.offsets_E, rank_first=False, dtype=factor.dtype, token_M=token_M, p_M=p_M)
    return yb_MR, dB


def skinny(x: Tensor, o: Operands, token_M: Tensor | None, factor: Tensor, cut: Cut | None) -> Result:
    product, _ = pass_rows(x, offsets_E=o.offsets_E, token_M=token_M, factor=factor, cut=cut)
    assert product is not None
    return (product,)


def whole(rounded: Rounded | None) -> Result:
    """Codes to be compared bit for bit, and scales."""
    assert rounded is not None
    return rounded.codes.view(torch.uint8), rounded.scales


def rounded_too(yb_MR: Tensor, dB: Tensor, rounded: Rounded | None) -> Result:
    return yb_MR, dB, *whole(rounded)


def rounded_dz(o: Operands, cut: Cut | None) -> Rounded:
    return round_rows(o.z_MG, 2 * o.model.intermediate, offsets_E=o.offsets_E, fold_EK=o.fold_EG, cut=cut)


BOTH = (
    None, Cut(64, 128, 4, 4), Cut(128, 64, 4, 4), Cut(128, 128, 4, 3), Cut(256, 32, 8, 4), Cut(256, 64, 8, 2),
    Cut(512, 32, 8, 3),
)  # fmt: skip
SKINNY = (None, Cut(32, 256, 4, 3), Cut(64, 64, 4, 4), Cut(64, 128, 4, 4), Cut(128, 64, 4, 4), Cut(128, 128, 8, 3))
OUTER = (None, Cut(64, 64, 4, 4), Cut(128, 64, 4, 3), Cut(64, 128, 8, 3), Cut(32, 128, 4, 4), Cut(128, 128, 8, 3))
GATED = (None, Cut(32, 64, 4, 4), Cut(64, 64, 4, 3), Cut(32, 128, 4, 3), Cut(64, 128, 8, 3), Cut(128, 64, 8, 3))
ROUND = (None, Cut(1, 0, 4), Cut(2, 0, 4), Cut(2, 0, 8), Cut(8, 0, 8), Cut(16, 0, 8))
COMBINE = (None, Cut(1, 2048, 2), Cut(1, 2048, 8), Cut(1, 1024, 4), Cut(1, 512, 1), Cut(1, 1024, 2))

PASSES: dict[str, Pass] = {
    "sort, one launch": Pass(
        lambda o, _: sorted_pairs(o, 1 << 40),
        lambda o: (o.token_M, o.row_TK, o.offsets_E),
        lambda o: nbytes(o.index_TK, o.token_M, o.row_TK),
    ),
    "sort, three launches": Pass(
        lambda o, _: sorted_pairs(o, 0),
        lambda o: (o.token_M, o.row_TK, o.offsets_E),
        lambda o: nbytes(o.index_TK, o.token_M, o.row_TK),
    ),
    "x·A gathered": Pass(
        lambda o, cut: skinny(o.x_TH, o, o.token_M, o.up_A, cut),
        lambda o: (o.skinny(o.x_TH[o.token_M], o.up_A.transpose(1, 2)),),
        lambda o: nbytes(o.y_MH, o.xa_MR, o.up_A),
        SKINNY,
    ),
    "h·A": Pass(
        lambda o, cut: skinny(o.h_MI, o, None, o.down_A, cut),
        lambda o: (o.skinny(o.h_MI, o.down_A.transpose(1, 2)),),
        lambda o: nbytes(o.h_MI, o.xa_MR, o.down_A),
        SKINNY,
    ),
    "combine weighted": Pass(
        lambda o, cut: (combine(o.y_MH, o.row_TK, o.offsets_E, o.p_TK, cut),),
        lambda o: (sum(o.y_MH[o.row_TK[:, k]].float() * o.p_TK[:, k, None].float() for k in range(o.model.top_k)),),  # type: ignore[arg-type]
        lambda o: nbytes(o.y_MH, o.x_TH),
        COMBINE,
    ),
    "dy·B and dB, two reads": Pass(
        lambda o, _: two_reads(o, o.x_TH, o.down_B, o.token_M, o.p_M),
        lambda o: (
            o.skinny(o.x_TH[o.token_M], o.down_B),
            o.outer(o.x_TH[o.token_M], (o.xa_MR.float() * o.p_M.float()[:, None])),
        ),
        lambda o: nbytes(o.y_MH, o.xa_MR, o.xa_MR, o.down_B, o.down_B),
    ),
    "dy·B and dB, one read": Pass(
        lambda o, cut: lora_backward(o.x_TH, o.down_B, o.xa_MR, o.offsets_E, token_M=o.token_M, p_M=o.p_M, cut=cut)[:2],
        lambda o: PASSES["dy·B and dB, two reads"].want(o),
        lambda o: nbytes(o.y_MH, o.xa_MR, o.xa_MR, o.down_B, o.down_B),
        BOTH,
    ),
    "dz·B and dB, two reads": Pass(
        lambda o, _: two_reads(o, o.z_MG, o.up_B, None, None),
        lambda o: (o.skinny(o.z_MG, o.up_B), o.outer(o.z_MG, o.xa_MR)),
        lambda o: nbytes(o.z_MG, o.xa_MR, o.xa_MR, o.up_B, o.up_B),
    ),
    "dz·B and dB, one read": Pass(
        lambda o, cut: lora_backward(o.z_MG, o.up_B, o.xa_MR, o.offsets_E, cut=cut)[:2],
        lambda o: PASSES["dz·B and dB, two reads"].want(o),
        lambda o: nbytes(o.z_MG, o.xa_MR, o.xa_MR, o.up_B, o.up_B),
        BOTH,
    ),
    "h in groups": Pass(
        lambda o, cut: whole(round_rows(o.h_MI, GROUP, offsets_E=o.offsets_E, cut=cut)),
        lambda o: whole(round_rows(o.h_MI, GROUP)),
        lambda o: nbytes(o.h_MI) * 3 // 2,
    ),
    "h by rows": Pass(
        lambda o, cut: whole(round_rows(o.h_MI, o.model.intermediate, offsets_E=o.offsets_E, cut=cut)),
        lambda o: whole(round_rows(o.h_MI, o.model.intermediate)),
        lambda o: nbytes(o.h_MI) * 3 // 2,
        ROUND,
    ),
    "dz by rows": Pass(
        lambda o, cut: whole(rounded_dz(o, cut)),
        lambda o: whole(rounded_dz(o, None)),
        lambda o: nbytes(o.z_MG) * 3 // 2,
    ),
    "dz·B, dB and dz by rows, two reads": Pass(
        lambda o, _: (*lora_backward(o.z_MG, o.up_B, o.xa_MR, o.offsets_E)[:2], *whole(rounded_dz(o, None))),
        lambda o: (*PASSES["dz·B and dB, two reads"].want(o), *whole(rounded_dz(o, None))),
        lambda o: PASSES["dz·B and dB, one read"].bytes(o) + nbytes(o.z_MG) // 2,
    ),
    "dz·B, dB and dz by rows, one read": Pass(
        lambda o, cut: rounded_too(*lora_backward(o.z_MG, o.up_B, o.xa_MR, o.offsets_E, maxima=o.maxima, cut=cut)),
        lambda o: PASSES["dz·B, dB and dz by rows, two reads"].want(o),
        lambda o: PASSES["dz·B and dB, one read"].bytes(o) + nbytes(o.z_MG) // 2,
        BOTH,
    ),
    "dA of down, h from z": Pass(
        lambda o, cut: (
            outer(o.z_MG, o.xa_MR, o.offsets_E, rank_first=True, dtype=torch.bfloat16, p_M=o.p_M, gated=True, cut=cut),
        ),
        lambda o: (o.outer(gated(o.z_MG), o.xa_MR.float() * o.p_M.float()[:, None]).transpose(1, 2),),
        lambda o: nbytes(o.z_MG, o.xa_MR, o.down_A),
        GATED,
    ),
    "dA of up, x gathered": Pass(
        lambda o, cut: (
            outer(o.x_TH, o.xa_MR, o.offsets_E, rank_first=True, dtype=torch.bfloat16, token_M=o.token_M, cut=cut),
        ),
        lambda o: (o.outer(o.x_TH[o.token_M], o.xa_MR).transpose(1, 2),),
        lambda o: nbytes(o.y_MH, o.xa_MR, o.up_A),
        OUTER,
    ),
    "sum of shares": Pass(
        lambda o, _: (sum_parts(o.parts_PM, o.offsets_E),),
        lambda o: (o.parts_PM.sum(0),),
        lambda o: nbytes(o.parts_PM, o.parts_PM[0]),
    ),
}


def worst_error(got: Result, want: Result) -> float:
    """The largest relative error; infinite for integers that differ and for anything that is not finite."""
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        if not b.is_floating_point():
            error = 0.0 if torch.equal(a, b) else math.inf
        else:
            error = ((a.float() - b.float()).norm() / b.float().norm()).item()
        worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst


def graph_us(runs: list[Callable[[], Result]], repeats: int = 7) -> float:
    """Microseconds of one of ``runs``, which are captured in a row."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        runs[0]()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [run() for run in runs]
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    del kept
    return sorted(start.elapsed_time(end) for start, end in times)[repeats // 2] * 1e3 / len(runs)


def compile_one(job: tuple[str, str, int]) -> None:
    model, name, tokens = job
    operands = Operands(MODELS[model], tokens, "cpu")
    for cut in PASSES[name].cuts:
        PASSES[name].run(operands, cut)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--tokens", nargs="*", type=int, default=list(TOKENS))
    parser.add_argument("--only", default="", help="passes whose name contains this")
    args = parser.parse_args()
    names = [name for name in PASSES if args.only in name]
    # a cut may depend on the number of rows: both ends
    ends = sorted({min(args.tokens), max(args.tokens)})
    in_pool(compile_one, [(model, name, tokens) for model in args.models for name in names for tokens in ends])

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    found = []
    for model in args.models:
        for tokens in args.tokens:
            first = Operands(MODELS[model], tokens, "cuda")
            size = nbytes(first.z_MG, first.y_MH, first.h_MI)
            copies = min(MOST_COPIES, 1 + COLD_BYTES // size)
            operands = [first] + [Operands(MODELS[model], tokens, "cuda") for _ in range(copies - 1)]
            for name in names:
                one = PASSES[name]
                want, moved = one.want(first), one.bytes(first)
                for cut in one.cuts:
                    label = f"{model:6s}{tokens:6d}  {name:38s}"
                    shown = "*" if cut is None else str(cut)
                    error = worst_error(one.run(first, cut), want)
                    if not error <= TOLERANCE:
                        print(f"{label} WRONG, relative error {error:.1e}  {shown}", flush=True)
                        continue
                    us = graph_us([lambda o=o, one=one, cut=cut: one.run(o, cut) for o in operands])
                    gbs = moved / us / 1e3
                    print(f"{label} {us:8.1f} us {gbs:6.0f} GB/s  {shown}", flush=True)
                    row = {"model": model, "tokens": tokens, "pass": name, "cut": shown, "us": us, "gbs": gbs}
                    found.append(row | {"rel_err": error, "bytes": moved})
                del want
            del operands, first
            torch.cuda.empty_cache()
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
