"""``octavo.compile_layers``: decoder layers through ``torch.compile``, one graph for all layers of a kind.

Between the products of a training step lie norms, rotary embeddings, residuals, casts, LoRA's additions and a router:
in eager mode each is a kernel that reads and writes every hidden state. Compiled, they are a few kernels per layer; the
FP8 products stay the operators that they are. What is compiled is the inside of a layer, so gradient checkpointing,
hooks on the layer and everything outside of it work as before.
"""

import sys
import types
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from octavo.errors import EngineError
from octavo.integrations.taps import Taps


class CompiledLayer(nn.Module):
    """A decoder layer that runs as a compiled graph while it trains; not instantiated by itself.

    Generation, evaluation, and forwards with a hook inside the layer that may change what it sees run as the layer's
    own class does.
    """

    _own: ClassVar[type[nn.Module]]
    _region: Callable[..., Any]
    _taps: Taps

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the layer's own class."""
        if self.training and kwargs.get("past_key_values") is None:
            modules, anew = self._taps.modules(self)
            # whoever has wrappers of peft has imported it
            if anew and "peft" in sys.modules:
                from octavo.integrations.adoption import adopt_plain

                for _, module in modules:
                    adopt_plain(module)
            ran, output = self._taps.run(self, self._region, args, kwargs)
            if ran:
                return output
        return self._own.forward(self, *args, **kwargs)


def compile_layers(model: nn.Module, on: bool = True, *, backend: str = "inductor") -> nn.Module:
    """Run the decoder layers of ``model`` as compiled graphs while they train; ``on=False`` takes that back.

    Compiling happens in the first training step, once per kind of layer, and once more when the length of the rows
    first changes. Outputs and gradients are those of the eager layer up to rounding: between elementwise operations a
    compiled graph rounds less often. LoRA that peft put on the weight of an unquantized linear layer by
    ``target_parameters`` is added to the layer's output and no longer to the weight. Parameters, their names and the
    class names of the layers stay. ``backend``: of ``torch.compile``. Returns ``model``.

    Raises :class:`octavo.errors.EngineError` where ``model`` has no layer that can be compiled.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise EngineError(
            f"{type(model).__name__} has no decoder layer that transformers can checkpoint, and these are what octavo "
            "compiles. Leave compiling off for this model."
        )
    regions: dict[tuple[Any, ...], Callable[..., Any]] = {}
    for layer in layers:
        _restore(layer)
        if on:
            # a layer of another kind would be a recompilation, of which torch allows a few for each piece of code
            kind = tuple((name, type(module)) for name, module in layer.named_modules())
            if kind not in regions:
                regions[kind] = _compiled(backend)
            layer.__class__ = _subclass(type(layer))
            layer.__dict__["_region"], layer.__dict__["_taps"] = regions[kind], Taps()
    return model


def compiled_layers(model: nn.Module) -> list[str]:
    """The names of the layers of ``model`` for which :func:`compile_layers` is on."""
    return [name for name, module in model.named_modules() if isinstance(module, CompiledLayer)]


def _restore(layer: nn.Module) -> None:
    if isinstance(layer, CompiledLayer):
        layer.__class__ = layer._own  # type: ignore[assignment]
        del layer.__dict__["_region"], layer.__dict__["_taps"]
        if "peft" in sys.modules:
            from octavo.integrations.adoption import release_plain

            for module in layer.modules():
                release_plain(module)


def _compiled(backend: str) -> Callable[..., Any]:
    """A compiled function with recompilations of its own: torch counts them by code object."""
    own = types.FunctionType(_region.__code__.replace(), globals(), "layer")
    return torch.compile(own, backend=backend)


def _region(layer: Any, taps: tuple[Any, ...], *args: Any, **kwargs: Any) -> Any:
    # taps: hooks are not among what torch watches for changes, arguments are
    return layer._own.forward(layer, *args, **kwargs)


_classes: dict[type[nn.Module], type[nn.Module]] = {}


def _subclass(own: type[nn.Module]) -> type[nn.Module]:
    """``own`` that runs compiled, under its own name: sharding and recording look for it."""
    if own not in _classes:
        _classes[own] = type(own.__name__, (CompiledLayer, own), {"_own": own, "__module__": own.__module__})
    return _classes[own]
