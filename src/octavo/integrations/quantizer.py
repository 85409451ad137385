"""octavo's quantizer for transformers' own loader: storage instead of expansion, accounting before the first byte.

``preprocess_model`` gets the empty model and the files: the ledger is opened, every key is claimed, and the modules
that will hold FP8 are swapped on the meta device. The stock loader then streams tensors and stacks codes and scales.
Afterwards codes and scales are sealed and their values checked where they lie, without a second pass over the disk.
"""

import copy
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from octavo.checkpoint.accounting import Ledger, open_ledger
from octavo.checkpoint.stream import TORCH_DTYPES
from octavo.errors import CheckpointError, EngineError
from octavo.integrations import conversions
from octavo.integrations.claims import Claims, Float8Target, StackedTarget, claim
from octavo.integrations.delivery import Delivery, memory_of
from octavo.integrations.experts import experts_layout, gate_of, why_not_ours
from octavo.integrations.peft import install
from octavo.integrations.values import check_plain_values, check_values
from octavo.nn.experts import DenseExperts, Float8Experts, OctavoExperts, adopt_dense, adopt_float8
from octavo.nn.host import HostMemory
from octavo.nn.linear import Float8Linear
from octavo.nn.settings import Settings
from octavo.nn.storage import unsealed
from octavo.ops.kept import Activations
from octavo.ops.ring import HostRing

logger = logging.getLogger("octavo")

PRIVATE_METHOD = "octavo"

_SMALL_BYTES = 1 << 20
"""Up to this size torch serves a GPU's tensors from blocks of their own: what is reserved in one piece for them as well
is reserved twice.
"""

Residence = Literal["resident", "host"]
"""Where FP8 experts are kept: where they compute, or in host memory."""


class OctavoConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """A checkpoint's ``quantization_config`` as the file has it, with the settings that its modules will get.

    Saved again as the file's own dictionary, ``quant_method`` included.
    """

    def __init__(
        self,
        raw: Mapping[str, Any],
        settings: Settings,
        *,
        registered_as: str,
        delivery: Delivery | None = None,
        experts: Residence = "resident",
    ) -> None:
        self.raw = copy.deepcopy(dict(raw))
        self.settings = settings
        self.experts = experts
        # where the tensors come from, for as long as the load lasts
        self.delivery = delivery
        # transformers looks the quantizer up under this name
        self.quant_method = registered_as

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        settings, delivery = Settings(*config_dict["settings"]), config_dict["delivery"]
        config = cls(
            config_dict["raw"],
            settings,
            registered_as=PRIVATE_METHOD,
            delivery=delivery,
            experts=config_dict["experts"],
        )
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self.raw)

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()

    def get_loading_attributes(self) -> dict[str, Any]:
        return {}


class OctavoQuantizer(HfQuantizer):  # type: ignore[misc]
    """Keeps FP8 weights in FP8 through transformers' loader."""

    requires_calibration = True

    def __init__(self, quantization_config: OctavoConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.settings = quantization_config.settings
        self._ledger: Ledger | None = None
        self._claims: Claims | None = None
        self._dtype = torch.get_default_dtype()
        self._dense: list[conversions.ToDense] = []
        self._host: HostMemory | None = None
        self._on_host: frozenset[str] = frozenset()

    @property
    def ledger(self) -> Ledger:
        assert self._ledger is not None, "the ledger is opened when loading starts"
        return self._ledger

    @property
    def claims(self) -> Claims:
        assert self._claims is not None, "claims are made when loading starts"
        return self._claims

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        if dtype == torch.float32:
            logger.warning(
                "Loading an FP8 checkpoint with dtype float32: activations and everything unquantized take twice the "
                "memory of bfloat16. "
                "Pass dtype=torch.bfloat16 unless you mean it (trl loads a path in float32 by default)."
            )
        self._dtype = dtype
        return dtype

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        delivery: Delivery | None = self.quantization_config.delivery
        if delivery is not None:
            self._ledger = delivery.ledger
        elif checkpoint_files:
            self._ledger = open_ledger([Path(file) for file in checkpoint_files])
        else:
            raise CheckpointError(
                "octavo loads FP8 weights from files; a state_dict without files cannot be accounted for."
            )
        self._claims = claim(self.ledger, model)
        if delivery is not None:
            if self.quantization_config.experts == "host":
                self._host = self._host_memory(model, delivery)
            delivery.expect(self.claims.wanted, self.claims.stacked, self._memory)
        for name, stacks in self.claims.experts.items():
            self._swap_experts(model.get_submodule(name), stacks)
        for name, target in self.claims.linears.items():
            model.set_submodule(name, self._float8_linear(model.get_submodule(name), target))

    def _host_memory(self, model: PreTrainedModel, delivery: Delivery) -> HostMemory:
        """Memory for all FP8 stacks of experts and their scales.

        Raises:
            EngineError: there is no such stack, or the host has not got the memory.
        """
        targets = [target for stacks in self.claims.experts.values() for target in stacks.values()]
        if not targets:
            raise EngineError(
                f"experts='host' is about routed experts in FP8, and {type(model).__name__} has none in this "
                "checkpoint. Load it with experts='resident'."
            )
        self._on_host = frozenset(target.name for target in targets)
        codes = [sum(source.weight.nbytes for source in target.sources) for target in targets]
        # Scales are kept in float32, whatever the file has them in.
        scales = [sum(4 * math.prod(source.scale.shape) for source in target.sources) for target in targets]
        return HostMemory(
            delivery.device,
            [*codes, *scales],
            asked="experts='host'",
            contents="the experts' codes",
            otherwise="load the model with experts='resident'",
        )

    def _memory(self, target: StackedTarget, device: torch.device) -> Tensor:
        if self._host is None or target.name not in self._on_host:
            return memory_of(target, device)
        return self._host.empty(target.shape, TORCH_DTYPES[target.dtype])

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """What a parameter takes of its device per element. transformers reserves that there in one piece, for a load
        onto one device; for several it is what they are filled by.
        """
        if param_name.removesuffix("_scale") in self._on_host:
            return 0
        size: float = super().param_element_size(model, param_name, param)
        reserved = self.quantization_config.delivery is not None
        return 0 if reserved and size * param.numel() <= _SMALL_BYTES else size

    def _swap_experts(self, module: nn.Module, stacks: dict[str, Float8Target]) -> None:
        layout = experts_layout(module)
        assert layout is not None
        adopted = adopt_float8(
            module,
            layout,
            gate_of(module),
            self.settings,
            {name: target.layout for name, target in stacks.items()},
            {name for name, target in stacks.items() if target.static_input},
        )
        _load_shards_locally(adopted)

    def _float8_linear(self, module: nn.Module, target: Float8Target) -> Float8Linear:
        assert isinstance(module, nn.Linear)
        linear = Float8Linear(
            module.in_features,
            module.out_features,
            layout=target.layout,
            bias=module.bias is not None,
            static_input=target.static_input,
            settings=self.settings,
        )
        _load_shards_locally(linear)
        return linear

    def update_weight_conversions(
        self, weight_conversions: list[Any], model: PreTrainedModel | None = None
    ) -> list[Any]:
        """Add the scales' conversions. ``model`` came with transformers 5.21; the claims already hold what it is
        asked for.
        """
        targets, renamed = self.claims.dequantized.values(), self.claims.renamed
        self._dense = [conversions.ToDense(target, self._dtype, renamed) for target in targets]
        dense = [WeightConverter(op.names, [op.target.name], [op]) for op in self._dense]
        scales, activations = self._suffixes()
        parameters = {
            f"{target.name}{suffix}"
            for stacks in self.claims.experts.values()
            for target in stacks.values()
            for suffix in (("_scale", "_input_scale") if target.static_input else ("_scale",))
        }
        stacked = conversions.with_scales(
            weight_conversions,
            parameters,
            dict.fromkeys(scales, "_scale") | dict.fromkeys(activations, "_input_scale"),
            self.claims.scales,
        )
        linears = conversions.linear_scales(
            dict.fromkeys(scales, "weight_scale") | dict.fromkeys(activations, "input_scale"), self.claims.scales
        )
        found = [*dense, *stacked, *linears]
        delivery = self.quantization_config.delivery
        return found if delivery is None else [conversions.in_place(conversion, delivery) for conversion in found]

    def _suffixes(self) -> tuple[list[str], list[str]]:
        """Last parts of the keys of weight scales and of activation scales, as this checkpoint spells them."""
        weights = self.ledger.quantized.values()
        scales = {weight.scale.key.rpartition(".")[2] for weight in weights}
        activations = {weight.activation.key.rpartition(".")[2] for weight in weights if weight.activation is not None}
        return sorted(scales), sorted(activations)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for module in model.modules():
            if isinstance(module, Float8Experts | Float8Linear):
                module.seal()
        check_values(model, self.claims)
        for problem in (op.problem for op in self._dense if op.problem is not None):
            raise problem
        check_plain_values(model)
        self._keep_on_host(model)
        prepare(model, self.settings)
        self._finish_plain_experts(model)
        conversions.order_for_saving(model)
        return model

    def _keep_on_host(self, model: PreTrainedModel) -> None:
        if self._host is None:
            return
        ring = HostRing(self.quantization_config.delivery.device)
        for name in self.claims.experts:
            experts = model.get_submodule(name)
            assert isinstance(experts, Float8Experts)
            experts.keep_on_host(ring, self._host)
        self._host = None

    def _finish_plain_experts(self, model: PreTrainedModel) -> None:
        """Give unquantized stacks of a mixed checkpoint the model's dtype: before 5.21 the loader leaves what it
        stacks in the file's.
        """
        for module in model.modules():
            if isinstance(module, DenseExperts):
                for parameter in module.parameters(recurse=False):
                    parameter.data = parameter.data.to(self._dtype)

    def update_parallel_plan(self, model: PreTrainedModel, plan: dict[str, str]) -> None:
        """Shard scales like their weights; a scale whose rows are whole cannot be cut along them, so it is
        replicated.
        """
        from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard

        for name, parameter in model.named_parameters():
            if not name.endswith("_scale"):
                continue
            scale = replace_layer_number_by_wildcard(name)
            weight = scale.removesuffix("_input_scale").removesuffix("_scale")
            style = plan.get(weight) or plan.get(weight.removesuffix(".weight"))
            if style is not None:
                plan[scale] = "replicate" if "rowwise" in style and parameter.shape[-1] == 1 else style

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The state dict with codes as float8 and scales as float32 again, for saving under the file's own names."""
        state: dict[str, Tensor] = dict(model.state_dict())
        for name, module in model.named_modules():
            if isinstance(module, Float8Experts | Float8Linear):
                for parameter in _sealed_names(module):
                    state[f"{name}.{parameter}"] = unsealed(state[f"{name}.{parameter}"])
        return state, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _sealed_names(module: Float8Experts | Float8Linear) -> list[str]:
    weights = list(module.experts_layout.names) if isinstance(module, Float8Experts) else ["weight"]
    return [*weights, *module.scale_names]


def _load_shards_locally(module: nn.Module) -> None:
    """Ask transformers' loader for this rank's part of each tensor as a local tensor under tensor parallelism."""
    module._hf_quantized_needs_local_tp = True  # type: ignore[assignment]


def adopt_dense_experts(model: nn.Module, settings: Settings) -> list[str]:
    """Put unquantized experts on octavo's forward; returns the names of those that stay on the model's own, with the
    reason.
    """
    left = []
    for name, module in model.named_modules():
        layout = experts_layout(module)
        if layout is None or isinstance(module, OctavoExperts):
            continue
        if reason := why_not_ours(module, float8=False):
            left.append(f"{name}: {reason}")
        else:
            adopt_dense(module, layout, gate_of(module), settings)
    return left


def prepare(model: PreTrainedModel, settings: Settings) -> None:
    """Make a loaded model ready for adapters: plain experts take them in the forward too, peft's wrappers are adopted.

    Warns of experts that stay on the model's own forward, with the reason.
    """
    for left in adopt_dense_experts(model, settings):
        logger.warning("experts stay on transformers' own forward: %s", left)
    _check_engines(model, settings)
    install()


def _check_engines(model: nn.Module, settings: Settings) -> None:
    """Raise unless the engine asked for can run every layer of ``model`` where that is now, and does what it says."""
    quantized = any(isinstance(module, Float8Experts | Float8Linear) for module in model.modules())
    if not quantized and settings.numerics != "exact":
        raise EngineError(
            f"numerics {settings.numerics!r} is about products with FP8 weights, and {type(model).__name__} has none: "
            "nothing would change. Leave numerics at 'exact', or load a checkpoint in FP8."
        )
    if not quantized and settings.engine in ("fused", "scaled"):
        raise EngineError(
            f"engine {settings.engine!r} reads FP8 weights, and {type(model).__name__} has none. Leave it at 'auto'."
        )
    for module in model.modules():
        if isinstance(module, OctavoExperts):
            settings.choose(module.layer(module.device, None))
        elif isinstance(module, Float8Linear):
            settings.choose(module.layer(None))


def configure(
    model: nn.Module,
    *,
    numerics: str | None = None,
    engine: str | None = None,
    activations: Activations | None = None,
) -> nn.Module:
    """Change how a loaded model computes: ``numerics`` (exact, fp8_grad, fp8), ``engine``, and in what routed experts
    keep ``activations`` for backward (bf16, fp8); ``None`` leaves one as it is.

    Works under peft wrappers too. Experts of a plain model that plain transformers loaded are put on octavo's forward
    first. Returns ``model``. Raises :class:`octavo.errors.EngineError` before anything changes.
    """
    ours = [module for module in model.modules() if isinstance(module, OctavoExperts | Float8Linear)]
    before = ours[0].settings if ours else Settings()

    def changed(old: Settings) -> Settings:
        return Settings(numerics or old.numerics, engine or old.engine, activations or old.activations)

    _check_engines(model, changed(before))
    adopt_dense_experts(model, before)
    if activations == "fp8":
        require_experts(model)
    for module in model.modules():
        if isinstance(module, OctavoExperts | Float8Linear):
            module.settings = changed(module.settings)
    return model


def require_experts(model: nn.Module) -> None:
    """Refuse activations in FP8 where nothing would be kept so.

    Raises:
        EngineError: ``model`` has no routed experts on octavo's forward.
    """
    if not any(isinstance(module, OctavoExperts) for module in model.modules()):
        raise EngineError(
            f"activations='fp8' is about what routed experts keep for backward, and {type(model).__name__} has none on "
            "octavo's forward. Leave it at 'bf16'."
        )


__all__ = [
    "OctavoConfig",
    "OctavoQuantizer",
    "adopt_dense_experts",
    "configure",
    "prepare",
    "require_experts",
]
