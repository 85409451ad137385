"""Every kind of product for Hopper against float64: the source that a GPU runs, thread by thread, on `emulator.hpp`.

Legend: ``M`` rows sorted by expert, ``E`` experts, ``F`` features, ``C`` contraction, ``R`` LoRA rank.
"""

from dataclasses import dataclass, field, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.formats.scheme import ScaleLayout
from octavo.formats.weight import Float8Weight, quantize
from octavo.ops.hopper.compiler import Mode
from octavo.ops.hopper.engine import tile_sizes, tokens_of_tile
from octavo.ops.hopper.product import RANKS, ROWS_UP, Bank, GateGradient, LoraStep, Rows, product
from tests.ops.hopper import conftest

GUARD = 7
"""Rows past the last offset, which nobody may write."""


def interleaved(x: Tensor) -> Tensor:
    """Of each 16 columns the even ones first."""
    return x.unflatten(-1, (-1, 8, 2)).transpose(-1, -2).flatten(-3).contiguous()


def plain(x: Tensor) -> Tensor:
    """The inverse of :func:`interleaved`."""
    return x.unflatten(-1, (-1, 2, 8)).transpose(-1, -2).flatten(-3).contiguous()


@dataclass
class Case:
    """The operands of one product, and what it gives in float64."""

    rows_of: tuple[int, ...]
    rows: int
    cols: int
    layout: ScaleLayout
    flip: bool = False
    parts: int = 1
    rank: int = 16
    gathers: bool = True
    rounded: bool = False
    seed: int = 0
    lora: LoraStep | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        experts = len(self.rows_of)
        values = torch.randn(experts, self.parts * self.rows, self.cols) * 0.02
        self.weight: Float8Weight = quantize(values, self.layout, parts=self.parts)
        # scales of very different sizes, or a product that takes its neighbour's would pass
        self.weight = Float8Weight(
            self.weight.codes, self.weight.scales * torch.rand(self.weight.scales.shape).mul(3).exp(), self.weight.block
        )
        self.live = sum(self.rows_of)
        self.num_rows = self.live + GUARD
        self.offsets_E = torch.tensor(self.rows_of).cumsum(0).int()
        self.expert_M = torch.repeat_interleave(torch.arange(experts), torch.tensor(self.rows_of))
        width = self.parts * self.rows
        self.features, self.contraction = (self.cols, width) if self.flip else (width, self.cols)
        num_sources = 2 * self.live // 3 + 1 if self.gathers else self.num_rows
        self.token_M = torch.randint(num_sources, (self.num_rows,)) if self.gathers else None
        self.values = torch.randn(num_sources, self.contraction).bfloat16()
        if self.rank:
            xa = torch.randn(self.num_rows, self.rank).bfloat16()
            self.lora = LoraStep(xa, (torch.randn(experts, self.features, self.rank) * 0.1).bfloat16())
        self.operand, self.wide = self._operand()

    def _operand(self) -> tuple[Rows, Tensor]:
        """(what the kernel multiplies, the same in float64 [*, C])."""
        values = self.values
        if not self.rounded:
            if self.flip:
                return Rows(values, self.token_M), values.double()
            return Rows(interleaved(values) * 2.0**ROWS_UP, self.token_M), values.double()
        whole = self.flip or self.weight.block[1] >= self.weight.in_features
        group = self.contraction if whole else self.weight.block[1]
        grouped = values.float().unflatten(1, (-1, group))
        scales = grouped.abs().amax(-1) / 448
        codes = (grouped / scales[..., None]).to(torch.float8_e4m3fn)
        wide = (codes.double() * scales[..., None].double()).flatten(1)
        return Rows(codes.flatten(1).contiguous(), self.token_M, scales.contiguous()), wide

    @property
    def dense(self) -> Tensor:
        """The weights in float64 [E, N, K]; without scales where the rows have them folded in."""
        folded = self.rounded and self.flip and self.weight.block[1] >= self.weight.in_features
        if folded:
            return self.weight.codes.double().flatten(1, 2)
        return self.weight.dequantize(torch.float64)

    def expected(self) -> Tensor:
        """[live, features] in float64."""
        source = torch.arange(self.live) if self.token_M is None else self.token_M[: self.live]
        rows, dense, out = self.wide[source], self.dense, torch.zeros(self.live, self.features, dtype=torch.float64)
        for expert in range(len(self.rows_of)):
            here = self.expert_M == expert
            out[here] = rows[here] @ (dense[expert] if self.flip else dense[expert].T)
            if self.lora is not None:
                out[here] += self.lora.xa[: self.live][here].double() @ self.lora.factor[expert].double().T
        return out

    def empty(self, columns: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.full((self.num_rows, columns), float("nan"), dtype=dtype)


def close(got: Tensor, want: Tensor, tolerance: float) -> None:
    """Every live row is right, by its own norm, and the guard is untouched."""
    live = want.shape[0]
    assert got[live:].isnan().all()
    error = (got[:live].double() - want).norm(dim=-1) / want.norm(dim=-1)
    assert error.max() <= tolerance
    assert error.mean() <= 0.6 * tolerance


RAGGED = (37, 0, 1, 130, 64, 5)
CHANNEL, TENSOR, BLOCK = ScaleLayout("channel"), ScaleLayout("tensor"), ScaleLayout("block", (128, 128))
# Of a row: bfloat16 rounds a result by 2^-8 at most, 1.7e-3 in the mean; with scales in a table, or dequantized before,
# the weights as well.
ROUNDED, TABLE_ROUNDED = 2**-8, 1.6 * 2**-8


@pytest.mark.parametrize("tokens", [64, 128])
@pytest.mark.parametrize("rounded", [False, True], ids=["bfloat16", "e4m3"])
@pytest.mark.parametrize("flip", [False, True], ids=["forward", "input gradient"])
@pytest.mark.parametrize("layout", [CHANNEL, TENSOR, BLOCK], ids=["channel", "tensor", "block"])
def test_store(launched: list[Mode], layout: ScaleLayout, flip: bool, rounded: bool, tokens: int) -> None:
    sizes = (384, 256) if layout.kind == "block" else (160, 288)
    case = Case(RAGGED, *sizes, layout, flip=flip, rounded=rounded, gathers=tokens == 64)
    out = case.empty(case.features)
    product(case.operand, case.weight, case.offsets_E, out, flip=flip, lora=case.lora, tokens=tokens)
    [mode] = launched
    assert (mode.wide, mode.flip, mode.tokens) == (not rounded, flip, tokens)
    close(out, case.expected(), ROUNDED if rounded or (layout.kind != "block" and not flip) else TABLE_ROUNDED)


@pytest.mark.parametrize("rounded", [False, True], ids=["bfloat16", "e4m3"])
def test_many_short_tiles(launched: list[Mode], monkeypatch: pytest.MonkeyPatch, rounded: bool) -> None:
    """Of one step each, all of them one block's: what the producer says of a tile stays until it was read."""
    monkeypatch.setattr(conftest, "BLOCKS", 1)
    case = Case(tuple(9 * (i % 4) for i in range(20)), 576, 96, CHANNEL, rounded=rounded, rank=0)
    out = case.empty(case.features)
    product(case.operand, case.weight, case.offsets_E, out, tokens=64)
    close(out, case.expected(), ROUNDED)


@pytest.mark.parametrize("saves", [False, True])
def test_tiles_of_160_tokens(saves: bool) -> None:
    """Where an expert's rows are a few more than 128; of long experts only where they save something."""
    assert tokens_of_tile(128, tile_sizes(), saves=saves) == 160
    assert tokens_of_tile(512, tile_sizes(), saves=saves) == 128
    assert tokens_of_tile(2048, tile_sizes(), saves=saves) == (160 if saves else 128)


@pytest.mark.parametrize("rank", [0, 8, 72])
@pytest.mark.parametrize("rounded", [False, True], ids=["bfloat16", "e4m3"])
def test_ranks(launched: list[Mode], rank: int, rounded: bool) -> None:
    """None, less than a multiplication has, and more than a step has."""
    case = Case(RAGGED, 160, 288, CHANNEL, rounded=rounded, rank=rank, seed=rank)
    out = case.empty(case.features)
    product(case.operand, case.weight, case.offsets_E, out, lora=case.lora, tokens=64)
    close(out, case.expected(), ROUNDED)


@pytest.mark.parametrize("block", [(128, 128), (256, 128), (128, 256)], ids=str)
@pytest.mark.parametrize("sizes", [(96, 320), (320, 192)], ids=str)
@pytest.mark.parametrize("way", ["forward", "input gradient", "SwiGLU", "gate's gradient"])
def test_blocks_that_do_not_divide(
    launched: list[Mode], way: str, sizes: tuple[int, int], block: tuple[int, int]
) -> None:
    """Neither the widths nor where gates end and ups begin."""
    flip = way.endswith("gradient")
    parts = 2 if way in ("input gradient", "SwiGLU") else 1
    case = Case(RAGGED, *sizes, ScaleLayout("block", block), flip=flip, parts=parts)
    out = case.empty(case.features * (2 if way == "gate's gradient" else 1))
    gradient = h = None
    if way == "SwiGLU":
        h = case.empty(sizes[0])
    if way == "gate's gradient":
        z = torch.ones(case.num_rows, 2 * case.features).bfloat16()
        gradient = GateGradient(z, torch.ones(case.num_rows), torch.empty(2 * -(-case.features // 256), case.num_rows))
    product(
        case.operand, case.weight, case.offsets_E, out, flip=flip, lora=case.lora, h=h, gradient=gradient, tokens=64
    )
    want = case.expected()
    if gradient is not None:
        # at gate = up = 1: silu's derivative, and silu
        silu = torch.tensor(1.0).sigmoid().double()
        want = torch.cat([want * (silu + silu * (1 - silu)), want * silu], 1)
    close(out, want, TABLE_ROUNDED)


@pytest.mark.parametrize(
    ("block", "flip"), [((256, 128), True), ((128, 256), False), ((256, 256), True), ((384, 128), True)], ids=str
)
def test_slabs_of_wide_blocks(launched: list[Mode], block: tuple[int, int], flip: bool) -> None:
    """A block is several steps of the contraction, of one scale."""
    sizes = (768, 512)
    case = Case((40, 3), *sizes, ScaleLayout("block", block), flip=flip, rounded=True)
    out = case.empty(case.features)
    product(case.operand, case.weight, case.offsets_E, out, flip=flip, lora=case.lora, tokens=64)
    close(out, case.expected(), ROUNDED)


@pytest.mark.parametrize("way", ["forward", "input gradient", "SwiGLU", "gate's gradient"])
@pytest.mark.parametrize("rounded", [False, True], ids=["bfloat16", "e4m3"])
@pytest.mark.parametrize("layout", [CHANNEL, BLOCK], ids=["channel", "block"])
def test_the_largest_tiles(launched: list[Mode], layout: ScaleLayout, rounded: bool, way: str) -> None:
    """For which the fewest slots and registers are left, with more rows of an expert than one takes."""
    flip = way.endswith("gradient")
    tokens = max(tile_sizes(tokens_left=rounded and not flip and layout.kind == "block"))
    rows, width = (128, 384) if layout.kind == "block" else (160, 288)
    case = Case(
        (tokens + 33, 0, 40), rows, width, layout, flip=flip, parts=2 if way == "SwiGLU" else 1, rounded=rounded
    )
    out = case.empty(case.features * (2 if way == "gate's gradient" else 1))
    gradient = h = None
    if way == "SwiGLU":
        h = case.empty(rows)
    if way == "gate's gradient":
        z = torch.ones(case.num_rows, 2 * case.features).bfloat16()
        gradient = GateGradient(z, torch.ones(case.num_rows), torch.empty(2 * -(-case.features // 256), case.num_rows))
    product(
        case.operand, case.weight, case.offsets_E, out, flip=flip, lora=case.lora, h=h, gradient=gradient, tokens=tokens
    )
    assert launched[-1].tokens == tokens
    want = case.expected()
    if h is not None:
        gates, ups = out[: case.live].double().chunk(2, -1)
        close(h if rounded else plain(h) * 2.0**-ROWS_UP, F.silu(gates) * ups, ROUNDED)
    if gradient is not None:
        # at gate = up = 1: silu's derivative, and silu
        silu = torch.tensor(1.0).sigmoid().double()
        want = torch.cat([want * (silu + silu * (1 - silu)), want * silu], 1)
    close(out, want, TABLE_ROUNDED)


def test_slabs_whose_scales_are_far_apart(launched: list[Mode]) -> None:
    """Sums go from one slab's unit to the next one's, by up to 2^-40 down and as far up as float32 goes."""
    for flip, tokens in ((False, 128), (True, 128), (True, 160)):
        case = Case((70,), 640, 640, BLOCK, flip=flip, rounded=True, rank=0)
        scales = case.weight.scales.clone()
        # from one slab to the next: much smaller, larger again, and one that is as nothing
        steps = torch.tensor([1.0, 1e-9, 1.0, 1e-25, 1e-3])
        scales *= steps[:, None] if flip else steps
        case.weight = Float8Weight(case.weight.codes, scales, case.weight.block)
        out = case.empty(case.features)
        product(case.operand, case.weight, case.offsets_E, out, flip=flip, tokens=tokens)
        close(out, case.expected(), ROUNDED)


def test_groups_of_zeros_before_small_ones(launched: list[Mode]) -> None:
    """Zeros have a scale of 1, and what comes after them may be anything: scales below float32's normal numbers too."""
    case = Case((70,), 640, 640, BLOCK, rounded=True, rank=0, gathers=False)
    values = case.values.float().unflatten(1, (5, 128)) * torch.tensor([0.0, 1e-13, 0.0, 1e-9, 0.0])[:, None]
    scales = values.abs().amax(-1) / 448
    scales = torch.where(scales > 0, scales, 1)
    codes = (values / scales[..., None]).to(torch.float8_e4m3fn)
    case.wide = (codes.double() * scales[..., None].double()).flatten(1)
    for tokens in (64, 192):
        out = case.empty(case.features)
        rows = Rows(codes.flatten(1).contiguous(), None, scales.contiguous())
        product(rows, case.weight, case.offsets_E, out, tokens=tokens)
        close(out, case.expected(), ROUNDED)
    tiny = scales.clone()
    tiny[:, 1] = 1e-40
    product(Rows(rows.values, None, tiny), case.weight, case.offsets_E, out, tokens=64)
    assert out[: case.live].isfinite().all()


@pytest.mark.parametrize("flip", [False, True], ids=["forward", "input gradient"])
@pytest.mark.parametrize("tokens", [128, 160])
def test_rounded_rows_over_blocks_that_do_not_divide(launched: list[Mode], flip: bool, tokens: int) -> None:
    """As linear layers have them, which are one expert of one part."""
    case = Case((200,), 320, 576, BLOCK, flip=flip, rank=0, gathers=False)
    tokens = tokens if flip else {128: 128, 160: 192}[tokens]
    group = case.contraction if flip else 128
    padded = F.pad(case.values.float(), (0, -case.contraction % group)).unflatten(1, (-1, group))
    scales = padded.abs().amax(-1) / 448
    codes = (padded / scales[..., None]).to(torch.float8_e4m3fn)
    case.wide = (codes.double() * scales[..., None].double()).flatten(1)[:, : case.contraction]
    out = case.empty(case.features)
    rows = Rows(codes.flatten(1)[:, : case.contraction].contiguous(), None, scales.contiguous())
    product(rows, case.weight, case.offsets_E, out, flip=flip, tokens=tokens)
    close(out, case.expected(), ROUNDED)


def test_parts_that_meet_in_a_tile_are_refused(launched: list[Mode]) -> None:
    case = Case(RAGGED, 96, 320, BLOCK, parts=2)
    with pytest.raises(AssertionError):
        product(case.operand, case.weight, case.offsets_E, case.empty(case.features), tokens=64)


@pytest.mark.parametrize("flip", [False, True], ids=["forward", "input gradient"])
def test_slabs_of_an_odd_number(launched: list[Mode], flip: bool) -> None:
    """A tile begins while some threads still scale the sums of the tile before."""
    case = Case(RAGGED, 384, 384, BLOCK, flip=flip, rounded=True, rank=0)
    out = case.empty(case.features)
    product(case.operand, case.weight, case.offsets_E, out, flip=flip, tokens=64)
    close(out, case.expected(), ROUNDED)


@pytest.mark.parametrize("rows_of", [(1,), (0, 0, 0), (300,), (0, 257, 0, 0), tuple([3] * 70)], ids=str)
def test_experts(launched: list[Mode], rows_of: tuple[int, ...]) -> None:
    """One, none with rows, one with all rows, and more than a warp has lanes."""
    case = Case(rows_of, 96, 64, CHANNEL, seed=len(rows_of))
    out = case.empty(case.features)
    product(case.operand, case.weight, case.offsets_E, out, lora=case.lora, tokens=64)
    assert out[case.live :].isnan().all()
    if case.live:
        close(out, case.expected(), ROUNDED)


def test_a_launch_without_rows_is_none(launched: list[Mode]) -> None:
    case = Case((0, 0), 96, 64, CHANNEL)
    product(case.operand, case.weight, case.offsets_E, torch.empty(0, 96, dtype=torch.bfloat16))
    assert not launched


WAYS = [
    pytest.param(CHANNEL, False, False, id="channel-bfloat16"),
    pytest.param(BLOCK, False, False, id="block-bfloat16"),
    pytest.param(CHANNEL, True, False, id="channel-e4m3"),
    pytest.param(BLOCK, True, False, id="block-e4m3"),
    pytest.param(CHANNEL, False, True, id="dequantized"),
]


def bank_of(case: Case) -> Bank:
    """All experts, dequantized."""
    return Bank(interleaved(case.weight.dequantize(torch.bfloat16)), 0)


@pytest.mark.parametrize("tokens", [64, 128])
@pytest.mark.parametrize(("layout", "rounded", "banked"), WAYS)
def test_swiglu(launched: list[Mode], layout: ScaleLayout, rounded: bool, banked: bool, tokens: int) -> None:
    width, cols = (256, 128) if layout.kind == "block" else (96, 160)
    case = Case(RAGGED, width, cols, layout, parts=2, rounded=rounded)
    z, h = case.empty(2 * width), case.empty(width)
    bank = bank_of(case) if banked else None
    product(case.operand, case.weight, case.offsets_E, z, h=h, lora=case.lora, tokens=tokens, bank=bank)
    close(z, case.expected(), ROUNDED if rounded or (layout is CHANNEL and not banked) else TABLE_ROUNDED)
    # h is that of the rounded z, so that backward computes the same again
    gates, ups = z[: case.live].double().chunk(2, -1)
    found = h if rounded else plain(h) * 2.0**-ROWS_UP
    close(found, F.silu(gates) * ups, ROUNDED)


@pytest.mark.parametrize("spends", [False, True], ids=["", "in the place of z"])
@pytest.mark.parametrize("tokens", [64, 128])
@pytest.mark.parametrize(("layout", "rounded", "banked"), WAYS)
def test_gate_gradient(
    launched: list[Mode], layout: ScaleLayout, rounded: bool, banked: bool, tokens: int, spends: bool
) -> None:
    rows, width = (128, 384) if layout.kind == "block" else (160, 288)
    case = Case(RAGGED, rows, width, layout, flip=True, rounded=rounded)
    z = torch.randn(case.num_rows, 2 * width).bfloat16()
    z[case.live :] = float("nan")
    p_M = torch.rand(case.num_rows)
    if tokens == 64:
        p_M = p_M.bfloat16()
    shares = torch.full((2 * -(-width // 256), case.num_rows), float("nan"))
    dz = z.clone() if spends else case.empty(2 * width)
    gradient = GateGradient(dz if spends else z, p_M, shares)
    fold_EG = None
    if rounded:
        if layout is CHANNEL:
            fold_EG = torch.rand(len(RAGGED), 2 * width).mul(3).exp()
        gradient = replace(gradient, fold=fold_EG, peaks=torch.full_like(shares, float("nan")))
    bank = bank_of(case) if banked else None
    product(
        case.operand, case.weight, case.offsets_E, dz, flip=True, lora=case.lora, gradient=gradient, tokens=tokens,
        bank=bank,
    )  # fmt: skip
    dh = case.expected()
    wide = z[: case.live].double().requires_grad_()
    gates, ups = wide.chunk(2, -1)
    h = F.silu(gates) * ups
    [want] = torch.autograd.grad(h, wide, dh * p_M[: case.live, None].double())
    close(dz, want, ROUNDED if rounded else TABLE_ROUNDED)
    dp, want_dp = shares[:, : case.live].double().sum(0), (dh * h.detach()).sum(-1)
    scale = (dh * h.detach()).norm(dim=-1)
    assert ((dp - want_dp).abs() / scale).max() < TABLE_ROUNDED
    assert shares[:, case.live :].isnan().all()
    assert launched[-1].peaks == (gradient.peaks is not None)
    if gradient.peaks is not None:
        # of what was stored
        fold = 1 if fold_EG is None else fold_EG[case.expert_M]
        want_M = (dz[: case.live].float() * fold).abs().amax(-1)
        assert torch.equal(gradient.peaks[:, : case.live].amax(0), want_M)
        assert gradient.peaks[:, case.live :].isnan().all()


@pytest.mark.parametrize("rank", [8, 16])
@pytest.mark.parametrize(("layout", "rounded"), [(CHANNEL, False), (CHANNEL, True), (BLOCK, False), (BLOCK, True)])
def test_gate_gradient_sums_the_gradient_of_A(
    launched: list[Mode], layout: ScaleLayout, rounded: bool, rank: int
) -> None:
    """Of each tile of tokens, in the order of tiles; ranks that are not there are zero."""
    rows, width = (128, 384) if layout.kind == "block" else (160, 288)
    tokens = 64 if rank == 8 else 128
    case = Case(RAGGED, rows, width, layout, flip=True, rounded=rounded, rank=rank)
    z, p_M = torch.randn(case.num_rows, 2 * width).bfloat16(), torch.rand(case.num_rows)
    shares = torch.empty(2 * -(-width // 256), case.num_rows)
    tiles = [-(-count // tokens) for count in RAGGED]
    sums = torch.full((sum(tiles), width, RANKS), float("nan"))
    gradient = GateGradient(z, p_M, shares, sums)
    if rounded:
        fold_EG = torch.rand(len(RAGGED), 2 * width) if layout is CHANNEL else None
        gradient = replace(gradient, fold=fold_EG, peaks=torch.empty_like(shares))
    dz = case.empty(2 * width)
    product(case.operand, case.weight, case.offsets_E, dz, flip=True, lora=case.lora, gradient=gradient, tokens=tokens)
    assert launched[-1].outer
    assert case.lora is not None
    gates, ups = z[: case.live].double().chunk(2, -1)
    h, yb = F.silu(gates) * ups * p_M[: case.live, None].double(), case.lora.xa[: case.live].double()
    first = 0
    for expert, count in enumerate(tiles):
        here = case.expert_M == expert
        found = sums[first : first + count].double().sum(0)
        want = h[here].T @ yb[here]
        assert (found[:, :rank] - want).norm() <= ROUNDED * want.norm()
        assert not found[:, rank:].any()
        first += count


@pytest.mark.parametrize("tokens", [64, 192])
@pytest.mark.parametrize("flip", [False, True], ids=["forward", "input gradient"])
def test_chunks_of_dequantized_experts(launched: list[Mode], flip: bool, tokens: int) -> None:
    """Each chunk writes its experts' rows and leaves the others."""
    case = Case(RAGGED, 160, 288, CHANNEL, flip=flip)
    whole = interleaved(case.weight.dequantize(torch.bfloat16))
    out = case.empty(case.features)
    for first in range(0, len(RAGGED), 2):
        bank = Bank(whole[first : first + 2].contiguous(), first)
        before = out.clone()
        product(case.operand, case.weight, case.offsets_E, out, flip=flip, lora=case.lora, tokens=tokens, bank=bank)
        start = 0 if first == 0 else int(case.offsets_E[first - 1])
        assert torch.equal(out[:start], before[:start])
        assert out[int(case.offsets_E[first + 1]) :].isnan().all()
    close(out, case.expected(), TABLE_ROUNDED)


def test_widening_is_exact_for_every_code(launched: list[Mode]) -> None:
    """A row of one 1 selects a column of the weight, whose every code comes out as it is."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F].repeat(2)[:504]
    values = torch.zeros(512, dtype=torch.uint8)
    values[:504] = codes
    case = Case((64,), 512, 64, TENSOR, rank=0, gathers=False)
    stack = values[:, None].repeat(1, 64).view(torch.float8_e4m3fn)[None, None]
    case.weight = Float8Weight(stack.contiguous(), torch.ones(1, 1, 1, 1), case.weight.block)
    rows = torch.zeros(case.num_rows, 64).bfloat16()
    rows[torch.arange(64), torch.arange(64)] = 1
    out = case.empty(512)
    product(Rows(interleaved(rows) * 2.0**ROWS_UP), case.weight, case.offsets_E, out, tokens=64)
    want = values.view(torch.float8_e4m3fn).float()
    assert torch.equal(out[:64].float(), want.expand(64, -1))


def test_repeats_bit_for_bit(launched: list[Mode]) -> None:
    case = Case(RAGGED, 160, 288, CHANNEL)
    outs = [case.empty(case.features) for _ in range(2)]
    for out in outs:
        product(case.operand, case.weight, case.offsets_E, out, lora=case.lora, tokens=64)
    assert torch.equal(outs[0][: case.live], outs[1][: case.live])
