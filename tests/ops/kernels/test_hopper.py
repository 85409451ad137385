"""The products for Hopper compile for it without a GPU, and the compiler neither serializes them nor spills much."""

import ctypes
import re
import sys
from pathlib import Path

import pytest

from octavo.ops.hopper.compiler import Mode, compile_mode, missing
from octavo.ops.hopper.engine import modes

# a tile of few tokens has room to spare
TILES = [mode for mode in modes() if mode.tokens >= 128]
MOST_SPILLED = 32
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
    assert max(spilled) <= MOST_SPILLED, log
