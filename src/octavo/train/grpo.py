"""``octavo grpo`` from configuration to adapter."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from octavo.errors import ConfigError
from octavo.train.arguments import grpo_arguments
from octavo.train.base import BaseRun, load_tokenizer, quiet
from octavo.train.completions import CompletionsFile
from octavo.train.data import require_embedded
from octavo.train.grpo_config import GrpoConfig
from octavo.train.grpo_trainer import GrpoTrainer
from octavo.train.outcome import RunResult
from octavo.train.preview import Preview, say
from octavo.train.prompts import Prompts, load_prompts
from octavo.train.proof import GradientProofCallback, ProofReport
from octavo.train.rewards import load_rewards
from octavo.train.rollout.own import ModelSampler
from octavo.train.rollout.vllm import SamplingParameters, VllmServer


def grpo(config: GrpoConfig, console: Console, *, dry_run: bool = False) -> RunResult:
    """Train on rewards as ``config`` says and write the run folder; a dry run stops before the first step.

    Raises:
        OctavoError: the configuration, the data, the checkpoint, a reward function or the sampler is wrong, gradients
            are missing, the loss is not finite, or training and sampler do not agree.
    """
    with quiet():
        run = GrpoRun(config, console)
        try:
            return run.result() if dry_run else run.train()
        finally:
            run.trainer.close()


class GrpoRun(BaseRun):
    """A run of ``octavo grpo``."""

    trainer: GrpoTrainer

    def __init__(self, config: GrpoConfig, console: Console) -> None:
        """Read the prompts, find the reward functions, load the model, make the trainer, show what will happen."""
        self._config = config.resolved()
        super().__init__(self._config, self._config.train, console)
        self.tokenizer = load_tokenizer(self._config)
        if self.tokenizer.eos_token is None:
            raise ConfigError(
                f"The tokenizer of {self._config.model.path} has no eos_token, so no completion could end. Give it one."
            )
        self.prompts = load_prompts(self._config.data, self.tokenizer)
        self.rewards = load_rewards(self._config.rewards, self.prompts.columns)
        self._completions = CompletionsFile(self._folder.completions)
        self._make_trainer(self.prompts)
        self._ready()

    def _make_trainer(self, prompts: Prompts) -> None:
        config = self._config
        # First, because it joins the process group and picks this rank's device.
        args = grpo_arguments(config)
        in_a_step = config.train.prompts * args.world_size
        if len(prompts) < in_a_step:
            raise ConfigError(
                f"{prompts.source} holds {len(prompts)} prompts, and a step takes {in_a_step} of them: `train.prompts: "
                f"{config.train.prompts}` on {args.world_size} device(s). Lower it, or give more prompts."
            )
        model, lora, announced = self._load(args)
        require_embedded(len(model.get_input_embeddings().weight), prompts.highest, prompts.source)
        self.trainer = GrpoTrainer(
            model=model,
            args=args,
            tokenizer=self.tokenizer,
            adapter=lora,
            prompts=prompts,
            rewards=self.rewards,
            rollout=config.rollout,
            completions=self._completions,
            make_sampler=None if config.rollout.server is None else self._make_server,
            callbacks=self._callbacks(),
            stop_on_nan=config.train.stop_on_nan,
            offload_optimizer=config.train.optimizer if config.train.offload_optimizer else None,
        )
        preview = Preview(self._console)
        preview.model(self.trainer.model)
        preview.adapter(self.trainer.model, lora, announced)
        preview.section("data")
        say(self._console, f"train: {prompts.source}, {len(prompts)} prompts of at most {prompts.longest} tokens")
        if over := len(prompts) % in_a_step:
            say(self._console, f"{over} of them, drawn anew in each pass, make no whole step and are left out of it")
        train, rollout = config.train, config.rollout
        say(
            self._console,
            f"a step: {train.prompts} prompts x {train.completions} completions of at most {rollout.max_new_tokens} "
            f"tokens at temperature {rollout.temperature}, sampled by {self._sampled_by()}",
        )
        for section, reward in zip(config.rewards, self.rewards, strict=True):
            say(self._console, f"reward {reward.__name__}: {section.function}, weight {section.weight}")

    def _sampled_by(self) -> str:
        sampler = self.trainer.sampler
        if isinstance(sampler, ModelSampler):
            return f"the model itself, numerics {self._config.rollout.numerics}, {sampler.decoding}"
        return str(self._config.rollout.server)

    def _make_server(self, trainer: GrpoTrainer) -> VllmServer:
        config, rollout = self._config, self._config.rollout
        assert rollout.server is not None
        return VllmServer(
            rollout.server,
            run=self._folder.path.name,
            folder=Path(rollout.adapters).expanduser().absolute()
            if rollout.adapters
            else self._folder.path / "rollout",
            base_model=config.model.path,
            dtype=getattr(torch, config.model.dtype),
            parameters=SamplingParameters(rollout.max_new_tokens, rollout.temperature, tuple(trainer.eos_token_ids)),
            timeout=rollout.server_timeout,
            main=trainer.accelerator.is_main_process,
            wait=trainer.accelerator.wait_for_everyone,
        )

    def _proof(self, report: Callable[[ProofReport], None]) -> GradientProofCallback:
        return _ProofWithSignal(report, lambda: self.trainer.has_signal())

    def _own_callbacks(self) -> list[TrainerCallback]:
        return [self._completions]


class _ProofWithSignal(GradientProofCallback):
    """Waits for a step in which some completion was better than the others: before, gradients are rightly zero."""

    def __init__(self, report: Callable[[ProofReport], None], has_signal: Callable[[], bool]) -> None:
        super().__init__(report)
        self._has_signal = has_signal

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Asked at every step, which starts it again.
        if self._has_signal():
            super().on_pre_optimizer_step(args, state, control, **kwargs)
