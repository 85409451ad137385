"""trl's SFTTrainer, plus what it keeps quiet: what became of each example."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import datasets
import torch
import trl
from peft import LoraConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

import octavo
from octavo.errors import ConfigError
from octavo.plan.terms import Optimizer
from octavo.train.data import Examples, require_embedded
from octavo.train.even_rows import EvenRows, even_shape
from octavo.train.example import IGNORED
from octavo.train.offload import HiddenStatesOnHost
from octavo.train.offloaded_optimizer import OffloadsOptimizer
from octavo.train.packed import PACKED
from octavo.train.watched import TrainingError, Watched

__all__ = ["Preparation", "SftTrainer", "TrainingError"]


@dataclass(frozen=True, slots=True)
class Preparation:
    """What became of the examples of one data set between the file and the first batch."""

    examples: int
    # Cut at `data.max_length`, and among them those left without a counted token, which are dropped.
    truncated: int
    dropped: int
    rows: int
    tokens: int
    counted: int

    def __str__(self) -> str:
        packed = f" in {self.rows} packed rows" if self.rows != self.examples - self.dropped else ""
        share = 100 * self.counted / self.tokens
        text = f"{self.examples - self.dropped} examples{packed}, {self.tokens:,} tokens, {share:.0f} % of them count"
        if self.truncated:
            text += f"; {self.truncated} cut at max_length"
        return text + (f", {self.dropped} of them dropped: nothing that counts was left" if self.dropped else "")


class SftTrainer(Watched, OffloadsOptimizer, trl.SFTTrainer):  # type: ignore[misc]  # trl is untyped
    """A `trl.SFTTrainer` on checked examples, with a `Meter` in its log."""

    data_collator: Any

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        args: trl.SFTConfig,
        tokenizer: PreTrainedTokenizerBase,
        adapter: LoraConfig,
        train: Examples,
        evaluation: Examples | None,
        callbacks: Sequence[TrainerCallback] = (),
        stop_on_nan: bool = True,
        adapter_dtype: torch.dtype = torch.float32,
        offload_hidden_states: bool = False,
        offload_optimizer: Optimizer | None = None,
        compile_layers: bool = False,
        graph_layers: bool = False,
    ) -> None:
        """``offload_optimizer``: the ``train.optimizer`` whose states are kept in host memory, if they are."""
        # Data are prepared before the trainer has its model.
        self._embedding = model.get_input_embeddings()
        self.preparations: dict[str, Preparation] = {}
        self._sources = {"train": train} if evaluation is None else {"train": train, "eval": evaluation}
        super().__init__(
            model=model,
            args=args,
            train_dataset=train.dataset,
            eval_dataset=None if evaluation is None else evaluation.dataset,
            processing_class=tokenizer,
            peft_config=adapter,
            callbacks=list(callbacks),
        )
        self._adapter_dtype = adapter_dtype
        _cast_adapters(self.model, adapter_dtype)
        shape = None
        if graph_layers:
            octavo.graph_layers(self.model)
            if args.packing and args.max_length and model.config.get_text_config()._attn_implementation == PACKED:
                rows = args.per_device_train_batch_size
                packs = list(_column(self.train_dataset, "seq_lengths"))
                length, examples = even_shape(packs)
                self.data_collator = EvenRows(self.data_collator, rows * length, rows * examples)
                # packed rows of a batch are one row to the model
                shape = 1, rows * length
        if compile_layers:
            octavo.compile_layers(self.model, shape=shape)
        self._offload: HiddenStatesOnHost | None = None
        if offload_hidden_states:
            self._offload = HiddenStatesOnHost(self.model.parameters(), self.args.device)
        if offload_optimizer is not None:
            self.offload_optimizer(offload_optimizer)
        self.watch(stop_on_nan=stop_on_nan)

    def _prepare_dataset(
        self,
        dataset: datasets.Dataset,
        processing_class: PreTrainedTokenizerBase,
        args: trl.SFTConfig,
        packing: bool,
        formatting_func: Any,
        dataset_name: str,
    ) -> datasets.Dataset:
        """Tokenize in full first and count; trl then cuts, drops and packs, and leaves tokenized data as it is."""
        source = self._sources[dataset_name]
        whole = copy.copy(args)
        whole.max_length = None
        try:
            full = super()._prepare_dataset(dataset, processing_class, whole, False, formatting_func, dataset_name)
        except RuntimeError as error:
            # Nothing is computed here, so this is trl's verdict on an example.
            raise ConfigError(f"{source.source} cannot be prepared: {error}") from error
        highest = max(max(ids) for ids in _column(full, "input_ids"))
        require_embedded(len(self._embedding.weight), highest, source.source)
        longest = args.max_length if args.max_length is not None else int(1e18)
        examples = truncated = dropped = tokens = counted = 0
        for index, labels in enumerate(_column(full, "labels")):
            if not any(label != IGNORED for label in labels[1:]):
                raise ConfigError(
                    f"No token of {source.where(index)} counts in the loss. Remove the example, or look at `data.loss`."
                )
            kept = labels[:longest]
            left = sum(label != IGNORED for label in kept[1:])
            examples += 1
            truncated += len(labels) > len(kept)
            dropped += left == 0 and not packing
            tokens += len(kept) if left else 0
            counted += left
        if counted == 0:
            raise ConfigError(
                f"All {examples} examples of {source.source} are cut at `data.max_length: {args.max_length}` before "
                "the first token that counts. Raise it."
            )
        prepared = super()._prepare_dataset(full, processing_class, args, packing, formatting_func, dataset_name)
        self.preparations[dataset_name] = Preparation(examples, truncated, dropped, len(prepared), tokens, counted)
        return prepared

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Load the adapter's state; peft widens to float32 what it loads."""
        super()._load_from_checkpoint(*args, **kwargs)
        _cast_adapters(self.model, self._adapter_dtype)

    def _load_best_model(self) -> None:
        """The same at the end of a run that stops early."""
        super()._load_best_model()
        _cast_adapters(self.model, self._adapter_dtype)

    def compute_loss(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """trl's loss, with hidden states leaving for the host as they are kept if that was asked for."""
        with self._offload if self._offload is not None and model.training else nullcontext():
            return super().compute_loss(model, *args, **kwargs)


def _cast_adapters(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Give LoRA factors their dtype; peft made them in float32. What is trained in full keeps its own."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_" in name:
            parameter.data = parameter.data.to(dtype)


def _column(dataset: datasets.Dataset, name: str) -> Iterator[list[int]]:
    batch: Mapping[str, list[list[int]]]
    for batch in dataset.select_columns([name]).iter(batch_size=1000):
        yield from batch[name]
