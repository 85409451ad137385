"""Expert load is counted from what the router really chose."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen3MoeForCausalLM

from octavo.train.meter import Meter
from octavo.train.routing import ExpertTokens, experts_layers

from .tiny import tiny_config


@pytest.fixture
def model():
    torch.manual_seed(0)
    base = Qwen3MoeForCausalLM(tiny_config(mlp_only_layers=[]))
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    return get_peft_model(base, LoraConfig(r=2, target_parameters=parameters)).train()


def chosen(model, **inputs: torch.Tensor) -> list[torch.Tensor]:
    """The experts that each layer chose, [T, K], from the router logits that transformers returns."""
    with torch.no_grad():
        logits = model.get_base_model()(**inputs, output_router_logits=True).router_logits
    return [torch.topk(layer, 2, dim=-1).indices for layer in logits]


def test_wrapped_experts_are_found_once_at_their_outermost_name(model):
    layers = list(experts_layers(model))
    assert [name.split("model.")[-1] for name, _, _ in layers] == ["layers.0.mlp.experts", "layers.1.mlp.experts"]
    assert all(outer is not own and type(own).__name__ == "Qwen3MoeExperts" for _, outer, own in layers)


@pytest.mark.parametrize("padding", [False, True])
def test_counts_are_those_of_the_router_with_and_without_padding(model, padding):
    ids = torch.randint(0, 256, (3, 7))
    mask = torch.ones_like(ids)
    mask[0, 4:] = mask[2, 1:] = 0
    wanted = [
        torch.bincount((layer if padding else layer[mask.flatten().bool()]).flatten(), minlength=8)
        for layer in chosen(model, input_ids=ids, attention_mask=mask)
    ]
    with ExpertTokens(model, padding=padding) as counter:
        model(input_ids=ids, attention_mask=mask)
        assert [count.tolist() for count in counter.counts.values()] == [count.tolist() for count in wanted]
        assert counter.tokens == int(mask.sum())
        model.eval()
        model(input_ids=ids, attention_mask=mask)
        model.train()
        assert counter.tokens == int(mask.sum()), "evaluation is not counted"
        counter.reset()
        assert counter.tokens == 0
        assert not any(count.any() for count in counter.counts.values())
    model(input_ids=ids, attention_mask=mask)
    assert counter.tokens == 0, "a closed counter counts nothing"


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_is_computed_again_is_not_counted_again(model, reentrant):
    ids = torch.randint(0, 256, (1, 5))
    plain, recomputed = ExpertTokens(model, padding=True), ExpertTokens(model, padding=True)
    plain_counts = []
    for counter, checkpointing in ((plain, False), (recomputed, True)):
        counter.reset()
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
            recomputed.reset()
        model(input_ids=ids, labels=ids).loss.backward()
        plain_counts.append([count.clone() for count in counter.counts.values()])
    for once, again in zip(*plain_counts, strict=True):
        assert torch.equal(again, once)
        assert once.sum() == 10
    assert recomputed.tokens == 5


def test_the_meter_reads_load_as_the_busiest_expert_over_the_mean(model):
    meter = Meter(model)
    ids = torch.randint(0, 256, (4, 16))
    counts = [torch.bincount(layer.flatten(), minlength=8).double() for layer in chosen(model, input_ids=ids)]
    loads = [float(count.max() / count.mean()) for count in counts]
    meter.read()
    meter.on_step_begin(None, None, None)
    model(input_ids=ids)
    meter.on_step_end(None, None, None)
    figures = meter.read()
    assert figures["expert_load"] == pytest.approx(sum(loads) / 2)
    assert figures["expert_load_worst"] == max(loads)
    assert figures["tokens_per_second"] > 0
    assert figures["peak_memory_gb"] > 0.05
    assert "expert_load" not in meter.read()
    assert "tokens_per_second" not in meter.read()
