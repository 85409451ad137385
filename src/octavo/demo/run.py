"""The main job on a small real model: fine-tune it in FP8, and show that it learned."""

import dataclasses
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from torch import nn

from octavo import demo
from octavo.checkpoint.accounting import open_ledger
from octavo.train.chat import Chat, Sampling
from octavo.train.config import SftConfig, parse_config
from octavo.train.metrics import read_metrics
from octavo.train.preview import Preview, say
from octavo.train.run import Run, quiet
from octavo.train.trainable import trainable_table

# Held-out examples that are shown before and after.
_SHOWN = 2
MUST_FALL = 0.15


@dataclasses.dataclass(frozen=True, slots=True)
class Completion:
    """What the model answers to a held-out question before and after, and what the dictionary says."""

    prompt: str
    reference: str
    before: str
    after: str


@dataclasses.dataclass(frozen=True, slots=True)
class DemoResult:
    """What the demo showed."""

    model: Path
    adapter: Path | None
    steps: int
    eval_loss_before: float
    eval_loss_after: float
    completions: tuple[Completion, ...]
    # Bytes of the loaded model's own weights, counted tensor by tensor.
    weights_measured: int
    # What the weights of the checkpoint would take with every FP8 matrix in bf16, from the headers.
    weights_in_bf16: int
    trainable_parameters: int
    seconds: float
    signal: int | None

    @property
    def fell(self) -> float:
        """Share by which the loss on held-out examples fell."""
        return 1 - self.eval_loss_after / self.eval_loss_before

    @property
    def learned(self) -> bool:
        """Whether it fell by as much as it must."""
        return self.fell >= MUST_FALL

    def as_json(self) -> dict[str, Any]:
        """As ``--json`` prints it."""
        tree = dataclasses.asdict(self) | {"fell": self.fell, "learned": self.learned}
        return {name: str(value) if isinstance(value, Path) else value for name, value in tree.items()}


def demo_config(model: str, out: Path, *, steps: int) -> SftConfig:
    """The configuration of the demo, which `octavo sft` would take as YAML."""
    return parse_config(
        {
            "model": {"path": str(demo.checkpoint(model)), "dtype": "bfloat16"},
            "lora": {"r": 16},
            "data": {"train": str(demo.data("train")), "eval": str(demo.data("eval")), "max_length": 128},
            "train": {
                "steps": steps,
                "batch_size": 16,
                "lr": 5e-3,
                "warmup": 10,
                "precision": "bf16",
                "gradient_checkpointing": "none",
                "logging_steps": 5,
                "eval_on_start": True,
                "keep_checkpoints": 1,
                # takes longer than these steps
                "compile": False,
                "resume": "never",
            },
            "out": str(out),
        }
    )


def run_demo(console: Console, *, model: str = "glm-tiny", out: Path | None = None, steps: int = 60) -> DemoResult:
    """Fine-tune a model that ships with octavo on word definitions, and print what the README promises.

    Raises:
        OctavoError: as `octavo.train.run.sft`.
    """
    began = time.perf_counter()
    config = demo_config(model, _fresh(Path("octavo-demo")) if out is None else out, steps=steps)
    with quiet(), _one_thread():
        run = Run(config, console)
        base = Path(config.model.path)
        measured, in_bf16 = _weight_bytes(run.trainer.model), _bf16_bytes(base)
        chat = Chat(run.trainer.model, run.tokenizer)
        questions = _questions(Path(str(config.data.eval)))
        before = _answers(chat, questions)
        result = run.train()
        after = _answers(chat, questions)
    losses = [line["eval_loss"] for line in read_metrics(config.out / "metrics.jsonl") if "eval_loss" in line]
    shown = DemoResult(
        model=base,
        adapter=result.adapter,
        steps=result.step,
        eval_loss_before=losses[0],
        eval_loss_after=losses[-1],
        completions=tuple(
            Completion(prompt, reference, first, last)
            for (prompt, reference), first, last in zip(questions, before, after, strict=True)
        ),
        weights_measured=measured,
        weights_in_bf16=in_bf16,
        trainable_parameters=trainable_table(run.trainer.model).parameters,
        seconds=time.perf_counter() - began,
        signal=result.signal,
    )
    _print(console, shown)
    return shown


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one core: at hidden size 256 a second one gains nothing (466 against 480 tokens per second in bf16 on
    an EPYC), and when another process takes it, the two wait for each other, for a tenth of the speed.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _print(console: Console, result: DemoResult) -> None:
    Preview(console).section("what it learned")
    for completion in result.completions:
        say(console, completion.prompt, style="bold")
        say(console, f"  before:     {completion.before}")
        say(console, f"  after:      {completion.after}")
        say(console, f"  dictionary: {completion.reference}")
    say(
        console,
        f"loss on held-out words: {result.eval_loss_before:.3f} before, {result.eval_loss_after:.3f} after: "
        f"{100 * result.fell:.1f} % lower (asked for: {100 * MUST_FALL:.0f} %)",
        style="bold green" if result.learned else "bold red",
    )
    say(
        console,
        f"weights: {result.weights_measured / 1e6:.2f} MB measured in the loaded model; in bf16 the same checkpoint "
        f"takes {result.weights_in_bf16 / 1e6:.2f} MB, calculated from its headers",
    )
    say(console, f"adapter: {result.adapter}\ntry it: octavo chat {result.adapter}\n{result.seconds:.0f} s in all")


def _questions(path: Path) -> list[tuple[str, str]]:
    lines = path.read_text(encoding="utf-8").splitlines()[:_SHOWN]
    turns = [json.loads(line)["messages"] for line in lines]
    return [(question["content"], answer["content"]) for question, answer in turns]


def _answers(chat: Chat, questions: list[tuple[str, str]]) -> list[str]:
    sampling = Sampling(max_new_tokens=40)
    return [chat.answer([{"role": "user", "content": prompt}], sampling).text.strip() for prompt, _ in questions]


def _weight_bytes(model: nn.Module) -> int:
    """Bytes of every parameter and buffer that is not the adapter's, each storage once."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    named = (*base.named_parameters(), *base.named_buffers())
    sizes = {
        tensor.data_ptr(): tensor.numel() * tensor.element_size() for name, tensor in named if ".lora_" not in name
    }
    return sum(sizes.values())


def _bf16_bytes(checkpoint: Path) -> int:
    ledger = open_ledger(checkpoint)
    codes = sum(math.prod(quantized.weight.shape) for quantized in ledger.quantized.values())
    return 2 * codes + sum(entry.nbytes for entry in ledger.plain.values())


def _fresh(path: Path) -> Path:
    """``path``, or the first of ``path-2``, ``path-3`` … that is not there yet."""
    number = 1
    while (candidate := path if number == 1 else path.with_name(f"{path.name}-{number}")).exists():
        number += 1
    return candidate
