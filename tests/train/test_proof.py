"""The proof of the gradients: it passes what trains, and names what does not."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import Qwen3MoeForCausalLM
from trl import SFTConfig, SFTTrainer

from octavo.errors import AdapterError
from octavo.train.proof import GradientProof, GradientProofCallback
from octavo.train.trainable import trainable_tensors

from .tiny import byte_tokenizer, tiny_config

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ATTENTION = ["q_proj", "o_proj"]


def adapted(**changes: object) -> PeftModel:
    torch.manual_seed(0)
    base = Qwen3MoeForCausalLM(tiny_config(mlp_only_layers=[]))
    return get_peft_model(
        base, LoraConfig(**{"r": 2, "target_modules": ATTENTION, "target_parameters": EXPERTS, **changes})
    )


def ids(seed: int = 0, tokens: int = 24) -> torch.Tensor:
    return torch.randint(0, 256, (1, tokens), generator=torch.Generator().manual_seed(seed))


def backward(model: PeftModel, inputs: torch.Tensor) -> None:
    model.train()
    model(input_ids=inputs, labels=inputs).loss.backward()


def optimizer(model: PeftModel, lr: float = 1e-2) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)


def step(model: PeftModel, proof: GradientProof, optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()
    optimizer.zero_grad()
    proof.optimizer_stepped(optimizer.param_groups[0]["lr"])


def factor(model: PeftModel, ending: str) -> nn.Parameter:
    """The first trainable tensor whose name ends so."""
    return next(tensor.parameter for tensor in trainable_tensors(model) if tensor.name.endswith(ending))


@pytest.mark.parametrize("checkpointing", [None, "reentrant", "non_reentrant"])
def test_a_healthy_adapter_is_proven_by_the_second_backward(checkpointing):
    model, proof = adapted(), GradientProof()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        model.enable_input_require_grads()
    proof.watch(model)
    step_by = optimizer(model)
    backward(model, ids(0))
    first = proof.after_backward(model)
    # B of every pair; A waits, because its gradient is zero while B is.
    pairs = len(list(trainable_tensors(model))) // 2
    assert (first.proven, first.waiting, first.complete) == (pairs, pairs, False)
    step(model, proof, step_by)
    backward(model, ids(1))
    second = proof.after_backward(model)
    assert second.complete
    assert second.proven == 2 * pairs
    assert "proven" in str(second)


def test_an_expert_without_tokens_is_exempt_in_both_factors():
    model, proof = adapted(target_modules=None), GradientProof()
    proof.watch(model)
    step_by = optimizer(model)
    # One token goes to two of eight experts.
    backward(model, ids(0, tokens=2))
    report = proof.after_backward(model)
    assert report.idle_experts is not None
    assert report.idle_experts[0] >= 8
    assert report.idle_experts[1] == 16
    backwards = 1
    while not report.complete and backwards < 60:
        step(model, proof, step_by)
        backward(model, ids(backwards, tokens=2))
        report = proof.after_backward(model)
        backwards += 1
    # Two batches of one token rarely share an expert: A waits for a batch that comes back to one whose B has moved.
    assert report.complete
    assert backwards > 2


def test_warmup_from_a_rate_of_zero_only_delays_the_proof():
    model, proof = adapted(), GradientProof()
    step_by = optimizer(model, lr=0.0)
    for rate in (0.0, 0.0, 1e-2):
        backward(model, ids(0))
        assert not proof.after_backward(model).complete
        step_by.param_groups[0]["lr"] = rate
        step(model, proof, step_by)
    backward(model, ids(1))
    assert proof.after_backward(model).complete


def test_factors_that_are_not_zero_are_all_proven_at_once():
    """As after a resume."""
    model, proof = adapted(init_lora_weights=False), GradientProof()
    proof.watch(model)
    backward(model, ids())
    assert proof.after_backward(model).complete


def test_full_parameters_and_embeddings_need_a_finite_gradient_only():
    model = adapted(modules_to_save=["lm_head"], target_modules=[*ATTENTION, "embed_tokens"])
    proof, step_by = GradientProof(), optimizer(model)
    backward(model, ids(0))
    proof.after_backward(model)
    step(model, proof, step_by)
    backward(model, ids(0))
    assert proof.after_backward(model).complete
    factor(model, "lm_head.modules_to_save.default.weight").grad[0, 0] = torch.inf
    with pytest.raises(AdapterError, match=r"lm_head\.modules_to_save\.default\.weight"):
        proof.after_backward(model)


def test_a_layer_that_is_bypassed_is_named():
    """FIELD 11: an experts implementation that skips adapters."""
    model, proof = adapted(), GradientProof()
    block = model.get_base_model().model.layers[1].mlp
    block.forward = lambda hidden: block.experts.base_layer.base_layer(
        hidden.flatten(0, 1), *reversed(block.gate(hidden.flatten(0, 1))[1:])
    ).view(hidden.shape)
    backward(model, ids())
    with pytest.raises(AdapterError, match=r"4 of 16 trainable.* have no gradient: .*layers\.1\.mlp\.experts") as error:
        proof.after_backward(model)
    assert "layers.0" not in str(error.value)


def test_a_loss_that_depends_on_nothing_trainable_is_explained():
    with pytest.raises(AdapterError, match=r"No trainable parameter has a gradient.*enable_input_require_grads"):
        GradientProof().after_backward(adapted())


def test_a_delta_that_is_rounded_away_is_named():
    """FIELD 1: the delta is added to raw codes and lost; here it is cut off by a rounding with a zero gradient."""
    model, proof = adapted(), GradientProof()
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    layer.lora_B["default"].register_forward_hook(lambda module, args, out: out * 0.0)
    backward(model, ids())
    with pytest.raises(AdapterError) as error:
        proof.after_backward(model)
    assert "1 LoRA factors have a gradient that is zero everywhere" in str(error.value)
    assert "layers.0.self_attn.q_proj.lora_B.default.weight" in str(error.value)


def test_an_a_without_gradient_is_found_at_the_second_backward():
    model, proof = adapted(), GradientProof()
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    # The delta is right and B learns, but nothing flows on to A.
    layer.lora_B["default"].register_forward_pre_hook(lambda module, args: (args[0].detach() + 0 * args[0],))
    step_by = optimizer(model)
    backward(model, ids(0))
    proof.after_backward(model)
    step(model, proof, step_by)
    backward(model, ids(1))
    with pytest.raises(AdapterError, match=r"zero everywhere.*layers\.0\.self_attn\.q_proj\.lora_A"):
        proof.after_backward(model)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_the_first_non_finite_gradient_is_named_even_after_clipping_spread_it(value):
    model, proof = adapted(), GradientProof()
    proof.watch(model)
    # Breaks the gradient of layer 0 only: what is nearer to the loss has finite gradients until they are clipped.
    model.get_base_model().model.layers[0].register_full_backward_pre_hook(lambda module, grads: (grads[0] * value,))
    backward(model, ids())
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    assert not factor(model, "layers.1.self_attn.q_proj.lora_B.default.weight").grad.isfinite().all()
    with pytest.raises(AdapterError, match="NaN or infinite") as error:
        proof.after_backward(model)
    assert "layers.0" in str(error.value)
    assert "layers.1" not in str(error.value)


@pytest.mark.parametrize("side", ["A", "B"])
def test_factors_of_experts_in_the_wrong_order_are_found(side):
    """FIELD 13: B is expert-fastest; gradients written the other way end up at experts that got no token."""
    model, proof = adapted(target_modules=None, init_lora_weights=False), GradientProof()
    proof.watch(model)
    backward(model, ids(0, tokens=3))
    parameter = factor(model, f"layers.0.mlp.experts.lora_{side}.default.weight")
    assert parameter.grad is not None
    if side == "A":
        parameter.grad = parameter.grad.reshape(8, 2, -1).transpose(0, 1).reshape(parameter.shape)
    else:
        parameter.grad = parameter.grad.reshape(-1, 2, 8).transpose(1, 2).reshape(parameter.shape)
    with pytest.raises(AdapterError, match=rf"experts that got no token: .*lora_{side}.*scrambled"):
        proof.after_backward(model)


def test_a_factor_that_the_optimizer_does_not_hold_is_named():
    model, proof = adapted(), GradientProof()
    forgotten = factor(model, "layers.0.self_attn.q_proj.lora_B.default.weight")
    step_by = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad and p is not forgotten], lr=1e-2)
    backward(model, ids(0))
    proof.after_backward(model)
    step(model, proof, step_by)
    backward(model, ids(1))
    with pytest.raises(AdapterError, match=r"zero where they should have moved: .*q_proj\.lora_B.*optimizer"):
        proof.after_backward(model)


def test_a_pair_that_begins_at_zero_in_both_factors_is_named():
    model, proof = adapted(), GradientProof()
    with torch.no_grad():
        factor(model, "layers.0.self_attn.q_proj.lora_A.default.weight").zero_()
    backward(model, ids())
    with pytest.raises(AdapterError, match=r"both factors.*began at zero"):
        proof.after_backward(model)


def test_nothing_to_train_is_an_error():
    model = adapted().requires_grad_(False)
    with pytest.raises(AdapterError, match="No parameter of the model is trainable"):
        GradientProof().after_backward(model)


def test_a_proof_leaves_no_hook_behind():
    model, proof = adapted(init_lora_weights=False), GradientProof()
    proof.watch(model)
    backward(model, ids())
    assert proof.after_backward(model).complete
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters() if parameter.requires_grad)


class Breaks(nn.Module):
    """A LoRA B whose output is cut from the graph of B."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.weight = inner.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (0 * self.weight.T)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_in_any_trainer_the_run_stops_before_the_first_optimizer_step(tmp_path, accumulation):
    model = adapted()
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    layer.lora_B["default"] = Breaks(layer.lora_B["default"])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    arguments = SFTConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
        learning_rate=1.0,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    data = Dataset.from_list([{"text": f"some text {index}"} for index in range(8)])
    callback = GradientProofCallback()
    trainer = SFTTrainer(
        model=model, args=arguments, train_dataset=data, processing_class=byte_tokenizer(), callbacks=[callback]
    )
    with pytest.raises(AdapterError, match=r"q_proj\.lora_B"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert not callback.reports
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_in_any_trainer_a_healthy_run_is_proven(tmp_path):
    arguments = SFTConfig(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        warmup_steps=1,
        use_cpu=True,
        bf16=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    data = Dataset.from_list([{"text": f"some text {index}"} for index in range(8)])
    said: list[object] = []
    callback = GradientProofCallback(said.append)
    SFTTrainer(
        model=adapted(), args=arguments, train_dataset=data, processing_class=byte_tokenizer(), callbacks=[callback]
    ).train()
    # The first step has a rate of zero, so B moves at the second and A is proven at the third.
    assert [report.complete for report in callback.reports] == [False, False, True]
    assert said == callback.reports
