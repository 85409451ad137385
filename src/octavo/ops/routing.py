"""Which rows go to which expert: sort, offsets, gather, combine.

Legend: ``T`` tokens, ``K`` top-k, ``M = T·K`` routed rows sorted by expert, ``E`` experts, ``H`` hidden size.
Nothing here asks the device for a value, so a whole layer can be captured.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """The sorted order of a batch's (token, expert) pairs.

    ``token_M`` (int64): the token of each sorted row. ``row_TK`` (int64): the sorted row of each pair.
    ``offsets_E`` (int32): where each expert's rows end. Rows past ``offsets_E[-1]`` belong to experts of another
    rank (ids ≥ E); every stage leaves them zero.
    """

    token_M: Tensor
    row_TK: Tensor
    offsets_E: Tensor

    @property
    def num_tokens(self) -> int:
        return self.row_TK.shape[0]

    @property
    def num_rows(self) -> int:
        return self.token_M.shape[0]


def route(index_TK: Tensor, num_experts: int) -> Routing:
    """Sort the pairs of ``index_TK`` (integer, [T, K]) by expert, stably; ids outside 0 … ``num_experts`` - 1 are
    off-rank.
    """
    num_tokens, top_k = index_TK.shape
    flat = index_TK.reshape(-1)
    expert_M = flat.where(flat >= 0, num_experts).clamp(max=num_experts)
    _, order_M = torch.sort(expert_M, stable=True)
    row_M = torch.empty_like(order_M)
    row_M[order_M] = torch.arange(order_M.shape[0], device=order_M.device)
    counts = torch.zeros(num_experts + 1, dtype=torch.int32, device=index_TK.device)
    counts = counts.scatter_add(0, expert_M, torch.ones_like(expert_M, dtype=torch.int32))
    offsets_E = counts[:num_experts].cumsum(0, dtype=torch.int32)
    return Routing(order_M // top_k, row_M.view(num_tokens, top_k), offsets_E)


def row_probabilities(p_TK: Tensor, routing: Routing) -> Tensor:
    """``p_TK`` in the sorted order, [M]."""
    p_M = p_TK.new_empty(routing.num_rows)
    p_M[routing.row_TK.reshape(-1)] = p_TK.reshape(-1)
    return p_M


def combine(y_MH: Tensor, routing: Routing, p_TK: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``y_t = Σ_k p_tk · y_row(t,k)`` (weights 1 without ``p_TK``), [T, H].

    A gather and a sum in a fixed order, so the result is deterministic. Accumulates in float32 (float64 for float64
    rows) and rounds once to ``dtype``.
    """
    wide = torch.promote_types(y_MH.dtype, torch.float32)
    out_TH = y_MH.new_zeros((routing.num_tokens, y_MH.shape[1]), dtype=wide)
    for k in range(routing.row_TK.shape[1]):
        rows = y_MH[routing.row_TK[:, k]].to(wide)
        out_TH += rows if p_TK is None else rows * p_TK[:, k, None].to(wide)
    return out_TH.to(dtype)
