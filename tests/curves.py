"""The same fine-tuning twice on a small real model: its FP8 weights as they are, and the dequantized bf16 model in
stock transformers and peft.
"""

import json
import shutil
from pathlib import Path

import peft
import torch
from datasets import load_dataset
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from trl import SFTConfig, SFTTrainer

import octavo
from octavo.checkpoint.accounting import open_ledger
from octavo.checkpoint.headers import TensorEntry
from octavo.formats.weight import Float8Weight
from octavo.integrations.conversions import as_grid


def dequantized(checkpoint: Path, out: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """The plain checkpoint with the same weights: codes × scales, rounded once to ``dtype``; everything else as it
    is.
    """
    ledger = open_ledger(checkpoint)

    def read(entry: TensorEntry) -> torch.Tensor:
        with safe_open(entry.file, "pt") as file:
            return file.get_tensor(entry.key)

    tensors = {key: read(entry) for key, entry in ledger.plain.items()}
    for weight in ledger.quantized.values():
        codes = read(weight.weight)
        block = weight.layout.block_of(*codes.shape)
        stored = Float8Weight.from_storage(codes, as_grid(read(weight.scale)), block=block)
        tensors[weight.weight.key] = stored.dequantize(dtype)[0]
    out.mkdir(parents=True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = {key: value for key, value in ledger.config.items() if key != "quantization_config"}
    (out / "config.json").write_text(json.dumps(config))
    for file in checkpoint.glob("*"):
        if file.name.startswith(("tokenizer", "generation", "chat")):
            shutil.copy(file, out / file.name)
    return out


def pair(name: str, folder: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The FP8 model on octavo, and its dequantized twin on stock transformers."""
    plain = dequantized(octavo.demo.checkpoint(name), folder / f"{name}-plain")
    stock = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16, experts_implementation="eager")
    return octavo.load_model(octavo.demo.checkpoint(name)), stock


def losses(model: PreTrainedModel, tokenizer: Path, config: peft.LoraConfig, steps: int, out: Path) -> list[float]:
    """The loss of each of ``steps`` steps of trl's SFTTrainer on the bundled definitions, seed 0."""
    data = load_dataset("json", data_files=str(octavo.demo.data("train")), split="train")
    arguments = SFTConfig(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        bf16=True,
        use_cpu=True,
        seed=0,
        max_length=128,
        assistant_only_loss=True,
        disable_tqdm=True,
        gradient_checkpointing=False,
    )
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(tokenizer),
        peft_config=config,
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def both(name: str, steps: int, folder: Path) -> tuple[list[float], list[float]]:
    """The losses of the FP8 model and of its twin, under one configuration."""
    fp8, plain = pair(name, folder)
    config = octavo.lora_config(fp8, r=8, expert_rank=4)
    tokenizer = octavo.demo.checkpoint(name)
    return tuple(losses(model, tokenizer, config, steps, folder / "run") for model in (fp8, plain))  # type: ignore[return-value]


def worst_difference(a: list[float], b: list[float], window: int = 10) -> float:
    """The largest relative difference between running means over ``window`` steps."""
    assert len(a) == len(b) >= window
    means = [[sum(curve[i : i + window]) / window for i in range(len(curve) - window + 1)] for curve in (a, b)]
    return max(abs(x - y) / y for x, y in zip(*means, strict=True))
