"""What runs of every kind share: model and adapter, the folder, resuming, an interrupt, and the result."""

import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import LoraConfig
from rich.console import Console
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainerState,
)
from transformers.trainer import TRAINER_STATE_NAME

import octavo
from octavo.errors import ConfigError, first_line
from octavo.integrations.announced import rehearse
from octavo.train.config import LoraSection, OptimizationSection, RunConfig
from octavo.train.folder import RunFolder
from octavo.train.interrupt import SaveOnInterrupt
from octavo.train.meter import GB, peak_memory
from octavo.train.metrics import MetricsFile
from octavo.train.outcome import RunResult
from octavo.train.preview import Preview, say
from octavo.train.progress import LiveProgress, progress_for
from octavo.train.proof import GradientProofCallback, ProofReport
from octavo.train.rescue import SaveOnFailure
from octavo.train.watched import saving


def load_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
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


def adapter_config(model: PreTrainedModel, lora: LoraSection) -> LoraConfig:
    """peft's configuration for the section ``lora``."""
    return octavo.lora_config(
        model,
        r=lora.r,
        alpha=lora.alpha,
        expert_rank=lora.expert_rank,
        targets=lora.targets,
        router=lora.router,
        rslora=lora.rslora,
        dropout=lora.dropout,
        modules_to_save=list(lora.modules_to_save) or None,
        trainable_token_indices=list(lora.trainable_tokens) or None,
        init="gaussian" if lora.init == "gaussian" else True,
    )


class BaseRun(ABC):
    """One run in its two phases: all that comes before the first step, when it is made, and the training.

    A kind of run makes ``self.trainer`` in its own ``__init__``, between `_load` and `_ready`.
    """

    trainer: Any

    def __init__(self, config: RunConfig, train: OptimizationSection, console: Console) -> None:
        self._began = time.perf_counter()
        self._run_config = config
        self._console = console
        self._interrupt = SaveOnInterrupt()
        self._rescue = SaveOnFailure()
        self._adapter: Path | None = None
        _require_reporter(train)
        _require_optimizer(train)
        self._folder = RunFolder(config.out)
        self._folder.require_folder()
        self._checkpoint = self._folder.checkpoint(train.resume)
        self._passed_over = self._folder.cut_off() if train.resume == "auto" else []

    def _load(self, args: Any) -> tuple[PreTrainedModel, LoraConfig, Collection[str]]:
        """The model, its adapter's configuration, and the weights that it announces; ``args`` know this rank."""
        config = self._run_config
        if args.process_index > 0:
            self._console = Console(quiet=True)
        self._progress = progress_for(self._console)
        say(self._console, f"loading {config.model.path}")
        try:
            model = octavo.load_model(
                config.model.path,
                numerics=config.model.numerics,
                engine=config.model.engine,
                activations=config.model.activations,
                experts=config.model.experts,
                dtype=getattr(torch, config.model.dtype),
                revision=config.model.revision,
                attn_implementation=None if config.model.attention == "auto" else config.model.attention,
            )
        except ImportError as error:
            if config.model.attention == "auto":
                raise
            raise ConfigError(
                f"`model.attention: {config.model.attention}` cannot be had here: {first_line(error)} Leave "
                "it at `auto`."
            ) from error
        lora = adapter_config(model, config.lora)
        return model, lora, rehearse(model, lora).named

    def _ready(self) -> None:
        """The last checks, and the record of a new run; that of an old one stays, because a dry run ends here."""
        # transformers adds it where its own progress bar is off; ours take its place.
        self.trainer.remove_callback(PrinterCallback)
        config, args = self._run_config, self.trainer.args
        if self._checkpoint is not None:
            changed = self._folder.changed_keys(config)
            if other := [key for key in changed if key in ("model.path", "model.revision") or key.startswith("lora.")]:
                raise ConfigError(
                    f"{self._folder.path} holds a run with another {' and '.join(other)}, and its adapter does not "
                    "fit this one. Choose another `out`, or set these back."
                )
            Preview(self._console).resume(self._checkpoint, changed)
        if self._passed_over:
            names = ", ".join(path.name for path in self._passed_over)
            say(self._console, f"passed over, because it was not written to its end: {names}", style="yellow")
        if args.should_save and not self._folder.config.exists():
            self._folder.write_start(config, args.device, args.world_size)

    def train(self) -> RunResult:
        """Train, and write the adapter unless interrupted. A run that is finished already stays as it is."""
        Preview(self._console).section("training")
        if self._is_finished():
            say(self._console, f"nothing to do: {self._checkpoint} is the last of its steps. Raise them to go on.")
            self._adapter = self._finished_adapter()
            return self.result()
        args = self.trainer.args
        if args.should_save:
            self._folder.write_start(self._run_config, args.device, args.world_size)
        try:
            with self._rescue.watching(self.trainer, self._saved), self._interrupt:
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
        self.trainer.state.best_model_checkpoint = state.best_model_checkpoint
        return True

    def result(self) -> RunResult:
        """Where the run stands."""
        state = self.trainer.state
        logged = {
            key: line[key] for line in state.log_history for key in ("loss", "eval_loss", "reward") if key in line
        }
        received = self._interrupt.received
        return RunResult(
            out=self._folder.path,
            adapter=self._adapter,
            step=state.global_step,
            max_steps=state.max_steps,
            loss=logged.get("loss"),
            eval_loss=logged.get("eval_loss"),
            reward=logged.get("reward"),
            seconds=time.perf_counter() - self._began,
            peak_memory_gb=peak_memory() / GB,
            resumed_from=self._checkpoint,
            signal=None if received is None else int(received),
            main_process=self.trainer.is_world_process_zero(),
        )

    def _proof(self, report: Callable[[ProofReport], None]) -> GradientProofCallback:
        return GradientProofCallback(report)

    @abstractmethod
    def _own_callbacks(self) -> list[TrainerCallback]:
        """Callbacks of this kind of run."""

    def _callbacks(self) -> list[TrainerCallback]:
        proof = self._proof(lambda report: say(self._console, str(report)))
        shared = [proof, self._interrupt, self._rescue, MetricsFile(self._folder.metrics), self._progress]
        return [*shared, *self._own_callbacks()]

    def _saved(self, checkpoint: Path) -> None:
        say(self._console, f"saved {checkpoint}: the same command goes on from there, once the error is put right")

    def _finished_adapter(self) -> Path | None:
        """Of a run that had come to its end before: the best checkpoint's where it keeps the best."""
        assert self._checkpoint is not None, "a finished run has its last checkpoint"
        best = self.trainer.state.best_model_checkpoint if self.trainer.args.load_best_model_at_end else None
        source = self._checkpoint if best is None else self._folder.path / Path(best).name
        return self._folder.finish(source) if self.trainer.args.should_save else self._folder.adapter

    def _save_adapter(self) -> None:
        with saving("The adapter", self._folder.adapter):
            self.trainer.save_model(str(self._folder.adapter))
        if self.trainer.args.should_save:
            # A pickle of trl's arguments; config.yaml says the same and is safe to read.
            (self._folder.adapter / "training_args.bin").unlink(missing_ok=True)
        self._adapter = self._folder.adapter


def _require_reporter(train: OptimizationSection) -> None:
    name = train.report_to
    if name != "none" and find_spec(name) is None:
        raise ConfigError(f"`train.report_to: {name}` needs the package of that name. Run: pip install {name}")


def _require_optimizer(train: OptimizationSection) -> None:
    if train.optimizer == "adamw_8bit" and find_spec("torchao") is None:
        raise ConfigError(
            "`train.optimizer: adamw_8bit` is torchao's, which is not installed. Run: pip install 'octavo[adamw8bit]'"
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars of `datasets`, drawn over ours, and without trl's notes on its own future."""
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*is deprecated and will be removed in v6", FutureWarning)
            # The hook for rollouts is trl's own; the version it was tested with is pinned.
            warnings.filterwarnings("ignore", "You are using 'rollout_func'", UserWarning)
            yield
    finally:
        if shown:
            datasets.enable_progress_bars()
