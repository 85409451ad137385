"""``octavo.compile_layers``: decoder layers through ``torch.compile``, one graph for all layers of a kind.

Between the products of a training step lie norms, rotary embeddings, residuals, casts, LoRA's additions and a router:
in eager mode each is a kernel that reads and writes every hidden state. Compiled, they are a few kernels per layer; the
FP8 products stay the operators that they are. What is compiled is the inside of a layer, so gradient checkpointing,
hooks on the layer and everything outside of it work as before.

Two graphs of one layer round differently, so which of them a batch runs through must follow from the batch and not from
the batches before it, which are others when a run is resumed. torch would compile for the first sizes alone and for all
others later; here sizes are symbols from the first, and only what the code itself asks about them makes another graph.
"""

import logging
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import config as dynamo
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.fx.experimental import _config as shapes

from octavo.integrations import layers as own
from octavo.integrations.layers import decoder_layers, set_compiled, trained_layers
from octavo.integrations.taps import Names

logger = logging.getLogger("octavo")

LIMIT = 16
"""Graphs of one kind of layer. A few are usual: with a mask and without, one row and several."""


def compile_layers(
    model: nn.Module, on: bool = True, *, backend: str = "inductor", shape: tuple[int, int] | None = None
) -> nn.Module:
    """Run the decoder layers of ``model`` as compiled graphs while they train; ``on=False`` takes that back.

    Compiling happens in the first training step, once per kind of layer, for batches of every size. ``shape``: that of
    most batches [rows, tokens], if they have one. They get a graph for it alone, and the others still share theirs.
    Which graph a batch takes does not depend on the batches before it.

    Outputs and gradients are those of the eager layer up to rounding: between elementwise operations a compiled graph
    rounds less often. LoRA that peft put on the weight of an unquantized linear layer by ``target_parameters`` is added
    to the layer's output and no longer to the weight. Parameters, their names and the class names of the layers stay.
    ``backend``: of ``torch.compile``. Returns ``model``.

    Raises :class:`octavo.errors.EngineError` where ``model`` has no layer that can be compiled.
    """
    regions: dict[tuple[Any, ...], Callable[..., Any]] = {}
    for layer in decoder_layers(model, "compiles"):
        set_compiled(layer, None)
        if on:
            # a layer of another kind would be a recompilation, of which torch allows a few for each piece of code
            kind = tuple((name, type(module)) for name, module in layer.named_modules())
            if kind not in regions:
                regions[kind] = _Compiled(backend)
            set_compiled(layer, regions[kind], shape)
    return model


def compiled_layers(model: nn.Module) -> list[str]:
    """The names of the layers of ``model`` for which :func:`compile_layers` is on."""
    return [name for name, layer in trained_layers(model) if layer._compiled is not None]


class _Compiled:
    """The compiled function of one kind of layer, with recompilations of its own: torch counts them by code object."""

    def __init__(self, backend: str) -> None:
        copy = types.FunctionType(_region.__code__.replace(), globals(), "layer")
        self._function = torch.compile(copy, backend=backend, dynamic=True)
        self._settings = _settings(fail_on_recompile_limit_hit=True)

    def __call__(self, layer: Any, taps: Names, *args: Any, **kwargs: Any) -> Any:
        undo = [change() for change in self._settings]
        try:
            return self._function(layer, taps, *args, **kwargs)
        except FailOnRecompileLimitHit:
            # from now on torch runs the graphs that there are, and the rest eagerly
            self._settings = _settings()
            logger.warning(
                "%s takes more than %d compiled graphs, as where its code depends on the length of rows. Batches for "
                "which there is none run uncompiled from here on, and a resumed run may round otherwise than an "
                "unbroken one. Leave compile_layers (`train.compile`) off for this model.",
                type(layer).__name__,
                LIMIT,
            )
        finally:
            for revert in undo:
                revert()
        return own.region(layer, taps, *args, **kwargs)


def _settings(**more: bool) -> list[Callable[[], Callable[[], None]]]:
    """Changes to torch's settings for a call that may compile; each returns what takes it back.

    `torch.compile` has no arguments for them (2.11 to 2.13). The patchers are what it uses itself for those that it
    has: the documented `config.patch` takes the host a tenth of a millisecond, which is as long as the call.
    """
    return [
        # nothing depends on the sizes met before, and numbers of the model are constants
        dynamo._make_closure_patcher(
            automatic_dynamic_shapes=False, specialize_float=True, recompile_limit=LIMIT, **more
        ),
        # sizes that are equal by chance, as where there are as many rows as tokens, are two sizes all the same
        shapes._make_closure_patcher(use_duck_shape=False),  # type: ignore[attr-defined]
    ]


def _region(layer: Any, taps: Names, *args: Any, **kwargs: Any) -> Any:
    """:func:`octavo.integrations.layers.region`, and before it what the compiler is to know about sizes."""
    rotary = kwargs.get("position_embeddings")
    for tensor in (args[0], *(rotary if isinstance(rotary, tuple) else (rotary,))):
        if isinstance(tensor, Tensor):
            # their width is the model's, and not the batch's
            torch._dynamo.mark_static(tensor, -1)
    if layer._shape is not None and args[0].shape[:2] == layer._shape:
        # asked so that it is known: this branch is compiled for that shape, and the other for all but that
        return own.region(layer, taps, *args, **kwargs)
    return own.region(layer, taps, *args, **kwargs)
