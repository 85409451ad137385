"""Tensors for transformers' loader from a :class:`octavo.checkpoint.stream.Stream`, stacks already stacked.

The loader takes a state dict in place of files. Ours maps each key to a :class:`Source`, which the loader slices when
it wants the tensor; by then it has been read, or is about to be. Matrices of a stack are read straight into their
places in it, so what the loader collects of them are the sources themselves, and the operations that would stack them
return the stack.
"""

import threading
from collections.abc import Callable, Iterable
from typing import Any, Self

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps

from octavo.checkpoint.accounting import Ledger
from octavo.checkpoint.headers import TensorEntry
from octavo.checkpoint.stream import TORCH_DTYPES, Stream
from octavo.integrations.claims import StackedTarget

_SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")


def single_device(device_map: Any) -> torch.device | None:
    """The device that ``device_map`` puts a whole model on, if it is one that a delivery knows: the CPU, or a CUDA GPU.

    ``None`` is the CPU, as in transformers.
    """
    if isinstance(device_map, dict):
        if set(device_map) != {""}:
            return None
        device_map = device_map[""]
    if device_map is None:
        return torch.device("cpu")
    if device_map in _SPREAD or device_map in ("disk", "meta"):
        return None
    device = torch.device("cuda", device_map) if isinstance(device_map, int) else torch.device(device_map)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device if device.type in ("cpu", "cuda") else None


class Delivery:
    """One load onto ``device``: the ledger it was opened with, and a source for each key.

    Reading begins when the loader asks for the first tensor: by then it has warmed up the allocator of a GPU, and
    stacks take their memory from what that left.
    """

    def __init__(self, ledger: Ledger, device: torch.device) -> None:
        self.ledger, self.device = ledger, device
        self.sources = {key: Source(self, entry) for key, entry in ledger.entries.items()}
        self.placed: dict[str, StackedTarget] = {}
        self._placed_keys: frozenset[str] = frozenset()
        self._stacks: dict[str, Tensor] = {}
        self._wanted: list[TensorEntry] = []
        self._memory: Callable[[StackedTarget, torch.device], Tensor] = memory_of
        self._stream: Stream | None = None
        self._starting = threading.Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # transformers copies the config that carries it
        return self

    def expect(
        self,
        wanted: Iterable[str],
        stacks: Iterable[StackedTarget],
        memory: Callable[[StackedTarget, torch.device], Tensor] | None = None,
    ) -> None:
        """``wanted``: the keys that the model will ask for. ``stacks``: read into place, in memory that ``memory``
        gives for a stack and the device of the load.
        """
        entries = self.ledger.entries
        self._wanted = [entries[key] for key in entries.keys() & set(wanted)]
        order = {file: index for index, file in enumerate(self.ledger.files)}
        self._wanted.sort(key=lambda entry: (order[entry.file], entry.start))
        self.placed = {stack.name: stack for stack in stacks}
        self._placed_keys = frozenset(entry.key for stack in self.placed.values() for entry in stack.entries)
        self._memory = memory or self._memory

    def is_placed(self, key: str) -> bool:
        return key in self._placed_keys

    def take(self, key: str) -> Tensor:
        """The tensor ``key`` on the load's device; see :meth:`octavo.checkpoint.stream.Stream.take`."""
        with self._starting:
            if self._stream is None:
                self._stream = self._started()
        return self._stream.take(key)

    def stack(self, name: str) -> Tensor:
        """The stack that fills the parameter ``name``, its parts taken. To be asked for once."""
        return self._stacks.pop(name)

    def close(self) -> None:
        """Stop reading, and let go of everything."""
        if self._stream is not None:
            self._stream.__exit__(None, None, None)
        self._stream, self._wanted, self.placed = None, [], {}
        self._stacks.clear()
        self.sources.clear()

    def _started(self) -> Stream:
        places: dict[str, Tensor] = {}
        for name, target in self.placed.items():
            stack = self._stacks[name] = self._memory(target, self.device)
            places |= target.places(stack)
        return Stream(self._wanted, self.device, places).__enter__()


def memory_of(target: StackedTarget, device: torch.device) -> Tensor:
    """Uninitialised memory for a stack on ``device``."""
    return torch.empty(target.shape, dtype=TORCH_DTYPES[target.dtype], device=device)


class Source:
    """A tensor of a file as transformers' loader sees it: it asks for the dtype, then slices, then moves."""

    __slots__ = ("_delivery", "_entry")

    def __init__(self, delivery: Delivery, entry: TensorEntry) -> None:
        self._delivery, self._entry = delivery, entry

    def get_dtype(self) -> str:
        return self._entry.dtype

    def get_shape(self) -> list[int]:
        return list(self._entry.shape)

    def __getitem__(self, index: Any) -> "Tensor | Source":
        assert index is Ellipsis, "a delivery is for one device, which wants whole tensors"
        tensor = self._delivery.take(self._entry.key)
        return self if self._delivery.is_placed(self._entry.key) else tensor

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """A matrix of a stack is where it belongs already."""
        return self


class InPlace(ConversionOps):  # type: ignore[misc]
    """One of a model's own stacking operations, spared where the stack was read into place; on saving it is that
    operation.
    """

    def __init__(self, delivery: Delivery, operation: ConversionOps) -> None:
        self._delivery, self._operation = delivery, operation

    def __deepcopy__(self, memo: dict[int, Any]) -> "InPlace":
        return self

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        name = kwargs["full_layer_name"]
        if name not in self._delivery.placed:
            return self._operation.convert(input_dict, **kwargs)  # type: ignore[no-any-return]
        first = next(iter(input_dict.values()))
        found = first if isinstance(first, Tensor) else self._delivery.stack(name)
        input_dict.clear()
        return {kwargs["target_patterns"][0]: found}

    @property
    def reverse_op(self) -> ConversionOps:
        return self._operation.reverse_op
