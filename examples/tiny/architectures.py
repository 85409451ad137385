"""The two models: small, but with every part that makes the real ones difficult to handle.

Sizes are multiples of 16 and often no multiple of 128, so that blocks of 128 are partial at the edges, as they are in
real checkpoints.
"""

from transformers import Glm4MoeLiteConfig, PreTrainedConfig, PreTrainedTokenizerBase, Qwen3MoeConfig


def config(name: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """The configuration of `glm-tiny` or `qwen-tiny`."""
    shared = {
        "vocab_size": len(tokenizer),
        "hidden_size": 256,
        "num_hidden_layers": 5,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
        "max_position_embeddings": tokenizer.model_max_length,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "rms_norm_eps": 1e-5,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "dtype": "bfloat16",
    }
    match name:
        case "glm-tiny":
            # Layer 0 is dense, the others have 16 routed experts and a shared one. kv_a_proj_with_mqa has 144 rows.
            return Glm4MoeLiteConfig(
                **shared,
                intermediate_size=592,
                moe_intermediate_size=112,
                n_routed_experts=16,
                n_shared_experts=1,
                num_attention_heads=4,
                num_key_value_heads=4,
                q_lora_rank=144,
                kv_lora_rank=112,
                qk_nope_head_dim=32,
                qk_rope_head_dim=32,
                v_head_dim=64,
                routed_scaling_factor=1.8,
                tie_word_embeddings=False,
            )
        case "qwen-tiny":
            # Every layer has 16 experts of one block and an eighth; q_proj has 288 rows, k_proj and v_proj have 96.
            return Qwen3MoeConfig(
                **shared,
                intermediate_size=576,
                moe_intermediate_size=144,
                num_local_experts=16,
                num_attention_heads=6,
                num_key_value_heads=2,
                head_dim=48,
                router_aux_loss_coef=0.001,
                tie_word_embeddings=True,
            )
    raise ValueError(f"unknown model {name!r}; expected 'glm-tiny' or 'qwen-tiny'")
