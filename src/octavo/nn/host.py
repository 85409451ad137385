"""Memory of the host for what a GPU copies from and to: pinned for one, in blocks that waste little of it."""

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from octavo.errors import EngineError

# torch pins powers of two, so a stack of 0.4 GB by itself would take 0.54 GB.
_BLOCK_BYTES = 1 << 32
_ALIGNMENT = 4096
_V1_FILES = ("total_inactive_file", "total_active_file")


class HostMemory:
    """Memory for tensors of ``sizes`` bytes that are copied to ``device``; pinned when that is a GPU.

    ``asked`` names the setting that needs it, ``contents`` what it holds and ``otherwise`` the way out, for the
    :class:`octavo.errors.EngineError` when the host has not got it.
    """

    def __init__(
        self, device: torch.device, sizes: Iterable[int], *, asked: str, contents: str, otherwise: str
    ) -> None:
        nbytes = sum(_aligned(size) for size in sizes)
        self._pinned = device.type == "cuda"
        self._left = nbytes
        self._block = torch.empty(0, dtype=torch.uint8)
        self._used = 0
        self._given: set[int] = set()
        available = available_bytes()
        if self._pinned and available is not None and nbytes > available:
            # torch keeps what it has pinned, of a model that is gone as well.
            torch._C._host_emptyCache()
            available = available_bytes()
        if available is not None and nbytes > available:
            raise EngineError(
                f"{asked} needs {nbytes / 1e9:.1f} GB of host memory for {contents}, and {available / 1e9:.1f} GB are "
                f"available. Free some, or {otherwise}."
            )

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised contiguous tensor with a storage of its own: savers take a shared one for tied weights."""
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes == 0:
            return torch.empty(shape, dtype=dtype)
        start = _aligned(self._used)
        if start + nbytes > self._block.nbytes:
            # The last block is no larger than what it is for.
            size = max(nbytes, min(_BLOCK_BYTES, self._left))
            self._block = torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)
            start = 0
        self._used = start + nbytes
        self._left -= _aligned(nbytes)
        found = torch.frombuffer(self._block[start : self._used].numpy(), dtype=torch.uint8)
        self._given.add(found.data_ptr())
        return found.view(dtype).view(shape)

    def holds(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` is one of :meth:`empty`'s."""
        return tensor.data_ptr() in self._given


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def available_bytes(system: Path = Path("/")) -> int | None:
    """What the host can give without swapping, or what is left of a container's limit where that is less; ``None``
    where the system, mounted at ``system``, does not say.
    """
    found = [left for left in (_available(system / "proc/meminfo"), _left_of_limit(system)) if left is not None]
    return min(found, default=None)


def _available(meminfo: Path) -> int | None:
    kilobytes = _numbers(meminfo).get("MemAvailable:")
    return None if kilobytes is None else kilobytes * 1024


def _left_of_limit(system: Path) -> int | None:
    """Of the cgroup that a container sees as its own; pages of files that it read are given back before it fails."""
    for folder, limit, used, kept in (
        ("sys/fs/cgroup", "memory.max", "memory.current", ("inactive_file", "active_file")),
        ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", _V1_FILES),
    ):
        group = system / folder
        try:
            most, taken = (int((group / name).read_text()) for name in (limit, used))
        except (OSError, ValueError):
            # It is not there, or says "max".
            continue
        pages = _numbers(group / "memory.stat")
        return max(0, most - taken + sum(pages.get(name, 0) for name in kept))
    return None


def _numbers(file: Path) -> dict[str, int]:
    """The first number of each line by what stands before it."""
    try:
        lines = [line.split() for line in file.read_text().splitlines()]
    except OSError:
        return {}
    return {line[0]: int(line[1]) for line in lines if len(line) > 1 and line[1].isdigit()}
