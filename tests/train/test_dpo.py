"""trl's DPOTrainer, whose reference is the same model with the adapter switched off."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

import octavo
from octavo.train.proof import GradientProofCallback
from octavo.train.trainable import trainable_tensors


@pytest.mark.parametrize("fp8", [False, True], ids=["float32", "fp8"])
def test_the_model_without_its_adapter_is_the_reference(tmp_path, checkpoint, fp8):
    path = octavo.demo.checkpoint("glm-tiny") if fp8 else checkpoint
    tokenizer = AutoTokenizer.from_pretrained(path)
    rows = [{"prompt": f"say {index}", "chosen": "ab" * 3, "rejected": "xyz"} for index in range(16)]
    model = octavo.load_model(path, dtype=torch.float32)
    arguments = DPOConfig(
        output_dir=str(tmp_path),
        max_steps=6,
        per_device_train_batch_size=8,
        learning_rate=2e-2,
        # The balancing loss would come on top of ln 2.
        router_aux_loss_coef=0.0,
        bf16=False,
        use_cpu=True,
        report_to=[],
        logging_steps=1,
        disable_tqdm=True,
        save_strategy="no",
    )
    proof = GradientProofCallback()
    trainer = DPOTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=octavo.lora_config(model, r=4),
        callbacks=[proof],
    )
    assert trainer.ref_model is None
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad(), trainer.model.disable_adapter():
        before = trainer.model(input_ids=ids).logits
    trainer.train()
    logged = [line for line in trainer.state.log_history if "loss" in line]
    # With B at zero, policy and reference are one model: the loss is ln 2 and no reward differs.
    assert abs(logged[0]["loss"] - 0.6931472) < 1e-6
    assert logged[0]["rewards/margins"] == 0
    assert logged[-1]["loss"] < 0.6
    assert logged[-1]["rewards/margins"] > 0
    assert proof.reports[-1].complete
    assert proof.reports[-1].proven == len(list(trainable_tensors(trainer.model)))
    with torch.no_grad(), trainer.model.disable_adapter():
        assert torch.equal(trainer.model(input_ids=ids).logits, before), "the base has not moved"
