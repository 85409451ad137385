"""``octavo.generate``: decoding on fixed buffers says what transformers' own loop says."""

import peft
import pytest
import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import octavo
from octavo.errors import EngineError
from octavo.integrations import generation, latent_attention
from octavo.integrations.repeated import Repeated
from octavo.nn.linear import Float8Linear

MODELS = ("dense-tiny", "glm-tiny", "qwen-tiny")


def loaded(name, *, adapter=True):
    torch.manual_seed(0)
    model = octavo.load_model(octavo.demo.checkpoint(name), dtype=torch.float32)
    if adapter:
        model = peft.get_peft_model(model, octavo.lora_config(model, r=4, init=False))
    return model.eval()


def prompts():
    """Two prompts, the first padded on the left."""
    ids = torch.randint(5, 4000, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[0, :4], mask[0, :4] = 0, 0
    return {"input_ids": ids, "attention_mask": mask, "pad_token_id": 0}


@pytest.mark.parametrize("adapter", [True, False], ids=["adapter", "bare"])
@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_those_of_transformers(name, adapter):
    model = loaded(name, adapter=adapter)
    given = prompts() | {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        want = model.generate(**given)
        got = model.generate(custom_generate=generation.decode, **given)
    assert torch.equal(got, want)
    assert want.shape == (2, 49)


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_every_step_are_those_of_one_whole_forward(name):
    model = loaded(name)
    given = prompts()
    seen = []

    def keep(input_ids, scores):
        seen.append(scores.clone())
        return scores

    with torch.no_grad():
        ids = model.generate(
            custom_generate=generation.decode, **given, max_new_tokens=12, do_sample=False, logits_processor=[keep]
        )
        mask = torch.cat([given["attention_mask"], torch.ones_like(ids[:, 9:])], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        whole = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, 8:-1]
    torch.testing.assert_close(torch.stack(seen, 1), whole, atol=2e-4, rtol=1e-4)


def test_samples_follow_the_seed_as_in_transformers():
    model = loaded("dense-tiny")
    given = prompts() | {"max_new_tokens": 12, "do_sample": True, "top_k": 0, "temperature": 1.5}
    drawn = []
    for custom in (None, generation.decode, generation.decode):
        torch.manual_seed(7 if len(drawn) < 2 else 8)
        with torch.no_grad():
            drawn.append(model.generate(custom_generate=custom, **given))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[1], drawn[2])


def test_sequences_end_where_they_end_in_transformers():
    model = loaded("dense-tiny")
    given = prompts() | {"max_new_tokens": 60, "do_sample": False}
    with torch.no_grad():
        free = model.generate(**given, eos_token_id=None)
        # a token that each sequence says at another time, so that one is padded while the other goes on
        first, second = free[0, 9 + 3], free[1, 9 + 20]
        ends = [int(first), int(second)]
        want = model.generate(**given, eos_token_id=ends)
        got = model.generate(custom_generate=generation.decode, **given, eos_token_id=ends)
    assert torch.equal(got, want)
    assert got.shape[1] < free.shape[1]


def test_the_model_attends_as_before_afterwards_and_keeps_no_cache():
    model = loaded("glm-tiny")
    before = {name: id(value) for name, value in vars(model.get_base_model()).items()}
    with torch.no_grad():
        model.generate(custom_generate=generation.decode, **prompts(), max_new_tokens=3)
    assert model.config._attn_implementation == "sdpa"
    assert {name: id(value) for name, value in vars(model.get_base_model()).items()} == before


def test_a_changed_adapter_speaks_at_once():
    model = loaded("qwen-tiny")
    given = prompts() | {"max_new_tokens": 8, "do_sample": False}
    with torch.no_grad():
        first = model.generate(custom_generate=generation.decode, **given)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
        second = model.generate(custom_generate=generation.decode, **given)
        assert torch.equal(second, model.generate(**given))
    assert not torch.equal(first, second)


def test_what_cannot_be_a_graph_says_why():
    model = loaded("dense-tiny", adapter=False)
    assert "lies on cpu" in generation.why_no_graphs(model)
    assert generation.why_not_static(model) is None
    with pytest.raises(EngineError, match="asked for, but it lies on cpu, and graphs need CUDA"):
        octavo.generate(model, graphs=True, **prompts(), max_new_tokens=2)
    with torch.no_grad():
        for graphs in ("auto", False):
            given = prompts() | {"max_new_tokens": 2, "do_sample": False}
            assert torch.equal(octavo.generate(model, graphs=graphs, **given), model.generate(**given))


SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def test_other_caches_and_attentions_are_refused_by_name():
    sliding = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4))
    assert "StaticSlidingWindowLayer" in generation.why_not_static(sliding)
    eager = LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation="eager"))
    assert "attention is eager" in generation.why_not_static(eager)
    assert "holds no model" in generation.why_not_static(torch.nn.Linear(2, 2))
    model = octavo.load_model(octavo.demo.checkpoint("glm-tiny"), engine="reference")
    reason = generation._why_experts_wait(model, torch.device("cpu"))
    assert "mlp.experts run on the torch code of engine reference" in reason
    assert generation._why_experts_wait(loaded("dense-tiny"), torch.device("cpu")) is None


@pytest.mark.parametrize("asked", [{"num_beams": 2}, {"return_dict_in_generate": True}])
def test_what_the_loop_does_not_do_is_refused(asked):
    model = loaded("dense-tiny", adapter=False)
    with torch.no_grad(), pytest.raises(EngineError, match=f"does not do {next(iter(asked))}"):
        model.generate(custom_generate=generation.decode, **prompts(), max_new_tokens=2, **asked)


def test_a_repeated_step_runs_on_its_buffers_and_gives_one_result():
    count = torch.zeros(3)

    def step():
        count.add_(1)
        return count * 2

    repeated = Repeated(step, torch.device("cpu"))
    first = repeated()
    assert first.tolist() == [2, 2, 2]
    assert repeated() is first
    assert first.tolist() == [4, 4, 4]


@pytest.mark.parametrize("adapted", ["bare", "linear", "weight"])
@pytest.mark.parametrize("name", ["glm", "deepseek"])
def test_latents_attend_as_the_expanded_keys_and_values_do(name, adapted, monkeypatch):
    torch.manual_seed(0)
    if name == "glm":
        model = octavo.load_model(octavo.demo.checkpoint("glm-tiny"), dtype=torch.float32)
    else:
        heads = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12}
        sizes = SIZES | {"num_key_value_heads": 2, "first_k_dense_replace": 1, "vocab_size": 4096}
        model = DeepseekV3ForCausalLM(DeepseekV3Config(**sizes, **heads))
    if adapted != "bare":
        where = (
            {"target_modules": ["kv_b_proj"]} if adapted == "linear" else {"target_parameters": ["kv_b_proj.weight"]}
        )
        config = peft.LoraConfig(r=4, lora_alpha=12, init_lora_weights=False, **{"target_modules": [], **where})
        model = peft.get_peft_model(model, config)
    handed = []
    real = latent_attention.attention

    def watched(module, *given):
        handed.append(type(module).__name__)
        return real(module, *given)

    monkeypatch.setattr(latent_attention, "attention", watched)
    given = prompts() | {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    model.eval()
    with torch.no_grad():
        want = model.generate(**given)
        assert not handed
        assert torch.equal(model.generate(custom_generate=generation.decode, **given), want)
    # peft's own wrapper around a plain weight materialises W + BA, and there the layer expands
    expands = name == "deepseek" and adapted == "weight"
    assert set(handed) == (set() if expands else {{"glm": "Glm4MoeLiteAttention"}.get(name, "DeepseekV3Attention")})
    layers = model.config.num_hidden_layers
    assert expands or len(handed) == 11 * layers


def test_rounded_numerics_expand_the_latents():
    """They round what goes into the expansion, so the way around it would be other numerics."""
    model = loaded("glm-tiny")
    layers = [module for module in model.modules() if type(module).__name__ in latent_attention.CLASSES]
    for numerics, expected in (("exact", True), ("fp8", False)):
        octavo.configure(model, numerics=numerics)
        with latent_attention.latents(model):
            handing = {latent_attention.hands_latents(module) for module in layers if _is_float8(module)}
        assert handing == {expected}
    assert not any(latent_attention.hands_latents(module) for module in layers)


def _is_float8(module):
    return isinstance(module.kv_b_proj.get_base_layer(), Float8Linear)
