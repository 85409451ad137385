"""The expert MLP of every engine against float64 maths: output and each gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from octavo.ops.choice import Request, select
from octavo.ops.experts import Side, expert_mlp
from octavo.ops.gates import SWIGLU, Gate, ModelGate
from octavo.ops.weights import WeightSpec
from tests.ops.cases import (
    BLOCK,
    CHANNEL,
    LAYOUTS,
    TENSOR,
    TOLERANCE,
    Case,
    assert_close,
    exact,
    random_index,
    relative_error,
    run,
)

ENGINES = ["reference", "dequant"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("engine", ENGINES)
def test_matches_float64(engine: str, layout: object, dtype: torch.dtype) -> None:
    case = Case(random_index(37, 2, 6), dtype, layout)
    assert_close(exact(case), run(case, select(engine, "exact")), TOLERANCE[engine, dtype])


@pytest.mark.parametrize(
    "index",
    [
        pytest.param(torch.zeros(9, 1, dtype=torch.int64), id="one expert has every token"),
        pytest.param(torch.tensor([[5, 0]]), id="one token"),
        pytest.param(torch.empty(0, 2, dtype=torch.int64), id="no token"),
        pytest.param(torch.tensor([[0, 1], [0, 2], [0, 3], [0, 4], [0, 5]]), id="one row each but the first"),
        pytest.param(torch.tensor([[2, 2], [2, 1]]), id="an expert chosen twice by a token"),
    ],
)
@pytest.mark.parametrize("engine", ENGINES)
def test_ragged_routing(engine: str, index: Tensor) -> None:
    case = Case(index, layout=BLOCK, bias=True)
    assert_close(exact(case), run(case, select(engine, "exact")), TOLERANCE[engine, torch.float32])


@pytest.mark.parametrize("engine", ENGINES)
def test_off_rank_experts_contribute_nothing(engine: str) -> None:
    """Ids ≥ E are another rank's under expert parallelism."""
    index = torch.tensor([[0, 6], [9, 2], [7, 8], [5, 1]])
    case = Case(index, bias=True)
    got = run(case, select(engine, "exact"))
    assert_close(exact(case), got, TOLERANCE[engine, torch.float32])
    assert torch.equal(got["dp"][index >= 6], torch.zeros(4))
    assert torch.equal(got["y"][2], torch.zeros(case.hidden))


@given(
    tokens=st.integers(0, 40),
    top_k=st.integers(1, 4),
    experts=st.integers(5, 9),
    hidden=st.integers(1, 70),
    intermediate=st.integers(1, 50),
    rank=st.sampled_from([None, 1, 3]),
    layout=st.sampled_from([CHANNEL, TENSOR, BLOCK]),
    bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=25, deadline=None)
def test_any_sizes(**drawn: object) -> None:
    tokens, top_k, experts = drawn["tokens"], drawn["top_k"], drawn["experts"]
    case = Case(
        random_index(tokens, top_k, experts, drawn["seed"]),
        torch.float64,
        drawn["layout"],
        experts,
        drawn["hidden"],
        drawn["intermediate"],
        drawn["rank"],
        drawn["bias"],
        drawn["seed"],
    )
    want = exact(case)
    for engine in ENGINES:
        assert_close(want, run(case, select(engine, "exact")), 1e-12)


@pytest.mark.parametrize("engine", ENGINES)
def test_is_deterministic(engine: str) -> None:
    case = Case(random_index(50, 3, 6))
    first, second = (run(case, select(engine, "exact")) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_models_own_gate_is_differentiated() -> None:
    """A clamped gate as gpt-oss has it; the named gate written as a model's own gives the named gate's gradients."""
    case = Case(random_index(30, 2, 6), torch.float64)
    written_out = ModelGate("own", lambda z: torch.nn.functional.silu(z.chunk(2, -1)[0]) * z.chunk(2, -1)[1])
    assert_close(run(case, select("reference", "exact")), run(case, select("reference", "exact"), written_out), 1e-13)

    def clamped(z: Tensor) -> Tensor:
        gate, up = z.chunk(2, -1)
        return gate.clamp(max=0.3) * torch.sigmoid(gate.clamp(max=0.3) * 1.7) * (up.clamp(-0.3, 0.3) + 1)

    gate = ModelGate("clamped", clamped)
    z = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    dh = torch.randn(5, 4, dtype=torch.float64)
    (want,) = torch.autograd.grad(clamped(z), z, dh)
    assert torch.equal(gate.backward(z.detach(), dh), want)


def test_plain_weights_get_their_gradient() -> None:
    """Full fine-tuning of an unquantized stack, stored either way round, with the bias's gradient."""
    torch.manual_seed(0)
    index = random_index(20, 2, 5)
    up = torch.randn(5, 16, 12, dtype=torch.float64, requires_grad=True)
    down = torch.randn(5, 8, 12, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
    x = torch.randn(20, 12, dtype=torch.float64, requires_grad=True)
    p = torch.rand(20, 2, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(20, 12, dtype=torch.float64)

    want = torch.zeros(20, 12, dtype=torch.float64)
    for expert in range(5):
        tokens, slots = torch.where(index == expert)
        gate, linear = (x[tokens] @ up[expert].T + bias[expert]).chunk(2, -1)
        out = (torch.nn.functional.silu(gate) * linear) @ down[expert]
        want = want.index_add(0, tokens, out * p[tokens, slots, None])
    leaves = (x, p, up, bias, down)
    want_grads = torch.autograd.grad(want, leaves, dy)
    sides = Side(WeightSpec(False, 2), up, None, bias), Side(WeightSpec(False, 1, transposed=True), down)
    for engine in ENGINES:
        got = expert_mlp(x, index, p, *sides, SWIGLU, select(engine, "exact"))
        got_grads = torch.autograd.grad(got, leaves, dy)
        for a, b in zip((want, *want_grads), (got, *got_grads), strict=True):
            assert relative_error(a, b) < 1e-13


# What an ideal layer of the numerics has against float64, and twice that as a bound: FP8 rounding is a property of the
# mode.
IDEAL = {"fp8_grad": {"y": 5e-3, "dx": 3.7e-2}, "fp8": {"y": 4.5e-2, "dx": 4.6e-2}}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("numerics", ["fp8_grad", "fp8"])
def test_fp8_numerics_round_where_they_say(numerics: str, layout: object) -> None:
    """Forward untouched by fp8_grad, rounded by fp8; the input gradient rounded by both, within what E4M3 costs."""
    case = Case(random_index(64, 2, 6), torch.float32, layout, hidden=192, intermediate=160)
    want, got = exact(case), run(case, select("reference", numerics))
    plain = run(case, select("reference", "exact"))
    assert torch.equal(got["y"], plain["y"]) == (numerics == "fp8_grad")
    assert not torch.equal(got["dx"], plain["dx"])
    for name, ideal in IDEAL[numerics].items():
        assert relative_error(want[name], got[name]) < 2 * ideal


def test_nothing_dequantized_is_kept() -> None:
    """What autograd keeps is x, z, the skinny products and the routing: no float tensor as large as a weight but
    those.
    """
    case = Case(random_index(8, 2, 6), hidden=256, intermediate=128, rank=2)
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        x, p = case.inputs["x"], case.inputs["p"]
        sides = case.side("up", case.up), case.side("down", case.down)
        y = expert_mlp(x, case.index_TK, p, *sides, SWIGLU, select("dequant", "exact"))
    y.sum().backward()
    rows = case.index_TK.numel()
    allowed = {(8, 256), (8, 2), (rows, 256), (rows, 2), *(tuple(t.shape) for t in case.inputs.values())}
    scales = {tuple(side.scales.shape) for side in sides}
    for tensor in kept:
        if tensor.is_floating_point():
            assert tuple(tensor.shape) in allowed | scales, tensor.shape
        else:
            assert tensor.dtype in (torch.uint8, torch.int64, torch.int32)


def test_without_gradient_nothing_is_kept_and_nothing_changes() -> None:
    case = Case(random_index(20, 2, 6), bias=True)
    engine = select("dequant", "exact")
    want = run(case, engine)["y"]
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    sides = case.side("up", case.up), case.side("down", case.down)
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = expert_mlp(case.inputs["x"], case.index_TK, case.inputs["p"], *sides, SWIGLU, engine)
    assert torch.equal(y, want)
    assert not y.requires_grad
    assert kept == []


OWN = ModelGate("own", lambda z: torch.nn.functional.silu(z.chunk(2, -1)[0]) * z.chunk(2, -1)[1])


@pytest.mark.parametrize("gate", [SWIGLU, OWN], ids=["swiglu", "own gate"])
@pytest.mark.parametrize(("engine", "numerics"), [("dequant", "exact"), ("reference", "fp8"), ("auto", "fp8_grad")])
def test_compiles_without_a_break(engine: str, numerics: str, gate: Gate) -> None:
    """Output and each gradient of the compiled layer, LoRA and biases included; off-rank ids among the experts'."""
    index = random_index(24, 2, 6)
    index[3, 0] = 9
    case = Case(index, bias=True)
    sides = case.side("up", case.up), case.side("down", case.down)
    asked = Request(engine, numerics)

    def step(x: Tensor, p: Tensor) -> Tensor:
        return expert_mlp(x, case.index_TK, p, *sides, gate, asked)

    x, p = case.inputs["x"], case.inputs["p"]
    want = step(x, p)
    want_grads = torch.autograd.grad(want, list(case.inputs.values()), case.dy)
    # every case of this test has the code of this ``step``
    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    got = compiled(x, p)
    got_grads = torch.autograd.grad(got, list(case.inputs.values()), case.dy)
    for a, b in zip((want, *want_grads), (got, *got_grads), strict=True):
        assert relative_error(a, b) < 1e-6
    with torch.no_grad():
        assert relative_error(want, compiled(x, p)) < 1e-6


def test_a_compiled_layer_is_one_graph_of_operators() -> None:
    """What tracing sees of the layer is octavo's operators, not their insides."""
    case = Case(random_index(24, 2, 6))
    sides = case.side("up", case.up), case.side("down", case.down)

    def step(x: Tensor, p: Tensor) -> Tensor:
        return expert_mlp(x, case.index_TK, p, *sides, SWIGLU, Request("auto", "exact"))

    found = torch._dynamo.explain(step)(case.inputs["x"], case.inputs["p"])
    assert (found.graph_count, found.graph_break_count) == (1, 0)


def test_plain_weights_compile_with_their_gradient() -> None:
    torch.manual_seed(0)
    up, down = torch.randn(5, 16, 12, requires_grad=True), torch.randn(5, 8, 12, requires_grad=True)
    x, p = torch.randn(20, 12, requires_grad=True), torch.rand(20, 2, requires_grad=True)
    sides = Side(WeightSpec(False, 2), up), Side(WeightSpec(False, 1, transposed=True), down)
    leaves = (x, p, up, down)
    index = random_index(20, 2, 5)

    def step(x: Tensor) -> Tensor:
        return expert_mlp(x, index, p, *sides, SWIGLU, Request("auto", "exact"))

    for function in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        grads = torch.autograd.grad(function(x).square().sum(), leaves)
        if function is step:
            want = grads
    for a, b in zip(want, grads, strict=True):
        assert relative_error(a, b) < 1e-6
