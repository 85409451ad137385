"""The products for Hopper compile for it without a GPU, and the compiler neither serializes them nor spills much."""

import ctypes
import re
import sys
from pathlib import Path

import pytest

from octavo.ops.hopper.compiler import COLUMN, GRADIENT, NONE, SLAB, STORE, SWIGLU, TABLE, Mode, compile_mode, missing

# wide, flip, scale, stage
MODES = (
    (True, False, COLUMN, STORE), (True, False, COLUMN, SWIGLU), (True, False, TABLE, STORE),
    (True, False, TABLE, SWIGLU), (True, True, TABLE, STORE), (True, True, TABLE, GRADIENT),
    (False, False, COLUMN, STORE), (False, False, COLUMN, SWIGLU), (False, False, SLAB, STORE),
    (False, False, SLAB, SWIGLU), (False, True, NONE, STORE), (False, True, NONE, GRADIENT),
    (False, True, SLAB, STORE), (False, True, SLAB, GRADIENT),
)  # fmt: skip
TILES = [Mode(*mode, tokens) for mode in MODES for tokens in (128, 160) if mode[2] != SLAB or tokens == 128] + [
    Mode(True, flip, NONE, stage, tokens, bank=True)
    for flip, stage in ((False, STORE), (False, SWIGLU), (True, STORE), (True, GRADIENT))
    for tokens in (128, 192)
]
MOST_SPILLED = 256
"""Bytes of a thread; a spill in the loop over the contraction costs more than this bound can tell."""


# cuda-bindings looks for NVRTC where packages are installed, and here both lie in a folder of their own
for folder in sys.path:
    for library in sorted(Path(folder).glob("nvidia/cu*/lib/libnvrtc*.so.*[0-9]"), reverse=True):
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


def test_can_be_compiled_here() -> None:
    assert missing() is None


@pytest.mark.parametrize("mode", TILES, ids=str)
def test_compiles(mode: Mode) -> None:
    code, log = compile_mode(mode)
    assert code[:4] == b"\x7fELF"
    assert "wgmma.mma_async instructions are serialized" not in log, log
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill", log)]
    assert spilled, log
    # an E4M3 product of blocks holds two sums, and its tile is turned through registers
    assert max(spilled) <= MOST_SPILLED, log
