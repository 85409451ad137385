"""A run's configuration in trl's words."""

import math
from pathlib import Path
from typing import Any

import torch
import trl

from octavo.train.config import OptimizationSection, SftConfig
from octavo.train.data import Loss
from octavo.train.grpo_config import GrpoConfig

_OPTIMIZERS = {"adamw": "adamw_torch_fused", "adamw_8bit": "adamw_torch_8bit", "adafactor": "adafactor", "sgd": "sgd"}
_SCHEDULERS = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
# An interval that no run reaches: trl then evaluates and saves at the last step only.
_AT_THE_END = 10**9


def _warmup(train: OptimizationSection) -> float:
    """Steps of warm-up, or their share. Of a run with few steps the share is no whole step: transformers would round it
    up, and the first step of a warm-up has a rate of zero.
    """
    if train.warmup < 1 and train.steps is not None:
        return math.floor(train.warmup * train.steps)
    return train.warmup


def _common(train: OptimizationSection, out: Path) -> dict[str, Any]:
    """What every trainer of trl is told."""
    return {
        "output_dir": str(out),
        "max_steps": train.steps if train.steps is not None else -1,
        "num_train_epochs": train.epochs if train.epochs is not None else 1.0,
        "learning_rate": train.lr,
        "lr_scheduler_type": _SCHEDULERS[train.scheduler],
        "warmup_steps": _warmup(train),
        "optim": _OPTIMIZERS[train.optimizer],
        # Rounds updates of bfloat16 parameters stochastically, and leaves float32 ones alone.
        "optim_args": "bf16_stochastic_round=True" if train.optimizer == "adamw_8bit" else None,
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "router_aux_loss_coef": train.router_aux_loss,
        "seed": train.seed,
        "gradient_checkpointing": train.gradient_checkpointing != "none",
        "gradient_checkpointing_kwargs": {"use_reentrant": train.gradient_checkpointing == "reentrant"},
        "bf16": train.precision == "bf16",
        "use_cpu": not torch.accelerator.is_available(),
        "dataloader_pin_memory": torch.accelerator.is_available(),
        "ddp_find_unused_parameters": False,
        "logging_steps": train.logging_steps,
        # The filter would log an average of other steps in place of a loss that is NaN.
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "report_to": [] if train.report_to == "none" else [train.report_to],
        "run_name": out.name,
        "project": "octavo",
        # Metrics stay on this machine; trackio's default is to publish a run that has a space.
        "trackio_space_id": None,
        "trackio_static_space_id": False,
        "save_strategy": "steps",
        "save_steps": train.save_every or _AT_THE_END,
        "save_total_limit": train.keep_checkpoints,
    }


def sft_arguments(config: SftConfig, loss: Loss, *, evaluates: bool) -> trl.SFTConfig:
    """The arguments of trl's trainer. Making them joins the process group of torchrun or accelerate, if any."""
    train, data = config.train, config.data
    return trl.SFTConfig(
        **_common(train, config.out),
        per_device_train_batch_size=train.batch_size,
        per_device_eval_batch_size=train.batch_size,
        gradient_accumulation_steps=train.grad_accumulation,
        max_length=data.max_length,
        packing=data.packing,
        assistant_only_loss=loss == "assistant",
        completion_only_loss=loss == "completion",
        chat_template_path=data.chat_template,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=(train.eval_every or _AT_THE_END) if evaluates else None,
        eval_on_start=train.eval_on_start and evaluates,
        prediction_loss_only=True,
        load_best_model_at_end=train.early_stopping is not None,
        metric_for_best_model="eval_loss" if train.early_stopping is not None else None,
        greater_is_better=False if train.early_stopping is not None else None,
        restore_callback_states_from_checkpoint=train.early_stopping is not None,
    )


def grpo_arguments(config: GrpoConfig) -> trl.GRPOConfig:
    """The arguments of trl's trainer: one set of completions for each ``train.iterations`` optimizer steps.

    Making them joins the process group of torchrun or accelerate, if any.
    """
    train = config.train
    return trl.GRPOConfig(
        **_common(train, config.out),
        per_device_train_batch_size=train.forward_size,
        gradient_accumulation_steps=train.prompts * train.completions // train.forward_size,
        num_generations=train.completions,
        num_iterations=train.iterations,
        max_completion_length=config.rollout.max_new_tokens,
        temperature=config.rollout.temperature,
        beta=train.beta,
        epsilon=train.clip,
        epsilon_high=train.clip_high,
        loss_type=train.loss,
        scale_rewards=train.scale_rewards,
        mask_truncated_completions=train.mask_truncated,
        reward_weights=[reward.weight for reward in config.rewards],
        # Columns beside the prompt go to the reward functions.
        remove_unused_columns=False,
        # A printed table and one parquet file for each log; completions.jsonl holds the same.
        log_completions=False,
    )
