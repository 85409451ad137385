"""Optimizer states in host memory: they come to the GPU in pieces at the step, and leave as soon as they changed.

The optimizer is the one that would run without: it takes its step on the parameters of one piece after another, in its
own order, with the piece's states on the GPU. Every parameter is updated by the same kernels with the same numbers, so
results are the same to the bit, stochastic rounding included. While a piece is updated the next one comes and the last
one leaves, and no more than `octavo.ops.pieces.IN_FLIGHT` of them are on the GPU. Between steps there is none: only
numbers, such as the count of steps, stay.
"""

import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from octavo.errors import ConfigError
from octavo.nn.host import HostMemory
from octavo.ops.pieces import IN_FLIGHT, PIECE_BYTES, Copies, Wait, copies_for, leaves, with_leaves
from octavo.plan.terms import Optimizer as Name
from octavo.plan.terms import state_tensors
from octavo.train.adamw_8bit import fused_adamw_8bit


@dataclass(eq=False)
class _Piece:
    """Parameters of one group that are updated together."""

    group: dict[str, Any]
    parameters: list[Tensor]
    # (parameter, key, state) on the device; filled as the piece is fetched.
    states: list[tuple[Tensor, str, Tensor]] = field(default_factory=list)


class OffloadedOptimizer(Optimizer):
    """``optimizer`` with its states in ``memory``. Groups, `state_dict` and results are the optimizer's own.

    ``piece_bytes``: states that are updated together; a parameter with more is a piece by itself. ``copies``: how
    states come and go; by the device unless given. A `state_dict` of either optimizer loads into the other.

    Raises:
        ConfigError: parameters are sharded, or on several devices.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        memory: HostMemory,
        *,
        piece_bytes: int = PIECE_BYTES,
        copies: Copies | None = None,
    ) -> None:
        # Not Optimizer's: groups and states are the inner optimizer's, and would be there twice.
        self._inner = optimizer
        self._memory = memory
        self._piece_bytes = piece_bytes
        self._device = next(p.device for group in optimizer.param_groups for p in group["params"])
        self._require_whole(chain.from_iterable(group["params"] for group in optimizer.param_groups))
        self._copies = copies_for(self._device) if copies is None else copies
        # Memory of the states of each parameter that had any, by key.
        self._hosts: dict[Tensor, dict[str, list[Tensor]]] = {}
        self._nbytes: dict[Tensor, int] = {}
        if optimizer.state:
            self.load_state_dict(optimizer.state_dict())
        # Pinned memory must not be handed out while the last copies still arrive in it.
        weakref.finalize(self, self._copies.synchronize).atexit = False

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]  # a property in place of an attribute
        """The optimizer's own."""
        return self._inner.param_groups

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The optimizer's own."""
        return self._inner.defaults

    @property
    def state(self) -> Any:  # type: ignore[override]
        """States by parameter and key, as the last step left them, in host memory."""
        self._copies.synchronize()
        return self._inner.state

    @property
    def host_bytes(self) -> int:
        """Bytes of states in host memory."""
        return sum(self._nbytes.values())

    def __repr__(self) -> str:
        return f"OffloadedOptimizer({self._inner!r})"

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._inner.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self._inner.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's own, with tensors in host memory."""
        self._copies.synchronize()
        return self._inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As the optimizer does, without its tensors passing through the GPU."""
        self._copies.synchronize()
        numbers = {
            name: {key: value for key, value in states.items() if not _leaves_the_device(value)}
            for name, states in state_dict["state"].items()
        }
        self._inner.load_state_dict({**state_dict, "state": numbers})
        names = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        for name, parameter in zip(names, self._parameters(), strict=True):
            if name in numbers:
                loaded = self._inner.state[parameter]
                self._inner.state[parameter] = {
                    key: loaded[key] if key in numbers[name] else self._held(parameter, key, value)
                    for key, value in state_dict["state"][name].items()
                }

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of the optimizer, piece by piece. The host waits for no copy."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        pieces = list(self._pieces())
        waits: deque[Wait] = deque()
        # What leaves keeps its memory until the computing stream has waited for its copy.
        leaving: deque[tuple[Wait, list[Tensor]]] = deque()
        try:
            for index, piece in enumerate(pieces):
                if index == 0:
                    waits.append(self._fetch(piece))
                while len(leaving) > IN_FLIGHT - 2:
                    _let_go(leaving)
                if index + 1 < len(pieces):
                    waits.append(self._fetch(pieces[index + 1]))
                waits.popleft()()
                self._update(piece)
                leaving.append(self._write(piece))
        finally:
            while waits:
                waits.popleft()()
            while leaving:
                _let_go(leaving)
        return loss

    def _parameters(self) -> Iterator[Tensor]:
        return chain.from_iterable(group["params"] for group in self._inner.param_groups)

    def _pieces(self) -> Iterator[_Piece]:
        """What has a gradient, in the optimizer's order: random numbers are drawn in it."""
        for group in self._inner.param_groups:
            piece, size = _Piece(group, []), 0
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if parameter not in self._nbytes:
                    self._require_whole([parameter])
                # One that was never updated is alone: what it takes is not known yet.
                nbytes = self._nbytes.get(parameter, self._piece_bytes)
                if piece.parameters and size + nbytes > self._piece_bytes:
                    yield piece
                    piece, size = _Piece(group, []), 0
                piece.parameters.append(parameter)
                size += nbytes
            if piece.parameters:
                yield piece

    def _fetch(self, piece: _Piece) -> Wait:
        """Begin to copy the piece's states to the device."""
        hosts = [
            (parameter, key, value)
            for parameter in piece.parameters
            for key, value in self._inner.state.get(parameter, {}).items()
            if _leaves_the_device(value)
        ]
        tensors, wait = self._copies.fetch([leaf for *_, host in hosts for leaf in leaves(host)])
        plain = iter(tensors)
        piece.states = [(parameter, key, with_leaves(host, plain)) for parameter, key, host in hosts]
        return wait

    def _update(self, piece: _Piece) -> None:
        """The optimizer's step on the parameters of ``piece`` alone; if it fails, states are those of before."""
        inner, group = self._inner, piece.group
        groups, parameters = inner.param_groups, group["params"]
        before = {parameter: dict(inner.state.get(parameter, {})) for parameter in piece.parameters}
        for parameter, key, tensor in piece.states:
            inner.state[parameter][key] = tensor
        piece.states.clear()
        inner.param_groups, group["params"] = [group], piece.parameters
        updated = False
        try:
            inner.step()
            updated = True
        finally:
            inner.param_groups, group["params"] = groups, parameters
            if not updated:
                inner.state.update(before)

    def _write(self, piece: _Piece) -> tuple[Wait, list[Tensor]]:
        """Begin to copy the piece's states to the host; the tensors that they are copied from."""
        sources: list[Tensor] = []
        places: list[Tensor] = []
        for parameter in piece.parameters:
            self._nbytes.setdefault(parameter, 0)
            states = self._inner.state.get(parameter, {})
            for key, value in states.items():
                if not _leaves_the_device(value):
                    continue
                states[key] = self._host(parameter, key, value)
                sources += leaves(value)
                places += leaves(states[key])
        return self._copies.write(sources, places), sources

    def _held(self, parameter: Tensor, key: str, value: Tensor) -> Tensor:
        """The state ``value`` in host memory, in the parameter's dtype, as any optimizer loads it."""
        cast = value.to(parameter.dtype) if parameter.is_floating_point() else value
        host = self._host(parameter, key, cast)
        for place, source in zip(leaves(host), leaves(cast), strict=True):
            place.copy_(source)
        return host

    def _host(self, parameter: Tensor, key: str, like: Tensor) -> Tensor:
        """Host memory for the state ``key`` of ``parameter``: what it had, if ``like`` fits."""
        held, wanted = self._hosts.setdefault(parameter, {}), leaves(like)
        found = held.get(key)
        if found is None or [(h.shape, h.dtype) for h in found] != [(w.shape, w.dtype) for w in wanted]:
            found = held[key] = [self._allocate(tensor) for tensor in wanted]
            self._nbytes[parameter] = sum(leaf.nbytes for each in held.values() for leaf in each)
        return with_leaves(like, iter(found))

    def _allocate(self, like: Tensor) -> Tensor:
        strides = torch.empty_like(like, device="meta").stride()
        return self._memory.empty((like.numel(),), like.dtype).as_strided(like.shape, strides)

    def _require_whole(self, parameters: Iterator[Tensor] | list[Tensor]) -> None:
        for parameter in parameters:
            if isinstance(parameter, DTensor):
                raise ConfigError(
                    f"`train.offload_optimizer` streams states of whole parameters, and one of shape "
                    f"{tuple(parameter.shape)} is sharded. Set it to `false`, or train without FSDP and expert "
                    "parallelism."
                )
            if parameter.device != self._device:
                raise ConfigError(
                    f"`train.offload_optimizer` streams states to one device, and what trains is on {self._device} and "
                    f"{parameter.device}. Set it to `false`, or keep the model on one."
                )


class OffloadsOptimizer:
    """To be inherited before a trainer of transformers or trl, whose ``__init__`` then calls `offload_optimizer`."""

    optimizer: Optimizer
    _offloaded_name: Name | None = None

    def offload_optimizer(self, name: Name) -> None:
        """Keep the states of the optimizer, ``train.optimizer: name``, in host memory once it is made."""
        self._offloaded_name = name

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Optimizer:
        """The trainer's optimizer, with octavo's step where there is one, and states in host memory if so asked."""
        optimizer: Optimizer = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        optimizer = self.optimizer = fused_adamw_8bit(optimizer)
        if self._offloaded_name is not None and not isinstance(optimizer, OffloadedOptimizer):
            optimizer = self.optimizer = offloaded(optimizer, self._offloaded_name)
        return optimizer


def offloaded(optimizer: Optimizer, name: Name) -> OffloadedOptimizer:
    """``optimizer``, which ``train.optimizer`` calls ``name``, with its states in host memory, pinned for a GPU.

    Raises:
        OctavoError: the host has not got the memory, or parameters are sharded or on several devices.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    sizes = [size for p in parameters for size in state_tensors(name, tuple(p.shape), p.element_size())]
    memory = HostMemory(
        parameters[0].device,
        sizes,
        asked="`train.offload_optimizer`",
        contents="the optimizer's states",
        otherwise="set it to `false`",
    )
    return OffloadedOptimizer(optimizer, memory)


def _leaves_the_device(value: object) -> bool:
    """Whether a state is copied: numbers stay where the optimizer keeps them."""
    return isinstance(value, Tensor) and value.ndim > 0


def _let_go(leaving: deque[tuple[Wait, list[Tensor]]]) -> None:
    wait, tensors = leaving.popleft()
    wait()
    tensors.clear()
