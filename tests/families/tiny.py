"""Tiny configs, experts and models of every family: sizes that are no multiples of a block, weights with outliers."""

import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .discovery import causal_lm_class, config_class, experts_classes
from .table import INSTALLED

HIDDEN, INTERMEDIATE, NUM_EXPERTS, TOP_K, LAYERS, VOCABULARY = 72, 40, 6, 2, 3, 96

# What a field means is the same in every config; a config takes those that it declares.
_FIELDS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "moe_intermediate_size": INTERMEDIATE,
    "moe_hidden_size": HIDDEN,
    "shared_expert_intermediate_size": INTERMEDIATE,
    "shared_intermediate_size": INTERMEDIATE,
    "num_experts": NUM_EXPERTS,
    "num_local_experts": NUM_EXPERTS,
    "n_routed_experts": NUM_EXPERTS,
    "moe_num_experts": NUM_EXPERTS,
    "num_experts_per_tok": TOP_K,
    "moe_topk": TOP_K,
    "moe_k": TOP_K,
    "top_k_experts": TOP_K,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "kv_lora_rank": 24,
    "q_lora_rank": 40,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 24,
    # fewer than a test has tokens, or what an indexer picks would not matter
    "index_topk": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
_LINEAR_ATTENTION = {
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
}
# What only one family needs: by the name of its config.
_OWN_FIELDS: dict[str, dict[str, Any]] = {
    # its first layers are all dense by default
    "BeamConfig": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "Gemma4TextConfig": {
        "enable_moe_block": True,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 16,
    },
    # a sliding layer, the third, has head sizes of its own
    "Dots3NoteTextConfig": {"num_hidden_layers": 2},
    # one size for the experts of text tokens and one for those of image tokens
    "Ernie4_5_VLMoeTextConfig": {"moe_intermediate_size": [INTERMEDIATE, INTERMEDIATE // 2]},
    "Glm5NextTextConfig": {"qk_rope_head_dim": 0, "index_topk": 16},
    "GraniteMoeHybridConfig": {"mamba_n_heads": 4, "mamba_d_head": 36, "layer_types": ["mamba", "attention", "mamba"]},
    "KimiLinearConfig": {"linear_head_dim": 16, "linear_num_heads": 2},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    # its sliding layers have twice the key-value heads
    "MiMoV2FlashConfig": {"num_attention_heads": 4},
    "NemotronHConfig": {"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 1},
    "Qwen3NextConfig": _LINEAR_ATTENTION,
    "Qwen3_5MoeTextConfig": _LINEAR_ATTENTION,
    "Qwen4ExpTextConfig": _LINEAR_ATTENTION,
    "ZayaConfig": {"num_experts_per_tok": 1, "router_hidden_size": 24},
}
# What a model passes to its experts beside the config.
_OWN_ARGUMENTS: dict[str, dict[str, Any]] = {"Ernie4_5_VLMoeMoeExperts": {"intermediate_size": INTERMEDIATE}}


def class_called(name: str) -> type[nn.Module]:
    """The experts class of this name; skips the test where the installed transformers lacks it."""
    if name not in experts_classes():
        pytest.skip(f"transformers {INSTALLED} has no {name}")
    return experts_classes()[name]


def tiny_config(cls: type[PreTrainedConfig], **changes: Any) -> PreTrainedConfig:
    """A tiny config of this class; ``changes`` win."""
    declared = set(cls.__dataclass_fields__)
    shared = {name: value for name, value in _FIELDS.items() if name in declared}
    return cls(**{**shared, **_OWN_FIELDS.get(cls.__name__, {}), **changes})


@cache
def _experts_config(cls: type[nn.Module]) -> PreTrainedConfig:
    return tiny_config(config_class(cls))


def tiny_experts(cls: type[nn.Module], dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """An experts module of this class with random weights."""
    module = cls(copy.copy(_experts_config(cls)), **_OWN_ARGUMENTS.get(cls.__name__, {}))
    randomize(module.to(dtype), seed)
    return module.eval()


def randomize(module: nn.Module, seed: int) -> None:
    """Random matrices with outlier columns, as real weights have, and random biases; norms stay what they are."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
            if parameter.ndim > 1 and not name.endswith("bias"):
                parameter[..., torch.randint(parameter.shape[-1], (3,), generator=generator)] *= 8


def tiny_model(cls: type[nn.Module], seed: int = 0) -> PreTrainedModel:
    """The causal language model around this experts class, in float32."""
    model_class = causal_lm_class(cls)
    assert model_class is not None, f"AutoModelForCausalLM builds nothing around {cls.__name__}"
    return built(model_class, tiny_config(config_class(cls)), seed)


def built(model_class: type[PreTrainedModel], config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A model of this class, its experts with outliers."""
    torch.manual_seed(seed)
    model = model_class(config)
    for module in model.modules():
        if type(module) in experts_classes().values():
            randomize(module, seed)
    return model.eval()
