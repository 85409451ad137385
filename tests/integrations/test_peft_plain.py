"""Unquantized stacks on octavo's forward: factors handed over, transposed stacks included, and merging as stock."""

import copy

import peft
import pytest
import torch
from transformers import GptOssConfig, GptOssForCausalLM, PreTrainedModel

from octavo.integrations.experts import experts_layout, gate_of
from octavo.integrations.peft import install
from octavo.nn.experts import adopt_dense
from octavo.nn.settings import Settings
from tests.integrations.peft_models import VOCABULARY, Pair, config_for, gradients, logits, pair, randomize, relative

STACKS = ["experts.gate_up_proj", "experts.down_proj"]


def gpt_oss() -> PreTrainedModel:
    """Stacks are [E, in, out] and interleaved, with biases and a clamped gate."""
    torch.manual_seed(7)
    return GptOssForCausalLM(
        GptOssConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=32,
            num_local_experts=5,
            num_experts_per_tok=2,
            max_position_embeddings=64,
            initializer_range=0.1,
            pad_token_id=0,
        )
    ).eval()


def plain_pair() -> Pair:
    install()
    stock = gpt_oss()
    ours = copy.deepcopy(stock)
    for module in ours.modules():
        if (layout := experts_layout(module)) is not None:
            assert layout.transposed
            adopt_dense(module, layout, gate_of(module), Settings())
    stock.set_experts_implementation("eager")
    return Pair(ours, stock)


@pytest.mark.parametrize("targets", [STACKS, STACKS[:1], STACKS[1:]], ids=["both", "up", "down"])
def test_transposed_stacks_read_the_factors_as_peft_does(targets):
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"], target_parameters=targets)
    models = plain_pair()
    ours, stock = (randomize(peft.get_peft_model(model, config)) for model in models)
    assert relative(logits(ours), logits(stock)) < 1e-5
    got, want = gradients(ours), gradients(stock)
    assert all(relative(got[name], want[name]) < 1e-4 for name in want)


def test_biases_are_not_a_target():
    config = peft.LoraConfig(r=3, target_modules=["q_proj"], target_parameters=["experts.down_proj_bias"])
    with pytest.raises(ValueError, match="gate_up_proj and down_proj only"):
        peft.get_peft_model(plain_pair().ours, config)


@pytest.mark.parametrize("safe", [False, True])
def test_plain_stacks_merge_and_unmerge(safe):
    for models, config in (
        (plain_pair(), peft.LoraConfig(r=3, target_modules=["q_proj"], target_parameters=STACKS)),
        (pair("glm", plain=lambda name: True), config_for("glm")),
    ):
        model = randomize(peft.get_peft_model(models.ours, config))
        want = logits(model)
        with model.disable_adapter():
            bare = logits(model)
        model.merge_adapter(safe_merge=safe)
        assert relative(logits(model), want) < 1e-5
        model.unmerge_adapter()
        assert relative(logits(model), want) < 1e-5
        model.merge_adapter()
        with model.disable_adapter():
            assert relative(logits(model), bare) < 1e-5
        assert relative(logits(model.merge_and_unload()), want) < 1e-5
