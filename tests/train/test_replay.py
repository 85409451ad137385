"""Routing replay: the experts chosen while sampling compute in training, with gradients, also when recomputed."""

import pytest
import torch
from peft import get_peft_model
from transformers import Qwen3MoeForCausalLM

import octavo
from octavo.train.metrics import read_metrics
from octavo.train.rollout.replay import UNKNOWN, RoutingRecorder, RoutingReplay
from octavo.train.rollout.sampler import RolloutError
from octavo.train.routing import experts_layers

from .grpo_runs import prompts, run, tree
from .tiny import tiny_config

MODELS = ("glm-tiny", "qwen-tiny")


def loaded(name: str):
    torch.manual_seed(0)
    base = octavo.load_model(octavo.demo.checkpoint(name), dtype=torch.float32)
    model = get_peft_model(base, octavo.lora_config(base, r=4, init=False))
    return model.train()


def other_experts(model, ids_BS):
    """An allowed choice that the router would not make: each expert's neighbour."""
    recorder = RoutingRecorder(model)
    recorder.start(len(ids_BS))
    with torch.no_grad():
        model(input_ids=ids_BS)
    routed = recorder.stop(ids_BS.shape[1])
    recorder.close()
    return (routed + 1) % 16, routed


@pytest.mark.parametrize("name", MODELS)
def test_the_recorder_sees_what_the_experts_get(name):
    model = loaded(name)
    ids = torch.randint(0, 4096, (2, 7))
    recorder = RoutingRecorder(model)
    recorder.start(2)
    with torch.no_grad():
        output = model.eval().generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, min_new_tokens=3
        )
    assert output.shape == (2, 10)
    routed = recorder.stop(10)
    recorder.start(2)
    with torch.no_grad():
        model(input_ids=output)
    whole = recorder.stop(10)
    # token by token and all at once; the last token was sampled and never computed
    assert torch.equal(routed[:, :9], whole[:, :9])
    assert bool((routed[:, 9] == UNKNOWN).all())
    assert routed.shape == (2, 10, sum(1 for _ in experts_layers(model)), 4)
    recorder.close()
    assert not any(len(module._forward_pre_hooks) for _, module, _ in experts_layers(model))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("checkpointing", [None, "reentrant", "non_reentrant"])
def test_forced_experts_compute_and_have_gradients(name, checkpointing):
    model = loaded(name)
    ids = torch.randint(0, 4096, (2, 9))
    forced, natural = other_experts(model, ids)
    free = model(input_ids=ids, labels=ids).loss
    replay = RoutingReplay(model)
    replay.force(natural)
    assert torch.equal(model(input_ids=ids, labels=ids).loss, free), "its own choice changes nothing"
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        model.enable_input_require_grads()
    replay.force(forced)
    counts = {}
    handles = [
        own.register_forward_pre_hook(lambda m, args, layer=layer: counts.setdefault(layer, []).append(args[1]))
        for layer, (_, _, own) in enumerate(experts_layers(model))
    ]
    loss = model(input_ids=ids, labels=ids).loss
    assert not torch.equal(loss, free)
    loss.backward()
    for layer, seen in counts.items():
        # once in the forward, and once more where the backward computes it again
        assert len(seen) == (2 if checkpointing else 1)
        assert all(torch.equal(chosen.flatten(), forced[:, :, layer].flatten().long()) for chosen in seen)
    assert len(counts) == forced.shape[2]
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    if checkpointing:
        model.gradient_checkpointing_disable()
        model(input_ids=ids, labels=ids).loss.backward()
        for n, p in model.named_parameters():
            if p.requires_grad:
                torch.testing.assert_close(p.grad, gradients[n], rtol=1e-4, atol=1e-7)
    for handle in handles:
        handle.remove()
    replay.force(None)
    assert torch.equal(model(input_ids=ids, labels=ids).loss, free)
    replay.close()


def test_the_gradient_of_forced_routing_is_the_gradient():
    """Of the loss with respect to a router's weights, by finite differences on a random tiny model."""
    torch.manual_seed(0)
    model = octavo.configure(Qwen3MoeForCausalLM(tiny_config(initializer_range=0.2)).double().train())
    ids = torch.randint(0, 256, (1, 6))
    forced = torch.stack([torch.arange(6) % 8, (torch.arange(6) + 3) % 8], dim=1)[None, :, None].to(torch.int16)
    replay = RoutingReplay(model)
    replay.force(forced)
    (gate,) = [p for n, p in model.named_parameters() if n.endswith("mlp.gate.weight")]
    model(input_ids=ids, labels=ids).loss.backward()
    direction = torch.randn_like(gate)
    # The router's softmax and the loss are in float32 whatever the model: rounding is 1e-5 of the slope at this step.
    slopes, step = [], 1e-2
    for sign in (1, -1):
        with torch.no_grad():
            gate += sign * step * direction
            slopes.append(model(input_ids=ids, labels=ids).loss.item())
            gate -= sign * step * direction
    assert (gate.grad * direction).sum().item() == pytest.approx((slopes[0] - slopes[1]) / (2 * step), rel=1e-2)
    replay.close()


def test_a_router_that_does_not_take_the_choice_is_refused():
    model = loaded("qwen-tiny")
    ids = torch.randint(0, 4096, (1, 4))
    forced, _ = other_experts(model, ids)
    replay = RoutingReplay(model)
    block = next(module for name, module in model.named_modules() if name.endswith("layers.2.mlp"))
    gate = block.gate.forward
    # sorts where others take topk
    block.gate.forward = lambda x: (*gate(x)[:2], gate(x)[2].sort(dim=-1).values)
    replay.force(forced)
    with pytest.raises(RolloutError, match=r"layers\.2\.mlp\.experts did not take the experts that were recorded"):
        model(input_ids=ids)


@pytest.mark.parametrize("name", MODELS)
def test_a_run_with_replay_agrees_better_with_a_sampler_of_other_numerics(tmp_path, name):
    data = prompts(tmp_path / "prompts.jsonl")
    apart = {}
    for replay in (False, True):
        changed = tree(octavo.demo.checkpoint(name), data, tmp_path / str(replay), steps=1)
        changed["rollout"] |= {"numerics": "fp8", "replay": replay, "stop_mean": None, "max_new_tokens": 12}
        changed["train"] |= {"gradient_checkpointing": "non_reentrant"}
        run(**changed)
        apart[replay] = [line["agreement_mean"] for line in read_metrics(tmp_path / str(replay) / "metrics.jsonl")]
    assert apart[True][0] < apart[False][0]
