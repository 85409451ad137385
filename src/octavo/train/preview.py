"""What a person sees before the first step: the model, what trains in it, the data, and one example with its mask."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from rich.console import Console
from rich.rule import Rule
from transformers import PreTrainedTokenizerBase

import octavo
from octavo.integrations.lora_config import expert_rank_note
from octavo.train.announce import difference
from octavo.train.data import Examples, Loss
from octavo.train.example import render_example
from octavo.train.trainable import trainable_table
from octavo.train.trainer import Preparation


def say(console: Console, text: str, *, style: str | None = None) -> None:
    """Print ``text`` as it is: not wrapped, not coloured by content, brackets and all."""
    console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)


class Preview:
    """Prints one section after the other."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def section(self, title: str) -> None:
        """A rule with a title."""
        self._console.print(Rule(title, align="left", style="dim"))

    def model(self, model: PeftModel) -> None:
        """How each layer is stored and computed. With the adapter on, it also says what trains in each."""
        self.section("model")
        say(self._console, str(octavo.describe(model)))

    def adapter(self, model: PeftModel, config: LoraConfig, announced: Collection[str]) -> None:
        """What trains by group, and where peft did not do as announced."""
        self.section("adapter")
        self._console.print(trainable_table(model).rich())
        if note := expert_rank_note(model, config):
            say(self._console, note)
        for line in difference(announced, model).lines():
            say(self._console, line, style="yellow")

    def data(self, preparations: Mapping[str, Preparation], examples: Sequence[Examples]) -> None:
        """How many examples there are, and what became of them."""
        self.section("data")
        for (name, preparation), source in zip(preparations.items(), examples, strict=True):
            say(self._console, f"{name}: {source.source}, {preparation}")
            if source.left_out:
                say(self._console, f"{name}: columns not used: {', '.join(source.left_out)}", style="yellow")

    def example(self, row: Mapping[str, Any], loss: Loss, tokenizer: PreTrainedTokenizerBase) -> None:
        """The first row as the model gets it, with the tokens that count in the loss marked."""
        example = render_example(row["input_ids"], row["labels"], tokenizer)
        say(self._console, f"the first row, {example.counted} of its {example.tokens} tokens count (loss on {loss}):")
        if self._console.is_terminal:
            self._console.print(example.rich(), soft_wrap=True)
        else:
            say(self._console, str(example))

    def resume(self, checkpoint: Path, changed: Sequence[str]) -> None:
        """Where the run goes on, and in what it differs from the run it goes on with."""
        say(self._console, f"resuming from {checkpoint}")
        for key in changed:
            say(self._console, f"`{key}` differs from the run that is resumed", style="yellow")
