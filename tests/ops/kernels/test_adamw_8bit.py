"""AdamW with moments of 8 bits against float64: several tensors in a launch, moments, rounding and its random bits."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from octavo.ops.kernels.adamw_8bit import BLOCK_SIZE, Moment, Numbers, Tensors, fits, step
from tests.ops.kernels.cases import DEVICE, seeds

# Float32 computes what is rounded, within a few units in its last place.
FLOAT32 = 8 * 2**-24


def table(signed: bool, generator: torch.Generator) -> Tensor:
    """A sorted table of 256 that is denser near zero and has 0 and 1, as torchao's are; its gaps are uneven."""
    steps = torch.rand(128 if signed else 255, generator=generator).cumsum(0)
    above = (steps / steps[-1]) ** 3
    below = -above[:-1].flip(0) * 0.99
    found = torch.cat((below, torch.zeros(1), above)) if signed else torch.cat((torch.zeros(1), above))
    assert found.shape == (256,)
    assert (found.diff() >= 0).all()
    return found


def moment(shape: tuple[int, ...], qmap: Tensor, generator: torch.Generator, size: float) -> Moment:
    codes = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    scale = torch.rand(codes.numel() // BLOCK_SIZE, generator=generator) * size
    scale[::5] = 0.0
    return Moment(codes.to(DEVICE), scale.to(DEVICE), qmap.to(DEVICE))


def drawn(
    shapes: list[tuple[int, ...]], seed: int, dtype: torch.dtype, gradients: torch.dtype | None = None
) -> list[Tensors]:
    generator = torch.Generator().manual_seed(seed)
    maps = table(True, generator), table(False, generator)
    found = []
    for number, shape in enumerate(shapes):
        p, g = (torch.randn(shape, generator=generator) for _ in range(2))
        # A block of which nothing is known, and some of other sizes.
        g.view(-1, BLOCK_SIZE)[-1] = 0.0
        g.view(-1, BLOCK_SIZE)[::3] *= 1e-6
        m, v = (moment(shape, qmap, generator, size) for qmap, size in zip(maps, (1.0, 0.1), strict=True))
        found.append(
            Tensors(p.to(dtype).to(DEVICE), g.to(gradients or dtype).to(DEVICE), m, v, 2**62 + 977 * number - seed)
        )
    return found


def numbers_of(count: int, *, betas: tuple[float, float] = (0.9, 0.999), lr: float = 1e-2) -> Numbers:
    beta1, beta2 = betas
    return Numbers(lr, lr * 0.1, (1 - beta1, 1 - beta2), (1 - beta1**count, (1 - beta2**count) ** 0.5), 1e-8)


def copied(tensors: list[Tensors]) -> list[Tensors]:
    def again(moment: Moment) -> Moment:
        return Moment(moment.codes.clone(), moment.scale.clone(), moment.qmap.clone())

    return [replace(one, parameter=one.parameter.clone(), m=again(one.m), v=again(one.v)) for one in tensors]


def value(moment: Moment) -> Tensor:
    entries = moment.qmap.double()[moment.codes.long()].view(-1, BLOCK_SIZE)
    return entries * moment.scale.double()[:, None]


@dataclass(frozen=True)
class Updated:
    """[blocks, 256] in float64, before anything is rounded. ``size``: of the terms of ``p``, which may cancel."""

    p: Tensor
    m: Tensor
    v: Tensor
    size: Tensor


def updated(one: Tensors, numbers: Numbers) -> Updated:
    p, g = (tensor.double().view(-1, BLOCK_SIZE) for tensor in (one.parameter, one.gradient))
    kept, new = (1 - numbers.weights[0]) * value(one.m), numbers.weights[0] * g
    v = (1 - numbers.weights[1]) * value(one.v) + numbers.weights[1] * g**2
    rate = numbers.lr / numbers.corrections[0] / (v.sqrt() / numbers.corrections[1] + numbers.eps)
    want = p * (1 - numbers.decay) - rate * (kept + new)
    return Updated(want, kept + new, v, p.abs() + rate * (kept.abs() + new.abs()))


def assert_moment(name: str, got: Moment, want: Tensor) -> None:
    """The scale is the block's largest; no entry is nearer than the code's, but for the rounding of float32."""
    scale = want.abs().amax(1).clamp(min=1e-12)
    assert ((got.scale.double() - scale).abs() <= FLOAT32 * scale).all(), f"{name}: scales"
    scaled = want / got.scale.double()[:, None]
    qmap = got.qmap.double()
    nearest = (scaled[..., None] - qmap).abs().amin(-1)
    off = (scaled - qmap[got.codes.long()].view(scaled.shape)).abs() - nearest
    # of a sum of terms that may cancel
    assert (off <= 2 * FLOAT32).all(), f"{name}: codes off by {off.max():.3g}"


def assert_parameter(got: Tensor, want: Updated, *, stochastic: bool) -> None:
    assert not got.isnan().any()
    slack = FLOAT32 * want.size
    if got.dtype == torch.bfloat16:
        # of the larger number, where the two lie on either side of a power of two
        gap = torch.exp2(torch.frexp(want.p.abs() + slack)[1].double() - 8)
        slack = slack + gap * (1.0 if stochastic else 0.5)
    off = (got.double().view(want.p.shape) - want.p).abs() - slack
    assert (off <= 0).all(), f"off by {off.max():.3g} more than rounding has"


sizes = st.lists(st.sampled_from([(256,), (16, 16), (3, 256), (8, 256), (9, 2, 128), (40, 64)]), min_size=1, max_size=5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@given(
    shapes=sizes,
    seed=seeds,
    count=st.sampled_from((1, 2, 1000)),
    betas=st.sampled_from(((0.9, 0.999), (0.3, 0.4), (0.0, 0.95))),
    stochastic=st.booleans(),
)
@settings(max_examples=15, deadline=None)
def test_against_float64(
    dtype: torch.dtype,
    shapes: list[tuple[int, ...]],
    seed: int,
    count: int,
    betas: tuple[float, float],
    stochastic: bool,
) -> None:
    tensors, numbers = drawn(shapes, seed, dtype), numbers_of(count, betas=betas)
    want = [updated(one, numbers) for one in tensors]
    gradients = [one.gradient.clone() for one in tensors]
    step(tensors, numbers, stochastic=stochastic)
    for one, expected, gradient in zip(tensors, want, gradients, strict=True):
        assert_parameter(one.parameter, expected, stochastic=stochastic)
        assert_moment("m", one.m, expected.m)
        assert_moment("v", one.v, expected.v)
        assert torch.equal(one.gradient, gradient)


def test_every_block_is_updated_once_and_nothing_else_is_written() -> None:
    """Parameters are slices of one memory, with a block that belongs to none between them."""
    shapes = [(256 * blocks,) for blocks in (1, 7, 8, 9, 16, 23)]
    tensors, numbers = drawn(shapes, 0, torch.float32), numbers_of(3)
    memory = torch.full((sum(shape[0] + 256 for shape in shapes),), 7.0, device=DEVICE)
    placed, start = [], 0
    for one in tensors:
        place = memory[start : start + one.parameter.numel()]
        place.copy_(one.parameter)
        placed.append(replace(one, parameter=place))
        start += one.parameter.numel() + 256
    want = [updated(one, numbers) for one in placed]
    step(placed, numbers, stochastic=False)
    between = torch.ones_like(memory, dtype=torch.bool)
    start = 0
    for one, expected in zip(placed, want, strict=True):
        assert_parameter(one.parameter, expected, stochastic=False)
        between[start : start + one.parameter.numel()] = False
        start += one.parameter.numel() + 256
    assert (memory[between] == 7.0).all()


def test_ties_go_to_the_upper_entry_and_ends_of_the_table_are_kept() -> None:
    """m = g exactly, with a table of which midpoints are exact."""
    qmap = (torch.arange(256) - 128).to(DEVICE) / 128.0
    qmap[255] = 1.0
    g = torch.zeros(BLOCK_SIZE, device=DEVICE)
    g[:6] = torch.tensor([1.0, -1.0, 0.5 / 128, -0.5 / 128, 1.5 / 128, -127.5 / 128])
    moments = [Moment(torch.zeros(256, dtype=torch.uint8, device=DEVICE), torch.zeros(1, device=DEVICE), qmap)] * 2
    m, v = copied([Tensors(g, g, *moments)])[0].m, copied([Tensors(g, g, *moments)])[0].v
    one = Tensors(torch.zeros_like(g), g, m, v)
    step([one], replace(numbers_of(1, betas=(0.0, 0.0)), corrections=(1.0, 1.0)), stochastic=False)
    assert one.m.codes[:7].tolist() == [255, 0, 129, 128, 130, 1, 128]
    assert one.m.scale.tolist() == [1.0]


def test_zeros_stay_zeros_and_nan_shows() -> None:
    (zeros, broken), numbers = drawn([(256,), (2, 256)], 0, torch.bfloat16), numbers_of(1)
    for one in (zeros, broken):
        one.gradient.zero_()
        for each in (one.m, one.v):
            each.scale.zero_()
            each.codes.zero_()
    zeros.parameter.zero_()
    broken.gradient[1, 3] = float("nan")
    before = broken.parameter.clone()
    step([zeros, broken], numbers, stochastic=True)
    assert (zeros.parameter == 0).all()
    assert zeros.m.scale.item() == pytest.approx(1e-12)
    assert (zeros.m.qmap[zeros.m.codes.long()] == 0).all()
    # The parameter's element, and the block of either moment; as torchao has it.
    assert broken.parameter.isnan().nonzero().tolist() == [[1, 3]]
    assert broken.m.scale.isnan().tolist() == [False, True]
    assert broken.v.scale.isnan().tolist() == [False, True]
    assert ((broken.parameter[0] - before[0]).abs() <= before[0].abs() * 2**-6).all()


@pytest.mark.parametrize("gradients", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("how", ["as they are", "transposed", "at odd bytes"])
def test_gradients_of_any_dtype_and_layout(gradients: torch.dtype, how: str) -> None:
    (one,), numbers = drawn([(16, 32)], 3, torch.float32, gradients), numbers_of(2)
    (want,) = copied([one])
    expected = updated(one, numbers)
    step([want], numbers, stochastic=False)
    gradient = one.gradient
    if how == "transposed":
        gradient = gradient.T.contiguous().T
    if how == "at odd bytes":
        gradient = torch.cat((gradient.new_zeros(1), gradient.flatten()))[1:].view(16, 32)
    step([replace(one, gradient=gradient)], numbers, stochastic=False)
    assert_parameter(one.parameter, expected, stochastic=False)
    assert torch.equal(one.parameter, want.parameter)
    assert torch.equal(one.m.codes, want.m.codes)


def test_what_fits() -> None:
    (one,) = drawn([(16, 32)], 0, torch.float32)
    assert fits(one.parameter, one.m, one.v)
    assert not fits(one.parameter.T, one.m, one.v)
    assert not fits(one.parameter.half(), one.m, one.v)
    assert not fits(torch.zeros(513, device=DEVICE)[1:], one.m, one.v)
    assert not fits(one.parameter, one.m, replace(one.v, scale=one.v.scale[:1]))
    step([], numbers_of(1), stochastic=False)


def rounded(start: float, direction: float, blocks: int, seeds_of: list[int], count: int = 1) -> list[Tensor]:
    """bfloat16 parameters of ``start``, each after one step towards ``start - direction``, in one launch."""
    tensors = drawn([(blocks, 256)] * len(seeds_of), 0, torch.bfloat16)
    for one in tensors:
        one.parameter.fill_(start)
        one.gradient.fill_(1.0)
        for each in (one.m, one.v):
            each.scale.zero_()
    numbers = replace(numbers_of(count), lr=direction, decay=0.0)
    step([replace(one, seed=seed) for one, seed in zip(tensors, seeds_of, strict=True)], numbers, stochastic=True)
    return [one.parameter for one in tensors]


@pytest.mark.parametrize("start", [1.0, -1.0])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_stochastic_rounding_is_one_of_two_neighbours_and_right_in_the_mean(start: float, share: float) -> None:
    """A step by a ``share`` of the gap between two bfloat16 numbers."""
    blocks, gap = 128, 2**-7
    (got,) = rounded(start, -start * share * gap, blocks, [1234])
    assert set(got.unique().tolist()) == {start, start * (1 + gap)}
    taken = ((got != start).double().mean()).item()
    deviation = (share * (1 - share) / got.numel()) ** 0.5
    assert abs(taken - share) < 5 * deviation
    # Nor do places in a draw, a block or a program differ.
    for axis, length in ((0, 256), (1, 128)):
        of = (got != start).double().mean(axis)
        assert (of - share).abs().max() < 6 * (share * (1 - share) / (got.numel() / (256 if axis == 0 else 128))) ** 0.5
        assert of.shape == (length,)
    # Neighbours are independent: of 8 that one draw gives, and of one draw and the next.
    centred = (got != start).double().flatten() - taken
    for lag in (1, 2, 3, 4, 7, 8, 16, 256, 2048):
        correlation = (centred[lag:] * centred[:-lag]).mean() / (share * (1 - share))
        assert abs(correlation) < 5 / got.numel() ** 0.5, lag


def test_random_bits_are_those_of_the_seed_and_the_place_alone() -> None:
    first, second, again = rounded(1.0, 2**-9, 20, [5, 6, 5])
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    (alone,) = rounded(1.0, 2**-9, 20, [6])
    assert torch.equal(alone, second)
    # A tensor that is a part of another has the same places.
    (short,) = rounded(1.0, 2**-9, 9, [6])
    assert torch.equal(short, second[:9])
    # All 64 bits count.
    (high,) = rounded(1.0, 2**-9, 20, [6 + 2**32])
    (negative,) = rounded(1.0, 2**-9, 20, [6 - 2**63])
    assert not torch.equal(high, second)
    assert not torch.equal(negative, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_launch_is_as_many(dtype: torch.dtype) -> None:
    shapes = [(5, 256), (32, 64), (256,), (17, 256)]
    together = drawn(shapes, 11, dtype)
    apart = copied(together)
    numbers = numbers_of(4)
    step(together, numbers, stochastic=True)
    for one in apart:
        step([one], numbers, stochastic=True)
    for mine, theirs in zip(together, apart, strict=True):
        assert torch.equal(mine.parameter, theirs.parameter)
        for a, b in ((mine.m, theirs.m), (mine.v, theirs.v)):
            assert torch.equal(a.codes, b.codes)
            assert torch.equal(a.scale, b.scale)
