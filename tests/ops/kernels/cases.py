"""Operands for one kernel at a time, and bounds on what its rounding may cost.

In the interpreter activations are float32, so that an indexing mistake cannot hide behind a bfloat16 tolerance; on a
GPU they are bfloat16.
"""

from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from torch import Tensor

from octavo.formats.scheme import ScaleLayout
from octavo.formats.weight import Float8Weight, quantize
from octavo.ops.kernels.common import INTERPRETED

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
ACTIVATIONS = torch.float32 if INTERPRETED else torch.bfloat16
# Several of these experts make every edge: none, one row, whole tiles, one more or less than a tile of 16, 32 or 64.
ROWS = (0, 0, 1, 2, 15, 16, 17, 32, 33, 65)
# The products read whole blocks with their tiles: small tiles in the interpreter, so small blocks.
BLOCK = ScaleLayout("block", (32, 32) if INTERPRETED else (128, 128))
CHANNEL, TENSOR = ScaleLayout("channel"), ScaleLayout("tensor")
LAYOUTS = [CHANNEL, TENSOR, BLOCK]

seeds = st.integers(0, 2**31)
# rows of each expert; then rows of other ranks' experts, which lie past the last offset
ragged = st.tuples(st.lists(st.sampled_from(ROWS), min_size=1, max_size=4), st.sampled_from((0, 0, 1, 20)), seeds)


@dataclass
class Rows:
    """Rows sorted by expert: ``counts`` of each, then ``others`` that belong to another rank."""

    counts: list[int]
    others: int
    seed: int
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        self.offsets_E = torch.tensor(self.counts).cumsum(0, dtype=torch.int32).to(DEVICE)
        self.live = sum(self.counts)
        self.num_rows = self.live + self.others
        self.num_tokens = self.num_rows // 2 + 1
        # tokens in no order, some of them more than once
        self.token_M = torch.randint(0, self.num_tokens, (self.num_rows,), generator=self.generator).to(DEVICE)

    @property
    def num_experts(self) -> int:
        return len(self.counts)

    def draw(self, *shape: int, dtype: torch.dtype = ACTIVATIONS, scale: float = 1.0) -> Tensor:
        """Normal values in ``dtype``."""
        return (torch.randn(*shape, generator=self.generator) * scale).to(dtype).to(DEVICE)

    def rows(self, columns: int, dtype: torch.dtype = ACTIVATIONS) -> Tensor:
        """[M, columns], NaN in the rows of other ranks: no kernel may read them into a sum."""
        values = self.draw(self.num_rows, columns, dtype=dtype)
        values[self.live :] = float("nan")
        return values

    def spans(self) -> list[tuple[int, slice]]:
        """(expert, its rows) for every expert, also an empty one."""
        ends = self.offsets_E.tolist()
        return [(e, slice(start, end)) for e, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True))]

    def weight(self, layout: ScaleLayout, parts: int, rows: int, columns: int) -> Float8Weight:
        """Codes and scales of every expert; the scales differ widely, so that a wrong one shows."""
        values = torch.randn(self.num_experts, parts * rows, columns, generator=self.generator)
        values *= torch.exp2(torch.randint(-3, 4, values.shape[:2], generator=self.generator).float())[..., None]
        weight = quantize(values, layout, parts=parts)
        return Float8Weight(weight.codes.to(DEVICE), weight.scales.to(DEVICE), weight.block)


def unit_roundoff(dtype: torch.dtype) -> float:
    """Half the distance from 1 to the next value of ``dtype``."""
    return torch.finfo(dtype).eps / 2


def assert_sums(
    name: str, got: Tensor, want: Tensor, magnitude: Tensor, terms: int, slack: Tensor | float = 0.0
) -> None:
    """``got`` is a float32 sum of ``terms`` products, rounded once to its dtype: each element within the bound of that.

    ``want``: the float64 sum; ``magnitude``: the float64 sum of absolute values. A sum of n terms in any order is off
    by at most n·u of that (Higham, Accuracy and Stability of Numerical Algorithms, 4.2), twice that where a tensor core
    truncates. ``slack``: what the rounding of the operands on the way may add.
    """
    bound = 2 * (terms + 2) * unit_roundoff(torch.float32) * magnitude + slack
    bound = bound + unit_roundoff(got.dtype) * (want.abs() + bound) + torch.finfo(torch.float32).tiny
    wrong = ~((got.double() - want).abs() <= bound)
    if bool(wrong.any()):
        at = tuple(int(index) for index in wrong.nonzero()[0])
        raise AssertionError(
            f"{name} {list(got.shape)}: {int(wrong.sum())} elements out of bounds, first at {at}: "
            f"{got[at].item()!r}, want {want[at].item()!r} ± {bound[at].item():.2e}"
        )


def grouped(rows: Rows, left_MK: Tensor, stack_EKN: Tensor) -> tuple[Tensor, Tensor]:
    """``left_m · stack_{e(m)}`` for every live row, in float64, and the same of absolute values: two [live, N]."""
    left, stack = left_MK.double(), stack_EKN.double()
    pieces = [(left[span] @ stack[e], left[span].abs() @ stack[e].abs()) for e, span in rows.spans()]
    return torch.cat([value for value, _ in pieces]), torch.cat([magnitude for _, magnitude in pieces])


def grouped_outer(rows: Rows, left_MN: Tensor, right_MR: Tensor) -> tuple[Tensor, Tensor]:
    """``Σ_{m in e} left_m ⊗ right_m`` in float64, and the same of absolute values: two [E, N, R]."""
    left, right = left_MN.double(), right_MR.double()
    pieces = [(left[span].T @ right[span], left[span].T.abs() @ right[span].abs()) for _, span in rows.spans()]
    return torch.stack([value for value, _ in pieces]), torch.stack([magnitude for _, magnitude in pieces])
