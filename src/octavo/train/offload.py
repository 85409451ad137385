"""Hidden states in host memory: what a checkpointed forward keeps leaves the GPU and comes back just before its layer.

Under gradient checkpointing a layer keeps its input alone, [B, S, H] in the dtype of the model: at 32k tokens 0.13 GB a
layer at H 2048. Each is copied to pinned memory on a stream of its own while the next layer computes, and the backward
pass, which asks for them in reverse order, finds each one fetched while the layer after it computed.
"""

import weakref
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

# Smaller tensors cost more to track than they take.
_MIN_BYTES = 1 << 20


class _Copies:
    """Copies between a GPU and pinned memory, on a stream beside the one that computes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def to_host(self, tensor: Tensor) -> Tensor:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            host.copy_(tensor, non_blocking=True)
        # The allocator must not hand the memory out before it was read.
        tensor.record_stream(self._stream)
        return host

    def to_device(self, host: Tensor) -> tuple[Tensor, Callable[[], None]]:
        """The tensor, and what to call before it is used."""
        computing = torch.cuda.current_stream(self._device)
        # Allocated for the computing stream, so this stream waits for what used the memory before.
        tensor = torch.empty(host.shape, dtype=host.dtype, device=self._device)
        self._stream.wait_stream(computing)
        with torch.cuda.stream(self._stream):
            tensor.copy_(host, non_blocking=True)
            done = self._stream.record_event()
        return tensor, lambda: torch.cuda.current_stream(self._device).wait_event(done)


class _PlainCopies:
    """The same on the host alone, for machines without a GPU."""

    def to_host(self, tensor: Tensor) -> Tensor:
        return tensor.clone()

    def to_device(self, host: Tensor) -> tuple[Tensor, Callable[[], None]]:
        return host.clone(), lambda: None


class Offloaded:
    """One tensor that backward will ask for, in host memory."""

    def __init__(self, host: Tensor, before: "Offloaded | None") -> None:
        self.host = host
        # Backward asks for it next. Weak: the graph alone decides how long it lives.
        self.before = None if before is None else weakref.ref(before)
        self.fetched: tuple[Tensor, Callable[[], None]] | None = None
        self.asked_for = False


class HiddenStatesOnHost:
    """Inside the block, what autograd keeps of ``device`` goes to pinned host memory. For the forward pass only.

    Parameters stay where they are, and so do tensors below ``min_bytes`` and integers. Values and gradients do not
    change by a bit. ``bytes_offloaded``: of the last block.
    """

    def __init__(self, parameters: Iterable[Tensor], device: torch.device, min_bytes: int = _MIN_BYTES) -> None:
        self._parameters = list(parameters)
        self._device_type = device.type
        self._copies = _Copies(device) if device.type == "cuda" else _PlainCopies()
        self._min_bytes = min_bytes
        self._stay: set[int] = set()
        self._last: weakref.ref[Offloaded] | None = None
        self._hooks: saved_tensors_hooks | None = None
        self.bytes_offloaded = 0

    def __enter__(self) -> Self:
        # Read each time: a parameter's memory may have moved since.
        self._stay = {parameter.untyped_storage().data_ptr() for parameter in self._parameters}
        self._last = None
        self.bytes_offloaded = 0
        self._hooks = saved_tensors_hooks(self._pack, self._unpack)
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._hooks is not None, "left without having been entered"
        self._hooks.__exit__(kind, error, trace)
        self._hooks = None

    def _pack(self, tensor: Tensor) -> Tensor | Offloaded:
        if (
            tensor.device.type != self._device_type
            or tensor.nbytes < self._min_bytes
            or not tensor.is_floating_point()
            or tensor.untyped_storage().data_ptr() in self._stay
        ):
            return tensor
        kept = Offloaded(self._copies.to_host(tensor.detach()), None if self._last is None else self._last())
        self._last = weakref.ref(kept)
        self.bytes_offloaded += tensor.nbytes
        return kept

    def _unpack(self, kept: Tensor | Offloaded) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        if kept.fetched is None:
            kept.fetched = self._copies.to_device(kept.host)
        tensor, wait = kept.fetched
        kept.fetched = None
        kept.asked_for = True
        wait()
        before = None if kept.before is None else kept.before()
        if before is not None and before.fetched is None and not before.asked_for:
            before.fetched = self._copies.to_device(before.host)
        return tensor
