"""peft's layers over octavo's modules: the classes that they become, and what is refused.

peft builds its stock wrapper and stores the wrapped module in it; at that moment, before any factor exists, the
wrapper's class is changed to one of these. The names of the classes are peft's own, because peft compares them. Two
facts make stock wrappers wrong on FP8: ``lora.ParamWrapper`` adds ``BA`` to the codes without their scale, and every
``merge`` writes into the codes.
"""

import re
import warnings
from contextlib import ExitStack
from typing import Any

import torch
from peft.tuners import ia3, loha, lokr, lora
from peft.tuners.lora.layer import Linear as StockLinear
from peft.tuners.lora.layer import ParamWrapper as StockParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from octavo.errors import AdapterError
from octavo.nn.experts import Float8Experts, LoraFactors, OctavoExperts
from octavo.nn.linear import Float8Linear

FLOAT8 = (Float8Experts, Float8Linear)

# peft's methods beside LoRA that act on a layer's input or output and never read its weight; all others are refused.
_METHODS = "LoRA, (IA)³, LoHa and LoKr"
_OUTPUT_SIDE = (ia3.layer.Linear, loha.layer.Linear, lokr.layer.Linear)
_TUNERS = (lora.LoraModel, ia3.IA3Model, loha.LoHaModel, lokr.LoKrModel)

# Initialisations of LoRA that do not look at the base weight.
_BLIND_INITS = (True, False, "gaussian", "eva")


def on_registration(module: nn.Module, name: str, submodule: nn.Module) -> None:
    """Adopt ``module`` if it is a layer or a tuner of peft that just got one of octavo's modules as ``submodule``.

    Raises :class:`AdapterError` for a method, a parameter or a full copy that FP8 codes do not allow.
    """
    if name == "base_layer" and isinstance(module, BaseTunerLayer):
        _adopt_layer(module, submodule.get_base_layer() if isinstance(submodule, BaseTunerLayer) else submodule)
    elif name == "model" and type(module) in _TUNERS:
        if any(isinstance(part, OctavoExperts | Float8Linear) for part in submodule.modules()):
            module.__class__ = _subclass(_Tuner, type(module))
    elif name == "original_module":
        _refuse_copy(submodule)


def _adopt_layer(layer: Any, base: nn.Module) -> None:
    if not isinstance(base, OctavoExperts | Float8Linear):
        return
    if type(layer) is StockParamWrapper:
        _check_parameter(base, layer.parameter_name)
        layer.__class__ = ParamWrapper
    elif type(layer) is StockLinear:
        layer.__class__ = Linear
    elif isinstance(layer, ParamWrapper | Linear | _NoMerge):
        return
    elif type(layer) in _OUTPUT_SIDE:
        layer.__class__ = _subclass(_NoMerge, type(layer))
    else:
        raise AdapterError(
            f"{type(layer).__module__}.{type(layer).__name__} was put on {describe(base)}, and it may read the weight, "
            f"which holds FP8 codes. On FP8 layers octavo runs peft's {_METHODS}; use one of these, or target layers "
            "that are not FP8. The model is partly wrapped now: load it again."
        )


def adopt_plain(layer: Any) -> None:
    """Let ``layer``, if it is a stock ``ParamWrapper`` over the weight of a plain linear layer, add ``B(A(x))``.

    Stock puts a parametrization on the weight in each forward and builds W + BA, which a compiled graph cannot hold.
    :func:`release_plain` takes it back.
    """
    if type(layer) is StockParamWrapper and type(layer.get_base_layer()) is nn.Linear:
        layer.__class__ = _subclass(_OnOutput, StockParamWrapper)


def release_plain(layer: nn.Module) -> None:
    """Undo :func:`adopt_plain`."""
    if isinstance(layer, _OnOutput):
        layer.__class__ = StockParamWrapper


class _OnOutput:
    """A ``lora.ParamWrapper`` over a plain weight [out, in] that computes as ``lora.Linear``."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = StockLinear.forward(self, x, *args, **kwargs)
        return output


def _check_parameter(base: nn.Module, name: str) -> None:
    names = base.experts_layout.names if isinstance(base, OctavoExperts) else ("weight",)
    if name not in names:
        raise AdapterError(
            f"target_parameters names {name!r} of {describe(base)}, and LoRA is possible there on "
            f"{' and '.join(names)} only. Take the name out of target_parameters, and load the model again."
        )


def _refuse_copy(module: nn.Module) -> None:
    found = next((part for part in module.modules() if isinstance(part, FLOAT8)), None)
    if found is not None:
        raise AdapterError(
            f"modules_to_save (or a full fine-tuned copy) asks to train {describe(found)} itself, and FP8 codes "
            "cannot be trained. Put LoRA on it, or name modules that are not FP8, such as lm_head or embed_tokens. "
            "Load the model again."
        )


def describe(base: nn.Module) -> str:
    """A module of octavo in words, for an error."""
    if isinstance(base, OctavoExperts):
        shapes = ", ".join(f"{name} {list(base.get_parameter(name).shape)}" for name in base.experts_layout.names)
        return f"{type(base).__name__} ({base.storage_name()}; {shapes})"
    assert isinstance(base, Float8Linear)
    return f"{type(base).__name__} (FP8 {base.layout}; [{base.out_features}, {base.in_features}])"


def refused_merge(names: list[str]) -> AdapterError:
    """The error for merging into the FP8 modules called or described by ``names``."""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return AdapterError(
        f"An adapter cannot be merged into {names[0]}{more}: the weight is FP8 codes, and adding BA to them would lose "
        "the scale or round the update away. Nothing was merged. Keep the adapter separate (save_pretrained on the "
        "peft model, PeftModel.from_pretrained to use it); unload() gives "
        "back the bare model."
    )


def _has_adapter(layer: Any, names: list[str] | None) -> bool:
    """Whether ``layer`` holds one of the adapters ``names``, or of its active ones."""
    wanted = layer.active_adapters if names is None else names
    return any(name in getattr(layer, part, ()) for name in wanted for part in layer.adapter_layer_names)


class _NoMerge:
    """A layer of peft whose base is FP8: it adapts the output and is never merged, so there is nothing to unmerge."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        if _has_adapter(self, adapter_names):
            base: nn.Module = self.get_base_layer()  # type: ignore[attr-defined]
            raise refused_merge([describe(base)])


class _Tuner:
    """A tuner of peft on a model with octavo's modules.

    It refuses to merge into FP8 before the first layer is touched, by the layer's full name: layer by layer, the plain
    layers ahead of the first FP8 one would be merged and lose their adapter before the refusal.
    """

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        with warnings.catch_warnings():
            # peft compares these patterns with modules only, and says "ignored" of those that matched parameters
            warnings.filterwarnings("ignore", r"The following (rank|alpha)_pattern keys did not match", RuntimeWarning)
            super().inject_adapter(model, adapter_name, *args, **kwargs)  # type: ignore[misc]
        tuner: Any = self
        config = tuner.peft_config[adapter_name]
        names = [*tuner.targeted_module_names, *tuner.targeted_parameter_names]
        for field in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(config, field, None) or ():
                if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):
                    warnings.warn(f"{field} has {pattern!r}, which matches nothing that is adapted.", stacklevel=2)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: Any, child: nn.Module) -> None:
        super()._replace_module(parent, child_name, new_module, child)  # type: ignore[misc]
        # all inside went where the codes are, which is the host for experts that are kept there
        for module in new_module.modules():
            if isinstance(module, ParamWrapper):
                for adapter in module.lora_A:
                    module._move_adapter_to_device_of_base_layer(adapter)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        self._refuse(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)  # type: ignore[misc]

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        self._refuse(adapter_names)
        merged: nn.Module = super().merge_and_unload(progressbar, safe_merge, adapter_names)  # type: ignore[misc]
        return merged

    def _refuse(self, adapter_names: list[str] | None) -> None:
        model: nn.Module = self.model  # type: ignore[attr-defined]
        names = [
            name
            for name, layer in model.named_modules()
            if isinstance(layer, BaseTunerLayer)
            and isinstance(layer.get_base_layer(), FLOAT8)
            and _has_adapter(layer, adapter_names)
        ]
        if names:
            raise refused_merge(names)


_subclasses: dict[tuple[type, type], type] = {}


def _subclass(mixin: type, stock: type) -> type:
    """``stock`` with ``mixin`` ahead of it, under its own name; one class per pair."""
    key = (mixin, stock)
    if key not in _subclasses:
        _subclasses[key] = type(stock.__name__, (mixin, stock), {})
    return _subclasses[key]


class _Lora:
    """What both LoRA layers share: nothing that reads the base weight is started."""

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: Any, **kwargs: Any) -> None:
        self._check(config)
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)  # type: ignore[misc]

    def _check(self, config: Any) -> None:
        layer: Any = self
        base: nn.Module = layer.get_base_layer()
        wrapped = isinstance(layer, ParamWrapper)
        init = config.init_lora_weights
        # EVA collects the inputs of modules; peft does not do so for parameters
        if init not in _BLIND_INITS or (init == "eva" and wrapped):
            raise AdapterError(
                f"init_lora_weights={init!r} does not work on {describe(base)}: it reads the base weight, or inputs "
                "that peft does not collect there. Use True or 'gaussian' ('eva' too, on FP8 linear layers by "
                "target_modules), and load the model again."
            )
        if layer.resolve_lora_variant(config=config) is not None:
            raise AdapterError(
                f"{_variant(config)} does not work on {describe(base)}: it reads the base weight, which holds FP8 "
                "codes. Use plain LoRA or use_rslora there, and load the model again."
            )


def _add_lora(layer: Any, x: Tensor) -> Tensor | None:
    """``base(x) + s · B(A(x))`` without gradient and dropout in the fewest operations; ``None`` where it is more.

    Decoding is thousands of small kernels per token. peft's own forward widens ``x`` to the dtype of the factors, which
    autocast narrows again, and scales apart from adding; sums are the same up to rounding.
    """
    other = layer.training or torch.is_grad_enabled() or layer.merged or layer.disable_adapters
    if other or layer.lora_variant:
        return None
    output: Tensor = layer.base_layer(x)
    dtype = output.dtype
    narrows = torch.is_autocast_enabled(x.device.type)
    for adapter in layer.active_adapters:
        if adapter in layer.lora_A:
            A, B = layer.lora_A[adapter], layer.lora_B[adapter]
            x = x if narrows else layer._cast_input_dtype(x, A.weight.dtype)
            output = torch.add(output, B(A(x)), alpha=layer.scaling[adapter])
    return output.to(dtype)


def _variant(config: Any) -> str:
    """What in ``config`` asks for a variant of LoRA."""
    if config.use_dora:
        return "use_dora=True (DoRA)"
    asked = [
        name for name, value in vars(config).items() if name.endswith("_config") and value and name != "runtime_config"
    ]
    return ", ".join(asked) or "this variant of LoRA"


class Linear(_NoMerge, _Lora, StockLinear):  # type: ignore[misc]
    """``lora.Linear`` over :class:`Float8Linear`: ``y = base(x) + s · B(A(dropout(x)))``, in training by peft."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output = None if args or kwargs else _add_lora(self, x)
        return super().forward(x, *args, **kwargs) if output is None else output


class ParamWrapper(_Lora, StockParamWrapper):  # type: ignore[misc]
    """``lora.ParamWrapper`` over a stack of experts, FP8 or plain, or over the weight of :class:`Float8Linear`.

    On a stack [E, out, in] (or its transpose) the factors of the active adapters are handed to the experts' own
    forward: A as ``[E, r, in]`` from peft's ``[r·E, in]``, where the expert is slowest, and B as ``[E, out, r]`` from
    ``[out, r·E]``, where it is fastest. On a weight [out, in] it is ``lora.Linear``'s arithmetic. W + BA is never
    built.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        base = self.get_base_layer()
        if not isinstance(base, OctavoExperts):
            self._check_forward_args(x, *args, **kwargs)
            output = None if args or kwargs else _add_lora(self, x)
            return StockLinear.forward(self, x, *args, **kwargs) if output is None else output
        self._check_forward_args(x, *args, **kwargs)
        kwargs.pop("adapter_names", None)
        if self.disable_adapters and self.merged:
            self.unmerge()
        with ExitStack() as factors:
            if not self.disable_adapters and not self.merged:
                active = [self.factors(adapter) for adapter in self.active_adapters if adapter in self.lora_A]
                factors.enter_context(base.lora(self.parameter_name, active))
            return self.base_layer(x, *args, **kwargs)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # Stock also casts to the dtype of the base, which rounds A before it is ever used.
        layer: Any = self
        base: nn.Module = layer.get_base_layer()
        # experts in host memory compute elsewhere
        target = device or (base.device if isinstance(base, OctavoExperts) else next(base.parameters()).device)
        for part in layer.adapter_layer_names:
            factors = getattr(self, part)
            if adapter_name in factors and not any(factor.is_meta for factor in factors.parameters()):
                factors[adapter_name] = factors[adapter_name].to(target)

    def factors(self, adapter: str) -> LoraFactors:
        """The factors of one adapter on the stack, views of peft's own parameters."""
        A, B = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        return LoraFactors(
            A.view(self.num_experts, -1, A.shape[-1]),
            B.view(B.shape[0], -1, self.num_experts).permute(2, 0, 1),
            self.scaling[adapter],
        )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As stock on plain stacks; refused on FP8."""
        base: nn.Module = self.get_base_layer()
        if isinstance(base, FLOAT8) and _has_adapter(self, adapter_names):
            raise refused_merge([describe(base)])
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
