"""Tiny checkpoints on disk, of every architecture and layout, and ways to damage them.

``build`` writes a quantized checkpoint under the names that transformers itself gives the model's tensors, and
beside it the same weights dequantized, in float32, for stock transformers. Sizes are no multiples of 128 on purpose.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from octavo.formats.scheme import ScaleLayout
from octavo.formats.weight import quantize

Arch = Literal["glm", "qwen", "deepseek_v3", "qwen3", "llama", "mistral", "glm4"]
Layout = Literal[
    "ct-channel", "ct-tensor", "ct-block", "fp8-block", "fp8-tensor", "ue8m0", "modelopt", "fbgemm", "bf16"
]
Files = Literal["one", "shuffled"]

ARCHS: tuple[Arch, ...] = ("glm", "qwen", "deepseek_v3")
DENSE_ARCHS: tuple[Arch, ...] = ("qwen3", "llama", "mistral", "glm4")
# The six that the matrix names, and the others.
LAYOUTS: tuple[Layout, ...] = ("ct-channel", "ct-tensor", "ct-block", "fp8-block", "fp8-tensor", "ue8m0")
FURTHER_LAYOUTS: tuple[Layout, ...] = ("modelopt", "fbgemm")

NUM_SHARDS = 3
MIXED_LAYER = 1  # the first MoE layer: whoever looks at that one alone learns nothing about the others
QUANTIZED = re.compile(r"\.layers\.(\d+)\..*_proj(_with_mqa)?\.weight$")
SIZES = {
    "vocab_size": 256,
    "hidden_size": 192,
    "intermediate_size": 224,
    "moe_intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "num_experts_per_tok": 2,
    "initializer_range": 0.05,
    "tie_word_embeddings": False,
}
MOE_SIZES = ("moe_intermediate_size", "num_experts_per_tok")
# 512 + 64 rows of kv_a_proj_with_mqa are 4.5 blocks of 128, as in the real models.
MLA = {
    "kv_lora_rank": 512,
    "q_lora_rank": 96,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "num_key_value_heads": 4,
    "n_routed_experts": 6,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}


@dataclass(frozen=True)
class Scales:
    """How a layout writes its scales."""

    layout: ScaleLayout
    suffix: str
    dtype: torch.dtype
    shape: Literal["grid", "scalar", "one", "rows"] = "grid"
    activation: str | None = None


RECIPES: dict[Layout, Scales] = {
    "ct-channel": Scales(ScaleLayout("channel"), "weight_scale", torch.bfloat16),
    "ct-tensor": Scales(ScaleLayout("tensor"), "weight_scale", torch.bfloat16, "one", "input_scale"),
    "ct-block": Scales(ScaleLayout("block", (64, 96)), "weight_scale", torch.bfloat16),
    "fp8-block": Scales(ScaleLayout("block", (128, 128)), "weight_scale_inv", torch.float32),
    "fp8-tensor": Scales(ScaleLayout("tensor"), "weight_scale_inv", torch.float32, "scalar", "activation_scale"),
    "ue8m0": Scales(ScaleLayout("block", (128, 128)), "weight_scale_inv", torch.float8_e8m0fnu),
    "modelopt": Scales(ScaleLayout("tensor"), "weight_scale", torch.float32, "scalar", "input_scale"),
    "fbgemm": Scales(ScaleLayout("channel"), "weight_scale", torch.float32),
}


@dataclass(frozen=True)
class Built:
    """``folder``: the checkpoint. ``plain``: the same weights dequantized to float32, without a quantization_config.

    ``quantized``: the modules with codes, by name on disk. ``ignored``: those that the config lists as left in bf16.
    """

    folder: Path
    plain: Path
    arch: Arch
    layout: Layout
    quantized: tuple[str, ...]
    ignored: tuple[str, ...]


def build(
    folder: Path,
    *,
    arch: Arch = "qwen",
    layout: Layout = "ct-channel",
    files: Files = "one",
    mixed: bool = False,
    seed: int = 0,
    scale_dtype: torch.dtype | None = None,
    block: tuple[int, int] | None = None,
    static: bool = True,
    **sizes: Any,
) -> Built:
    """Writes ``folder`` and ``folder-plain``.

    ``mixed``: every linear layer of layer 1 stays bf16, its experts named one by one in the config's ignore list.
    ``scale_dtype``: in place of the layout's usual one; uint8 for the bytes of e8m0. ``static``: with static activation
    scales, in the layouts that know them. ``sizes``: fields of the model's config to change.
    """
    config, tensors = _model(arch, seed, tuple(sorted(sizes.items())))
    stored: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    quantized, ignored = [], []
    recipe = None if layout == "bf16" else _recipe(layout, scale_dtype, block, static)
    for key, tensor in tensors.items():
        match = QUANTIZED.search(key)
        module = key.removesuffix(".weight")
        if match is None or recipe is None or (mixed and int(match[1]) == MIXED_LAYER):
            stored[key], plain[key] = tensor, tensor.float()
            if match is not None and recipe is not None:
                ignored.append(module)
            continue
        stored_here, plain[key] = _quantized(module, tensor, recipe)
        stored |= stored_here
        quantized.append(module)
    plain_folder = folder.with_name(folder.name + "-plain")
    _write(plain_folder, {**config, "dtype": "float32"}, plain, "one", seed)
    if recipe is not None:
        config = {**config, "quantization_config": quantization_config(layout, ignored, recipe)}
    _write(folder, {**config, "dtype": "bfloat16"}, stored, files, seed)
    return Built(folder, plain_folder, arch, layout, tuple(quantized), tuple(ignored))


def quantization_config(layout: Layout, ignored: Iterable[str], recipe: Scales | None = None) -> dict[str, Any]:
    """The config that writers of this layout put beside it."""
    recipe = recipe or RECIPES[layout]
    ignored = list(ignored)
    if layout.startswith("ct-"):
        return _compressed_tensors(recipe, ["lm_head", *ignored])
    if layout == "modelopt":
        return {
            "quant_method": "modelopt",
            "quant_algo": "FP8",
            "producer": {"name": "modelopt", "version": "0.37.0"},
            "ignore": ["lm_head", "*.mlp.gate", *ignored],
        }
    unquantized = ["lm_head", "model.embed_tokens", *(f"model.layers.{i}.mlp.gate" for i in (1, 2)), *ignored]
    if layout == "fbgemm":
        return {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": unquantized}
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "static" if recipe.activation else "dynamic",
        "weight_block_size": list(recipe.layout.block) if recipe.layout.block else None,
        "modules_to_not_convert": unquantized,
        **({"scale_fmt": "ue8m0"} if layout == "ue8m0" else {}),
    }


def _compressed_tensors(recipe: Scales, ignore: list[str]) -> dict[str, Any]:
    eight_bits = {"num_bits": 8, "type": "float", "symmetric": True, "group_size": None, "actorder": None}
    block = recipe.layout.block
    weights = {
        **eight_bits,
        "strategy": recipe.layout.kind,
        "dynamic": False,
        "block_structure": list(block) if block else None,
        "observer": "minmax",
    }
    activations = {**eight_bits, "strategy": "token", "dynamic": True}
    if block:
        activations |= {"strategy": "group", "group_size": block[1]}
    if recipe.activation:
        activations |= {"strategy": "tensor", "dynamic": False}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": {**group, "format": "float-quantized"}},
        "ignore": ignore,
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
    }


def _recipe(layout: Layout, dtype: torch.dtype | None, block: tuple[int, int] | None, static: bool) -> Scales:
    usual = RECIPES[layout]
    return Scales(
        ScaleLayout("block", block) if block else usual.layout,
        usual.suffix,
        dtype or usual.dtype,
        usual.shape,
        usual.activation if static else None,
    )


def _quantized(module: str, weight: Tensor, recipe: Scales) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors on disk for one matrix, and its dequantized float32."""
    powers = recipe.dtype in (torch.float8_e8m0fnu, torch.uint8)
    found = quantize(
        weight,
        recipe.layout,
        scale_dtype=torch.float32 if powers else recipe.dtype,
        scale_format="ue8m0" if powers else "float",
    )
    scale = found.scales[0, 0]
    if recipe.shape != "grid":
        scale = scale.reshape({"scalar": (), "one": (1,), "rows": (-1,)}[recipe.shape])
    scale = scale.to(torch.float8_e8m0fnu).view(torch.uint8) if recipe.dtype == torch.uint8 else scale.to(recipe.dtype)
    tensors = {f"{module}.weight": found.codes[0, 0].clone(), f"{module}.{recipe.suffix}": scale.clone()}
    if recipe.activation:
        # Any positive value: what a calibration would have found.
        value = 0.01 + 0.001 * (len(module) % 7)
        tensors[f"{module}.{recipe.activation}"] = torch.full_like(scale, value, dtype=torch.float32)
    return tensors, found.dequantize()[0]


@cache
def _model(arch: Arch, seed: int, sizes: tuple[tuple[str, Any], ...]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """``config.json`` and the tensors on disk, in bf16, of a random model with outlier columns."""
    import tempfile

    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(_config(arch, dict(sizes)), dtype=torch.float32)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.02)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                # Real weights have channels far above the others; without them every layout looks fine.
                parameter[..., torch.randint(parameter.shape[-1], (3,))] *= 8
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = json.loads((Path(folder) / "config.json").read_text())
        tensors = load_file(Path(folder) / "model.safetensors")
    return config, {k: v if k.endswith("e_score_correction_bias") else v.bfloat16() for k, v in tensors.items()}


def _config(arch: Arch, sizes: dict[str, Any]) -> Any:
    from transformers import (
        DeepseekV3Config,
        Glm4Config,
        Glm4MoeLiteConfig,
        LlamaConfig,
        MistralConfig,
        Qwen3Config,
        Qwen3MoeConfig,
    )

    dense = {"qwen3": Qwen3Config, "llama": LlamaConfig, "mistral": MistralConfig, "glm4": Glm4Config}
    if arch in dense:
        own = {name: value for name, value in SIZES.items() if name not in MOE_SIZES}
        # Glm4 pads with its config's token, and the real one is far past a tiny vocabulary.
        return dense[arch](**{**own, "num_key_value_heads": 2, "head_dim": 48, "pad_token_id": 0, **sizes})
    if arch == "qwen":
        own = {
            "num_experts": 6,
            "num_key_value_heads": 2,
            "head_dim": 48,
            "norm_topk_prob": True,
            "mlp_only_layers": [0],
        }
        return Qwen3MoeConfig(**{**SIZES, **own, **sizes})
    if arch == "glm":
        return Glm4MoeLiteConfig(**{**SIZES, **MLA, "n_group": 1, "topk_group": 1, **sizes})
    return DeepseekV3Config(**{**SIZES, **MLA, "n_group": 2, "topk_group": 1, **sizes})


def _write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], files: Files, seed: int) -> None:
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config)
    if files == "one":
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    # Dealt out one by one: a weight and its scale, and the experts of a layer, land in different shards.
    keys = sorted(tensors)
    random.Random(seed).shuffle(keys)
    weight_map = {}
    for shard in range(NUM_SHARDS):
        name = f"model-{shard + 1:05d}-of-{NUM_SHARDS:05d}.safetensors"
        held = {key: tensors[key] for key in keys[shard::NUM_SHARDS]}
        save_file(held, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(held, name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index)


# Ways to damage a checkpoint. Each changes a folder in place, so give it a copy.


def copy_of(built: Built, folder: Path) -> Path:
    """A copy of the checkpoint's folder, to be damaged."""
    return Path(shutil.copytree(built.folder, folder))


def read_json(file: Path) -> Any:
    return json.loads(file.read_text())


def write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=1))


def edit_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """``change`` gets the ``quantization_config``."""
    config = read_json(folder / "config.json")
    change(config["quantization_config"])
    write_json(folder / "config.json", config)


def edit_index(folder: Path, change: Callable[[dict[str, str]], None]) -> None:
    """``change`` gets the ``weight_map``."""
    file = folder / "model.safetensors.index.json"
    index = read_json(file)
    change(index["weight_map"])
    write_json(file, index)


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None], file: str = "model.safetensors") -> None:
    """``change`` gets the tensors of one file, by key; the index stays as it is."""
    tensors = load_file(folder / file)
    change(tensors)
    (folder / file).unlink()
    save_file(tensors, folder / file, metadata={"format": "pt"})


def read_raw(file: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    content = file.read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_raw(file: Path, header: dict[str, Any] | bytes, data: bytes, *, length: int | None = None) -> None:
    """A safetensors file with any header, true or not; ``length``: what its first eight bytes claim."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def edit_header(folder: Path, change: Callable[[dict[str, Any]], None], file: str = "model.safetensors") -> None:
    """``change`` gets the header; the data stays as it is."""
    header, data = read_raw(folder / file)
    change(header)
    write_raw(folder / file, header, data)


def truncate(file: Path, nbytes: int) -> None:
    """Cuts ``nbytes`` off the end."""
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - nbytes)
