"""Pieces of a state that lives in host memory: copied to the device ahead of their turn, and back once they changed.

Each direction has a stream of its own, so that one piece comes while another leaves; the computing stream and the
copies wait for each other's events, and the host for none. A tensor of a wrapper subclass, such as a quantized state,
is copied as the plain tensors inside it.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

PIECE_BYTES = 32 << 20
"""Small enough that few are on the device, large enough that copies take longer than their launches."""
IN_FLIGHT = 3
"""One piece comes, one is changed, one leaves."""

Wait: TypeAlias = Callable[[], None]
"""Has the computing stream wait for copies."""


class Copies(Protocol):
    """Copies between host memory and the device of one computing stream."""

    def fetch(self, hosts: Sequence[Tensor]) -> tuple[list[Tensor], Wait]:
        """The same tensors on the device, and what to call before they are used."""

    def write(self, tensors: Sequence[Tensor], hosts: Sequence[Tensor]) -> Wait:
        """Copy ``tensors`` of the device, as the computing stream leaves them, to ``hosts``.

        What is returned is to be called before the tensors' memory is given up, and before ``hosts`` are fetched again.
        """

    def synchronize(self) -> None:
        """Have the host wait until every `write` has arrived."""


class StreamCopies:
    """Copies between a GPU and pinned memory, on two streams beside the one that computes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._coming = torch.cuda.Stream(device)
        self._leaving = torch.cuda.Stream(device)

    def fetch(self, hosts: Sequence[Tensor]) -> tuple[list[Tensor], Wait]:
        computing = torch.cuda.current_stream(self._device)
        # Allocated for the computing stream, so this stream waits for what used the memory before.
        tensors = [empty_as(host, self._device) for host in hosts]
        self._coming.wait_stream(computing)
        with torch.cuda.stream(self._coming):
            for tensor, host in zip(tensors, hosts, strict=True):
                tensor.copy_(host, non_blocking=True)
            done = self._coming.record_event()
        return tensors, lambda: torch.cuda.current_stream(self._device).wait_event(done)

    def write(self, tensors: Sequence[Tensor], hosts: Sequence[Tensor]) -> Wait:
        self._leaving.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._leaving):
            for tensor, host in zip(tensors, hosts, strict=True):
                host.copy_(tensor, non_blocking=True)
            done = self._leaving.record_event()
        return lambda: torch.cuda.current_stream(self._device).wait_event(done)

    def synchronize(self) -> None:
        self._leaving.synchronize()


class PlainCopies:
    """The same on the host alone, for machines without a GPU."""

    def fetch(self, hosts: Sequence[Tensor]) -> tuple[list[Tensor], Wait]:
        return [host.clone() for host in hosts], lambda: None

    def write(self, tensors: Sequence[Tensor], hosts: Sequence[Tensor]) -> Wait:
        for tensor, host in zip(tensors, hosts, strict=True):
            host.copy_(tensor)
        return lambda: None

    def synchronize(self) -> None:
        pass


def copies_for(device: torch.device) -> Copies:
    """Copies for a computing stream of ``device``."""
    return StreamCopies(device) if device.type == "cuda" else PlainCopies()


def empty_as(tensor: Tensor, device: torch.device) -> Tensor:
    """Memory on ``device`` with the shape, strides and dtype of ``tensor``."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)


def leaves(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that ``tensor`` is made of: itself, or those inside a wrapper subclass."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [leaf for name in names for leaf in leaves(getattr(tensor, name))]


def with_leaves(tensor: Tensor, plain: Iterator[Tensor]) -> Tensor:
    """A tensor of the kind of ``tensor`` made of the next of ``plain``, in the order of :func:`leaves`."""
    if not is_traceable_wrapper_subclass(tensor):
        return next(plain)
    names, context = tensor.__tensor_flatten__()
    inner = {name: with_leaves(getattr(tensor, name), plain) for name in names}
    made: Tensor = type(tensor).__tensor_unflatten__(inner, context, tensor.shape, tensor.stride())
    return made
