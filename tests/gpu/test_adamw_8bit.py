"""AdamW of 8 bits with octavo's step against torchao's: numbers, checkpoints both ways, resuming, states on the host.

On a GPU, or in Triton's interpreter: TRITON_INTERPRET=1 python -m pytest -m gpu tests/gpu/test_adamw_8bit.py
"""

import io
import warnings
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from octavo.train.adamw_8bit import fused_adamw_8bit, rounding_seed
from octavo.train.offloaded_optimizer import offloaded

from .device import CUDA, DEVICE, needs_kernels

pytestmark = needs_kernels
pytest.importorskip("torchao")

# Quantized, too small to be, no multiple of a block, not contiguous, and a number.
SHAPES = [(64, 128), (4, 32), (128, 64), (4097,), (96, 64), (8, 16, 256), (300,), (16, 256), ()]
TRANSPOSED = 2
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def not_compiled() -> Iterator[None]:
    """torchao's own step compiles a function for each shape, which changes nothing of what is tested."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator).to(dtype).to(DEVICE) for shape in SHAPES]
    made[TRANSPOSED] = made[TRANSPOSED].T
    return [nn.Parameter(tensor) for tensor in made]


def plain(of: Sequence[nn.Parameter], *, stochastic: bool = True, block_size: int = 256) -> Optimizer:
    from torchao.optim import AdamW8bit

    groups = [{"params": of[::2], "weight_decay": 0.1}, {"params": of[1::2], "weight_decay": 0.0}]
    made: Optimizer = AdamW8bit(groups, lr=1e-2, bf16_stochastic_round=stochastic, block_size=block_size)
    return made


def fused(of: Sequence[nn.Parameter], *, stochastic: bool = True, block_size: int = 256) -> Optimizer:
    found = fused_adamw_8bit(plain(of, stochastic=stochastic, block_size=block_size))
    assert type(found).__name__ == "FusedAdamW8bit"
    return found


def step(optimizer: Optimizer, of: Sequence[nn.Parameter], number: int, *, without: int | None = None) -> None:
    generator = torch.Generator().manual_seed(number)
    for index, parameter in enumerate(of):
        gradient = torch.randn(parameter.shape, generator=generator).to(parameter.dtype).to(DEVICE)
        parameter.grad = None if index == without else gradient
    # torchao's own rounding, of what is not quantized, draws from the generator.
    torch.manual_seed(7)
    torch.rand(number)
    torch.rand(number, device=DEVICE)
    optimizer.step()
    optimizer.zero_grad()


def exchanged(optimizer: Optimizer) -> dict[str, object]:
    """Its `state_dict` as a file has it."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    found: dict[str, object] = torch.load(file, weights_only=True)
    return found


def tensors_of(optimizer: Optimizer) -> list[Tensor]:
    found = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for value in optimizer.state[parameter].values():
                found += [value.codes, value.scale] if hasattr(value, "codes") else [value]
    return found


def assert_same(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    for index, (mine, theirs) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(mine.cpu(), theirs.cpu()), index


@pytest.mark.parametrize("before", [0, 1, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_step_is_torchaos(dtype, before):
    """From the same states: float32 within its last places, codes the same but for ties."""
    theirs, ours = parameters(dtype), parameters(dtype)
    reference, optimizer = plain(theirs, stochastic=False), fused(ours, stochastic=False)
    for number in range(before):
        step(reference, theirs, number)
    with torch.no_grad():
        for mine, other in zip(ours, theirs, strict=True):
            mine.copy_(other)
    optimizer.load_state_dict(exchanged(reference))
    step(reference, theirs, before)
    step(optimizer, ours, before)
    for mine, other in zip(ours, theirs, strict=True):
        # One bfloat16 number more or less where float32 lies by the midpoint.
        gap = 2**-7 if dtype == torch.bfloat16 else 2**-21
        off = (mine - other).abs().double()
        assert (off <= gap * other.abs().double() + 1e-7).all()
        assert (off > 2**-21 * other.abs().double() + 1e-7).double().mean() < 2e-3
    for mine, other in zip(tensors_of(optimizer), tensors_of(reference), strict=True):
        if mine.dtype == torch.uint8:
            off = (mine.int() - other.int()).abs()
            assert off.max() <= 1
            assert off.double().mean() < 1e-3
        else:
            assert torch.allclose(mine, other, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_twenty_steps_go_where_torchaos_go(dtype):
    theirs, ours, start = parameters(dtype), parameters(dtype), parameters(dtype)
    reference, optimizer = plain(theirs, stochastic=False), fused(ours, stochastic=False)
    for number in range(20):
        step(reference, theirs, number)
        step(optimizer, ours, number)
    for mine, other, first in zip(ours, theirs, start, strict=True):
        moved = (other - first).float().norm()
        assert (mine - other).float().norm() <= (0.05 if dtype == torch.bfloat16 else 0.01) * moved


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding_stochastically_is_right_in_the_mean(dtype):
    """Steps far below the gap of bfloat16, which rounding to nearest loses."""
    of = [nn.Parameter(torch.ones(64, 1024, dtype=dtype, device=DEVICE))]
    from torchao.optim import AdamW8bit

    optimizer = fused_adamw_8bit(AdamW8bit(of, lr=1e-4, weight_decay=0.0, bf16_stochastic_round=True))
    for _ in range(4):
        of[0].grad = torch.ones_like(of[0])
        optimizer.step()
    assert of[0].float().mean().item() == pytest.approx(1 - 4e-4, abs=3e-5 if dtype == torch.bfloat16 else 1e-6)
    assert of[0].unique().numel() > 1 or dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_run_that_is_resumed_goes_on_to_the_bit(dtype):
    want, got = parameters(dtype), parameters(dtype)
    whole, optimizer = fused(want), fused(got)
    for number in range(4):
        step(whole, want, number, without=number)
    for number in range(2):
        step(optimizer, got, number, without=number)
    saved = exchanged(optimizer)
    again = fused(got)
    again.load_state_dict(saved)
    # As it is after reading a checkpoint onto the GPU.
    for state in again.state.values():
        state["step"] = state["step"].to(DEVICE)
    for number in range(2, 4):
        step(again, got, number, without=number)
    assert_same(got, want)
    assert_same(tensors_of(again), tensors_of(whole))
    assert all(state["step"].device.type == "cpu" for state in again.state.values())


@pytest.mark.parametrize("before", ["ours", "torchao's"])
def test_a_checkpoint_of_either_goes_on_in_the_other(before):
    of = parameters(torch.bfloat16)
    makers = [fused, plain] if before == "ours" else [plain, fused]
    first = makers[0](of)
    step(first, of, 0)
    saved = exchanged(first)
    second = makers[1](of)
    second.load_state_dict(saved)
    step(second, of, 1)
    assert {float(state["step"]) for state in second.state.values()} == {2.0}
    other = exchanged(second)
    assert other.keys() == saved.keys()
    for index, state in saved["state"].items():
        assert {key: type(value) for key, value in state.items()} == {
            key: type(value) for key, value in other["state"][index].items()
        }
        assert all(value.dtype == other["state"][index][key].dtype for key, value in state.items())


@pytest.mark.parametrize("piece_bytes", [1, 20_000, 1 << 30])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_states_on_the_host_change_no_bit(dtype, piece_bytes):
    want, got = parameters(dtype), parameters(dtype)
    resident, streamed = fused(want), offloaded(fused(got), "adamw_8bit")
    streamed._piece_bytes = piece_bytes
    for number in range(5):
        step(resident, want, number, without=number + 2)
        step(streamed, got, number, without=number + 2)
    assert_same(got, want)
    assert_same(tensors_of(streamed), tensors_of(resident))


def test_random_bits_are_those_of_seed_step_and_parameter():
    def run(seed: int, *, others: bool) -> list[Tensor]:
        of = parameters(torch.bfloat16)
        optimizer = fused(of)
        for number in range(2):
            for index, parameter in enumerate(of):
                # Without gradients the others keep their numbers.
                parameter.grad = torch.ones_like(parameter) if others or index == 4 else None
            torch.manual_seed(seed)
            optimizer.step()
            assert optimizer.state[of[4]]["step"] == number + 1
        return [parameter.detach().clone() for parameter in of]

    first, again, other, alone = (run(*one[:1], others=one[1]) for one in ((1, True), (1, True), (2, True), (1, False)))
    assert_same(first, again)
    assert torch.equal(first[4], alone[4])
    assert not torch.equal(first[4], other[4])
    known = {rounding_seed(a, b, c) for a in range(5) for b in range(5) for c in range(5)}
    assert len(known) == 125
    assert all(-(2**63) <= one < 2**63 for one in known)


@pytest.mark.parametrize("block_size", [256, 128], ids=["ours", "torchao's"])
def test_hooks_run_once_and_schedulers_set_the_rate(block_size):
    of = parameters(torch.bfloat16)
    optimizer = fused(of, block_size=block_size)
    log: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: log.append("before"))
    optimizer.register_step_post_hook(lambda *_: log.append("after"))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda number: float(number == 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(optimizer, of, 0)
        scheduler.step()
    assert log == ["before", "after"]
    at = [parameter.detach().clone() for parameter in of]
    step(optimizer, of, 1)
    assert_same(of, at)


def test_groups_of_amsgrad_take_torchaos_step():
    """Of states that are not quantized; with others torchao 0.18 has it compiled alone."""
    of = [nn.Parameter(torch.ones(4, 32, device=DEVICE)), nn.Parameter(torch.ones(64, 64, device=DEVICE))]
    from torchao.optim import AdamW8bit

    optimizer = fused_adamw_8bit(AdamW8bit([{"params": of[:1], "amsgrad": True}, {"params": of[1:]}], lr=1e-2))
    for parameter in of:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert "max_exp_avg_sq" in optimizer.state[of[0]]
    assert "max_exp_avg_sq" not in optimizer.state[of[1]]
    for parameter in of:
        assert torch.allclose(parameter, torch.full_like(parameter, 1 - 1e-2 - 1e-4))
    assert len(optimizer.param_groups) == 2


def test_rules_are_torchaos():
    of = parameters(torch.float32)
    optimizer = fused(of)

    def closure() -> Tensor:
        loss = sum(parameter.square().sum() for parameter in of)
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0
    optimizer.zero_grad()
    of[0].grad = torch.zeros(64, 128, device=DEVICE).to_sparse()
    with pytest.raises(RuntimeError, match="Sparse gradient is not supported"):
        optimizer.step()
    of[0].grad = torch.zeros_like(of[0])
    optimizer.param_groups[0]["lr"] = 1.0
    with pytest.raises(RuntimeError, match="lr was changed to a non-Tensor object"):
        optimizer.step()
    other = torch.optim.AdamW(of)
    assert fused_adamw_8bit(other) is other
    assert type(other) is torch.optim.AdamW
    assert fused_adamw_8bit(optimizer) is optimizer
    assert repr(optimizer).startswith("FusedAdamW8bit (")
    late = nn.Parameter(torch.zeros(64, 64, device=DEVICE))
    optimizer.add_param_group({"params": [late]})
    late.grad = torch.ones_like(late)
    of[0].grad = None
    optimizer.step()
    assert (late < 0).all()


@pytest.mark.skipif(not CUDA, reason="the interpreter takes parameters on the CPU")
def test_parameters_on_the_cpu_take_torchaos_step():
    def run(make: Callable[[Sequence[nn.Parameter]], Optimizer]) -> list[nn.Parameter]:
        of = [nn.Parameter(parameter.detach().cpu()) for parameter in parameters(torch.bfloat16)]
        optimizer = make(of)
        torch.manual_seed(3)
        for parameter in of:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        return of

    assert_same(run(fused), run(plain))


@pytest.mark.skipif(not CUDA, reason="takes a GPU")
def test_against_torchaos_compiled_step():
    torch.compiler.set_stance("default")
    of, others = ([nn.Parameter(torch.ones(512, 1024, device=DEVICE))] for _ in range(2))
    from torchao.optim import AdamW8bit

    ours, theirs = fused_adamw_8bit(AdamW8bit(of, lr=1e-2)), AdamW8bit(others, lr=1e-2)
    for number in range(3):
        gradient = torch.randn(512, 1024, generator=torch.Generator(DEVICE).manual_seed(number), device=DEVICE)
        of[0].grad, others[0].grad = gradient, gradient.clone()
        ours.step()
        theirs.step()
    moved = (others[0] - 1).norm()
    assert (of[0] - others[0]).norm() <= 1e-3 * moved
