"""The trained models as FP8 checkpoints in the two layouts of the large ones that they stand for.

``glm-tiny``: compressed-tensors, one scale per channel in bfloat16, one MoE layer left in bfloat16 by its experts'
names, two shards.
``qwen-tiny``: ``fp8`` with 128 × 128 blocks and float32 scales, one file.
"""

import argparse
import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from octavo.formats.scheme import ScaleLayout
from octavo.formats.weight import quantize

LINEAR = re.compile(r"\.layers\.(\d+)\..*_proj(_with_mqa)?\.weight$")
# neither the first MoE layer nor the last: whoever looks at one of those learns nothing about the others
PLAIN_LAYER = 3
BESIDE = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "training.json",
    "README.md",
)


def glm(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    stored, ignored = {}, ["lm_head"]
    for key, tensor in tensors.items():
        found, module = LINEAR.search(key), key.removesuffix(".weight")
        if found is None:
            stored[key] = tensor
        elif int(found[1]) == PLAIN_LAYER and ".mlp." in key:
            stored[key] = tensor
            ignored.append(module)
        else:
            weight = quantize(tensor, ScaleLayout("channel"), scale_dtype=torch.bfloat16)
            stored[key] = weight.codes[0, 0].clone()
            stored[f"{module}.weight_scale"] = weight.scales[0, 0].bfloat16()
    eight_bits = {"num_bits": 8, "type": "float", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**eight_bits, "strategy": "channel", "dynamic": False},
        "input_activations": {**eight_bits, "strategy": "token", "dynamic": True},
        "output_activations": None,
    }
    return stored, {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignored,
        "kv_cache_scheme": None,
    }


def qwen(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    stored, layers = {}, set()
    for key, tensor in tensors.items():
        if found := LINEAR.search(key):
            weight = quantize(tensor, ScaleLayout("block", (128, 128)))
            stored[key] = weight.codes[0, 0].clone()
            stored[f"{key}_scale_inv"] = weight.scales[0, 0].clone()
            layers.add(int(found[1]))
        else:
            stored[key] = tensor
    kept = [
        "lm_head",
        "model.embed_tokens",
        "model.norm",
        *(f"model.layers.{layer}.mlp.gate" for layer in sorted(layers)),
    ]
    return stored, {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": kept,
    }


def write(folder: Path, tensors: dict[str, Tensor], shards: int) -> None:
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    # cut by size in the order of names, so that the cut falls inside a layer
    keys, weight_map = sorted(tensors), {}
    total = sum(tensor.nbytes for tensor in tensors.values())
    groups: list[dict[str, Tensor]] = [{} for _ in range(shards)]
    seen = 0
    for key in keys:
        groups[min(seen * shards // total, shards - 1)][key] = tensors[key]
        seen += tensors[key].nbytes
    for number, group in enumerate(groups, 1):
        name = f"model-{number:05d}-of-{shards:05d}.safetensors"
        save_file(group, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(group, name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=["glm-tiny", "qwen-tiny"])
    parser.add_argument("--trained", type=Path, required=True, help="folder with the trained bfloat16 checkpoint")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder to make, such as src/octavo/demo/models/glm-tiny"
    )
    arguments = parser.parse_args()
    tensors = {
        key: tensor
        for file in sorted(arguments.trained.glob("*.safetensors"))
        for key, tensor in load_file(file).items()
    }
    stored, quantization_config = (glm if arguments.model == "glm-tiny" else qwen)(tensors)
    arguments.out.mkdir(parents=True)
    write(arguments.out, stored, 2 if arguments.model == "glm-tiny" else 1)
    config = json.loads((arguments.trained / "config.json").read_text())
    config["quantization_config"] = quantization_config
    (arguments.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in BESIDE:
        if (arguments.trained / name).exists():
            shutil.copy(arguments.trained / name, arguments.out / name)
    total = sum(file.stat().st_size for file in arguments.out.iterdir())
    print(f"{arguments.out}: {len(stored)} tensors, {total / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
