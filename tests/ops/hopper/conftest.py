"""Run the products for Hopper on this processor: `emulator.hpp` in the place of the hardware's instructions."""

import ctypes
import os
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

import octavo.ops.hopper
from octavo.ops.hopper import product as hopper
from octavo.ops.hopper.compiler import Mode, macros

BLOCKS = 2
"""Of a launch: each has several tiles."""


class _Map(ctypes.Structure):
    """What `emulator.hpp` reads of a tensor map."""

    _fields_ = [
        ("address", ctypes.c_uint64),
        ("dims", ctypes.c_uint64 * 5),
        ("strides", ctypes.c_uint64 * 4),
        ("box", ctypes.c_uint64 * 5),
        ("size", ctypes.c_uint64),
    ]


def written(*place: int, **facts: int) -> "ctypes.Array[ctypes.c_uint64]":
    """The tensor map for the emulator, in the hardware's place."""
    found = hopper.tensor_map(*place, **facts)  # type: ignore[arg-type]
    fill = 5 - len(found.dims)
    dims, box = (*found.dims, *[1] * fill), (*found.box, *[1] * fill)
    record = _Map(
        found.address, (ctypes.c_uint64 * 5)(*dims), (ctypes.c_uint64 * 4)(*found.strides, *[0] * fill),
        (ctypes.c_uint64 * 5)(*box), found.size,
    )  # fmt: skip
    words = (ctypes.c_uint64 * 16)()
    ctypes.memmove(words, ctypes.addressof(record), ctypes.sizeof(record))
    return words


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Mode], ctypes.CDLL]:
    """The kernel of a mode, compiled for this processor."""
    # shared by the processes of one run
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "emulated"
    folder.mkdir(exist_ok=True)
    here, there = Path(__file__).parent, Path(str(octavo.ops.hopper.__path__[0]))

    @cache
    def get(mode: Mode) -> ctypes.CDLL:
        defined = macros(mode)
        path = folder / f"product{''.join(defined)}.so"
        if not path.exists():
            made = path.with_suffix(f".{os.getpid()}")
            command = ["g++", "-O2", "-std=c++17", "-w", "-Wno-psabi", "-shared", "-fPIC", *defined, f"-I{there}"]
            done = subprocess.run([*command, "-o", made, here / "emulator.cpp"], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            made.replace(path)
        found = ctypes.CDLL(str(path))
        found.emulate.restype = ctypes.c_char_p
        found.emulate.argtypes = [ctypes.c_void_p, ctypes.c_uint32]
        return found

    return get


@pytest.fixture
def launched(library: Callable[[Mode], ctypes.CDLL], monkeypatch: pytest.MonkeyPatch) -> list[Mode]:
    """Launches run on the emulator; the modes that were launched."""
    modes: list[Mode] = []

    def launch(mode: Mode, device: torch.device, most: int, arguments: int) -> None:
        modes.append(mode)
        [parameters] = (ctypes.c_void_p * 1).from_address(arguments)
        problem = library(mode).emulate(parameters, min(most, BLOCKS))
        assert not problem, f"{mode}: {problem.decode()}"

    monkeypatch.setattr(hopper, "launch", launch)
    monkeypatch.setattr(hopper, "_encoded", written)
    return modes
