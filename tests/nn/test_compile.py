"""Octavo's modules under torch.compile: one graph, the eager result, and the choice of an engine when it runs."""

import shutil

import pytest
import torch
from torch import Tensor

from octavo.nn.settings import Settings
from tests.nn.modules import Block, float8_experts, float8_linear
from tests.ops.cases import relative_error

# inductor writes C++ and needs a compiler for it
BACKENDS = ["eager", "aot_eager", *(["inductor"] if shutil.which("g++") else [])]


@pytest.fixture(autouse=True)
def _fresh():
    """Every test compiles for itself."""
    torch._dynamo.reset()


def both(module: torch.nn.Module, x: Tensor, backend: str) -> None:
    parameters = [p for p in module.parameters() if p.requires_grad]
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    results = []
    for function in (module, compiled):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        results.append((y, *torch.autograd.grad(y.square().sum(), [leaf, *parameters])))
    for want, got in zip(*results, strict=True):
        assert relative_error(want.detach(), got.detach()) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_and_experts_are_one_graph(backend: str) -> None:
    torch.manual_seed(0)
    both(Block(), torch.randn(24, 96), backend)


@pytest.mark.parametrize("numerics", ["exact", "fp8_grad", "fp8"])
def test_linear_in_each_numerics(numerics: str) -> None:
    torch.manual_seed(0)
    layer = float8_linear(bias=True)
    layer.settings = Settings(numerics)
    both(layer, torch.randn(3, 5, 96), "aot_eager")


def test_no_break_under_autocast_and_without_gradient() -> None:
    torch.manual_seed(0)
    experts, x = float8_experts(), torch.randn(12, 96)
    index = torch.arange(12)[:, None].add(torch.tensor([0, 1])) % 4
    p = torch.full((12, 2), 0.5)
    compiled = torch.compile(experts, backend="aot_eager", fullgraph=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert relative_error(experts(x, index, p), compiled(x, index, p)) < 1e-6


def test_other_lengths_need_no_engine_of_their_own() -> None:
    """The engine is chosen when the operator runs, so a dynamic length compiles once."""
    torch.manual_seed(0)
    layer = float8_linear()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (3, 40, 300):
        x = torch.randn(rows, 96)
        assert relative_error(layer(x), compiled(x)) < 1e-6
