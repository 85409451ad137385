"""Activations kept in FP8 on a GPU: rounded by the kernel as torch rounds them, on the engines that run there."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from octavo.ops.engines import Engine
from octavo.ops.experts import expert_mlp
from octavo.ops.gates import SWIGLU
from octavo.ops.kept import Activations, grow, shrink
from tests.gpu.test_kernel_engines import ENGINES
from tests.ops.cases import CHANNEL, Case, random_index, relative_error
from tests.ops.test_kept import BOUND, ROUNDING

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def forward(case: Case, inputs: dict[str, Tensor], engine: Engine, activations: Activations) -> Tensor:
    sides = []
    for name, weight in (("up", case.up), ("down", case.down)):
        side = case.side(name, weight)
        factors = {"lora_A": inputs[f"{name}_A"], "lora_B": inputs[f"{name}_B"]}
        sides.append(replace(side, weight=side.weight.cuda(), scales=side.scales.cuda(), **factors))
    return expert_mlp(inputs["x"], case.index_TK.cuda(), inputs["p"], *sides, SWIGLU, engine, activations)


@pytest.mark.parametrize("width", [48, 200, 3072])
def test_a_gpu_rounds_as_torch_does(width: int) -> None:
    """But for quotients that fall between two codes and are divided differently."""
    x = torch.randn(300, width, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    x[7] = 0
    want, got = grow(*shrink(x), torch.float32), grow(*(part.cpu() for part in shrink(x.cuda())), torch.float32)
    assert relative_error(x, got) <= ROUNDING
    assert (want != got).float().mean() < 1e-3
    assert torch.equal(got[7], torch.zeros(width))


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_are_within_the_bound(engine) -> None:
    case = Case(random_index(300, 2, 6), torch.bfloat16, CHANNEL, hidden=256, intermediate=128, rank=8)
    inputs = {name: tensor.detach().cuda().requires_grad_() for name, tensor in case.inputs.items()}
    found = {}
    for activations in ("bf16", "fp8"):
        y = forward(case, inputs, engine, activations)
        grads = torch.autograd.grad(y, list(inputs.values()), case.dy.cuda())
        found[activations] = {"y": y.detach()} | dict(zip(inputs, grads, strict=True))
    plain, narrow = found["bf16"], found["fp8"]
    assert torch.equal(plain["y"], narrow["y"])
    for name, bound in BOUND.items():
        assert relative_error(plain[name].cpu(), narrow[name].cpu()) <= bound, name


def test_half_is_kept() -> None:
    """Of x and z of a whole layer, measured."""
    tokens, top_k, hidden, width = 4096, 4, 512, 512
    case = Case(random_index(tokens, top_k, 6), torch.bfloat16, CHANNEL, hidden=hidden, intermediate=width)
    inputs = {name: tensor.detach().cuda().requires_grad_() for name, tensor in case.inputs.items()}
    engine = next(parameter.values[0] for parameter in ENGINES if parameter.values[0].name == "fused")
    held = {}
    for activations in ("bf16", "fp8"):
        forward(case, inputs, engine, activations).sum().backward()
        before = torch.cuda.memory_allocated()
        y = forward(case, inputs, engine, activations)
        held[activations] = torch.cuda.memory_allocated() - before
        del y
    rows = tokens * top_k
    # x is the caller's in bfloat16, and one of codes in FP8
    saved = rows * 2 * width - tokens * hidden - 4 * (rows + tokens)
    assert held["bf16"] - held["fp8"] == pytest.approx(saved, rel=0.02)
