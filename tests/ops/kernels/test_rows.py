"""Passes over rows against float64: skinny products, rounding to E4M3, folding a scale, combine, sums of parts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from octavo.ops.kernels.rows import combine, pass_rows, round_rows, sum_parts
from octavo.ops.reference import E4M3_MAX
from tests.ops.kernels.cases import ACTIVATIONS, DEVICE, Rows, assert_sums, grouped, ragged, seeds

ranks = st.sampled_from((1, 4, 16, 24))
columns = st.sampled_from((16, 48, 96, 160))


def poisoned_tokens(rows: Rows, width: int) -> Tensor:
    """[T, width] with NaN in the tokens that no live row reads."""
    x_TK = torch.full((rows.num_tokens, width), float("nan"), dtype=ACTIVATIONS, device=DEVICE)
    live = rows.token_M[: rows.live].unique()
    x_TK[live] = rows.draw(live.numel(), width)
    return x_TK


@given(ragged, columns, ranks, st.sampled_from((1, 2)), st.booleans())
@settings(max_examples=30, deadline=None)
def test_skinny_product(drawn: tuple[list[int], int, int], width: int, rank: int, contract: int, gather: bool) -> None:
    """``x·Aᵀ`` and ``dy·B``: the factor's either axis contracted, rows gathered or not."""
    rows = Rows(*drawn)
    x = poisoned_tokens(rows, width) if gather else rows.rows(width)
    factor = rows.draw(rows.num_experts, *((rank, width) if contract == 2 else (width, rank)))
    token_M = rows.token_M if gather else None
    skinny_MR, rounded = pass_rows(x, offsets_E=rows.offsets_E, token_M=token_M, factor=factor, contract=contract)
    again, _ = pass_rows(x, offsets_E=rows.offsets_E, token_M=token_M, factor=factor, contract=contract)
    assert rounded is None
    assert skinny_MR is not None
    assert again is not None
    assert skinny_MR.shape == (rows.num_rows, rank)
    want = grouped(rows, x[rows.token_M] if gather else x, factor.transpose(1, 2) if contract == 2 else factor)
    assert_sums("skinny", skinny_MR[: rows.live], *want, terms=width)
    assert torch.equal(skinny_MR[: rows.live], again[: rows.live])


def assert_rounded(value: Tensor, codes: Tensor, scales: Tensor, group: int) -> None:
    """Scales are amax / 448 of each group, and each code is a nearest E4M3 value of value / scale."""
    starts = range(0, value.shape[1], group)
    amax = torch.stack([value[:, start : start + group].abs().amax(1) for start in starts], 1).float()
    want = torch.where(amax > 0, amax / torch.full_like(amax, E4M3_MAX), 1.0)
    # one division in float32; a GPU's fast one is off by up to 2 ulp
    assert ((scales - want).abs() <= 4 * 2**-24 * want).all()
    spread = scales.repeat_interleave(group, 1)[:, : value.shape[1]]
    scaled = value.double() / spread.double()
    exponent = (torch.frexp(scaled.abs())[1] - 1).clamp(min=-6).double()
    # half an ulp of three bits of mantissa, and what the float32 division may move a tie
    bound = torch.exp2(exponent - 4) + 4 * 2**-24 * scaled.abs()
    assert ((codes.double() - scaled).abs() <= bound).all()


@given(ragged, st.sampled_from((16, 48, 96, 160)), st.sampled_from((16, 32, None)), st.booleans())
@settings(max_examples=20, deadline=None)
def test_rounding_to_e4m3(drawn: tuple[list[int], int, int], width: int, group: int | None, zeros: bool) -> None:
    """Every row, also those of other ranks: each token is rounded once, whoever reads it."""
    rows = Rows(*drawn)
    x = rows.draw(rows.num_tokens, width)
    if zeros:
        x[::2, :16] = 0
        x[0] = 0
    size = width if group is None or group > width else group
    skinny, rounded = pass_rows(x, group=size)
    assert skinny is None
    assert rounded is not None
    assert_rounded(x.float(), rounded.codes.float(), rounded.scales, size)


@given(ragged, st.sampled_from((16, 96, 160)), ranks, st.booleans())
@settings(max_examples=20, deadline=None)
def test_folding_a_scale_into_rows(drawn: tuple[list[int], int, int], width: int, rank: int, gather: bool) -> None:
    """What is rounded is x times the expert's column scale; the skinny product beside it sees x as it is."""
    rows = Rows(*drawn)
    x = poisoned_tokens(rows, width) if gather else rows.rows(width)
    fold_EK = torch.exp2(rows.draw(rows.num_experts, width, dtype=torch.float32) * 2)
    factor = rows.draw(rows.num_experts, width, rank)
    skinny_MR, rounded = pass_rows(
        x, offsets_E=rows.offsets_E, token_M=rows.token_M if gather else None, factor=factor, contract=1,
        fold_EK=fold_EK, group=width,
    )  # fmt: skip
    assert skinny_MR is not None
    assert rounded is not None
    source = x[rows.token_M] if gather else x
    assert_sums("skinny", skinny_MR[: rows.live], *grouped(rows, source, factor), terms=width)
    for e, span in rows.spans():
        value = source[span].float() * fold_EK[e]
        assert_rounded(value, rounded.codes[span].float(), rounded.scales[span], width)


@given(ragged, st.sampled_from((16, 96, 160)), st.sampled_from((16, 32, None)), st.booleans(), st.booleans())
@settings(max_examples=30, deadline=None)
def test_rounding_in_one_read(
    drawn: tuple[list[int], int, int], width: int, group: int | None, gather: bool, fold: bool
) -> None:
    """As the pass that multiplies beside it: sorted rows, gathered or not, with a column scale or without."""
    rows = Rows(*drawn)
    x = poisoned_tokens(rows, width) if gather else rows.rows(width)
    fold_EK = torch.exp2(rows.draw(rows.num_experts, width, dtype=torch.float32) * 2) if fold else None
    size = width if group is None else group
    token_M = rows.token_M if gather else None
    rounded = round_rows(x, size, offsets_E=rows.offsets_E, token_M=token_M, fold_EK=fold_EK)
    source = x[rows.token_M] if gather else x
    for e, span in rows.spans():
        value = source[span].float() * (1.0 if fold_EK is None else fold_EK[e])
        assert_rounded(value, rounded.codes[span].float(), rounded.scales[span], size)
    tokens = rows.draw(rows.num_tokens, width)
    rounded = round_rows(tokens, size)
    assert_rounded(tokens.float(), rounded.codes.float(), rounded.scales, size)


@given(
    tokens=st.integers(0, 40),
    top_k=st.integers(1, 8),
    width=st.sampled_from((1, 16, 40, 130)),
    others=st.integers(0, 3),
    weighted=st.booleans(),
    seed=seeds,
)
@settings(max_examples=30, deadline=None)
def test_combine(tokens: int, top_k: int, width: int, others: int, weighted: bool, seed: int) -> None:
    """A weighted sum of each token's rows; rows of other ranks, whose memory nobody wrote, count nothing."""
    pairs = tokens * top_k
    others = min(others, pairs)
    rows = Rows([pairs - others, 0], others, seed)
    y_MH = rows.rows(width)
    row_TK = torch.randperm(pairs, generator=rows.generator).view(tokens, top_k).to(DEVICE)
    p_TK = rows.draw(tokens, top_k) if weighted else None
    out_TH = combine(y_MH, row_TK, rows.offsets_E, p_TK)
    wide = y_MH.double().nan_to_num(0)[row_TK] * (1.0 if p_TK is None else p_TK.double()[..., None])
    assert_sums("combine", out_TH, wide.sum(1), wide.abs().sum(1), terms=top_k)
    assert torch.equal(out_TH, combine(y_MH, row_TK, rows.offsets_E, p_TK))


@given(ragged, st.integers(1, 30))
@settings(max_examples=20, deadline=None)
def test_sum_of_parts(drawn: tuple[list[int], int, int], num_parts: int) -> None:
    rows = Rows(*drawn)
    parts_PM = rows.draw(num_parts, rows.num_rows, dtype=torch.float32)
    parts_PM[:, rows.live :] = float("nan")
    out_M = sum_parts(parts_PM, rows.offsets_E)
    wide = parts_PM.double().nan_to_num(0)
    assert_sums("sum", out_M, wide.sum(0), wide.abs().sum(0), terms=num_parts)
    assert torch.equal(out_M[rows.live :], torch.zeros(rows.others, device=DEVICE))


@pytest.mark.parametrize("group", [16, 64])
def test_what_is_not_a_number_stays_so(group: int) -> None:
    """In its own group; other rows know nothing of it."""
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).to(ACTIVATIONS).to(DEVICE)
    plain = round_rows(x, group)
    x[3, 20] = float("nan")
    rounded = round_rows(x, group)
    assert rounded.codes[3, 20].float().isnan()
    others = [0, 1, 2, 4]
    assert torch.equal(rounded.codes[others].float(), plain.codes[others].float())
