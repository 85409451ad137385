"""Loading: ``load_model`` and ``enabled``."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.quantizers import auto

from octavo.checkpoint.accounting import Ledger, collector_paused, open_ledger
from octavo.errors import CheckpointError, EngineError, first_line
from octavo.formats.scheme import is_fp8
from octavo.integrations.delivery import Delivery, single_device
from octavo.integrations.describe import describe
from octavo.integrations.quantizer import (
    PRIVATE_METHOD,
    OctavoConfig,
    OctavoQuantizer,
    Residence,
    configure,
    prepare,
    require_experts,
)
from octavo.integrations.values import check_plain_values
from octavo.nn.settings import Settings
from octavo.ops.kept import Activations

__all__ = ["configure", "describe", "enabled", "find_checkpoint", "load_model"]

# Everything a model or its tokenizer needs, and no weights in other formats.
_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py"]


def load_model(
    path_or_id: str | Path,
    *,
    numerics: str = "exact",
    engine: str = "auto",
    activations: Activations = "bf16",
    experts: Residence = "resident",
    dtype: torch.dtype = torch.bfloat16,
    device_map: str | dict[str, Any] | torch.device | None = None,
    revision: str | None = None,
    token: str | None = None,
    attn_implementation: str | None = None,
    local_files_only: bool = False,
) -> PreTrainedModel:
    """Load a causal language model with its FP8 weights kept in FP8; plain checkpoints load as in transformers.

    ``path_or_id``: a folder, or a hub id (downloaded with progress at ``revision``, with ``token``). ``numerics``:
    exact, fp8_grad or fp8.
    ``engine``: auto, or one by name; ``stock`` leaves an unquantized model on transformers' own experts.
    ``activations``: in what routed experts keep theirs for backward, as computed (``bf16``) or in FP8. ``experts``:
    where FP8 experts are kept, with the rest of the model (``resident``) or in pinned memory of the ``host``, from
    which each layer is copied ahead of its turn. ``dtype``: of activations and of everything unquantized.
    ``device_map``: as in transformers; ``None`` places the model on the current accelerator, or the CPU.

    Every tensor of the checkpoint is accounted for before a byte is read, and every scale, code and plain weight is
    checked once loaded. No global state of transformers changes.

    Raises :class:`octavo.errors.CheckpointError`, with nothing left loaded, and :class:`octavo.errors.EngineError`.
    """
    if engine == "stock" and activations == "fp8":
        raise EngineError(
            "transformers' own experts (engine='stock') cannot keep activations in FP8; leave one of both."
        )
    if experts not in get_args(Residence):
        raise EngineError(f"experts {experts!r} is none of {', '.join(get_args(Residence))}.")
    settings = Settings(numerics, "auto" if engine == "stock" else engine, activations)
    folder = find_checkpoint(path_or_id, revision=revision, token=token, local_files_only=local_files_only)
    ledger = open_ledger(folder)
    try:
        config = AutoConfig.from_pretrained(folder)
    except ValueError as error:
        raise CheckpointError(
            f"transformers cannot read {folder / 'config.json'}: {first_line(error)} Check model_type, and "
            f"that "
            "transformers is new enough for this model."
        ) from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise CheckpointError(
            f"{folder.name} is a {config.model_type} model, which AutoModelForCausalLM of transformers does not build: "
            "it has no causal language model of that type. Load it with its own class inside `with octavo.enabled():`."
        )
    if ledger.scheme is not None and engine == "stock":
        raise CheckpointError(
            f"{folder.name} holds FP8 weights, and engine='stock' is for unquantized models: transformers' own "
            f"FP8 experts take no LoRA. "
            "Leave engine at 'auto'."
        )
    how = {
        "dtype": dtype,
        "device_map": device_map if device_map is not None else _current_device(),
        "attn_implementation": attn_implementation,
    }
    if experts == "host":
        _require_streaming(folder, ledger, single_device(how["device_map"]))
    if ledger.scheme is not None:
        model = _load_float8(folder, config, ledger, settings, experts, how)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, config=config, local_files_only=True, **how)
        check_plain_values(model)
        if engine != "stock":
            prepare(model, settings)
    if activations == "fp8":
        require_experts(model)
    model.name_or_path = model.config.name_or_path = str(path_or_id)
    return model


def _require_streaming(folder: Path, ledger: Ledger, device: torch.device | None) -> None:
    """Refuse ``experts='host'`` where nothing would stream them."""
    if ledger.scheme is None:
        raise EngineError(
            f"experts='host' streams FP8 codes, and {folder.name} holds no FP8 weights. Load it with "
            "experts='resident', or quantize it first."
        )
    if device is None:
        raise EngineError(
            "experts='host' streams experts to one GPU (or stays on the CPU), and device_map spreads the model. Leave "
            "device_map away, or name one device."
        )
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        ranks = torch.distributed.get_world_size()
        if ranks > 1:
            raise EngineError(
                f"experts='host' is for one process, and this is one of {ranks}: each would pin all experts for "
                "itself, and that was never tried. Load the model with experts='resident', or run one process."
            )


def _load_float8(
    folder: Path, config: Any, ledger: Ledger, settings: Settings, experts: Residence, how: dict[str, Any]
) -> PreTrainedModel:
    """``from_pretrained`` with our quantizer; onto a single device from our reader in place of the loader's own."""
    assert ledger.scheme is not None
    _register_private()
    device = single_device(how["device_map"])
    delivery = None if device is None else Delivery(ledger, device)
    quantization = {
        "quant_method": PRIVATE_METHOD,
        "raw": dict(ledger.scheme.raw),
        "settings": [settings.numerics, settings.engine, settings.activations],
        "delivery": delivery,
        "experts": experts,
    }
    if delivery is None:
        _set_quantization_config(config, quantization)
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, config=config, local_files_only=True, **how
        )
        return model
    model_class, config = _model_class(config)
    _set_quantization_config(config, quantization)
    try:
        with collector_paused():
            model = model_class.from_pretrained(None, config=config, state_dict=delivery.sources, **how)
    finally:
        delivery.close()
    model.config.quantization_config.delivery = None
    if model.can_generate():
        model.generation_config = _generation_config(folder)
    return model


def _model_class(config: Any) -> tuple[Any, Any]:
    """The class that AutoModelForCausalLM builds of ``config``, and the config that it builds it with."""
    found = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if isinstance(found, list | tuple):
        by_name = {one.__name__: one for one in found}
        found = next((by_name[name] for name in config.architectures or () if name in by_name), found[0])
    text = config.get_text_config()
    return (found, text) if found.config_class is type(text) else (found, config)


def _generation_config(folder: Path) -> GenerationConfig:
    """What ``from_pretrained`` of a folder would have given the model."""
    try:
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    except OSError:
        return GenerationConfig.from_pretrained(
            folder, config_file_name="config.json", _from_model_config=True, local_files_only=True
        )


def find_checkpoint(
    path_or_id: str | Path, *, revision: str | None = None, token: str | None = None, local_files_only: bool = False
) -> Path:
    """The folder of a checkpoint: ``path_or_id`` itself, or the hub repository downloaded into the local cache.

    Raises :class:`CheckpointError` when it is neither a folder nor a repository that can be reached.
    """
    folder = Path(path_or_id).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(
            f"{folder} is a file, and a checkpoint is a folder with config.json and safetensors files."
        )
    try:
        return Path(
            snapshot_download(
                str(path_or_id),
                revision=revision,
                token=token,
                allow_patterns=_FILES,
                local_files_only=local_files_only,
            )
        )
    except (HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise CheckpointError(
            f"{str(path_or_id)!r} is neither a folder nor a hub repository that could be found here"
            f"{f' at revision {revision!r}' if revision else ''} ({type(error).__name__}). Check the spelling, the "
            f"token, and the network."
        ) from error


def _current_device() -> dict[str, Any] | None:
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return None if device is None else {"": torch.device(device.type, torch.accelerator.current_device_index())}


def _set_quantization_config(config: Any, value: dict[str, Any]) -> None:
    """Put ``value`` where transformers looks for it: on the config, not on its text part."""
    text = config.get_text_config()
    if text is not config and getattr(text, "quantization_config", None) is not None:
        del text.quantization_config
    config.quantization_config = value


def _register_private() -> None:
    """Teach transformers a method name of our own; no other name is touched."""
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(PRIVATE_METHOD, OctavoConfig)
    auto.AUTO_QUANTIZER_MAPPING.setdefault(PRIVATE_METHOD, OctavoQuantizer)


@contextmanager
def enabled(*, numerics: str = "exact", engine: str = "auto") -> Iterator[None]:
    """Inside the block, plain ``from_pretrained`` keeps FP8 weights in FP8; afterwards transformers is as it was.

    For code that loads by itself, onto where it says; experts in host memory are for :func:`load_model` alone.
    Checkpoints that are not FP8 go to the stock quantizer, or to none. A model loaded
    without quantization keeps transformers' own experts; ``octavo.configure(model)`` moves them to octavo's forward.
    """
    settings = Settings(numerics, engine)
    before = dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING), dict(auto.AUTO_QUANTIZER_MAPPING)
    for method in ("fp8", "compressed-tensors", "modelopt", "fbgemm_fp8"):
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method] = _config_factory(before[0].get(method), settings)
        auto.AUTO_QUANTIZER_MAPPING[method] = _quantizer_factory(before[1].get(method))
    try:
        yield
    finally:
        for mapping, old in zip(
            (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING), before, strict=True
        ):
            mapping.clear()
            mapping.update(old)


def _config_factory(stock: Any, settings: Settings) -> Any:
    class Config:
        """Reads a ``quantization_config``: ours where it declares FP8 weights, else the stock class."""

        @staticmethod
        def from_dict(config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
            if is_fp8(config_dict):
                config = OctavoConfig(config_dict, settings, registered_as=config_dict["quant_method"])
                return (config, kwargs) if return_unused_kwargs else config
            if stock is None:
                raise CheckpointError(
                    f"quant_method {config_dict.get('quant_method')!r} of this kind is read neither by octavo nor by "
                    f"transformers."
                )
            return stock.from_dict(config_dict, return_unused_kwargs=return_unused_kwargs, **kwargs)

    return Config


def _quantizer_factory(stock: Any) -> Any:
    def make(quantization_config: Any, **kwargs: Any) -> Any:
        chosen = OctavoQuantizer if isinstance(quantization_config, OctavoConfig) else stock
        return chosen(quantization_config, **kwargs)

    return make
