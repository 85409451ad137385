"""``octavo sft`` from configuration to adapter."""

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import datasets
import torch
from rich.console import Console
from transformers import (
    AutoTokenizer,
    EarlyStoppingCallback,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainerState,
)
from transformers.trainer import TRAINER_STATE_NAME
from trl.chat_template_utils import get_training_chat_template

import octavo
from octavo.errors import ConfigError, OctavoError
from octavo.integrations.announced import rehearse
from octavo.train.arguments import sft_arguments
from octavo.train.config import SftConfig
from octavo.train.data import Examples, Loss, counted_loss, load_data
from octavo.train.folder import RunFolder, is_adapter
from octavo.train.interrupt import SaveOnInterrupt
from octavo.train.meter import GB, peak_memory
from octavo.train.metrics import MetricsFile
from octavo.train.outcome import RunResult
from octavo.train.packed import use_packed_attention
from octavo.train.planned import planned
from octavo.train.preview import Preview, say
from octavo.train.progress import LiveProgress, progress_for
from octavo.train.proof import GradientProofCallback
from octavo.train.trainer import SftTrainer


def sft(config: SftConfig, console: Console, *, dry_run: bool = False) -> RunResult:
    """Fine-tune as ``config`` says and write the run folder; a dry run stops before the first step.

    Raises:
        OctavoError: the configuration, the data, the checkpoint or the adapter is wrong, gradients are missing, or the
            loss is not finite.
    """
    with quiet():
        run = Run(config, console)
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


class Run:
    """One run in its two phases: all that comes before the first step, when it is made, and the training."""

    def __init__(self, config: SftConfig, console: Console) -> None:
        """Read the data, load the model, make the trainer, and show what will happen."""
        self._began = time.perf_counter()
        self._config = config.resolved()
        self._console = console
        self._interrupt = SaveOnInterrupt()
        self._adapter: Path | None = None
        _require_reporter(self._config)
        _require_optimizer(self._config)
        self._folder = RunFolder(self._config.out)
        self._checkpoint = self._folder.checkpoint(self._config.train.resume)
        train, evaluation = load_data(self._config.data, seed=self._config.train.seed)
        loss = counted_loss(train, self._config.data.loss)
        self.tokenizer = load_tokenizer(self._config)
        _require_template(self.tokenizer, train, loss, self._config)
        self.trainer = self._make_trainer(train, evaluation, loss)

    def _make_trainer(self, train: Examples, evaluation: Examples | None, loss: Loss) -> SftTrainer:
        config = self._config
        # First, because it joins the process group and picks this rank's device.
        args = sft_arguments(config, loss, evaluates=evaluation is not None)
        if args.process_index > 0:
            self._console = Console(quiet=True)
        self._progress = progress_for(self._console)
        say(self._console, f"loading {config.model.path}")
        model = octavo.load_model(
            config.model.path,
            numerics=config.model.numerics,
            engine=config.model.engine,
            dtype=getattr(torch, config.model.dtype),
            revision=config.model.revision,
            attn_implementation=None if config.model.attention == "auto" else config.model.attention,
        )
        if config.data.packing and config.model.attention == "auto":
            use_packed_attention(model)
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
            trainable_token_indices=list(config.lora.trainable_tokens) or None,
            init="gaussian" if config.lora.init == "gaussian" else True,
        )
        announced = rehearse(model, lora).named
        trainer = SftTrainer(
            model=model,
            args=args,
            tokenizer=self.tokenizer,
            adapter=lora,
            train=train,
            evaluation=evaluation,
            callbacks=self._callbacks(),
            stop_on_nan=config.train.stop_on_nan,
            adapter_dtype=getattr(torch, config.lora.dtype),
            offload_hidden_states=config.train.offload_hidden_states,
        )
        if args.device.type == "cuda" and config.model.dtype == "bfloat16":
            self._plan(trainer)
        # transformers adds it where its own progress bar is off; ours take its place.
        trainer.remove_callback(PrinterCallback)
        preview = Preview(self._console)
        preview.model(trainer.model)
        preview.adapter(trainer.model, lora, announced)
        preview.data(trainer.preparations, [train] if evaluation is None else [train, evaluation])
        preview.example(trainer.train_dataset[0], loss, self.tokenizer)
        if self._checkpoint is not None:
            changed = self._folder.changed_keys(config)
            if other := [key for key in changed if key in ("model.path", "model.revision") or key.startswith("lora.")]:
                raise ConfigError(
                    f"{self._folder.path} holds a run with another {' and '.join(other)}, and its adapter does not "
                    f"fit this "
                    "one. Choose another `out`, or set these back."
                )
            preview.resume(self._checkpoint, changed)
        if args.should_save:
            self._folder.write_start(config, args.device, args.world_size)
        return trainer

    def _plan(self, trainer: SftTrainer) -> None:
        """Say what the run should take, and have its line show it beside what it takes."""
        try:
            plan = planned(self._config)
        except OctavoError as error:
            say(self._console, f"no plan of the memory: {error}")
            return
        trainer.meter.plan = plan.allocated
        say(self._console, f"planned peak {plan.peak / GB:.2f} GB, in {plan.moment}; `octavo plan` shows its terms")

    def train(self) -> RunResult:
        """Train, and write the adapter unless interrupted. A run that is finished already stays as it is."""
        Preview(self._console).section("training")
        if self._is_finished():
            say(self._console, f"nothing to do: {self._checkpoint} is the last of its steps. Raise them to go on.")
            self._adapter = self._folder.adapter if is_adapter(self._folder.adapter) else self._checkpoint
            return self.result()
        try:
            with self._interrupt:
                self.trainer.train(resume_from_checkpoint=str(self._checkpoint) if self._checkpoint else None)
        finally:
            if isinstance(self._progress, LiveProgress):
                self._progress.close()
        if self.trainer.state.global_step >= self.trainer.state.max_steps:
            # A signal in the last step interrupts nothing.
            self._interrupt.received = None
        if self._interrupt.received is None:
            self._save_adapter()
        return self.result()

    def _is_finished(self) -> bool:
        """Whether the checkpoint is at the last step; transformers would take one more."""
        if self._checkpoint is None:
            return False
        state = TrainerState.load_from_json(str(self._checkpoint / TRAINER_STATE_NAME))
        *_, max_steps = self.trainer.set_initial_training_values(self.trainer.args, self.trainer.get_train_dataloader())
        if state.global_step < max_steps:
            return False
        self.trainer.state.global_step, self.trainer.state.max_steps = state.global_step, max_steps
        self.trainer.state.log_history = state.log_history
        return True

    def result(self) -> RunResult:
        """Where the run stands."""
        state = self.trainer.state
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
            main_process=self.trainer.is_world_process_zero(),
        )

    def _callbacks(self) -> list[TrainerCallback]:
        proof = GradientProofCallback(lambda report: say(self._console, str(report)))
        callbacks = [proof, self._interrupt, MetricsFile(self._folder.metrics), self._progress]
        if self._config.train.early_stopping is not None:
            callbacks.append(EarlyStoppingCallback(self._config.train.early_stopping))
        return callbacks

    def _save_adapter(self) -> None:
        self.trainer.save_model(str(self._folder.adapter))
        if self.trainer.args.should_save:
            # A pickle of trl's arguments; config.yaml says the same and is safe to read.
            (self._folder.adapter / "training_args.bin").unlink(missing_ok=True)
        self._adapter = self._folder.adapter


def _require_reporter(config: SftConfig) -> None:
    name = config.train.report_to
    if name != "none" and find_spec(name) is None:
        raise ConfigError(f"`train.report_to: {name}` needs the package of that name. Run: pip install {name}")


def _require_optimizer(config: SftConfig) -> None:
    if config.train.optimizer == "adamw_8bit" and find_spec("torchao") is None:
        raise ConfigError(
            "`train.optimizer: adamw_8bit` is torchao's, which is not installed. Run: pip install 'octavo[adamw8bit]'"
        )


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
def quiet() -> Iterator[None]:
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
