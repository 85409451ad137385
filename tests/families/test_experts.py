"""Every experts class alone: octavo's forward against the class's own, with the same weights.

Output and gradients (hidden states, router weights, LoRA factors, and weights and biases where those are not
quantized) are held against the class's own ``eager`` forward in float64 and against transformers' ``grouped_mm`` in
float32, which is the widest that it takes.
"""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from octavo.formats.facts import ScaleLayout
from octavo.nn.experts import OctavoExperts
from octavo.nn.settings import Settings

from . import table
from .cases import (
    LAYOUTS,
    Batch,
    assert_close,
    batch_for,
    dense_twin,
    differentiate,
    experts_of,
    factors_for,
    float8_twin,
    leaves_of,
    quantized,
    relative_errors,
    with_lora,
    with_merged,
)
from .tiny import class_called, tiny_experts

ENGINES = ("reference", "dequant")
# Relative error of sums of some hundred terms, added in another order: measured at most 2e-15 in float64, and 9e-7 in
# float32. Where the class computes in float32 inside, whatever comes in, that is all it can be held to.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6}
IMPLEMENTATION = {torch.float64: "eager", torch.float32: "grouped_mm", torch.bfloat16: "grouped_mm"}


def tolerance(name: str, dtype: torch.dtype) -> float:
    return TOLERANCE[torch.float32 if name in table.FLOAT32_INSIDE else dtype]


def layout_for(name: str) -> ScaleLayout:
    """The layouts take turns."""
    return LAYOUTS[table.FLOAT8.index(name) % len(LAYOUTS)]


def float8_pair(
    name: str, dtype: torch.dtype, engine: str = "reference", layout: ScaleLayout | None = None
) -> tuple[nn.Module, OctavoExperts]:
    """The stock module, holding the dequantized weights, and its twin in FP8."""
    layout = layout or layout_for(name)
    stock, module = tiny_experts(class_called(name), dtype), tiny_experts(class_called(name), dtype)
    weights = quantized(stock, layout)
    with torch.no_grad():
        for stack, weight in weights.items():
            stock.get_parameter(stack).copy_(weight.dequantize(dtype))
    stock.config._experts_implementation = IMPLEMENTATION[dtype]
    return stock, float8_twin(module, weights, layout, Settings(engine=engine))


def dense_pair(name: str, dtype: torch.dtype, engine: str = "reference") -> tuple[nn.Module, OctavoExperts]:
    """The stock module and a twin with the same plain weights."""
    stock, module = tiny_experts(class_called(name), dtype), tiny_experts(class_called(name), dtype)
    stock.config._experts_implementation = IMPLEMENTATION[dtype]
    return stock, dense_twin(module, Settings(engine=engine))


def parameters(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", table.FLOAT8)
def test_float8_experts_are_the_class_with_dequantized_weights(name: str, engine: str, dtype: torch.dtype) -> None:
    stock, twin = float8_pair(name, dtype, engine)
    batch, factors = batch_for(stock, dtype), factors_for(stock, dtype)
    assert_close(differentiate(stock, batch, {}), differentiate(twin, batch, {}), tolerance(name, dtype))
    want = differentiate(with_merged(stock, factors), batch, leaves_of(factors))
    got = differentiate(with_lora(twin, factors), batch, leaves_of(factors))
    assert_close(want, got, tolerance(name, dtype))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", table.PLAIN)
def test_plain_experts_are_the_class(name: str, engine: str, dtype: torch.dtype) -> None:
    stock, twin = dense_pair(name, dtype, engine)
    batch, factors = batch_for(stock, dtype), factors_for(stock, dtype)
    assert parameters(twin).keys() == parameters(stock).keys()
    want = differentiate(stock, batch, parameters(stock))
    got = differentiate(twin, batch, parameters(twin))
    assert_close(want, got, tolerance(name, dtype))
    want = differentiate(with_merged(stock, factors), batch, leaves_of(factors))
    got = differentiate(with_lora(twin, factors), batch, leaves_of(factors))
    assert_close(want, got, tolerance(name, dtype))


@pytest.mark.parametrize("name", table.PLAIN)
def test_off_rank_ids_contribute_nothing(name: str) -> None:
    """Ids past the last expert belong to another rank. The class's own forward is given a weight of zero for them."""
    for stock, twin in pairs(name):
        batch = batch_for(stock)
        away_TK = torch.rand(batch.index_TK.shape, generator=torch.Generator().manual_seed(3)) < 0.3
        num_experts = experts_of(stock)
        foreign_TK = torch.where(batch.index_TK % 2 == 0, num_experts, num_experts + 3)
        ours = Batch(batch.x_TH, torch.where(away_TK, foreign_TK, batch.index_TK), batch.p_TK, batch.dy_TH)

        def masked(x: Tensor, index: Tensor, p: Tensor, stock: nn.Module = stock, away: Tensor = away_TK) -> Tensor:
            return stock(x, index, p.masked_fill(away, 0.0))

        want, got = differentiate(masked, batch, {}), differentiate(twin, ours, {})
        assert_close(want, got, tolerance(name, torch.float64))
        assert not got["dp"][away_TK].any()


@pytest.mark.parametrize("name", table.PLAIN)
def test_tokens_may_come_in_any_shape(name: str) -> None:
    """Three dimensions, none at all, and a gradient of stride 0."""
    for _, twin in pairs(name):
        batch = batch_for(twin)
        flat, deep = differentiate(twin, batch, {}), differentiate(twin, batch, {}, shape=(2, 7))
        assert deep["y"].shape == (2, 7, batch.x_TH.shape[-1])
        deep["y"] = deep["y"].flatten(0, 1)
        assert all(torch.equal(flat[key], deep[key]) for key in flat)

        none = differentiate(twin, Batch(*(t[:0] for t in (batch.x_TH, batch.index_TK, batch.p_TK, batch.dy_TH))), {})
        assert none["y"].shape == none["dx"].shape == (0, batch.x_TH.shape[-1])

        ones = Batch(batch.x_TH, batch.index_TK, batch.p_TK, torch.ones_like(batch.dy_TH))
        x_TH, p_TK = batch.x_TH.clone().requires_grad_(), batch.p_TK.clone().requires_grad_()
        twin(x_TH, batch.index_TK, p_TK).sum().backward()
        want = differentiate(twin, ones, {})
        assert torch.equal(x_TH.grad, want["dx"])
        assert torch.equal(p_TK.grad, want["dp"])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", table.PLAIN)
def test_bfloat16_is_no_worse_than_the_class_itself(name: str, engine: str) -> None:
    """In bfloat16, with router weights in float32 as most routers give them; both errors against float64.

    They are of the same size, a few bf16 ulps, and scatter by a factor of 1.7 over the classes.
    """
    dtype = torch.bfloat16
    for make in [float8_pair, dense_pair] if name in table.FLOAT8 else [dense_pair]:
        exact, _ = make(name, torch.float64)
        stock, twin = make(name, dtype, engine)
        with torch.no_grad():
            for parameter, narrow in zip(exact.parameters(), stock.parameters(), strict=True):
                if make is dense_pair:
                    parameter.copy_(narrow)
        batch = batch_for(exact)
        batch = Batch(batch.x_TH.to(dtype), batch.index_TK, batch.p_TK.float(), batch.dy_TH.to(dtype))
        wide = Batch(batch.x_TH.double(), batch.index_TK, batch.p_TK.double(), batch.dy_TH.double())
        want, theirs, ours = (differentiate(m, b, {}) for m, b in ((exact, wide), (stock, batch), (twin, batch)))
        assert {key: value.dtype for key, value in ours.items()} == {key: value.dtype for key, value in theirs.items()}
        limit, got = relative_errors(want, theirs), relative_errors(want, ours)
        assert all(got[key] <= 2 * limit[key] for key in want), (limit, got)


@pytest.mark.parametrize("name", table.PLAIN)
def test_a_copy_computes_with_its_own_weights(name: str) -> None:
    """A gate is a method of the module that it came from; that of a copy has to be the copy's."""
    for _, twin in pairs(name):
        batch = batch_for(twin)
        twin_copy = copy.deepcopy(twin)
        before = differentiate(twin, batch, {})
        assert all(torch.equal(before[key], value) for key, value in differentiate(twin_copy, batch, {}).items())
        bound = getattr(getattr(twin_copy.gate, "function", None), "__self__", twin_copy)
        assert bound is twin_copy or bound is twin_copy.act_fn
        assert class_called(name).__name__ in repr(twin)


def pairs(name: str) -> Iterator[tuple[nn.Module, OctavoExperts]]:
    """The FP8 pair, where the class takes FP8, and the plain pair, in float64."""
    if name in table.FLOAT8:
        yield float8_pair(name, torch.float64)
    yield dense_pair(name, torch.float64)
