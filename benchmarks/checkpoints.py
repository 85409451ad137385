"""Checkpoints with the names, shapes and dtypes of real ones and drawn values, to load and to train."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen3MoeConfig

BLOCK = 128
# Qwen3-30B-A3B: 48 layers of 128 experts, 8 chosen
QWEN3 = {
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
}


def write_qwen3(folder: Path, layers: int) -> int:
    """Write Qwen3-30B-A3B-FP8 with ``layers`` layers, a shard each, and return its bytes."""
    config = Qwen3MoeConfig(**QWEN3, num_hidden_layers=layers, dtype="bfloat16", architectures=["Qwen3MoeForCausalLM"])
    quantization = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": ["lm_head", *(f"model.layers.{layer}.mlp.gate" for layer in range(layers))],
    }
    (folder / "config.json").write_text(json.dumps({**config.to_dict(), "quantization_config": quantization}))
    generator = torch.Generator().manual_seed(0)
    hidden, vocabulary = QWEN3["hidden_size"], QWEN3["vocab_size"]

    def plain(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * 0.02).bfloat16()

    shards = [{"model.embed_tokens.weight": plain(vocabulary, hidden), "lm_head.weight": plain(vocabulary, hidden)}]
    shards[0]["model.norm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    weight_map, total = {}, 0
    for number in range(layers + 1):
        tensors = shards[0] if number == 0 else _layer(f"model.layers.{number - 1}", generator)
        name = f"model-{number + 1:05d}-of-{layers + 1:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _layer(prefix: str, generator: torch.Generator) -> dict[str, Tensor]:
    hidden, head = QWEN3["hidden_size"], QWEN3["head_dim"]
    queries, keys = QWEN3["num_attention_heads"] * head, QWEN3["num_key_value_heads"] * head
    width = QWEN3["moe_intermediate_size"]
    ones = {
        "input_layernorm": hidden,
        "post_attention_layernorm": hidden,
        "self_attn.q_norm": head,
        "self_attn.k_norm": head,
    }
    tensors = {f"{prefix}.{name}.weight": torch.ones(size, dtype=torch.bfloat16) for name, size in ones.items()}
    tensors[f"{prefix}.mlp.gate.weight"] = (
        torch.randn(QWEN3["num_experts"], hidden, generator=generator) * 0.02
    ).bfloat16()
    linears = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
    }
    for expert in range(QWEN3["num_experts"]):
        linears |= {f"mlp.experts.{expert}.{name}_proj": (width, hidden) for name in ("gate", "up")}
        linears[f"mlp.experts.{expert}.down_proj"] = (hidden, width)
    for name, (rows, columns) in linears.items():
        codes = torch.randint(0, 256, (rows, columns), generator=generator, dtype=torch.uint8)
        # 0x7F and 0xFF are NaN
        codes[(codes & 0x7F) == 0x7F] = 0
        grid = (-(-rows // BLOCK), -(-columns // BLOCK))
        tensors[f"{prefix}.{name}.weight"] = codes.view(torch.float8_e4m3fn)
        tensors[f"{prefix}.{name}.weight_scale_inv"] = torch.rand(grid, generator=generator) * 1e-4 + 1e-4
    return tensors
