"""Checks of the values of scales, codes and plain weights, on tensors that a loader holds anyway: one read in all."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from octavo.errors import CheckpointError
from octavo.formats.weight import multipliers

# A chunk stays in the cache between the two reductions: 15 GB/s on one core of a server CPU, against 7 for the whole.
_CHUNK = 1 << 20
_NAN_ADVICE = "The file is damaged, or what wrote it had diverged: download it again, or go back to an earlier one."
_ADVICE = "The file is damaged, or whoever quantized it met NaN or infinite weights: download or quantize it again."


def check_scales(name: str, scale: Tensor) -> None:
    """Every value of ``scale`` is a positive finite number.

    ``scale``: any shape; a float dtype, float8_e8m0fnu, or uint8 with the bytes of e8m0. One transfer from a device.

    Raises: CheckpointError naming the tensor, how many values, the first of them and where it is.
    """
    values = multipliers(scale)
    # A NaN is neither.
    bad = ~((values > 0) & (values < torch.inf))
    if not bool(bad.any()):
        return
    first = bad.nonzero()[0].tolist()
    raise CheckpointError(
        f"{name!r} has {int(bad.sum())} of {values.numel()} scales that are not positive finite numbers, first "
        f"{values[tuple(first)].item():g} at {first}. {_ADVICE}"
    )


def check_codes(name: str, codes: Tensor) -> None:
    """No e4m3 code is NaN, 0x7F or 0xFF.

    ``codes``: float8_e4m3fn, or uint8 with the same bytes, any shape. Read as an integer NaN is the largest value there
    is, unsigned (0xFF) or signed (0x7F), so two maxima tell: 15 GB/s on one core, no temporary, one transfer from a
    device.

    Raises: CheckpointError naming the tensor, how many codes and the first of them.
    """
    if codes.numel() == 0:
        return
    flat = codes.detach().view(torch.uint8).reshape(-1)
    chunks = flat.split(_CHUNK) if flat.device.type == "cpu" else (flat,)
    if not any(_has_nan(chunk) for chunk in chunks):
        return
    bad = (codes.detach().view(torch.uint8) & 0x7F) == 0x7F
    raise CheckpointError(
        f"{name!r} has {int(bad.sum())} of {codes.numel()} FP8 codes that are NaN, first at "
        f"{bad.nonzero()[0].tolist()}. {_ADVICE}"
    )


def check_numbers(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """No number of a plain weight is NaN.

    ``tensors``: name and tensor, any shape; those that are not floating point, or have one byte an element, are passed
    over. A NaN is in every sum that it is part of: 30 GB/s on one core in bfloat16, one transfer from each device.

    Raises: CheckpointError naming the first tensor that has one, how many and where the first is.
    """
    on: defaultdict[torch.device, list[tuple[str, Tensor]]] = defaultdict(list)
    for name, tensor in tensors:
        if tensor.is_floating_point() and tensor.element_size() > 1 and tensor.numel() and not tensor.is_meta:
            on[tensor.device].append((name, tensor.detach()))
    for named in on.values():
        sums = torch.stack([tensor.sum().double() for _, tensor in named])
        for (name, tensor), bad in zip(named, sums.isnan().tolist(), strict=True):
            # infinities of both signs make one too
            wrong = tensor.isnan() if bad else None
            if wrong is not None and bool(wrong.any()):
                raise CheckpointError(
                    f"{name!r} has {int(wrong.sum())} of {tensor.numel()} numbers that are NaN, first at "
                    f"{wrong.nonzero()[0].tolist()}. {_NAN_ADVICE}"
                )


def _has_nan(flat: Tensor) -> bool:
    unsigned, signed = torch.stack((flat.max().short(), flat.view(torch.int8).max().short())).tolist()
    return bool(unsigned == 0xFF or signed == 0x7F)
