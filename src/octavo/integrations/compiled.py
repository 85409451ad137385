"""``octavo.compile_layers``: decoder layers through ``torch.compile``, one graph for all layers of a kind.

Between the products of a training step lie norms, rotary embeddings, residuals, casts, LoRA's additions and a router:
in eager mode each is a kernel that reads and writes every hidden state. Compiled, they are a few kernels per layer; the
FP8 products stay the operators that they are. What is compiled is the inside of a layer, so gradient checkpointing,
hooks on the layer and everything outside of it work as before.
"""

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from octavo.integrations import layers as own
from octavo.integrations.layers import decoder_layers, set_compiled, trained_layers


def compile_layers(model: nn.Module, on: bool = True, *, backend: str = "inductor") -> nn.Module:
    """Run the decoder layers of ``model`` as compiled graphs while they train; ``on=False`` takes that back.

    Compiling happens in the first training step, once per kind of layer, and once more when the length of the rows
    first changes. Outputs and gradients are those of the eager layer up to rounding: between elementwise operations a
    compiled graph rounds less often. LoRA that peft put on the weight of an unquantized linear layer by
    ``target_parameters`` is added to the layer's output and no longer to the weight. Parameters, their names and the
    class names of the layers stay. ``backend``: of ``torch.compile``. Returns ``model``.

    Raises :class:`octavo.errors.EngineError` where ``model`` has no layer that can be compiled.
    """
    regions: dict[tuple[Any, ...], Callable[..., Any]] = {}
    for layer in decoder_layers(model, "compiles"):
        set_compiled(layer, None)
        if on:
            # a layer of another kind would be a recompilation, of which torch allows a few for each piece of code
            kind = tuple((name, type(module)) for name, module in layer.named_modules())
            if kind not in regions:
                regions[kind] = _compiled(backend)
            set_compiled(layer, regions[kind])
    return model


def compiled_layers(model: nn.Module) -> list[str]:
    """The names of the layers of ``model`` for which :func:`compile_layers` is on."""
    return [name for name, layer in trained_layers(model) if layer._compiled is not None]


def _compiled(backend: str) -> Callable[..., Any]:
    """A compiled function with recompilations of its own: torch counts them by code object."""
    copy = types.FunctionType(own.region.__code__.replace(), vars(own), "layer")
    return torch.compile(copy, backend=backend)
