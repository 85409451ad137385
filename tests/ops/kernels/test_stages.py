"""Whole expert MLPs on the kernels: the output and each gradient, from NaN-filled memory.

``exact`` against float64. The FP8 modes against the reference in the same mode, which rounds the same values: what
remains is float32 rounding, and seldom a value that it carries over the middle between two codes.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from octavo.errors import EngineError
from octavo.formats.scheme import ScaleLayout
from octavo.ops.choice import select
from octavo.ops.fused import KernelEngine
from octavo.ops.gates import SWIGLU, ModelGate
from tests.ops.cases import Case, assert_close, exact, random_index, run
from tests.ops.kernels.cases import LAYOUTS

# sums of some hundred terms, as for the reference in float32
TOLERANCE = 2e-6
# one E4M3 code of some ten thousand moved by one step
TOLERANCE_FP8 = 2e-4
# of four experts
INDEX = {
    "ragged": torch.cat([random_index(13, 2, 4), torch.tensor([[2, 0]] * 12)]),
    "one expert has all": torch.zeros(35, 1, dtype=torch.int64),
    "one token": torch.tensor([[3, 0]]),
    "no token": torch.empty(0, 2, dtype=torch.int64),
    "off-rank": torch.tensor([[0, 4], [9, 2], [7, 8], [3, 1], [-1, 2]] * 3),
    "an expert twice": torch.tensor([[2, 2], [2, 1]]),
}


BOTH = ("up", "down")


def layer(
    label: str, layout: ScaleLayout = LAYOUTS[0], intermediate: int = 48, rank: int | None = 4, **more: object
) -> Case:
    return Case(INDEX[label], layout=layout, num_experts=4, hidden=80, intermediate=intermediate, rank=rank, **more)


def kernels(name: str, numerics: str) -> KernelEngine:
    return KernelEngine(name, numerics, wide=False)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", ["dequant", "fused"])
def test_exact_matches_float64(name: str, layout: ScaleLayout) -> None:
    """I = 48 is not a multiple of a block, and is where the grids of gate and up part."""
    # beyond the rank up to which LoRA's backward is one read, in one of them
    case = layer("ragged", layout, rank=40 if layout is LAYOUTS[1] else 4)
    assert_close(exact(case), run(case, kernels(name, "exact")), TOLERANCE)


@pytest.mark.parametrize("label", [label for label in INDEX if label != "ragged"])
def test_exact_on_ragged_routing(label: str) -> None:
    case = layer(label, LAYOUTS[2])
    want, got = exact(case), run(case, kernels("fused", "exact"))
    assert_close(want, got, TOLERANCE)
    off_rank = (case.index_TK < 0) | (case.index_TK >= case.num_experts)
    assert torch.equal(got["dp"][off_rank], torch.zeros(int(off_rank.sum())))


@pytest.mark.parametrize(
    ("numerics", "layout"), [("fp8", one) for one in LAYOUTS] + [("fp8_grad", LAYOUTS[2])], ids=str
)
def test_fp8_rounds_where_the_reference_does(numerics: str, layout: ScaleLayout) -> None:
    case = layer("ragged", layout, intermediate=64)
    assert_close(run(case, select("reference", numerics)), run(case, kernels("scaled", numerics)), TOLERANCE_FP8)


def test_off_rank_in_fp8() -> None:
    case = layer("off-rank")
    assert_close(run(case, select("reference", "fp8")), run(case, kernels("scaled", "fp8")), TOLERANCE_FP8)


def test_without_lora_and_with_a_models_own_gate() -> None:
    def swiglu(z: Tensor) -> Tensor:
        gate, up = z.chunk(2, -1)
        return torch.nn.functional.silu(gate) * up

    case = layer("ragged", rank=None)
    want = exact(case)
    for gate in (SWIGLU, ModelGate("own", swiglu)):
        assert_close(want, run(case, kernels("fused", "exact"), gate), TOLERANCE)


def test_factors_that_train_in_another_dtype() -> None:
    """Their gradients come back in their dtype; and the same gradients each time."""
    case = layer("ragged")
    want = exact(case)
    for name in ("up_A", "up_B", "down_A", "down_B"):
        case.inputs[name] = case.inputs[name].detach().bfloat16().requires_grad_()
    want = exact(case)
    first, second = (run(case, kernels("fused", "exact")) for _ in range(2))
    assert first["dup_A"].dtype == torch.bfloat16
    # the interpreter rounds to bfloat16 by cutting off
    assert_close(want, first, 2**-7)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_plain_stacks(bias: bool, transposed: bool) -> None:
    """Weights that are not quantized, stored either way round."""
    for label in ("ragged", "off-rank", "one expert has all"):
        case = layer(label, plain=BOTH, transposed=transposed, bias=bias)
        assert_close(exact(case), run(case, kernels("dequant", "exact")), TOLERANCE)


@pytest.mark.parametrize("plain", ["up", "down"])
def test_one_projection_is_plain(plain: str) -> None:
    case = layer("ragged", LAYOUTS[2], intermediate=64, plain=(plain,), bias=plain == "up")
    for name in ("dequant", "fused"):
        assert_close(exact(case), run(case, kernels(name, "exact")), TOLERANCE)
    for numerics in ("fp8", "fp8_grad"):
        want = run(case, select("reference", numerics))
        assert_close(want, run(case, kernels("scaled", numerics)), TOLERANCE_FP8)


@pytest.mark.parametrize("label", ["ragged", "off-rank"])
@pytest.mark.parametrize(("name", "numerics"), [("dequant", "exact"), ("fused", "exact"), ("scaled", "fp8")])
def test_biases(name: str, numerics: str, label: str) -> None:
    """With their gradients, and the router's through the bias of down."""
    case = layer(label, LAYOUTS[2], intermediate=64, bias=True)
    want, tolerance = exact(case), TOLERANCE
    if numerics == "fp8":
        want, tolerance = run(case, select("reference", numerics)), TOLERANCE_FP8
    assert_close(want, run(case, kernels(name, numerics)), tolerance)


def test_biases_in_bfloat16_and_a_models_own_gate() -> None:
    """As gpt-oss has them; its gate is interleaved and clamped."""

    def clamped(z: Tensor) -> Tensor:
        gate, up = z[:, ::2].clamp(max=0.3), z[:, 1::2].clamp(-0.3, 0.3)
        return gate * torch.sigmoid(1.7 * gate) * (up + 1)

    case = layer("off-rank", plain=BOTH, transposed=True, bias=True)
    for name in BOTH:
        case.inputs[f"{name}_bias"] = case.inputs[f"{name}_bias"].detach().bfloat16().requires_grad_()
    gate = ModelGate("clamped", clamped)
    want, got = (run(case, engine, gate) for engine in (select("reference", "exact"), kernels("dequant", "exact")))
    assert got["dup_bias"].dtype == torch.bfloat16
    # the interpreter rounds to bfloat16 by cutting off
    rounded = {key: got.pop(key) for key in ("dup_bias", "ddown_bias")}
    assert_close({key: want.pop(key) for key in rounded}, rounded, 2**-7)
    assert_close(want, got, TOLERANCE)


@pytest.mark.parametrize("plain", [("up",), ("down",), BOTH], ids=str)
def test_plain_weights_that_train(plain: tuple[str, ...]) -> None:
    """Their own gradient is torch's, after a forward on the kernels that leaves rows of other ranks unwritten."""
    case = layer("off-rank", plain=plain, full=True, bias=True)
    assert_close(exact(case), run(case, kernels("dequant", "exact")), TOLERANCE)


@pytest.mark.parametrize("side", BOTH)
def test_plain_stacks_that_the_kernels_cannot_read(side: str) -> None:
    """dequant goes through torch, an engine of FP8 codes says why."""
    case = layer("off-rank", plain=BOTH)
    name = f"{side}_weight"
    stack = case.stacks[name]
    for stored, why in (
        (stack.double(), "torch.float32 as the activations, and these are torch.float64"),
        (stack.new_zeros((*stack.shape, 2))[..., 0].copy_(stack), "rows at multiples of 16 bytes"),
        (stack.new_zeros(stack.numel() + 1)[1:].view(stack.shape).copy_(stack), "rows at multiples of 16 bytes"),
    ):
        case.stacks[name] = stored
        assert_close(exact(case), run(case, kernels("dequant", "exact")), TOLERANCE)
        with pytest.raises(EngineError, match=f"engine 'fused' cannot run this layer: .*{why}"):
            run(case, kernels("fused", "exact"))


@contextmanager
def no_host_reads() -> Iterator[None]:
    """What would wait for a GPU raises, but in Triton's interpreter, which is none."""
    with pytest.MonkeyPatch.context() as patch:

        def forbid(owner: object, name: str) -> None:
            real = getattr(owner, name)

            def read(*args: object, **kwargs: object) -> object:
                caller = sys._getframe(1).f_globals["__name__"]
                if not caller.startswith("triton."):
                    raise RuntimeError(f"{caller} calls {name}")
                return real(*args, **kwargs)

            patch.setattr(owner, name, read)

        for name in ("tolist", "item", "cpu", "numpy", "nonzero", "masked_select"):
            forbid(Tensor, name)
        for name in ("__bool__", "__int__", "__index__", "__float__"):
            forbid(Tensor, name)
        for name in ("nonzero", "tensor"):
            forbid(torch, name)
        yield


@pytest.mark.parametrize("more", [{"plain": BOTH, "bias": True}, {"bias": True, "rank": 40}], ids=str)
def test_no_stage_asks_the_device_for_a_value(more: dict[str, object]) -> None:
    """Forward and backward with LoRA, of plain stacks and of codes, with biases."""
    case = layer("off-rank", **more)
    for gate in (SWIGLU, ModelGate("own", lambda z: SWIGLU.forward(z))):
        with no_host_reads():
            run(case, kernels("dequant", "exact"), gate)


def test_asking_is_noticed() -> None:
    """In forward, and in backward alone."""
    for case, engine in (
        (layer("ragged", plain=BOTH), select("dequant", "exact")),
        (layer("ragged", plain=BOTH, full=True), kernels("dequant", "exact")),
    ):
        with no_host_reads(), pytest.raises(RuntimeError, match=r"octavo.ops.engines calls tolist"):
            run(case, engine)
