"""``octavo sft`` from configuration to adapter."""

import torch
import trl
from rich.console import Console
from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase, TrainerCallback
from trl.chat_template_utils import get_training_chat_template

from octavo.errors import ConfigError, OctavoError
from octavo.integrations.graphs import graphs_state
from octavo.train.arguments import sft_arguments
from octavo.train.base import BaseRun, load_tokenizer, quiet
from octavo.train.config import SftConfig
from octavo.train.data import Examples, Loss, counted_loss, load_data
from octavo.train.meter import GB
from octavo.train.outcome import RunResult
from octavo.train.packed import use_packed_attention
from octavo.train.planned import planned, replays_layers
from octavo.train.preview import Preview, say
from octavo.train.trainer import SftTrainer

__all__ = ["Run", "quiet", "sft"]


def sft(config: SftConfig, console: Console, *, dry_run: bool = False) -> RunResult:
    """Fine-tune as ``config`` says and write the run folder; a dry run stops before the first step.

    Raises:
        OctavoError: the configuration, the data, the checkpoint or the adapter is wrong, gradients are missing, or the
            loss is not finite.
    """
    with quiet():
        run = Run(config, console)
        return run.result() if dry_run else run.train()


class Run(BaseRun):
    """A run of ``octavo sft``."""

    trainer: SftTrainer

    def __init__(self, config: SftConfig, console: Console) -> None:
        """Read the data, load the model, make the trainer, and show what will happen."""
        self._config = config.resolved()
        super().__init__(self._config, self._config.train, console)
        train, evaluation = load_data(self._config.data, seed=self._config.train.seed)
        loss = counted_loss(train, self._config.data.loss)
        self.tokenizer = load_tokenizer(self._config)
        _require_template(self.tokenizer, train, loss, self._config)
        self._make_trainer(train, evaluation, loss)
        self._ready()

    def _make_trainer(self, train: Examples, evaluation: Examples | None, loss: Loss) -> None:
        config = self._config
        # First, because it joins the process group and picks this rank's device.
        args = sft_arguments(config, loss, evaluates=evaluation is not None)
        model, lora, announced = self._load(args)
        if config.data.packing and config.model.attention == "auto":
            use_packed_attention(model)
        self.trainer = SftTrainer(
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
            offload_optimizer=config.train.optimizer if config.train.offload_optimizer else None,
            compile_layers=args.device.type == "cuda" if config.train.compile == "auto" else config.train.compile,
            graph_layers=_replays(config, args),
        )
        if args.device.type == "cuda" and config.model.dtype == "bfloat16":
            self._plan(self.trainer)
        preview = Preview(self._console)
        preview.model(self.trainer.model)
        preview.adapter(self.trainer.model, lora, announced)
        preview.data(self.trainer.preparations, [train] if evaluation is None else [train, evaluation])
        preview.example(self.trainer.train_dataset[0], loss, self.tokenizer)

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
        """See :meth:`BaseRun.train`; says in the end how many forwards of a layer were replayed, and why others not."""
        result = super().train()
        state = graphs_state(self.trainer.model)
        if state is not None:
            say(self._console, f"CUDA graphs: {state}")
        return result

    def _own_callbacks(self) -> list[TrainerCallback]:
        patience = self._config.train.early_stopping
        return [] if patience is None else [EarlyStoppingCallback(patience)]


def _replays(config: SftConfig, args: trl.SFTConfig) -> bool:
    """Whether decoder layers are replayed as CUDA graphs."""
    alone = args.world_size == 1
    if config.train.graphs is True and not alone:
        raise ConfigError(f"`train.graphs` are for one GPU, and {args.world_size} processes train. Set it to `false`.")
    possible = args.device.type == "cuda" and alone
    return (possible or config.train.graphs is True) and replays_layers(config)


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
