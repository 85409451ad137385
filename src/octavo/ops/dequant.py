"""Products by dequantizing the active experts, a bounded chunk at a time, into the dtype of the activations.

The buffer is at most :data:`CHUNK_BYTES`; a whole bank is never built and nothing dequantized outlives the product. A
weight is rounded once, from float32 to the dtype of the activations (E4M3 codes themselves are exact in bfloat16).
Operands are in that dtype, sums in float32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.ops.reference import spans
from octavo.ops.weights import DenseWeight, Weight

CHUNK_BYTES = 400_000_000
# Up to so many rows a product of unquantized experts does not ask the device where experts end; past them the pass that
# clears rows of other ranks costs more than the question.
FEW_ROWS = 8192


def grouped_product(x_MK: Tensor, weight: Weight, ends: list[int], *, transposed: bool) -> Tensor:
    """``y_m = x_m · W_{e(m)}ᵀ``, or ``x_m · W_{e(m)}`` when ``transposed``, for rows sorted by expert; zero past the
    last end.

    ``x_MK`` [M, in] (or [M, out] when ``transposed``) of any float dtype; ``ends``: the end of each expert's rows.
    """
    width = weight.in_features if transposed else weight.out_features
    y_MN = x_MK.new_empty((x_MK.shape[0], width))
    y_MN[ends[-1] :] = 0
    for chunk in _chunks(spans(ends), weight, x_MK.element_size(), x_MK.device.type):
        experts = torch.tensor([expert for expert, _ in chunk], device=x_MK.device)
        first, last = chunk[0][1].start, chunk[-1][1].stop
        bank = weight.dequantize(x_MK.dtype, _contiguous(chunk) or experts)
        bank = bank if transposed else bank.transpose(-1, -2)
        chunk_ends = [rows.stop - first for _, rows in chunk]
        y_MN[first:last] = dense_product(x_MK[first:last], bank, chunk_ends)
    return y_MN


def unasked_product(x_MK: Tensor, weight: DenseWeight, offsets_E: Tensor, *, transposed: bool) -> Tensor:
    """:func:`grouped_product` with unquantized experts, in one grouped product of all of them, whose ends stay on the
    device: it can be captured in a CUDA graph.
    """
    bank = weight.weight_ENK.to(x_MK.dtype)
    bank = bank if transposed else bank.transpose(-1, -2)
    width, short_k, short_n = bank.shape[2], -bank.shape[1] % 8, -bank.shape[2] % 8
    if short_k or short_n:
        # operands have rows of 16 bytes; factors of a small rank have less
        x_MK, bank = F.pad(x_MK, (0, short_k)), F.pad(bank, (0, short_n, 0, short_k))
    y_MN = F.grouped_mm(x_MK.contiguous(), bank, offs=offsets_E)[:, :width]
    past_M1 = torch.arange(y_MN.shape[0], device=y_MN.device)[:, None] >= offsets_E[-1]
    return y_MN.masked_fill(past_M1, 0)


def takes_unasked(x_MK: Tensor) -> bool:
    """Whether :func:`unasked_product` is for these rows: few of them, on a device with torch's grouped product."""
    return x_MK.shape[0] <= FEW_ROWS and _has_grouped_mm(x_MK)


def dense_product(x_MK: Tensor, bank_EKN: Tensor, ends: list[int]) -> Tensor:
    """``x_m · bank_{e(m)}``, all rows covered by ``ends``: one grouped product where the device has it, else one
    each.
    """
    if has_grouped_mm(x_MK, bank_EKN):
        offsets = torch.tensor(ends, dtype=torch.int32, device=x_MK.device)
        return F.grouped_mm(x_MK.contiguous(), bank_EKN, offs=offsets)
    y_MN = x_MK.new_zeros((x_MK.shape[0], bank_EKN.shape[-1]))
    for expert, rows in spans(ends):
        torch.mm(x_MK[rows], bank_EKN[expert], out=y_MN[rows])
    return y_MN


def grouped_outer(dy_MN: Tensor, x_MK: Tensor, ends: list[int]) -> Tensor:
    """``dW_e = Σ_{m in e} dy_m ⊗ x_m``, [E, N, K] in the dtype of ``dy_MN``; zero for an expert without rows."""
    out = dy_MN.new_zeros((len(ends), dy_MN.shape[1], x_MK.shape[1]))
    for expert, rows in spans(ends):
        torch.mm(dy_MN[rows].T, x_MK[rows], out=out[expert])
    return out


def has_grouped_mm(x_MK: Tensor, bank_EKN: Tensor) -> bool:
    """Whether torch's grouped product takes these operands: CUDA of SM80 or later, bfloat16, strides of 16 bytes."""
    return _has_grouped_mm(x_MK) and x_MK.shape[1] % 8 == 0 and bank_EKN.shape[-1] % 8 == 0


def _has_grouped_mm(x_MK: Tensor) -> bool:
    if x_MK.device.type != "cuda" or x_MK.dtype != torch.bfloat16:
        return False
    return torch.cuda.get_device_capability(x_MK.device) >= (8, 0)


Span = tuple[int, slice]


def _chunks(active: list[Span], weight: Weight, element_size: int, device: str) -> list[list[Span]]:
    """Split the active experts so that each chunk's dequantized weights fit the buffer."""
    expert_bytes = weight.out_features * weight.in_features * element_size
    # one expert at a time stays in a CPU's cache; a GPU wants few, large products
    most = 1 if device == "cpu" and not isinstance(weight, DenseWeight) else max(1, CHUNK_BYTES // expert_bytes)
    return [active[i : i + most] for i in range(0, len(active), most)]


def _contiguous(chunk: list[Span]) -> slice | None:
    """The chunk's experts as a slice where they are neighbours: a view then, and no gather of codes."""
    first, last = chunk[0][0], chunk[-1][0]
    return slice(first, last + 1) if last - first + 1 == len(chunk) else None
