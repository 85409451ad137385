"""The model of a checkpoint without weights, stored as octavo would store it, with its adapters: what a plan counts."""

import json
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from octavo.checkpoint.accounting import open_ledger
from octavo.errors import CheckpointError
from octavo.formats.scheme import QuantScheme, ScaleLayout, parse_scheme
from octavo.integrations.claims import claim, float8_linears
from octavo.integrations.disk_names import DiskNames
from octavo.integrations.experts import experts_layout, gate_of
from octavo.integrations.lora_config import lora_config, skeleton
from octavo.integrations.peft import install
from octavo.integrations.quantizer import adopt_dense_experts
from octavo.nn.experts import adopt_float8
from octavo.nn.linear import Float8Linear
from octavo.nn.settings import Settings


@dataclass(frozen=True)
class Adapters:
    """What LoRA is put where; as the ``lora`` section of a run."""

    r: int = 16
    expert_rank: int | None = None
    targets: tuple[str, ...] = ("attention", "mlp", "shared_experts", "experts")
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Storage:
    """Scale layouts of what stays in FP8: by experts module and stack, and by linear layer."""

    experts: dict[str, dict[str, ScaleLayout]]
    linears: dict[str, ScaleLayout]


def bare_model(checkpoint: str | Path) -> PreTrainedModel:
    """The model on the meta device, in bfloat16, its FP8 weights as codes and scales.

    ``checkpoint``: a folder, of which ``config.json`` is enough, or a hub id. Headers are read where there are any:
    they say per tensor what a config says per rule.

    Raises:
        CheckpointError: there is no config, or its format is not one that octavo reads.
    """
    folder = Path(checkpoint).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise CheckpointError(f"{checkpoint} has no config.json, and a plan is made of what that says.")
    model = _widened(skeleton(checkpoint, torch.bfloat16))
    storage = _storage(checkpoint, model)
    settings = Settings()
    with torch.device("meta"):
        for name, layouts in storage.experts.items():
            module = model.get_submodule(name)
            layout = experts_layout(module)
            assert layout is not None, "only experts have stacks"
            adopt_float8(module, layout, gate_of(module), settings, layouts, set()).seal()
        for name, scales in storage.linears.items():
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear), "only linear layers are quantized one by one"
            narrow = Float8Linear(
                linear.in_features,
                linear.out_features,
                layout=scales,
                bias=linear.bias is not None,
                static_input=False,
                settings=settings,
            )
            narrow.to(torch.bfloat16).seal()
            model.set_submodule(name, narrow)
    adopt_dense_experts(model, settings)
    model.requires_grad_(False)
    return model


def with_adapters(model: PreTrainedModel, adapters: Adapters) -> nn.Module:
    """The model under peft's wrappers, factors without values."""
    from peft import get_peft_model

    install()
    config = lora_config(model, r=adapters.r, expert_rank=adapters.expert_rank, targets=adapters.targets)
    with warnings.catch_warnings():
        # peft calls transformers by a name that is going away.
        warnings.simplefilter("ignore", FutureWarning)
        tuned: nn.Module = get_peft_model(model, config, autocast_adapter_dtype=False, low_cpu_mem_usage=True)
    for module, name, parameter in trainable(tuned):
        empty = torch.empty(parameter.shape, dtype=adapters.dtype, device="meta")
        module.register_parameter(name, nn.Parameter(empty))
    return tuned


def trainable(model: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Every trainable parameter with the module and the name that it has there."""
    return [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.requires_grad
    ]


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Of tensors, each once."""
    return sum({id(tensor): tensor.numel() * tensor.element_size() for tensor in tensors}.values())


def _widened(model: PreTrainedModel) -> PreTrainedModel:
    """With what the model's class keeps in float32 in float32, as transformers loads it."""
    wide = [re.compile(pattern) for pattern in model._keep_in_fp32_modules_strict or ()]
    stored = model.state_dict(keep_vars=True)
    for name, tensor in stored.items():
        if any(pattern.search(name) for pattern in wide):
            tensor.data = tensor.data.float()
    return model


def _storage(checkpoint: str | Path, model: PreTrainedModel) -> Storage:
    folder = Path(checkpoint).expanduser()
    if folder.is_dir() and any(folder.glob("*.safetensors")):
        ledger = open_ledger(folder)
        if ledger.scheme is None:
            return Storage({}, {})
        claims = claim(ledger, model)
        return Storage(
            {name: {k: t.layout for k, t in stacks.items()} for name, stacks in claims.experts.items()},
            {name: target.layout for name, target in claims.linears.items()},
        )
    scheme = parse_scheme(_raw_config(checkpoint))
    return Storage({}, {}) if scheme is None else _by_config(scheme, model)


def _by_config(scheme: QuantScheme, model: PreTrainedModel) -> Storage:
    """By the config's rules on the names that tensors have on disk."""
    names = DiskNames(model)
    experts: dict[str, dict[str, ScaleLayout]] = {}
    for name, module in model.named_modules():
        layout = experts_layout(module)
        if layout is None:
            continue
        on_disk = {stack: names.first_expert(f"{name}.{stack}") for stack in layout.names}
        stacks = {stack: None if first is None else scheme.layout_of(first) for stack, first in on_disk.items()}
        if len(found := {k: v for k, v in stacks.items() if v is not None}) == len(stacks):
            experts[name] = found
    linears = {name: scheme.layout_of(names.of(name)) for name in float8_linears(model)}
    return Storage(experts, {name: scales for name, scales in linears.items() if scales is not None})


def _raw_config(checkpoint: str | Path) -> dict[str, Any]:
    from transformers.utils import cached_file

    file = cached_file(str(checkpoint), "config.json")
    if file is None:
        raise CheckpointError(f"{checkpoint} has no config.json.")
    config: dict[str, Any] = json.loads(Path(file).read_text(encoding="utf-8"))
    return config
