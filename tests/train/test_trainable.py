"""The table of what trains: groups from where a tensor sits, ranks from its shape, and nothing counted twice."""

import pytest
from peft import LoraConfig, get_peft_model
from transformers import Glm4MoeLiteConfig, Glm4MoeLiteForCausalLM, Qwen3MoeForCausalLM

from octavo.integrations.announced import rehearse
from octavo.train.announce import difference
from octavo.train.trainable import trainable_table, trainable_tensors

from .tiny import tiny_config

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
SHARED = ["mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight"]


@pytest.fixture
def glm() -> Glm4MoeLiteForCausalLM:
    config = Glm4MoeLiteConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        mlp_layer_types=["dense", "sparse"],
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
    )
    return Glm4MoeLiteForCausalLM(config)


def test_each_tensor_is_in_the_group_of_its_place(glm):
    config = LoraConfig(
        r=4,
        target_modules=["q_a_proj", "o_proj"],
        target_parameters=[*EXPERTS, *SHARED, "layers.0.mlp.up_proj.weight", "mlp.gate.weight"],
        rank_pattern={r"experts\.(gate_up_proj|down_proj)": 2},
        modules_to_save=["lm_head", "input_layernorm"],
    )
    model = get_peft_model(glm, config)
    rows = {row.group: row for row in trainable_table(model).rows}
    assert {group: (row.tensors, row.ranks) for group, row in rows.items()} == {
        "attention": (8, (4,)),
        "dense MLP": (2, (4,)),
        "shared experts": (4, (4,)),
        "routed experts": (4, (2,)),
        "router": (2, (4,)),
        "embeddings": (1, ()),
        "other": (2, ()),
    }
    trainable = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    table = trainable_table(model)
    assert table.parameters == sum(trainable.values())
    assert table.tensors == len(trainable)
    assert sum(row.parameters for row in rows.values()) == table.parameters
    assert f"total           {table.tensors:>8}" in str(table)
    assert "full" in str(table)


def test_factors_of_experts_know_their_expert_count_and_pair(glm):
    model = get_peft_model(glm, LoraConfig(r=4, target_parameters=EXPERTS))
    tensors = list(trainable_tensors(model))
    assert len({tensor.pair for tensor in tensors}) == 2
    for tensor in tensors:
        assert tensor.layer is not None
        assert tensor.layer.endswith("layers.1.mlp.experts")
        assert (tensor.num_experts, tensor.rank, tensor.begins_at_zero) == (8, 4, tensor.side == "B")


def test_what_peft_does_on_its_own_to_mixture_of_experts_targets_is_said():
    """peft 0.21 turns gate_proj and the like into the stacked experts: the dense layer is dropped, experts come in."""
    base = Qwen3MoeForCausalLM(tiny_config())
    config = LoraConfig(r=4, target_modules=["q_proj", "gate_proj", "up_proj"])
    announced = rehearse(base, config).named
    assert announced == {
        f"model.layers.{name}.weight"
        for name in ("0.self_attn.q_proj", "1.self_attn.q_proj", "0.mlp.gate_proj", "0.mlp.up_proj")
    }
    found = difference(announced, get_peft_model(base, config))
    assert found.dropped == ("model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight")
    assert found.added == ("model.layers.1.mlp.experts.gate_up_proj",)
    assert [line.split(":")[0] for line in found.lines()] == [
        "peft dropped 2 targets on its own",
        "peft added 1 targets on its own",
    ]


@pytest.mark.parametrize("targets", [["q_proj", "o_proj"], r".*\.(q|k)_proj"])
def test_what_trains_as_announced_makes_no_difference(targets):
    # Without experts, where peft rewrites nothing.
    base = Qwen3MoeForCausalLM(tiny_config(mlp_only_layers=[0, 1]))
    config = LoraConfig(r=2, target_modules=targets)
    announced = rehearse(base, config).named
    assert announced
    assert difference(announced, get_peft_model(base, config)).lines() == []


def test_a_full_model_is_a_table_too():
    model = Qwen3MoeForCausalLM(tiny_config())
    table = trainable_table(model)
    assert table.parameters == table.total_parameters == sum(p.numel() for p in model.parameters())
    assert all(row.ranks == () for row in table.rows)
