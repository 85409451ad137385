"""``octavo.lora_config`` names what it says and nothing else; what peft makes of a user's own configuration is told."""

import json
import warnings

import peft
import pytest
import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

from octavo.errors import AdapterError, CheckpointError
from octavo.integrations.lora_config import DEFAULT_TARGETS, TARGETS
from octavo.integrations.peft import (
    check_targets,
    expert_rank_note,
    find_weights,
    group_of,
    lora_config,
    trainable_parameters,
)
from octavo.integrations.targets import shortest_endings
from tests.families.discovery import causal_lm_class, config_class, experts_classes
from tests.families.tiny import tiny_config
from tests.integrations.peft_models import ATTENTION, FAMILIES, config_for, gradients, logits, pair, randomize, relative

BUILT = {name: cls for name, cls in experts_classes().items() if causal_lm_class(cls) is not None}


def adapted(model, config):
    """Names of the weights that peft adapts in ``model``, which it changes."""
    tuner = peft.LoraModel(model, config, "default", low_cpu_mem_usage=True)
    return {f"{name}.weight" for name in tuner.targeted_module_names} | set(tuner.targeted_parameter_names)


def llama():
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("name", BUILT)
def test_every_family_gets_exactly_the_groups_by_default(name):
    with torch.device("meta"):
        model = causal_lm_class(BUILT[name])(tiny_config(config_class(BUILT[name])))
    weights = find_weights(model)
    assert any(weight.group == "routed experts" for weight in weights.values())
    assert any(weight.group == "router" for weight in weights.values())
    want = {weight.name for weight in weights.values() if weight.group in TARGETS.values()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert adapted(model, lora_config(model)) == want
    # the same names under peft's wrappers, and the same groups
    assert find_weights(model) == weights
    for factor, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert group_of(factor, weights) in TARGETS.values()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_default_trains_every_group_exactly(family):
    models = pair(family)
    wrapped = [randomize(peft.get_peft_model(model, lora_config(model, r=4))) for model in models]
    ours, stock = wrapped
    assert relative(logits(ours), logits(stock)) < 1e-5
    got, want = gradients(ours), gradients(stock)
    assert all(relative(got[name], want[name]) < 1e-4 for name in want)
    groups = {group_of(name, find_weights(ours)) for name in got}
    assert groups == {weight.group for weight in find_weights(models.ours).values() if weight.group in TARGETS.values()}


def test_ranks_and_scalings_of_experts():
    model = pair("glm").ours
    config = lora_config(model, r=8)
    wrapped = peft.get_peft_model(model, config)
    ranks = {}
    for row in trainable_parameters(wrapped):
        ranks.setdefault(row.group, set()).add(row.rank)
    # a token passes 2 experts
    assert ranks == {"attention": {8}, "dense MLP": {8}, "shared experts": {8}, "routed experts": {4}}
    scalings = {
        s
        for layer in wrapped.modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
        for s in layer.scaling.values()
    }
    assert scalings == {1.0}
    assert expert_rank_note(model, config) == (
        "routed experts have rank 4 where other layers have 8: a token passes 2 experts, "
        "so it trains factors of 4 x 2 = 8 there"
    )


@pytest.mark.parametrize(
    ("settings", "rank", "alpha"),
    [
        ({"r": 1}, None, None),
        ({"r": 16, "alpha": 32}, 8, 16),
        ({"r": 16, "alpha": 1}, 8, 0.5),
        ({"r": 16, "expert_rank": 16}, None, None),
        ({"r": 16, "expert_rank": 2, "alpha": 32}, 2, 4),
        ({"r": 16, "alpha": 32, "rslora": True}, 8, None),
    ],
    ids=str,
)
def test_experts_follow_the_scaling(settings, rank, alpha):
    config = lora_config(pair("glm").ours, **settings)
    assert list(config.rank_pattern.values()) == ([] if rank is None else [rank])
    assert list(config.alpha_pattern.values()) == ([] if alpha is None else [alpha])


def test_a_path_gives_the_configuration_of_the_model(tmp_path):
    model = pair("glm").ours
    quantized = {"quant_method": "fp8", "weight_block_size": [64, 32]}
    (tmp_path / "config.json").write_text(json.dumps({**model.config.to_dict(), "quantization_config": quantized}))
    assert AutoConfig.from_pretrained(tmp_path).quantization_config["quant_method"] == "fp8"
    for path in (tmp_path, str(tmp_path)):
        assert lora_config(path, r=4).to_dict() == lora_config(model, r=4).to_dict()
    with pytest.raises(CheckpointError, match=r"neither a folder with a config\.json nor a hub id"):
        lora_config(tmp_path / "nowhere")


def test_a_group_that_is_not_there_is_refused_by_name():
    model = pair("qwen").ours
    with pytest.raises(
        AdapterError, match=r"shared_experts matches nothing in this model\. It has attention: k_proj, o_proj"
    ):
        lora_config(model, targets=("attention", "shared_experts"))
    assert lora_config(model, targets=DEFAULT_TARGETS).target_parameters
    dense = llama()
    with pytest.raises(AdapterError, match=r"experts matches nothing.*mlp: down_proj, gate_proj, up_proj"):
        lora_config(dense, targets=("experts",))
    with pytest.raises(AdapterError, match=r"router matches nothing"):
        lora_config(dense, router=True)
    with pytest.raises(AdapterError, match=r"targets names 'expert'; choose of attention, mlp"):
        lora_config(model, targets=("expert",))


def test_a_dense_model_is_targeted_by_modules_and_may_have_dropout():
    config = lora_config(llama(), dropout=0.1)
    assert set(config.target_modules) == {*ATTENTION["qwen"], "gate_proj", "up_proj", "down_proj"}
    assert config.target_parameters is None
    assert config.rank_pattern == {}
    assert adapted(llama(), config) == {w.name for w in find_weights(llama()).values() if w.group != "embeddings"}


def test_dropout_is_refused_where_peft_adapts_parameters():
    model = pair("glm").ours
    with pytest.raises(AdapterError, match=r"dropout=0\.1 is impossible on mlp, shared_experts, experts"):
        lora_config(model, dropout=0.1)
    assert lora_config(model, dropout=0.1, targets=("attention",)).lora_dropout == 0.1


@pytest.mark.parametrize("init", ["pissa", "orthogonal", "default"])
def test_an_init_that_reads_weights_is_refused(init):
    with pytest.raises(AdapterError, match=r"does not work on FP8 weights"):
        lora_config(pair("glm").ours, init=init)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_router_trains_when_asked(family):
    models = pair(family)
    ours, stock = (randomize(peft.get_peft_model(model, lora_config(model, r=4, router=True))) for model in models)
    got, want = gradients(ours), gradients(stock)
    routers = [name for name in got if group_of(name, find_weights(ours)) == "router"]
    assert len(routers) == 2 * sum(weight.group == "router" for weight in find_weights(models.ours).values())
    assert all(relative(got[name], want[name]) < 1e-4 for name in want)
    assert relative(logits(ours), logits(stock)) < 1e-5


def test_heads_and_tokens_are_passed_on():
    config = lora_config(pair("glm").ours, modules_to_save=["lm_head"], trainable_token_indices=[3])
    rows = trainable_parameters(peft.get_peft_model(pair("glm").ours, config))
    full = {(row.group, row.pattern, row.tensors, row.parameters) for row in rows if row.rank is None}
    assert full == {
        ("embeddings", "lm_head.modules_to_save.default.weight", 1, 96 * 72),
        ("embeddings", "model.embed_tokens.token_adapter.trainable_tokens_delta.default", 1, 72),
    }


def test_towers_that_are_not_text_are_left_alone():
    config = Qwen3VLMoeConfig(
        text_config={
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "moe_intermediate_size": 16,
            "num_hidden_layers": 2,
            "mlp_only_layers": [0],
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        },
        vision_config={"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32},
    )
    with torch.device("meta"):
        model = Qwen3VLMoeForConditionalGeneration(config)
    weights = find_weights(model)
    tower = {weight.group for weight in weights.values() if ".visual." in weight.name}
    assert tower == {"other"}
    chosen = adapted(model, lora_config(model))
    assert chosen == {w.name for w in weights.values() if w.group in TARGETS.values()}
    assert not [name for name in chosen if "visual" in name]
    assert len(chosen) == 2 * 4 + 3 + 2


def test_endings_name_what_they_should_and_nothing_else():
    names = ["a.0.mlp.up", "a.1.mlp.up", "a.1.mlp.shared.up", "vision.0.mlp.up", "a.1.attn.q"]
    assert shortest_endings(["a.1.attn.q"], names) == ["q"]
    assert shortest_endings(["a.1.mlp.shared.up"], names) == ["shared.up"]
    # told from the vision tower by everything, from each other by nothing
    assert shortest_endings(["a.0.mlp.up", "a.1.mlp.up"], names) == ["1.mlp.up", "a.0.mlp.up"]
    assert shortest_endings(["a.1.attn.q"], names, least=3) == ["1.attn.q"]


SHARED_LEAVES = ", ".join(f"mlp.shared_experts.{name}_proj" for name in ("down", "gate", "up"))
DROPPED = "peft leaves out"
ADDED = "peft adapts on its own"


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (ATTENTION["glm"], []),
        (
            ["gate_proj", "up_proj", "down_proj"],
            [
                f"{DROPPED} dense MLP: mlp.down_proj, mlp.gate_proj, mlp.up_proj (3 weights)",
                f"{DROPPED} shared experts: {SHARED_LEAVES} (6 weights)",
                f"{ADDED} routed experts: mlp.experts.down_proj, mlp.experts.gate_up_proj (4 weights)",
            ],
        ),
        (
            "all-linear",
            [
                f"{DROPPED} dense MLP: mlp.down_proj, mlp.gate_proj, mlp.up_proj (3 weights)",
                f"{DROPPED} shared experts: {SHARED_LEAVES} (6 weights)",
                f"{ADDED} routed experts: mlp.experts.down_proj, mlp.experts.gate_up_proj (4 weights)",
                f"{ADDED} router: mlp.gate (2 weights)",
            ],
        ),
    ],
    ids=["attention", "mlp", "all-linear"],
)
def test_what_peft_drops_and_adds_is_told(targets, said):
    model = pair("glm").ours
    config = peft.LoraConfig(r=4, target_modules=targets)
    before = config.to_dict()
    lines = check_targets(model, config)
    assert [line.partition(";")[0] for line in lines] == said
    assert config.to_dict() == before
    assert not [part for part in model.modules() if isinstance(part, peft.tuners.lora.LoraLayer)]


@pytest.mark.parametrize("family", FAMILIES)
def test_our_own_configurations_are_taken_as_they_are(family):
    model = pair(family).ours
    assert check_targets(model, lora_config(model)) == []
    assert check_targets(model, config_for(family)) == []


def test_parameters_are_counted_by_kind():
    model = peft.get_peft_model(pair("glm").ours, config_for("glm"))
    rows = trainable_parameters(model)
    assert sum(row.parameters for row in rows) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    up = next(row for row in rows if row.pattern == "model.layers.*.mlp.experts.gate_up_proj")
    # 2 layers, A and B; 6 experts of rank 2 between 72 and 2 x 40
    assert (up.group, up.tensors, up.parameters, up.rank) == ("routed experts", 4, 2 * 6 * 2 * (72 + 80), 2)
