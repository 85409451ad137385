"""``octavo.graph_layers``: decoder layers replayed as CUDA graphs while they train, in place of gradient checkpointing.

A layer of a training step is some 250 launches, which take the host longer than the GPU takes for the work, up to 8k
tokens. Recorded (:mod:`octavo.integrations.recording`) it is two. A recording holds for calls that are alike: the same
shapes, plain arguments, hooks, settings and memory of the weights. All other calls run as before, and are counted with
the reason.
"""

import logging
import operator
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from octavo.errors import EngineError, first_line
from octavo.integrations.layers import TrainedLayer, decoder_layers, set_graphs, trained_layers
from octavo.integrations.recorder import RECORDERS, Recorder, Slots, Unrecordable
from octavo.integrations.recording import Autocast, Call, Recording, flatten, replay
from octavo.integrations.taps import is_collector
from octavo.nn.experts import Float8Experts, OctavoExperts
from octavo.nn.linear import Float8Linear

logger = logging.getLogger("octavo")

WARM_UP = 2
"""Forwards of a kind that a layer runs as before: they compile, tune and load."""
LIMIT = 4
"""Kinds of calls, as of row lengths, that a layer is recorded for; others run as before."""
# Kinds of calls that are remembered while they wait for their turn.
_WAITING = 64
_EARLY = f"the first {WARM_UP} forwards of a kind"
# Of all recordings together: memory that is lost anew with each layer is noticed after the first few.
_MOST_KEPT = 64 << 20
_OTHERS = f"{LIMIT} other kinds of calls, as row lengths, are recorded"


@dataclass(frozen=True)
class GraphsState:
    """What became of :func:`graph_layers` so far.

    ``replayed``: forwards of a layer by a recording. ``unrecorded``: other training forwards, by the reason.
    ``recordings``: pairs of forward and backward that are held. ``buffer_bytes``: the buffers that they share;
    ``kept_bytes``: memory from inside of recordings that was not free again at their end, 0 where all is well.
    """

    layers: tuple[str, ...]
    recordings: int
    replayed: int
    unrecorded: dict[str, int]
    buffer_bytes: int
    kept_bytes: int

    def __str__(self) -> str:
        text = f"{self.recordings} recordings, {self.replayed} forwards replayed"
        reasons = [f"{count} not: {reason}" for reason, count in self.unrecorded.items()]
        return "; ".join([text, *reasons])


def graph_layers(model: nn.Module, on: bool = True) -> nn.Module:
    """Replay the decoder layers of ``model`` as CUDA graphs while they train; ``on=False`` takes that back.

    A replay takes the place of gradient checkpointing, so that must be on for a layer to be recorded. It is for a
    model on one GPU. Losses and gradients are the same, bit for bit. A layer runs as before in its first two forwards
    of each kind, wherever it draws random numbers (dropout), and wherever its call or its weights do not allow a
    recording; :func:`graphs_state` counts these forwards with the reason, and each reason is logged once. Works with
    and without :func:`octavo.compile_layers`. All recordings share one layer's memory. Returns ``model``.

    Raises :class:`octavo.errors.EngineError` where ``model`` has no decoder layer, or is not on a GPU.
    """
    layers = decoder_layers(model, "records")
    if not on:
        for layer in layers:
            set_graphs(layer, None)
        return model
    device = next(layers[0].parameters()).device
    if device.type not in RECORDERS:
        raise EngineError(
            f"CUDA graphs need a GPU, and the layers of {type(model).__name__} are on {device}. Load the model on one, "
            "or leave graphs off."
        )
    shared = _Shared(RECORDERS[device.type](device), device)
    for layer in layers:
        set_graphs(layer, LayerGraphs(shared))
    return model


def graphs_state(model: nn.Module) -> GraphsState | None:
    """What became of :func:`graph_layers`, ``None`` where it is not on."""
    found = [(name, layer._graphs) for name, layer in trained_layers(model) if layer._graphs is not None]
    graphs = [one for _, one in found if isinstance(one, LayerGraphs)]
    if not graphs:
        return None
    shared = graphs[0].shared
    return GraphsState(
        tuple(name for name, _ in found),
        sum(len(one.recordings) for one in graphs),
        shared.replayed,
        dict(shared.unrecorded),
        shared.slots.bytes,
        shared.recorder.kept_bytes,
    )


class _Shared:
    """What the layers of one model have in common."""

    def __init__(self, recorder: Recorder, device: torch.device) -> None:
        self.recorder, self.device = recorder, device
        self.slots = Slots()
        self.replayed = 0
        self.unrecorded: Counter[str] = Counter()
        self.stopped: str | None = None
        """Why nothing more is recorded."""

    def count(self, reason: str) -> None:
        """One forward runs as before."""
        self.unrecorded[reason] += 1
        if self.unrecorded[reason] == 1 and reason != _EARLY:
            logger.warning("A decoder layer runs without a CUDA graph: %s.", reason)


class LayerGraphs:
    """The recordings of one layer, by kind of call."""

    def __init__(self, shared: _Shared) -> None:
        self.shared = shared
        self.recordings: dict[Any, Recording] = {}
        self._waiting: OrderedDict[Any, int] = OrderedDict()
        self._watched: _Watched | None = None
        self._facts: Any = None
        self._refusal: str | None = None

    def clear(self) -> None:
        """Drop all recordings."""
        if self.recordings and self.shared.device.type == "cuda":
            # One may be running.
            torch.cuda.synchronize(self.shared.device)
        self.recordings.clear()
        self._waiting.clear()

    def run(self, layer: TrainedLayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[bool, Any]:
        """(Whether the layer ran by a recording, its output); evaluation and generation do not."""
        if not layer.training or not torch.is_grad_enabled():
            return False, None
        try:
            call, tapping = self._call(layer, args, kwargs)
            recording = self._recording(layer, call)
        except Unrecordable as error:
            self.shared.count(str(error))
            return False, None
        self.shared.replayed += 1
        output, taken = recording.output(replay(recording, call.tensors))
        tapping.hand(taken)
        for hook in layer._forward_hooks.values():
            hook(layer, args, output)
        return True, output

    def _call(self, layer: TrainedLayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Call, Any]:
        """The call taken apart, and its taps; raises :class:`Unrecordable` where it can have no recording."""
        if not layer.gradient_checkpointing:
            raise Unrecordable("gradient checkpointing is off, whose place it takes")
        if kwargs.get("past_key_values") is not None or kwargs.get("use_cache"):
            raise Unrecordable("it is called with a cache")
        outside = (layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
        if any(outside) or not all(is_collector(hook) for hook in layer._forward_hooks.values()):
            raise Unrecordable("there is a hook on the layer itself")
        if "forward" in layer.__dict__:
            raise Unrecordable("its forward was replaced, as accelerate does for a device map")
        tapping = layer.tapping()
        if tapping is None:
            raise Unrecordable("a hook inside the layer may change what it sees")
        tensors: list[Tensor] = []
        skeleton = flatten((args, kwargs), tensors)
        return Call(skeleton, tuple(tensors), tapping.names, Autocast.now(self.shared.device.type)), tapping

    def _recording(self, layer: TrainedLayer, call: Call) -> Recording:
        """The recording for a call, made now if it is its turn; raises :class:`Unrecordable` where there is none."""
        if self._watched is None or self._watched.seen != layer.taps.seen:
            self._watched = _Watched(layer, self.shared.device)
        facts = self._watched.facts()
        if facts != self._facts:
            self.clear()
            self._facts = facts
            self._refusal = self._watched.refusal()
        if self._refusal is not None:
            raise Unrecordable(self._refusal)
        tensors = tuple([(t.shape, t.stride(), t.dtype, t.device, t.requires_grad) for t in call.tensors])
        key = (call.skeleton, tensors, call.names, call.autocast, _environment())
        recording = self.recordings.get(key)
        if recording is not None:
            return recording
        if self.shared.stopped is not None:
            raise Unrecordable(self.shared.stopped)
        for tensor in call.tensors:
            if not _fixed(tensor, self.shared.device):
                raise Unrecordable(f"an argument is a {type(tensor).__name__} on {tensor.device}")
        if len(self.recordings) >= LIMIT:
            raise Unrecordable(_OTHERS)
        seen = self._waiting.pop(key, 0)
        if seen < WARM_UP:
            self._waiting[key] = seen + 1
            if len(self._waiting) > _WAITING:
                self._waiting.popitem(last=False)
            raise Unrecordable(_EARLY)
        try:
            recording = Recording(layer, call, self.shared.slots, self.shared.recorder)
        except Unrecordable as error:
            self.shared.slots.forget()
            self._refusal = str(error)
            raise
        except RuntimeError as error:
            # Of torch's making: what one layer cannot, the next will not either.
            self.shared.slots.forget()
            self.shared.stopped = f"recording it failed: {first_line(error)}"
            logger.debug("Recording a decoder layer failed.", exc_info=error)
            raise Unrecordable(self.shared.stopped) from error
        self.recordings[key] = recording
        kept = self.shared.recorder.kept_bytes
        if kept > _MOST_KEPT:
            self.shared.stopped = f"recordings kept {kept / 1e9:.2f} GB that they should have given back"
            logger.warning(
                "No more decoder layers are recorded as CUDA graphs: %s. Set graphs to false if memory runs short.",
                self.shared.stopped,
            )
        return recording


def _several_processes() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _fixed(tensor: Tensor, device: torch.device) -> bool:
    """Whether a recording on ``device`` can read this tensor: a plain one, with memory there."""
    return type(tensor) in (nn.Parameter, Tensor) and tensor.device == device


class _Watched:
    """What a recording of a layer holds fixed beside the call: where weights lie, what trains, and settings."""

    def __init__(self, layer: TrainedLayer, device: torch.device) -> None:
        self.seen, self._device = layer.taps.seen, device
        modules = list(layer.modules())
        self._weights = [weights for module in modules for weights in (module._parameters, module._buffers) if weights]
        self._ours: list[Any] = [module for module in modules if isinstance(module, OctavoExperts | Float8Linear)]
        configs = (getattr(module, "config", None) for module in modules)
        self._configs = list({id(one): one for one in configs if isinstance(one, PreTrainedConfig)}.values())
        self._adapters: list[Any] = []
        # whoever has wrappers of peft has imported it
        if "peft" in sys.modules:
            from peft.tuners.tuners_utils import BaseTunerLayer

            self._adapters = [module for module in modules if isinstance(module, BaseTunerLayer)]
        self._region = layer.region

    def refusal(self) -> str | None:
        """Why the weights allow no recording, if they do not."""
        if _several_processes():
            return "several processes train the model"
        if any(isinstance(module, Float8Experts) and module.ring is not None for module in self._ours):
            return "its experts are in host memory, and a graph cannot wait for their copies"
        for weights in self._weights:
            for name, one in weights.items():
                if one is not None and not _fixed(one, self._device):
                    return f"{name} is a {type(one).__name__} on {one.device}, and not in fixed memory of the GPU"
        return None

    def facts(self) -> Any:
        """Compares equal as long as nothing changed."""
        weights = [one for weights in self._weights for one in weights.values() if one is not None]
        return (
            list(map(Tensor.data_ptr, weights)),
            list(map(_REQUIRES_GRAD, weights)),
            list(map(id, weights)),
            [module.settings for module in self._ours],
            [(one._attn_implementation, getattr(one, "_experts_implementation", None)) for one in self._configs],
            [
                (one.disable_adapters, list(one.active_adapters), list(one.merged_adapters), dict(_scaling(one)))
                for one in self._adapters
            ],
            id(self._region),
        )


_REQUIRES_GRAD: Callable[[Tensor], bool] = operator.attrgetter("requires_grad")


def _scaling(adapter: Any) -> dict[str, float]:
    scaling: dict[str, float] = getattr(adapter, "scaling", {})
    return scaling


def _environment() -> tuple[object, ...]:
    """Settings of torch that say how an operator computes."""
    backends = torch.backends.cuda
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        backends.flash_sdp_enabled(),
        backends.mem_efficient_sdp_enabled(),
        backends.math_sdp_enabled(),
        backends.cudnn_sdp_enabled(),
        tuple(torch._C._get_sdp_priority_order()),
    )
