"""One layer recorded: its forward, and its recomputed forward with its backward, each replayed as one piece of work.

Gradient checkpointing keeps a layer's input, computes the layer again in the backward pass, and lets autograd run
through it. Here both halves run on fixed buffers, so that a GPU can replay them as two CUDA graphs: what a layer costs
the host is then copies in, one launch, and copies out. What is kept between the halves is the input alone, saved
through autograd, so hooks on saved tensors (offloading) see it as they see a checkpoint's.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._utils import _unflatten_dense_tensors
from torch.autograd.graph import saved_tensors_hooks

from octavo.integrations.layers import TrainedLayer
from octavo.integrations.recorder import Recorder, Slot, Slots, Unrecordable
from octavo.integrations.taps import Names

_TENSOR = "tensor"
_LEAVES = (bool, int, float, str, type(None), torch.dtype, torch.device)


def flatten(value: Any, tensors: list[Tensor]) -> Any:
    """``value`` without its tensors, which go to ``tensors``: hashable, and equal for what is built alike.

    Raises :class:`Unrecordable` for anything but tensors, plain values, and tuples, lists and dictionaries of them.
    """
    kind = type(value)
    if isinstance(value, Tensor):
        tensors.append(value)
        return _TENSOR
    if kind in _LEAVES:
        # the type as well: True is 1
        return (kind, value)
    if kind in (tuple, list):
        return (kind, tuple([flatten(one, tensors) for one in value]))
    if kind is dict:
        return (kind, tuple([(name, flatten(one, tensors)) for name, one in value.items()]))
    raise Unrecordable(f"it takes or returns a {kind.__name__}, which is no tensor and no plain value")


def restore(skeleton: Any, tensors: Iterator[Tensor]) -> Any:
    """The value that :func:`flatten` took apart, with these tensors."""
    if skeleton == _TENSOR:
        return next(tensors)
    kind, content = skeleton
    if kind in _LEAVES:
        return content
    if kind is dict:
        return {name: restore(one, tensors) for name, one in content}
    return kind(restore(one, tensors) for one in content)


@dataclass(frozen=True)
class Autocast:
    """What `torch.autocast` is set to."""

    device_type: str
    enabled: bool
    dtype: torch.dtype
    cached: bool

    @classmethod
    def now(cls, device_type: str) -> "Autocast":
        """The setting in this thread."""
        return cls(
            device_type,
            torch.is_autocast_enabled(device_type),
            torch.get_autocast_dtype(device_type),
            torch.is_autocast_cache_enabled(),
        )

    def set(self) -> torch.autocast:
        """The same setting for a block."""
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=self.enabled, cache_enabled=self.cached)


@dataclass(frozen=True)
class Call:
    """One call of a layer: its arguments taken apart, the taps that it needs, and autocast."""

    skeleton: Any
    tensors: tuple[Tensor, ...]
    names: Names
    autocast: Autocast


@dataclass
class _Results:
    """What one forward gave: the layer's output and what taps kept, taken apart."""

    skeleton: Any
    tensors: list[Tensor]
    """Of the output, and of outputs that hooks get: with gradient."""
    seen_skeleton: Any
    seen: list[Tensor]
    """Of arguments that hooks get: without."""


class Recording:
    """Both halves of one layer for calls that are alike."""

    def __init__(self, layer: TrainedLayer, call: Call, slots: Slots, recorder: Recorder) -> None:
        """Warm up on the arguments of ``call``, then record. Nothing but the slots is written.

        Raises :class:`Unrecordable`, or what torch raises, where that does not work.
        """
        self._layer, self._names, self._autocast = layer, call.names, call.autocast
        self._arguments = call.skeleton
        self.differentiable = [place for place, tensor in enumerate(call.tensors) if tensor.requires_grad]
        self._rest = [place for place, tensor in enumerate(call.tensors) if not tensor.requires_grad]
        self.trained = _unique(parameter for parameter in layer.parameters() if parameter.requires_grad)
        self._inputs = [slots.get(("argument", place), tensor) for place, tensor in enumerate(call.tensors)]
        for slot, tensor in zip(self._inputs, call.tensors, strict=True):
            slot.put(tensor)
        self._recorder = recorder
        self._slots = slots
        self._learned = False
        recorder.warm(self._backward_work)
        self._replay_forward = recorder.record(self._forward_work)
        self._replay_backward = recorder.record(self._backward_work)
        slots.forget()

    def forward(self, differentiable: Sequence[Tensor], rest: Sequence[Tensor]) -> list[Tensor]:
        """The layer's output and the outputs that hooks get, as fresh tensors."""
        self._fill(differentiable, rest)
        self._outputs[0].forget()
        self._replay_forward()
        return [slot.give() for slot in self._outputs]

    def backward(
        self, differentiable: Sequence[Tensor], rest: Sequence[Tensor], grads: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """The gradients of the differentiable arguments and of `trained`, as fresh tensors."""
        self._fill(differentiable, rest)
        for slot, place in zip(self._output_grads, self._grad_places, strict=True):
            grad = grads[place]
            if grad is None:
                slot.zero()
            else:
                slot.put(grad)
        for input_grad in self._input_grads:
            if input_grad is not None:
                input_grad.forget()
        ambient = Autocast.now(self._autocast.device_type)
        if ambient.enabled:
            # Recorded was the usual: autocast around the forward pass alone.
            self._backward_work(ambient)
        else:
            self._replay_backward()
        found: list[Tensor | None] = [None if slot is None else slot.give() for slot in self._input_grads]
        parameters: list[Tensor | None] = [None] * len(self.trained)
        for slot, places in self._flats:
            views = _unflatten_dense_tensors(slot.buffer.clone(), [self.trained[place] for place in places])
            for place, view in zip(places, views, strict=True):
                parameters[place] = view
        return found + parameters

    def output(self, outputs: Sequence[Tensor]) -> tuple[Any, list[tuple[Any, Any]]]:
        """(The layer's output, what its hooks get) from what :meth:`forward` gave.

        Arguments that hooks get are the buffers themselves: they are read at once.
        """
        output, after = restore(self._output_skeleton, iter(outputs))
        before = restore(self._seen_skeleton, iter([slot.buffer for slot in self._seen]))
        return output, list(zip(before, after, strict=True))

    def without_gradient(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Those of the outputs that have none."""
        return [tensor for place, tensor in enumerate(outputs) if place not in self._grad_places]

    def _fill(self, differentiable: Sequence[Tensor], rest: Sequence[Tensor]) -> None:
        for place, tensor in zip(self.differentiable, differentiable, strict=True):
            self._inputs[place].put(tensor)
        for place, tensor in zip(self._rest, rest, strict=True):
            self._inputs[place].put(tensor)

    def _forward_work(self) -> None:
        results = self._run(self._leaves(), self._aliases(), keeps=False)
        with torch.no_grad():
            for slot, tensor in zip(self._seen, results.seen, strict=True):
                slot.write(tensor)
            # the first last: its buffer is that of the layer's input, of which others may be views
            for slot, tensor in list(zip(self._outputs, results.tensors, strict=True))[::-1]:
                slot.write(tensor)

    def _backward_work(self, ambient: Autocast | None = None) -> None:
        leaves = self._leaves()
        aliases = self._aliases()
        results = self._run(leaves, aliases, keeps=True)
        if not self._learned:
            self._learn_outputs(results, leaves)
        wanted = [results.tensors[place] for place in self._grad_places]
        inputs = [leaves[place] for place in self.differentiable] + list(aliases.values())
        # as in a backward pass outside of autocast
        around = ambient or Autocast(self._autocast.device_type, False, self._autocast.dtype, self._autocast.cached)
        with around.set():
            grads = torch.autograd.grad(
                wanted, inputs, [slot.buffer for slot in self._output_grads], allow_unused=True, materialize_grads=False
            )
        if not self._learned:
            self._learn_grads(grads)
        with torch.no_grad():
            for slot, places in self._flats:
                flat = slot.buffer
                views = _unflatten_dense_tensors(flat, [self.trained[place] for place in places])
                torch._foreach_copy_(list(views), [grads[len(self.differentiable) + place] for place in places])
            for grad_slot, grad in zip(self._input_grads, grads, strict=False):
                if grad_slot is not None:
                    grad_slot.write(grad)

    def _learn_outputs(self, results: _Results, leaves: Sequence[Tensor]) -> None:
        """Buffers for what a forward gives, and for the gradients of that."""
        self._output_skeleton, self._seen_skeleton = results.skeleton, results.seen_skeleton
        self._grad_places = [place for place, tensor in enumerate(results.tensors) if tensor.requires_grad]
        if not self._grad_places:
            raise Unrecordable("nothing that it returns has a gradient")
        self._seen = [self._slots.get(("seen", place), tensor) for place, tensor in enumerate(results.seen)]
        self._outputs = [self._slots.get(("output", place), tensor) for place, tensor in enumerate(results.tensors)]
        self._output_grads = [
            self._slots.get(("gradient", place), results.tensors[place]) for place in self._grad_places
        ]
        # A layer's output is the next one's input, so it is left where that one reads it.
        if self.differentiable[:1] == [0] and _alike(results.tensors[0], leaves[0]):
            self._outputs[0] = self._inputs[0]

    def _learn_grads(self, grads: Sequence[Tensor | None]) -> None:
        """Buffers for the gradients of arguments and parameters."""
        inputs, parameters = grads[: len(self.differentiable)], grads[len(self.differentiable) :]
        self._input_grads: list[Slot | None] = [
            None if grad is None else self._slots.get(("input gradient", place), grad)
            for place, grad in enumerate(inputs)
        ]
        # And the gradient of its input is that of the output of the one before.
        first = inputs[0] if inputs else None
        if first is not None and self._grad_places[0] == 0 and _alike(first, self._output_grads[0].buffer):
            self._input_grads[0] = self._output_grads[0]
        self._flats: list[tuple[Slot, list[int]]] = []
        for dtype in dict.fromkeys(parameter.dtype for parameter in self.trained):
            places = [
                place
                for place, grad in enumerate(parameters)
                if grad is not None and self.trained[place].dtype == dtype
            ]
            if places:
                size = sum(self.trained[place].numel() for place in places)
                like = torch.empty(size, dtype=dtype, device=self.trained[places[0]].device)
                self._flats.append((self._slots.get("parameters", like), places))
        self._learned = True

    def _leaves(self) -> list[Tensor]:
        """The buffers as arguments: those that want a gradient are leaves, so nothing of the recording outlives it."""
        return [
            slot.buffer.detach().requires_grad_(place in self.differentiable) for place, slot in enumerate(self._inputs)
        ]

    def _aliases(self) -> dict[int, nn.Parameter]:
        """Parameters that share the memory of those that train, by the id of those.

        A parameter's gradient ends in a node that autograd keeps for it, bound to the stream of the first use, which is
        not the recording's; the aliases have nodes of their own.
        """
        return {id(parameter): nn.Parameter(parameter.detach()) for parameter in self.trained}

    def _run(self, leaves: Sequence[Tensor], aliases: dict[int, nn.Parameter], *, keeps: bool) -> _Results:
        """The layer between its taps, on these leaves and with these parameters. ``keeps``: what a backward pass needs;
        without one it would stay for good, in cycles that no collector sees.
        """
        tapping = self._layer.taps.tapping(self._names)
        args, kwargs = restore(self._arguments, iter(leaves))
        # Casts of parameters that autocast keeps: none from outside is used within, and none from within later.
        torch.clear_autocast_cache()
        with ExitStack() as around:
            # Hooks on saved tensors are for what is kept between forward and backward, and inside nothing is.
            around.enter_context(saved_tensors_hooks(_same if keeps else _nothing, _same))
            around.enter_context(_in_place(self._layer, aliases))
            around.enter_context(tapping.placed())
            around.enter_context(self._autocast.set())
            around.enter_context(torch.enable_grad())
            output = self._layer.region(self._layer, self._names, *args, **kwargs)
        taken = tapping.take()
        torch.clear_autocast_cache()
        tensors: list[Tensor] = []
        seen: list[Tensor] = []
        skeleton = flatten((output, [after for _, after in taken]), tensors)
        seen_skeleton = flatten([before for before, _ in taken], seen)
        return _Results(skeleton, tensors, seen_skeleton, seen)


class Replayed(torch.autograd.Function):
    """A layer by its recording: saves the differentiable arguments, returns gradients for them and for parameters."""

    @staticmethod
    def forward(ctx: Any, recording: Recording, rest: tuple[Tensor, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        given = tensors[: len(recording.differentiable)]
        ctx.recording, ctx.rest = recording, rest
        ctx.save_for_backward(*given)
        ctx.set_materialize_grads(False)
        outputs = recording.forward(given, rest)
        ctx.mark_non_differentiable(*recording.without_gradient(outputs))
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, None, *ctx.recording.backward(ctx.saved_tensors, ctx.rest, grads))


def replay(recording: Recording, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The outputs of a recorded layer for these arguments, with gradient."""
    given = [tensor for tensor in tensors if tensor.requires_grad]
    rest = tuple([tensor for tensor in tensors if not tensor.requires_grad])
    return list(Replayed.apply(recording, rest, *given, *recording.trained))  # type: ignore[no-untyped-call]


@contextmanager
def _in_place(layer: nn.Module, aliases: dict[int, nn.Parameter]) -> Iterator[None]:
    """Inside the block, modules have these for the parameters of those ids."""
    changed = [
        (module._parameters, name, parameter)
        for module in layer.modules()
        for name, parameter in module._parameters.items()
        if id(parameter) in aliases
    ]
    for parameters, name, parameter in changed:
        parameters[name] = aliases[id(parameter)]
    try:
        yield
    finally:
        for parameters, name, parameter in changed:
            parameters[name] = parameter


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _nothing(tensor: Tensor) -> None:
    return None


def _unique(parameters: Iterator[nn.Parameter]) -> list[nn.Parameter]:
    return list({id(parameter): parameter for parameter in parameters}.values())


def _alike(one: Tensor, other: Tensor) -> bool:
    return (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


__all__ = ["Autocast", "Call", "Recording", "flatten", "replay", "restore"]
