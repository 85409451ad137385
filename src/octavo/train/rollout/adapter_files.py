"""An adapter written for vLLM: one pair of factors for each linear layer, each expert's projections by their own names.

vLLM reads peft's files with two restrictions: one rank and one scaling for everything (it knows no ``rank_pattern``),
and for experts the names ``experts.N.gate_proj``, ``up_proj`` and ``down_proj``, all three for every expert. peft
itself stacks experts, gate and up in one pair of factors. So the scaling is folded into B, and experts are split:
A is shared by gate and up, whose rows of B are its first and second half.

Legend: ``E`` experts, ``R`` rank, ``N`` outputs, ``K`` inputs.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from octavo.errors import AdapterError
from octavo.integrations.targets import bare_name
from octavo.nn.experts import LoraFactors, OctavoExperts
from octavo.train.routing import experts_layers

_PREFIX = "base_model.model."
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True, slots=True)
class Pair:
    """The factors of one linear layer by its name in the checkpoint: the weight gains ``B_NR · A_RK``."""

    layer: str
    A_RK: Tensor
    B_NR: Tensor


def adapter_pairs(model: nn.Module, adapter: str = "default") -> Iterator[Pair]:
    """The trained LoRA factors of ``model``, experts one by one, the scaling folded into B. Call it on every rank.

    Raises:
        AdapterError: something is trained that is no LoRA factor of a linear layer or of experts.
    """
    others = [name for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name]
    if others:
        raise AdapterError(
            f"A server takes LoRA factors, and {others[0]} is trained in full. Leave out `lora.modules_to_save` and "
            "`lora.trainable_tokens`, or sample with the model itself."
        )
    experts = {id(own) for _, _, own in experts_layers(model)}
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer) or adapter not in module.lora_A:
            continue
        base = module.get_base_layer()
        if isinstance(module, ParamWrapper) and isinstance(base, OctavoExperts):
            yield from _of_experts(bare_name(name), module, base, adapter)
        elif id(base) in experts or isinstance(base, nn.Embedding):
            raise AdapterError(
                f"The adapter of {bare_name(name)} ({type(base).__name__}) cannot be written for a server. Sample with "
                "the model itself, or leave it out of `lora.targets`."
            )
        else:
            A, B = module.lora_A[adapter].weight, module.lora_B[adapter].weight
            yield Pair(bare_name(name), _whole(A), _whole(B) * module.scaling[adapter])


def _of_experts(name: str, wrapper: Any, experts: OctavoExperts, adapter: str) -> Iterator[Pair]:
    layout = experts.experts_layout
    if layout.transposed:
        raise AdapterError(f"The stacks of {name} are transposed, and no server's layout for their adapter is known.")
    factors: LoraFactors = wrapper.factors(adapter)
    A_ERK, B_ENR = _whole(factors.A_ERK), _whole(factors.B_ENR) * factors.scaling
    if wrapper.parameter_name == layout.down_name:
        parts = {"down_proj": B_ENR}
    elif layout.parts == 2:
        gate_ENR, up_ENR = B_ENR.chunk(2, dim=1)
        parts = {"gate_proj": gate_ENR, "up_proj": up_ENR}
    else:
        parts = {"up_proj": B_ENR}
    for projection, part_ENR in parts.items():
        for expert, (A_RK, B_NR) in enumerate(zip(A_ERK, part_ENR, strict=True)):
            yield Pair(f"{name}.{expert}.{projection}", A_RK, B_NR)


def write_adapter(pairs: Iterator[Pair], folder: Path, *, base_model: str, dtype: torch.dtype) -> int:
    """Write the two files of an adapter in ``dtype`` and return their bytes."""
    tensors, leaves, rank = {}, set(), 0
    for pair in pairs:
        for side, factor in (("A", pair.A_RK), ("B", pair.B_NR)):
            tensors[f"{_PREFIX}{pair.layer}.lora_{side}.weight"] = factor.detach().to("cpu", dtype).contiguous()
        leaves.add(pair.layer.rpartition(".")[2])
        rank = max(rank, len(pair.A_RK))
    # B holds the scaling already: alpha / r is 1, whatever rank a layer has.
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted(leaves),
        "bias": "none",
    }
    folder.mkdir(parents=True, exist_ok=True)
    # gate and up share A, and the format stores no tensor twice.
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / TENSORS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return sum((folder / name).stat().st_size for name in (TENSORS, CONFIG))


def _whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
