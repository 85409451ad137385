"""On a GPU: optimizer states in pinned memory, streamed through the step, are the same to the bit and leave nothing."""

import gc
import io
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from transformers import Adafactor

from octavo.ops.pieces import IN_FLIGHT, PIECE_BYTES, StreamCopies, leaves
from octavo.plan.terms import Optimizer as Name
from octavo.train.adamw_8bit import fused_adamw_8bit
from octavo.train.offloaded_optimizer import OffloadedOptimizer, offloaded

from .device import DEVICE, needs_gpu

pytestmark = needs_gpu

# Of ten layers of experts and their attention, a bias, and a number; 0.37 GB of states in float32.
SHAPES = [*10 * [(64, 2048, 16), (64, 16, 1536), (16, 2048), (4096, 16)], (4096,), *4 * [(32, 1024, 64)], ()]
NAMES: list[Name] = ["adamw", "adafactor", "adamw_8bit"]
# What a number's memory takes of the allocator, for each parameter.
NUMBERS = 2 * 512
# Blocks of the allocator may be larger than what is in them.
ROUNDING = 16 << 20


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> Name:
    if request.param == "adamw_8bit" and find_spec("torchao") is None:
        pytest.skip("torchao is optional")
    found: Name = request.param
    return found


def parameters(name: Name) -> list[nn.Parameter]:
    generator = torch.Generator(DEVICE).manual_seed(0)
    dtype = torch.bfloat16 if name == "adamw_8bit" else torch.float32
    return [nn.Parameter(torch.randn(s, generator=generator, device=DEVICE).to(dtype)) for s in SHAPES]


def optimizer_of(name: Name, of: Sequence[nn.Parameter]) -> Optimizer:
    groups = [{"params": of[:-2], "weight_decay": 0.1}, {"params": of[-2:], "weight_decay": 0.0}]
    if name == "adamw":
        return AdamW(groups, lr=1e-2, fused=True)
    if name == "adafactor":
        return Adafactor(groups, lr=1e-2, scale_parameter=False, relative_step=False)
    from torchao.optim import AdamW8bit

    return fused_adamw_8bit(AdamW8bit(groups, lr=1e-2, bf16_stochastic_round=True))


def step(optimizer: Optimizer, of: Sequence[nn.Parameter], number: int) -> None:
    """Gradients, clipped, and a step, behind work that lets the host run ahead of the GPU."""
    generator = torch.Generator(DEVICE).manual_seed(number)
    for parameter in of:
        parameter.grad = torch.randn(parameter.shape, generator=generator, device=DEVICE).to(parameter.dtype)
    nn.utils.clip_grad_norm_(of, 1.0)
    torch.manual_seed(number)
    if number % 2:
        torch.cuda._sleep(50_000_000)
    optimizer.step()
    optimizer.zero_grad()


def assert_same(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    for index, (mine, theirs) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(mine, theirs), f"{index}: {SHAPES[index]}"


def late_copies(patch: pytest.MonkeyPatch) -> None:
    """What does not wait for a copy uses what was there before, or takes its memory."""
    for method, stream in (("fetch", "_coming"), ("write", "_leaving")):
        on_time = getattr(StreamCopies, method)

        def late(
            self: StreamCopies, *tensors: Sequence[Tensor], on_time: Callable[..., Any] = on_time, stream: str = stream
        ) -> Any:
            with torch.cuda.stream(getattr(self, stream)):
                torch.cuda._sleep(5_000_000)
            return on_time(self, *tensors)

        patch.setattr(StreamCopies, method, late)


@pytest.mark.parametrize("late", [False, True], ids=["as they are", "late copies"])
def test_results_are_the_same_to_the_bit_and_states_are_pinned(name, late, monkeypatch):
    if late:
        late_copies(monkeypatch)
    want, got = parameters(name), parameters(name)
    resident, streamed = optimizer_of(name, want), offloaded(optimizer_of(name, got), name)
    for number in range(6):
        step(resident, want, number)
        step(streamed, got, number)
        # The next work follows at once; whatever is still being copied must not be its memory.
        scratch = [torch.full((1 << 22,), float("nan"), device=DEVICE) for _ in range(8)]
        del scratch
    assert_same(got, want)
    for parameter, other in zip(got, want, strict=True):
        assert streamed.state[parameter].keys() == resident.state[other].keys()
        for key, value in streamed.state[parameter].items():
            kept = resident.state[other][key]
            if not isinstance(value, Tensor) or value.ndim == 0:
                assert value == kept
                continue
            for mine, theirs in zip(leaves(value), leaves(kept), strict=True):
                assert mine.device.type == "cpu"
                assert mine.is_pinned()
                assert torch.equal(mine, theirs.cpu())


def test_no_state_is_on_the_gpu_after_a_step_and_few_are_within(name):
    of = parameters(name)
    streamed = offloaded(optimizer_of(name, of), name)
    for parameter in of:
        parameter.grad = torch.ones_like(parameter)
    # Whatever compiles and allocates once does so on other parameters.
    others = parameters(name)
    step(optimizer_of(name, others), others, 0)
    del others
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for number in range(3):
        torch.cuda.reset_peak_memory_stats()
        streamed.step()
        # Asked at once, with copies still running: their memory is given back in the order of the GPU's work.
        assert torch.cuda.memory_allocated() - before <= NUMBERS * len(of)
        if name == "adamw":
            # Both moments of the largest parameter are less than a piece.
            within = torch.cuda.max_memory_allocated() - before
            assert within <= IN_FLIGHT * PIECE_BYTES + ROUNDING, number
            assert within < streamed.host_bytes / 3
    if name == "adamw":
        assert streamed.host_bytes == 8 * sum(parameter.numel() for parameter in of if parameter.ndim)


@pytest.mark.parametrize("before", ["on host", "resident"])
def test_a_checkpoint_of_either_goes_on_in_the_other(name, before):
    def made(on_host: bool, of: Sequence[nn.Parameter]) -> Optimizer:
        optimizer = optimizer_of(name, of)
        return offloaded(optimizer, name) if on_host else optimizer

    want, of = parameters(name), parameters(name)
    resident = optimizer_of(name, want)
    for number in range(4):
        step(resident, want, number)
    optimizer = made(before == "on host", of)
    for number in range(2):
        step(optimizer, of, number)
    file = io.BytesIO()
    # At once, while the last pieces leave.
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    optimizer = made(before != "on host", of)
    there = torch.cuda.memory_allocated()
    optimizer.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    if isinstance(optimizer, OffloadedOptimizer):
        assert torch.cuda.memory_allocated() - there <= NUMBERS * len(of)
    for number in range(2, 4):
        step(optimizer, of, number)
    assert_same(of, want)
