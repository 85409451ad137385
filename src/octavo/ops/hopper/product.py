"""The grouped product of `product.cu`: what it takes, and how it is launched.

Legend: ``M`` rows sorted by expert, ``E`` experts, ``F`` features (columns of the product), ``C`` contraction.
"""

import ctypes
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from octavo.errors import EngineError
from octavo.formats.weight import Float8Weight
from octavo.ops.hopper.compiler import COLUMN, GRADIENT, NONE, SLAB, STORE, SWIGLU, TABLE, Mode, launch
from octavo.ops.weights import storage

MAX_EXPERTS = 1024
FEATURES = 256
"""Of a tile; with SwiGLU half of them gates."""
RANKS = 16
"""Up to how many ranks the gate's gradient also sums the gradient of LoRA's A."""
ROWS_UP = 60
"""Powers of two by which bfloat16 rows are larger in a product that is not flipped: widened codes are 2^-120 of theirs,
and their products must stay inside float32. Exact for values below 2^67.
"""


@dataclass(frozen=True)
class Rows:
    """The rows that multiply: ``values`` bfloat16 or E4M3 [*, C], read at ``token_M`` where given; E4M3 rows with
    float32 ``scales`` [*, 1]; against blocks in a product that is not flipped, [*, groups] of the block's columns.
    """

    values: Tensor
    token_M: Tensor | None = None
    scales: Tensor | None = None


@dataclass(frozen=True)
class Bank:
    """Dequantized experts ``first``, ``first + 1``, …: ``values`` bfloat16 [experts, N, K], the columns of every 16
    with the even ones first.
    """

    values: Tensor
    first: int


@dataclass(frozen=True)
class LoraStep:
    """One more step of the contraction: ``xa`` [M, R] times ``factor`` [E, F, R], both bfloat16, R a multiple of 8."""

    xa: Tensor
    factor: Tensor


@dataclass(frozen=True)
class GateGradient:
    """SwiGLU's gradient: ``z`` bfloat16 [M, 2F], ``p_M`` bfloat16 or float32; ``shares`` float32
    [2 * ceil(F / 256), M] takes each row's parts of <dh, h>; ``sums`` float32 [token tiles, F, 16], where given, each
    token tile's part of the gradient of LoRA's A, for at most :data:`RANKS` ranks and no chunks of experts; ``peaks``,
    where given, as shares: each row's largest |dz · fold|, for E4M3 rows, with ``fold`` float32 [E, 2F] for a weight of
    which one scale serves a row and without for blocks.
    """

    z: Tensor
    p_M: Tensor
    shares: Tensor
    sums: Tensor | None = None
    fold: Tensor | None = None
    peaks: Tensor | None = None


class _Params(ctypes.Structure):
    _fields_ = [
        ("map", ctypes.c_uint64 * 16),
        *((name, ctypes.c_void_p) for name in (
            "act", "token", "offsets", "act_scale", "scales", "xa", "factor", "out", "h", "z", "p", "shares",
            "sums", "fold", "peaks",
        )),
        ("num_rows", ctypes.c_longlong),
        *((name, ctypes.c_int) for name in (
            "E", "F", "C", "w_rows", "w_cols", "part_rows", "grid_n", "grid_k", "sb_n", "sb_k", "act_groups", "R",
            "p_float", "follows",
        )),
        ("sb_n_magic", ctypes.c_uint), ("sb_k_magic", ctypes.c_uint), ("grid_rows", ctypes.c_int),
        ("one_box", ctypes.c_int), ("pad", ctypes.c_uint * 14),
    ]  # fmt: skip


def _address(tensor: Tensor | None) -> int:
    if tensor is None:
        return 0
    assert tensor.is_contiguous()
    return tensor.data_ptr()


def _magic(divisor: int) -> int:
    return -(-(2**32) // divisor) & 0xFFFFFFFF


@dataclass(frozen=True)
class TensorMap:
    """How tiles of a weight lie in memory: ``dims`` and ``box`` in elements of ``size`` bytes, innermost first;
    ``strides`` in bytes, of all dimensions but the innermost. A line of a box has 128 bytes, which are swizzled.
    """

    address: int
    dims: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    size: int


def in_one_box(cols: int, bank: bool) -> bool:
    """Whether one box has all features of a turned tile: lines of which must not reach into the weight's next row."""
    return cols % (64 if bank else 128) == 0


def features_of_group(slabs: bool) -> int:
    """Of how many features of a tile the lines are in another order than they: a weight's rows are a multiple of it.
    ``slabs``: of E4M3 rows against blocks, not flipped.
    """
    return 32 if slabs else 16


def tensor_map(
    address: int, experts: int, rows: int, cols: int, *, flip: bool, gates: int, bank: bool, slabs: bool
) -> TensorMap:
    """By which tiles of a weight [experts, rows, cols] are fetched. ``gates``: how many rows are gates, which come with
    their ups, or 0; ``slabs``: see :func:`features_of_group`.

    A tile that is not flipped brings its rows in the order of wgmma's fragments: of two neighbouring features of a
    thread, the second is 8 lines after the first; with ``slabs`` of four, each is 8 lines after the one before.
    """
    step = 64 if bank else 128
    size = 2 if bank else 1
    line, width = cols * size, 128 // size
    if flip and in_one_box(cols, bank):
        dims, strides = (width, rows, cols // width, experts), (line, 128, rows * line)
        return TensorMap(address, dims, strides, (width, step, FEATURES // width, 1), size)
    if flip:
        return TensorMap(address, (cols, rows, experts), (line, rows * line), (width, step, 1), size)
    group = features_of_group(slabs)
    near = group // 8
    inner, apart = (cols, 8, near), (near * line, line, group * line)
    if gates:
        parts = (*inner, gates // group, 2 * experts)
        return TensorMap(address, parts, (*apart, gates * line), (step, 8, near, 64 // group, 2), size)
    return TensorMap(address, (*inner, experts * rows // group), apart, (step, 8, near, FEATURES // group), size)


@lru_cache(maxsize=4096)
def _encoded(
    address: int, experts: int, rows: int, cols: int, *, flip: bool, gates: int, bank: bool, slabs: bool
) -> "ctypes.Array[ctypes.c_uint64]":
    """The tensor map as the hardware reads it."""
    from cuda.bindings import driver

    found = tensor_map(address, experts, rows, cols, flip=flip, gates=gates, bank=bank, slabs=slabs)
    status, encoded = driver.cuTensorMapEncodeTiled(
        driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 if found.size == 2
        else driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT8,
        len(found.dims), found.address,
        [driver.cuuint64_t(n) for n in found.dims], [driver.cuuint64_t(n) for n in found.strides],
        [driver.cuuint32_t(n) for n in found.box], [driver.cuuint32_t(1)] * len(found.dims),
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )  # fmt: skip
    if int(status):
        raise EngineError(f"the CUDA driver refused the tensor map of a weight [{experts}, {rows}, {cols}]: {status}.")
    return (ctypes.c_uint64 * 16)(*(int(word) for word in encoded.opaque))


def straddles(weight: Float8Weight) -> bool:
    """Whether the blocks of two parts meet among the features of a tile, which read one scale: a product that is not
    flipped takes such a weight with ``h`` alone, where gates and ups have tiles of their own.
    """
    return weight.parts > 1 and weight.block[1] < weight.in_features and weight.rows % (FEATURES // 2) != 0


def product(
    rows: Rows,
    weight: Float8Weight,
    offsets_E: Tensor,
    out: Tensor,
    *,
    flip: bool = False,
    lora: LoraStep | None = None,
    h: Tensor | None = None,
    gradient: GateGradient | None = None,
    tokens: int = 128,
    bank: Bank | None = None,
) -> None:
    """Write ``out``: ``rows · Wᵀ`` (``rows · W`` with ``flip``) [M, F]; z [M, 2F] with ``h`` [M, F]; or dz [M, 2F]
    with ``gradient``.

    bfloat16 rows of a product that is not flipped, and the ``h`` that it writes, are interleaved (of each 16 columns
    the even ones first) and 2^:data:`ROWS_UP` times as large: see
    :func:`octavo.ops.kernels.interleave.interleave`. ``tokens``: of a tile. ``bank``: a chunk of the weight's experts,
    dequantized, for bfloat16 rows; rows of other experts are left as they are.
    """
    num_rows = out.shape[0]
    if num_rows == 0:
        return
    wide = rows.values.dtype == torch.bfloat16
    whole_row = weight.block[1] >= weight.in_features
    assert flip or h is not None or bank is not None or not straddles(weight)
    if bank is not None:
        assert wide
        scale = NONE
    elif wide:
        scale = TABLE if flip or not whole_row else COLUMN
    else:
        scale = SLAB if not whole_row else NONE if flip else COLUMN
    stage = SWIGLU if h is not None else GRADIENT if gradient is not None else STORE
    features = weight.in_features if flip else weight.out_features // (2 if h is not None else 1)
    contraction = weight.out_features if flip else weight.in_features
    values = storage(weight)[0] if bank is None else bank.values
    first, num_experts = (0, weight.num_experts) if bank is None else (bank.first, bank.values.shape[0])
    grid_n, grid_k = weight.scales.shape[2:]
    slabs, gates = scale == SLAB and not flip, 0 if h is None else weight.rows
    assert flip or (gates or weight.out_features) % features_of_group(slabs) == 0
    encoded = _encoded(_address(values), *values.shape, flip=flip, gates=gates, bank=bank is not None, slabs=slabs)
    params = _Params(
        encoded, _address(rows.values), _address(rows.token_M), _address(offsets_E[first:]), _address(rows.scales),
        _address(weight.scales), lora and _address(lora.xa), lora and _address(lora.factor[first:]),
        _address(out), _address(h), gradient and _address(gradient.z), gradient and _address(gradient.p_M),
        gradient and _address(gradient.shares), gradient and _address(gradient.sums),
        gradient and _address(gradient.fold), gradient and _address(gradient.peaks), num_rows, num_experts, features,
        contraction,
        weight.out_features, weight.in_features, weight.rows, grid_n, grid_k, weight.block[0], weight.block[1],
        1 if rows.scales is None else rows.scales.shape[1], 0 if lora is None else lora.xa.shape[1],
        gradient is not None and gradient.p_M.dtype == torch.float32, first > 0, _magic(weight.block[0]),
        _magic(weight.block[1]), weight.parts * grid_n, in_one_box(weight.in_features, bank is not None),
    )  # fmt: skip
    tile = FEATURES // (2 if h is not None else 1)
    most = (-(-num_rows // tokens) + num_experts) * -(-features // tile)
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(params))
    outer = gradient is not None and gradient.sums is not None
    if outer:
        assert bank is None
        assert lora is not None
        assert lora.xa.shape[1] <= RANKS
    peaks = gradient is not None and gradient.peaks is not None
    if peaks:
        assert gradient is not None
        assert not wide
        assert (gradient.fold is None) == (scale == SLAB)
    mode = Mode(wide, flip, scale, stage, tokens, bank is not None, outer, peaks)
    launch(mode, out.device, most, ctypes.addressof(pointers))
