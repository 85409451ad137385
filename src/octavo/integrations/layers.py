"""The class that decoder layers take while octavo runs them: their own, with another way to train.

Two things can be done to a layer, apart or together: its inside is compiled (:mod:`octavo.integrations.compiled`), and
its checkpointed forward and backward are recorded and replayed (:mod:`octavo.integrations.graphs`).
"""

import sys
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from octavo.errors import EngineError
from octavo.integrations.taps import Names, Tapping, Taps


class Graphs(Protocol):
    """What :mod:`octavo.integrations.graphs` puts on a layer."""

    def run(self, layer: "TrainedLayer", args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[bool, Any]:
        """(Whether the layer ran by a recording, its output)."""

    def clear(self) -> None:
        """Drop what is recorded."""


class TrainedLayer(nn.Module):
    """A decoder layer under one of octavo's ways to train it; not instantiated by itself.

    Generation, evaluation, and forwards with a hook inside the layer that may change what it sees run as the layer's
    own class does.
    """

    _own: ClassVar[type[nn.Module]]
    _compiled: Callable[..., Any] | None
    _shape: tuple[int, int] | None
    _graphs: Graphs | None
    _taps: Taps

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the layer's own class; a recording takes the place of gradient checkpointing."""
        if self._graphs is not None:
            ran, output = self._graphs.run(self, args, kwargs)
            if ran:
                return output
        return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the layer's own class."""
        if self._compiled is not None and self.training and kwargs.get("past_key_values") is None:
            tapping = self.tapping()
            if tapping is not None:
                return tapping.run(self._compiled, self, args, kwargs)
        return self._own.forward(self, *args, **kwargs)

    def tapping(self) -> Tapping | None:
        """The taps for a forward of this layer now; ``None`` where a hook inside may change what it sees."""
        modules, anew = self._taps.modules(self)
        # whoever has wrappers of peft has imported it
        if anew and self._compiled is not None and "peft" in sys.modules:
            from octavo.integrations.adoption import adopt_plain

            for _, module in modules:
                adopt_plain(module)
        return self._taps.plan(self)

    @property
    def taps(self) -> Taps:
        """Those of this layer."""
        return self._taps

    @property
    def region(self) -> Callable[..., Any]:
        """What runs between the taps: called with the layer, the taps' names, and the layer's arguments."""
        return region if self._compiled is None else self._compiled


def region(layer: Any, taps: Names, *args: Any, **kwargs: Any) -> Any:
    """The forward of the layer's own class."""
    # taps: hooks are not among what torch watches for changes, arguments are
    return layer._own.forward(layer, *args, **kwargs)


def decoder_layers(model: nn.Module, verb: str) -> list[nn.Module]:
    """The layers of ``model`` that transformers can checkpoint.

    Raises :class:`octavo.errors.EngineError` where there is none; ``verb`` says what they were wanted for.
    """
    layers: list[nn.Module] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise EngineError(
            f"{type(model).__name__} has no decoder layer that transformers can checkpoint, and these are what octavo "
            f"{verb}. Leave that off for this model."
        )
    return layers


def trained_layers(model: nn.Module) -> list[tuple[str, TrainedLayer]]:
    """The layers of ``model`` that have octavo's class, by name."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, TrainedLayer)]


def set_compiled(layer: nn.Module, compiled: Callable[..., Any] | None, shape: tuple[int, int] | None = None) -> None:
    """Have ``layer`` run ``compiled`` while it trains; ``None`` for its own forward. What was recorded is dropped.

    ``shape``: that of the batches [rows, tokens] for which ``compiled`` is to have a graph of its own.
    """
    trained = _dressed(layer)
    if trained._compiled is not None and "peft" in sys.modules:
        from octavo.integrations.adoption import release_plain

        for module in trained.modules():
            release_plain(module)
    if trained._graphs is not None:
        trained._graphs.clear()
    trained.__dict__.update(_compiled=compiled, _shape=shape)
    # taps that were needed once need not be for another graph, and modules are to be adopted anew
    trained.__dict__["_taps"] = Taps()
    _undress_plain(trained)


def set_graphs(layer: nn.Module, graphs: Graphs | None) -> None:
    """Have ``layer`` ask ``graphs`` at each call; ``None`` for none."""
    trained = _dressed(layer)
    if trained._graphs is not None:
        trained._graphs.clear()
    trained.__dict__["_graphs"] = graphs
    _undress_plain(trained)


def _dressed(layer: nn.Module) -> TrainedLayer:
    if not isinstance(layer, TrainedLayer):
        layer.__class__ = _subclass(type(layer))
        layer.__dict__.update(_compiled=None, _shape=None, _graphs=None, _taps=Taps())
    assert isinstance(layer, TrainedLayer)
    return layer


def _undress_plain(layer: TrainedLayer) -> None:
    if layer._compiled is None and layer._graphs is None:
        for name in ("_compiled", "_shape", "_graphs", "_taps"):
            del layer.__dict__[name]
        layer.__class__ = layer._own  # type: ignore[assignment]


_classes: dict[type[nn.Module], type[nn.Module]] = {}


def _subclass(own: type[nn.Module]) -> type[nn.Module]:
    """``own`` with octavo's way to train, under its own name: sharding and recording look for it."""
    if own not in _classes:
        _classes[own] = type(own.__name__, (TrainedLayer, own), {"_own": own, "__module__": own.__module__})
    return _classes[own]
