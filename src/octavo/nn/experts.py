"""Experts of a transformers model on octavo's forward: a mixin over the model's own experts class.

The class of a live module becomes a subclass of ``(Float8Experts or DenseExperts, its own class)``, so its gate,
flags, names and parallel plans survive; only the storage of the stacks and the forward change.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from octavo.errors import CheckpointError
from octavo.formats.scheme import ScaleLayout
from octavo.nn import storage
from octavo.nn.host import HostMemory
from octavo.nn.linear import autocast
from octavo.nn.settings import Chosen, Settings
from octavo.ops.choice import Layer, Request, experts_layer
from octavo.ops.engines import Engine
from octavo.ops.experts import Side, expert_mlp
from octavo.ops.gates import Gate
from octavo.ops.ring import HostRing
from octavo.ops.weights import WeightSpec


@dataclass(frozen=True)
class ExpertsLayout:
    """Facts about an experts class, as its decorator in transformers declares them.

    ``up_name``: ``gate_up_proj`` (parts 2) or, without a gate, ``up_proj`` (parts 1). ``transposed``: stacks are [E,
    in, out].
    """

    up_name: str
    down_name: str
    parts: int
    transposed: bool
    has_bias: bool

    @property
    def names(self) -> tuple[str, str]:
        return (self.up_name, self.down_name)


@dataclass(frozen=True)
class LoraFactors:
    """One adapter on one stack: ``A_ERK`` [E, r, in], ``B_ENR`` [E, out, r] and its scaling, as views of peft's own
    parameters.
    """

    A_ERK: Tensor
    B_ENR: Tensor
    scaling: float


class OctavoExperts(nn.Module):
    """The forward shared by FP8 and plain experts; not instantiated by itself."""

    experts_layout: ExpertsLayout
    settings: Settings
    gate: Gate
    num_experts: int

    _float8: ClassVar[bool]
    _chosen: Chosen | None = None

    @property
    def device(self) -> torch.device:
        """Where the products run."""
        return self.get_parameter(self.experts_layout.down_name).device

    def side(self, name: str, *, parts: int) -> Side:
        raise AssertionError("a storage class answers this")

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``hidden_states`` [..., H], ``top_k_index`` and ``top_k_weights`` [..., K] → [..., H]."""
        storage.refuse_parametrization(self)
        layout = self.experts_layout
        x = autocast(hidden_states)
        up, down = self.side(layout.up_name, parts=layout.parts), self.side(layout.down_name, parts=1)
        y_TH = expert_mlp(
            x.reshape(-1, x.shape[-1]),
            top_k_index.reshape(-1, top_k_index.shape[-1]),
            top_k_weights.reshape(-1, top_k_weights.shape[-1]),
            up,
            down,
            self.gate,
            self._engine(x, up, down, top_k_index.numel()),
            self.settings.activations,
        )
        return y_TH.view(hidden_states.shape).to(hidden_states.dtype)

    def layer(self, device: torch.device, dtype: torch.dtype | None) -> Layer:
        """What the choice of an engine depends on, for activations in ``dtype``."""
        layout = self.experts_layout
        up, down = self.side(layout.up_name, parts=layout.parts), self.side(layout.down_name, parts=1)
        return _layer(device, dtype, up, down)

    def _engine(self, x: Tensor, up: Side, down: Side, num_pairs: int) -> Engine | Request:
        if torch.compiler.is_compiling():
            return self.settings.request
        key = (self.settings, x.device, x.dtype)
        if self._chosen is None or self._chosen.key != key:
            self._chosen = Chosen(key, self.settings.choose(_layer(x.device, x.dtype, up, down)))
        return self._chosen.choice.at(num_pairs / up.weight.shape[0])

    @contextmanager
    def lora(self, name: str, adapters: list[LoraFactors]) -> Iterator[None]:
        """Hand LoRA factors of the stack ``name`` to the forwards inside the block."""
        active: dict[str, list[LoraFactors]] = self.__dict__.setdefault("_lora", {})
        before = active.get(name, [])
        active[name] = adapters
        try:
            yield
        finally:
            active[name] = before

    def _factors(self, name: str) -> tuple[Tensor | None, Tensor | None]:
        adapters: list[LoraFactors] = self.__dict__.get("_lora", {}).get(name, [])
        if not adapters:
            return None, None
        lora_A = torch.cat([adapter.A_ERK for adapter in adapters], 1) if len(adapters) > 1 else adapters[0].A_ERK
        lora_B = torch.cat([adapter.B_ENR * adapter.scaling for adapter in adapters], 2)
        return lora_A, lora_B.contiguous()

    def _bias(self, name: str) -> Tensor | None:
        return cast(Tensor, getattr(self, f"{name}_bias")) if self.experts_layout.has_bias else None

    def extra_repr(self) -> str:
        chosen = self.settings.shown(self.layer(self.device, None))
        return f"{self.num_experts} experts, {self.storage_name()}, gate={self.gate.name}, {chosen}"

    def storage_name(self) -> str:
        raise AssertionError("a storage class answers this")


def _layer(device: torch.device, dtype: torch.dtype | None, up: Side, down: Side) -> Layer:
    weights = ((up.spec, up.weight), (down.spec, down.weight))
    return experts_layer(device, dtype, weights, bias=up.bias is not None)


class Float8Experts(OctavoExperts):
    """Stacks of E4M3 codes (uint8) with their grids in ``<name>_scale`` (float32 bits in int32) [E, parts·n, k].

    ``ring``: where codes and scales go layer by layer when they are kept in host memory; ``None`` when they are where
    the products run.
    """

    scale_layouts: dict[str, ScaleLayout]
    ring: HostRing | None = None
    _float8 = True

    @property
    def device(self) -> torch.device:
        return super().device if self.ring is None else self.ring.device

    def side(self, name: str, *, parts: int) -> Side:
        codes = self.get_parameter(name)
        storage.check_codes_dtype(self, name, codes)
        scales: Tensor = self.get_parameter(f"{name}_scale")
        if self.ring is None:
            scales = storage.opened_scales(scales)
        rows, columns = codes.shape[1] // parts, codes.shape[2]
        spec = WeightSpec(True, parts, self.scale_layouts[name].block_of(rows, columns))
        return Side(spec, codes, scales, self._bias(name), *self._factors(name))

    @property
    def scale_names(self) -> list[str]:
        return [name for name in self._parameters if name.endswith("_scale")]

    def seal(self) -> None:
        """Freeze codes and scales in their stored dtypes, after loading."""
        storage.seal(self, list(self.experts_layout.names), self.scale_names)

    @property
    def streamed_names(self) -> list[str]:
        """The parameters that a ring copies, in its order."""
        return [name for stack in self.experts_layout.names for name in (stack, f"{stack}_scale")]

    def keep_on_host(self, ring: HostRing, memory: HostMemory) -> None:
        """Join ``ring`` with sealed codes and scales: what is in ``memory`` already stays, the rest moves there."""
        for name in self.streamed_names:
            parameter = self.get_parameter(name)
            if not memory.holds(parameter):
                moved = memory.empty(tuple(parameter.shape), parameter.dtype).copy_(parameter)
                self.register_parameter(name, nn.Parameter(moved, requires_grad=False))
        ring.add([self.get_parameter(name) for name in self.streamed_names])
        self.ring = ring

    def storage_name(self) -> str:
        kinds = [str(self.scale_layouts[name]) for name in self.experts_layout.names]
        where = "" if self.ring is None else " in host memory"
        return (f"FP8 {kinds[0]}" if len(set(kinds)) == 1 else f"FP8 {' and '.join(kinds)}") + where

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Float8Experts":
        sealed = [*self.experts_layout.names, *self.scale_names]
        stay = self.streamed_names if self.ring is not None else []
        super()._apply(storage.apply_guarded(self, sealed, fn, stay), recurse)  # type: ignore[no-untyped-call]
        return self


class DenseExperts(OctavoExperts):
    """Plain stacks in the model's dtype, on the same forward with LoRA factors handed over."""

    _float8 = False

    def side(self, name: str, *, parts: int) -> Side:
        spec = WeightSpec(False, parts, transposed=self.experts_layout.transposed)
        return Side(spec, self.get_parameter(name), None, self._bias(name), *self._factors(name))

    def storage_name(self) -> str:
        return str(self.get_parameter(self.experts_layout.down_name).dtype).removeprefix("torch.")


_classes: dict[tuple[type, type], type] = {}


def _become(module: nn.Module, mixin: type[OctavoExperts]) -> OctavoExperts:
    """Change the class of ``module`` to ``(mixin, its class)``; one class per pair, however many models are loaded."""
    own = type(module)
    if issubclass(own, OctavoExperts):
        raise CheckpointError(f"{own.__name__} already runs on octavo's forward.")
    key = (mixin, own)
    if key not in _classes:
        _classes[key] = type(f"{mixin.__name__.removesuffix('Experts')}{own.__name__}", (mixin, own), {})
    module.__class__ = _classes[key]
    return cast(OctavoExperts, module)


def adopt_dense(module: nn.Module, layout: ExpertsLayout, gate: Gate, settings: Settings) -> DenseExperts:
    """Run loaded, unquantized experts on octavo's forward."""
    adopted = cast(DenseExperts, _become(module, DenseExperts))
    adopted.experts_layout, adopted.gate, adopted.settings = layout, gate, settings
    return adopted


def adopt_float8(
    module: nn.Module,
    layout: ExpertsLayout,
    gate: Gate,
    settings: Settings,
    scale_layouts: dict[str, ScaleLayout],
    static_inputs: set[str],
) -> Float8Experts:
    """Swap the storage of experts on the meta device for FP8 stacks, to be loaded and then sealed.

    ``scale_layouts``: by stack name. ``static_inputs``: stacks whose checkpoint has static activation scales.
    """
    adopted = cast(Float8Experts, _become(module, Float8Experts))
    adopted.experts_layout, adopted.gate, adopted.settings, adopted.scale_layouts = (
        layout,
        gate,
        settings,
        scale_layouts,
    )
    for name in layout.names:
        num_experts, rows, columns = adopted.get_parameter(name).shape
        parts = layout.parts if name == layout.up_name else 1
        n, k = scale_layouts[name].grid(rows // parts, columns)
        storage.declare(adopted, name, (num_experts, rows, columns), storage.CODES)
        storage.declare(adopted, f"{name}_scale", (num_experts, parts * n, k), torch.float32)
        if name in static_inputs:
            storage.declare(adopted, f"{name}_input_scale", (num_experts, parts, 1), torch.float32)
    return adopted
