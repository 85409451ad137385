"""One layer's forward and backward pass without numbers: the bytes that live while the model's own code runs.

Tensors have shapes and dtypes and no memory (torch's fake tensors), so the sizes are those of the real shapes and it
takes a second. Attention and the experts' products are stood in for by what their kernels allocate on a GPU.
"""

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from octavo.errors import OctavoError, first_line
from octavo.formats.weight import Float8Weight
from octavo.nn.experts import OctavoExperts
from octavo.nn.linear import Float8Linear
from octavo.nn.settings import Settings
from octavo.ops.choice import Choice, Layer
from octavo.ops.dequant import CHUNK_BYTES
from octavo.ops.engines import Projection, ProjectionGrads, RowMaxima, Wants
from octavo.ops.gates import Gate
from octavo.ops.kept import Activations
from octavo.ops.reference import Numerics
from octavo.ops.routing import Routing
from octavo.ops.weights import DenseWeight, Weight

_ATTENTION = "octavo_plan"


class PlanError(OctavoError):
    """A model whose layers cannot be run without numbers."""


@dataclass(frozen=True)
class LayerCost:
    """Bytes of one layer beside its weights and its input. ``kept``: for backward, without checkpointing.

    ``transient``: the most that lives while it is recomputed and differentiated, gradients of its factors left out.
    """

    kept: int
    transient: int


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers that gradient checkpointing recomputes, in order."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def layer_costs(
    tuned: nn.Module, base: PreTrainedModel, batch: int, seq: int, activations: Activations = "bf16"
) -> list[LayerCost]:
    """The cost of every layer at ``batch`` rows of ``seq`` tokens. ``tuned``: ``base`` under its adapters.
    ``activations``: in what routed experts keep theirs.

    Raises:
        PlanError: a layer's code needs values.
    """
    layers = layers_of(base)
    known: dict[object, LayerCost] = {}
    found = []
    with _standing_in(tuned, base, activations):
        decoder, owner = _decoder(base, layers)
        nothing = None
        for layer in layers:
            kind = _kind(layer)
            if kind not in known:
                if nothing is None:
                    nothing = _run(tuned, base, decoder, owner, [], batch, seq)
                with_it = _run(tuned, base, decoder, owner, [layer], batch, seq)
                known[kind] = LayerCost(with_it.kept - nothing.kept, with_it.transient)
            found.append(known[kind])
    return found


def _kind(layer: nn.Module) -> object:
    return tuple((name, tuple(p.shape), p.dtype) for name, p in layer.named_parameters())


def _decoder(base: PreTrainedModel, layers: list[nn.Module]) -> tuple[nn.Module, str]:
    """The module that runs the layers, and the name of the list it has them in."""
    for module in base.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and list(child) == layers:
                return module, name
    raise PlanError(f"{type(base).__name__} has no one list of layers, so its memory cannot be planned yet.")


def _run(
    tuned: nn.Module,
    base: PreTrainedModel,
    decoder: nn.Module,
    owner: str,
    layers: list[nn.Module],
    batch: int,
    seq: int,
) -> LayerCost:
    whole = decoder._modules[owner]
    decoder._modules[owner] = nn.ModuleList(layers)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    live = _Live()
    try:
        with fake, _materialised(tuned):
            factors = [p for p in nn.ModuleList(layers).parameters() if p.requires_grad]
            hidden = base.config.get_text_config().hidden_size
            x_BSH = torch.empty((batch, seq, hidden), dtype=torch.bfloat16, requires_grad=True)
            with live, torch.autocast("cpu", dtype=torch.bfloat16):
                y_BSH = decoder(inputs_embeds=x_BSH, use_cache=False).last_hidden_state
                kept = live.now
                live.peak = live.now
                y_BSH.backward(torch.empty_like(y_BSH))
            gradients = sum(p.grad.numel() * p.grad.element_size() for p in factors if p.grad is not None)
            del y_BSH, x_BSH
            for parameter in factors:
                parameter.grad = None
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise PlanError(
            f"the layers of {type(base).__name__} cannot be run without numbers, so their memory cannot be planned: "
            f"{first_line(error)}"
        ) from error
    finally:
        decoder._modules[owner] = whole
    return LayerCost(kept, max(0, live.peak - gradients))


@contextmanager
def _materialised(model: nn.Module) -> Iterator[None]:
    """With fake tensors on the CPU in the place of parameters on the meta device."""
    held = []
    replaced: dict[int, Tensor] = {}
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is None or tensor.device.type != "meta":
                    continue
                held.append((store, name, tensor))
                if id(tensor) not in replaced:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    replaced[id(tensor)] = (
                        nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
                    )
    for store, name, tensor in held:
        store[name] = replaced[id(tensor)]  # type: ignore[assignment]
    try:
        yield
    finally:
        for store, name, tensor in held:
            store[name] = tensor  # type: ignore[assignment]


class _Live(TorchDispatchMode):
    """Bytes of the storages that operations made and that are still referenced."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self._sizes and key not in given:
                    self._sizes[key] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._free, key)
        return result

    def _free(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


class _Flash(torch.autograd.Function):
    """What a flash attention kernel keeps and returns; queries [B, heads, S, D]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, seq, _ = query.shape
        out = query.new_empty((batch, seq, heads, value.shape[-1]))
        ctx.save_for_backward(query, key, value, out, query.new_empty((batch, heads, seq), dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _flash(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **kwargs: Any
) -> tuple[Tensor, None]:
    out: Tensor = _Flash.apply(query, key, value)  # type: ignore[no-untyped-call]
    return out, None


@contextmanager
def _standing_in(tuned: nn.Module, base: PreTrainedModel, activations: Activations) -> Iterator[None]:
    AttentionInterface.register(_ATTENTION, _flash)
    config = base.config.get_text_config()
    attention = config._attn_implementation
    config._attn_implementation_internal = _ATTENTION
    ours = [module for module in tuned.modules() if isinstance(module, OctavoExperts | Float8Linear)]
    before = [module.settings for module in ours]
    for module in ours:
        module.settings = _SketchSettings(activations=activations)
    was_training = tuned.training
    tuned.train()
    try:
        yield
    finally:
        tuned.train(was_training)
        config._attn_implementation_internal = attention
        for module, settings in zip(ours, before, strict=True):
            module.settings = settings


@dataclass(frozen=True)
class _SketchSettings(Settings):
    def choose(self, layer: Layer) -> Choice:
        return Choice(((sys.maxsize, _Sketch()),))


class _Sketch:
    """An engine that allocates what the kernels on a GPU do, and computes nothing.

    One bank of dequantized experts at a time, at most ``CHUNK_BYTES``; gathers happen in the loads.
    """

    name = "plan"
    numerics: Numerics = "exact"

    def _bank(self, weight: Weight, like: Tensor) -> Tensor | None:
        if isinstance(weight, DenseWeight):
            return None
        expert = weight.out_features * weight.in_features
        chunks = -(-weight.num_experts * expert * 2 // CHUNK_BYTES)
        return like.new_empty((-(-weight.num_experts // chunks), expert))

    def arrange(self, h_MI: Tensor, down: Projection) -> Tensor:
        return h_MI

    def _rank(self, x: Tensor, routing: Routing, side: Projection) -> Tensor | None:
        return None if side.lora is None else x.new_empty((routing.num_rows, side.lora.A_ERK.shape[1]))

    def _grads(self, side: Projection, wants: Wants) -> ProjectionGrads:
        lora = side.lora if wants.lora else None
        return ProjectionGrads(
            None,
            None,
            None if lora is None else torch.empty_like(lora.A_ERK),
            None if lora is None else torch.empty_like(lora.B_ENR),
        )

    def route(self, index_TK: Tensor, num_experts: int) -> Routing:
        pairs = index_TK.numel()
        return Routing(
            index_TK.new_empty((pairs,), dtype=torch.int64),
            index_TK.new_empty(index_TK.shape, dtype=torch.int64),
            index_TK.new_empty((num_experts,), dtype=torch.int32),
        )

    def up(
        self, x_TH: Tensor, routing: Routing, up: Projection, gate: Gate, down: Projection
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        xa_MR = self._rank(x_TH, routing, up)
        z_MG = x_TH.new_empty((routing.num_rows, up.weight.out_features))
        parts = up.weight.parts if isinstance(up.weight, Float8Weight) else 2
        h_MI = x_TH.new_empty((routing.num_rows, up.weight.out_features // parts))
        self._bank(up.weight, x_TH)
        return z_MG, h_MI, xa_MR

    def down(self, h_MI: Tensor, p_TK: Tensor, routing: Routing, down: Projection) -> tuple[Tensor, Tensor | None]:
        ha_MR = self._rank(h_MI, routing, down)
        y_MH = h_MI.new_empty((routing.num_rows, down.weight.out_features))
        self._bank(down.weight, h_MI)
        return y_MH.new_empty((routing.num_tokens, down.weight.out_features)), ha_MR

    def maxima(
        self, dy_TH: Tensor, routing: Routing, up: Projection, down: Projection, gate: Gate, wants: Wants
    ) -> RowMaxima | None:
        return None

    def down_backward(
        self,
        dy_TH: Tensor,
        z_MG: Tensor,
        ha_MR: Tensor | None,
        p_M: Tensor,
        routing: Routing,
        down: Projection,
        gate: Gate,
        wants: Wants,
    ) -> tuple[Tensor, Tensor, ProjectionGrads]:
        yb_MR = self._rank(dy_TH, routing, down)
        dz_MG = torch.empty_like(z_MG)
        self._bank(down.weight, dy_TH)
        grads = self._grads(down, wants)
        del yb_MR
        return dz_MG, dy_TH.new_empty((routing.num_rows,), dtype=torch.float32), grads

    def up_backward(
        self, dz_MG: Tensor, x_TH: Tensor, xa_MR: Tensor | None, routing: Routing, up: Projection, wants: Wants
    ) -> tuple[Tensor | None, ProjectionGrads]:
        yb_MR = self._rank(dz_MG, routing, up)
        grads = self._grads(up, wants)
        dx_MH = dz_MG.new_empty((routing.num_rows, up.weight.in_features))
        self._bank(up.weight, dz_MG)
        del dx_MH, yb_MR
        return torch.empty_like(x_TH) if wants.x else None, grads

    def linear(self, x_MK: Tensor, weight: Float8Weight, *, transposed: bool) -> Tensor:
        wide = x_MK.new_empty((weight.out_features, weight.in_features))
        y = x_MK.new_empty((x_MK.shape[0], weight.in_features if transposed else weight.out_features))
        del wide
        return y
