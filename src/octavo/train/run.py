"""``octavo sft`` from configuration to adapter."""

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import torch
from peft import PeftModel
from rich.console import Console
from rich.rule import Rule
from transformers import (
    AutoTokenizer,
    EarlyStoppingCallback,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
)
from trl.chat_template_utils import get_training_chat_template

import octavo
from octavo.errors import ConfigError
from octavo.train.announce import announced_weights, difference
from octavo.train.arguments import sft_arguments
from octavo.train.config import SftConfig
from octavo.train.data import Examples, Loss, counted_loss, load_data
from octavo.train.example import render_example
from octavo.train.folder import RunFolder
from octavo.train.interrupt import SaveOnInterrupt
from octavo.train.meter import GB, peak_memory
from octavo.train.metrics import MetricsFile
from octavo.train.outcome import RunResult
from octavo.train.progress import LiveProgress, progress_for
from octavo.train.proof import GradientProofCallback
from octavo.train.trainable import trainable_table
from octavo.train.trainer import SftTrainer


def sft(config: SftConfig, console: Console, *, dry_run: bool = False) -> RunResult:
    """Fine-tune as ``config`` says and write the run folder; a dry run stops before the first step.

    Raises:
        OctavoError: the configuration, the data, the checkpoint or the adapter is wrong, gradients are missing, or the
            loss is not finite.
    """
    began = time.perf_counter()
    config = config.resolved()
    folder = RunFolder(config.out)
    with _quiet():
        checkpoint = folder.checkpoint(config.train.resume)
        train, evaluation = load_data(config.data, seed=config.train.seed)
        loss = counted_loss(train, config.data.loss)
        tokenizer = load_tokenizer(config)
        _require_template(tokenizer, train, loss, config)
        run = _Run(config, folder, console, checkpoint, began)
        run.prepare(train, evaluation, loss, tokenizer)
        return run.result() if dry_run else run.train()


def load_tokenizer(config: SftConfig) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer.

    Raises:
        ConfigError: the checkpoint has none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.model.path, revision=config.model.revision)
    except (OSError, ValueError) as error:
        raise ConfigError(f"`model.path`: {config.model.path} has no tokenizer that loads: {error}") from error
    # From a folder without tokenizer files transformers makes an empty one of the model's kind.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ConfigError(f"`model.path`: {config.model.path} has no tokenizer that loads: its vocabulary is empty.")
    return tokenizer


class _Run:
    """One run in its two phases: everything up to the first step, and the training."""

    def __init__(
        self, config: SftConfig, folder: RunFolder, console: Console, checkpoint: Path | None, began: float
    ) -> None:
        self._config, self._folder, self._checkpoint, self._began = config, folder, checkpoint, began
        self._console = console
        self._interrupt = SaveOnInterrupt()
        self._adapter: Path | None = None

    def prepare(
        self, train: Examples, evaluation: Examples | None, loss: Loss, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """Load the model, make the trainer, and show what will happen."""
        config = self._config
        # First, because it joins the process group and picks this rank's device.
        args = sft_arguments(config, loss, evaluates=evaluation is not None)
        if args.process_index > 0:
            self._console = Console(quiet=True)
        self._progress = progress_for(self._console)
        model = octavo.load_model(
            config.model.path,
            numerics=config.model.numerics,
            engine=config.model.engine,
            dtype=getattr(torch, config.model.dtype),
            revision=config.model.revision,
        )
        self._section("model", str(octavo.describe(model)))
        lora = octavo.lora_config(
            model,
            r=config.lora.r,
            alpha=config.lora.alpha,
            expert_rank=config.lora.expert_rank,
            targets=config.lora.targets,
            router=config.lora.router,
            rslora=config.lora.rslora,
            dropout=config.lora.dropout,
            modules_to_save=list(config.lora.modules_to_save) or None,
        )
        announced = announced_weights(model, lora)
        self._trainer = SftTrainer(
            model=model,
            args=args,
            tokenizer=tokenizer,
            adapter=lora,
            train=train,
            evaluation=evaluation,
            callbacks=self._callbacks(),
            stop_on_nan=config.train.stop_on_nan,
        )
        # transformers adds it where its own progress bar is off; ours take its place.
        self._trainer.remove_callback(PrinterCallback)
        self._show_adapter(self._trainer.model, announced)
        self._show_data(train, evaluation, loss, tokenizer)
        self._show_resume()
        if args.should_save:
            self._folder.write_start(config, args.device, args.world_size)

    def train(self) -> RunResult:
        """Train, and write the adapter unless interrupted."""
        self._section("training")
        try:
            with self._interrupt:
                self._trainer.train(resume_from_checkpoint=str(self._checkpoint) if self._checkpoint else None)
        finally:
            if isinstance(self._progress, LiveProgress):
                self._progress.close()
        if self._interrupt.received is None:
            self._save_adapter()
        return self.result()

    def result(self) -> RunResult:
        """Where the run stands."""
        state = self._trainer.state
        logged = {key: line[key] for line in state.log_history for key in ("loss", "eval_loss") if key in line}
        received = self._interrupt.received
        return RunResult(
            out=self._folder.path,
            adapter=self._adapter,
            step=state.global_step,
            max_steps=state.max_steps,
            loss=logged.get("loss"),
            eval_loss=logged.get("eval_loss"),
            seconds=time.perf_counter() - self._began,
            peak_memory_gb=peak_memory() / GB,
            resumed_from=self._checkpoint,
            signal=None if received is None else int(received),
            main_process=self._trainer.is_world_process_zero(),
        )

    def _callbacks(self) -> list[TrainerCallback]:
        proof = GradientProofCallback(lambda report: self._console.print(str(report), highlight=False))
        callbacks = [proof, self._interrupt, MetricsFile(self._folder.metrics), self._progress]
        if self._config.train.early_stopping is not None:
            callbacks.append(EarlyStoppingCallback(self._config.train.early_stopping))
        return callbacks

    def _save_adapter(self) -> None:
        self._trainer.save_model(str(self._folder.adapter))
        if self._trainer.args.should_save:
            # A pickle of trl's arguments; config.yaml says the same and is safe to read.
            (self._folder.adapter / "training_args.bin").unlink(missing_ok=True)
        self._adapter = self._folder.adapter

    def _show_adapter(self, model: PeftModel, announced: set[str]) -> None:
        self._section("adapter")
        self._console.print(trainable_table(model).rich())
        for line in difference(announced, model).lines():
            self._console.print(line, style="yellow", highlight=False)

    def _show_data(
        self, train: Examples, evaluation: Examples | None, loss: Loss, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self._section("data")
        for name, examples in (("train", train), ("eval", evaluation)):
            if examples is not None:
                self._console.print(
                    f"{name}: {examples.source}, {self._trainer.preparations[name]}", highlight=False, soft_wrap=True
                )
                if examples.left_out:
                    self._console.print(f"{name}: columns not used: {', '.join(examples.left_out)}", style="yellow")
        row = self._trainer.train_dataset[0]
        example = render_example(row["input_ids"], row["labels"], tokenizer)
        self._console.print(
            f"the first row, {example.counted} of its {example.tokens} tokens count (loss on {loss}):", highlight=False
        )
        rendered = example.rich() if self._console.is_terminal else str(example)
        self._console.print(rendered, highlight=False, markup=False, soft_wrap=True)

    def _show_resume(self) -> None:
        if self._checkpoint is not None:
            self._console.print(f"resuming from {self._checkpoint}", highlight=False, soft_wrap=True)
            for key in self._folder.changed_keys(self._config):
                self._console.print(f"`{key}` differs from the run that is resumed", style="yellow", highlight=False)

    def _section(self, title: str, text: str = "") -> None:
        self._console.print(Rule(title, align="left", style="dim"))
        if text:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def _require_template(tokenizer: PreTrainedTokenizerBase, train: Examples, loss: Loss, config: SftConfig) -> None:
    """Ask for what trl will need of the tokenizer, before a model is loaded."""
    if config.data.chat_template is not None:
        return
    conversational = train.format != "text" and not isinstance(train.dataset[0].get("completion", []), str)
    if conversational and tokenizer.chat_template is None:
        raise ConfigError(
            f"{config.model.path} has no chat template, which {train.format} examples need. Give a Jinja file as "
            "`data.chat_template`."
        )
    if not conversational and tokenizer.eos_token is None:
        raise ConfigError(f"The tokenizer of {config.model.path} has no eos_token to end an example with.")
    if loss == "assistant":
        try:
            get_training_chat_template(tokenizer)
        except ValueError as error:
            raise ConfigError(
                f"The chat template of {config.model.path} does not mark assistant turns with {{% generation %}}, "
                "and trl knows no marked version of it. Give one as `data.chat_template`, or set `data.loss: all`."
            ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars of `datasets`, drawn over ours, and without what trl's words are called in v6."""
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*is deprecated and will be removed in v6", FutureWarning)
            yield
    finally:
        if shown:
            datasets.enable_progress_bars()
