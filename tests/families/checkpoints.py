"""Any saved model as an FP8 checkpoint: every linear layer and expert that lies on disk as a matrix of its own is
quantized.

Which tensors those are is told by their bytes: they are looked up among the model's own weights, so that neither names
nor transformers' conversions are taken on trust.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from octavo.formats.facts import ScaleLayout
from octavo.formats.weight import quantize
from octavo.integrations.experts import experts_layout
from tests.checkpoints import RECIPES, Layout, Scales, quantization_config, read_json, write_json

# sizes of the tiny models are no multiples of 32
_BLOCK = ScaleLayout("block", (32, 32))
RECIPE: dict[Layout, Scales] = {
    "ct-channel": RECIPES["ct-channel"],
    "fp8-block": replace(RECIPES["fp8-block"], layout=_BLOCK),
    "ct-tensor": replace(RECIPES["ct-tensor"], activation=None),
}
LAYOUTS = tuple(RECIPE)
# Who quantizes a model leaves its routers alone.
ROUTERS = {"gate", "router"}


@dataclass(frozen=True)
class Saved:
    """``folder``: the FP8 checkpoint. ``plain``: the same weights dequantized. Modules by name on disk.

    ``experts``: those of them that are one expert's matrix. ``left``: linear layers that stay as they are.
    """

    folder: Path
    plain: Path
    quantized: tuple[str, ...]
    experts: tuple[str, ...]
    left: tuple[str, ...]


def save_quantized(model: PreTrainedModel, folder: Path, layout: Layout, *, experts: bool = True) -> Saved:
    """Write ``folder`` and ``folder-plain``, what is not FP8 in the model's dtype; ``experts``: they are FP8 too."""
    model.save_pretrained(folder)
    plain = folder.with_name(f"{folder.name}-plain")
    model.save_pretrained(plain)
    linears, matrices = _linear_weights(model), _expert_matrices(model)
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    kept = {_bytes(head.weight), _bytes(embeddings.weight)}
    stored: dict[str, Tensor] = {}
    dense: dict[str, Tensor] = {}
    quantized, ours, left = [], [], []
    for key, tensor in _tensors(folder).items():
        module, fingerprint = key.removesuffix(".weight"), _bytes(tensor)
        stored[key] = dense[key] = tensor
        if module == key or tensor.ndim != 2 or fingerprint not in linears.keys() | matrices:
            continue
        expert = fingerprint in matrices
        if (expert and not experts) or fingerprint in kept or _is_special(module, linears.get(fingerprint, True)):
            left.append(module)
            continue
        written, dense[key] = _quantized(module, tensor, RECIPE[layout])
        stored |= written
        quantized.append(module)
        if expert:
            ours.append(module)
    _rewrite(folder, stored, _config(layout, left))
    _rewrite(plain, dense, None)
    return Saved(folder, plain, tuple(quantized), tuple(ours), tuple(left))


def _is_special(module: str, plain_linear: bool) -> bool:
    return not plain_linear or bool(ROUTERS & set(module.split(".")))


def _linear_weights(model: nn.Module) -> dict[bytes, bool]:
    """Whether it is the weight of a plain ``nn.Linear``, not of a subclass that may compute something else."""
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return {_bytes(module.weight): type(module) is nn.Linear for module in linears}


def _expert_matrices(model: nn.Module) -> set[bytes]:
    """Each expert's gate, up and down, [out, in]."""
    found = set()
    for module in model.modules():
        if (layout := experts_layout(module)) is None or layout.transposed:
            continue
        for name in layout.names:
            parts = layout.parts if name == layout.up_name else 1
            for matrix in module.get_parameter(name):
                found |= {_bytes(part) for part in matrix.chunk(parts)}
    return found


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


def _quantized(module: str, weight: Tensor, recipe: Scales) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors on disk for one matrix, and the matrix that they stand for."""
    found = quantize(weight, recipe.layout, scale_dtype=recipe.dtype)
    scale = found.scales[0, 0].to(recipe.dtype)
    scale = scale.reshape(1) if recipe.shape == "one" else scale
    return {f"{module}.weight": found.codes[0, 0].clone(), f"{module}.{recipe.suffix}": scale}, found.dequantize()[0]


def _config(layout: Layout, left: list[str]) -> dict[str, Any]:
    config = quantization_config(layout, left, RECIPE[layout])
    if "modules_to_not_convert" in config:
        config["modules_to_not_convert"] = left
    return config


def _tensors(folder: Path) -> dict[str, Tensor]:
    return {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}


def _rewrite(folder: Path, tensors: dict[str, Tensor], quantization: dict[str, Any] | None) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if quantization is not None:
        config = read_json(folder / "config.json")
        write_json(folder / "config.json", {**config, "quantization_config": quantization})


def everything(folder: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    """Every tensor of a checkpoint: dtype, shape and bytes by name."""
    return {key: (tensor.dtype, tuple(tensor.shape), _bytes(tensor)) for key, tensor in _tensors(folder).items()}
