"""A tiny random mixture of experts, a byte tokenizer with a chat template, and a few examples."""

import io
import json
import signal
from pathlib import Path
from typing import Any

from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig

from octavo.train.config import parse_config
from octavo.train.outcome import RunResult
from octavo.train.run import sft

TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|end|>{% endgeneration %}"
    "{% else %}{{ message.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]


def byte_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """One token per byte, so that a test can count tokens by eye."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=SPECIAL[0], eos_token=SPECIAL[1], additional_special_tokens=SPECIAL[2:]
    )
    tokenizer.chat_template = template
    return tokenizer


def tiny_config(**changes: object) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        **{
            "vocab_size": 264,
            "hidden_size": 32,
            "intermediate_size": 48,
            "moe_intermediate_size": 16,
            "num_hidden_layers": 2,
            "mlp_only_layers": [0],
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "tie_word_embeddings": False,
            "pad_token_id": 257,
            "eos_token_id": 256,
            **changes,
        }
    )


def chat(index: int) -> dict[str, list[dict[str, str]]]:
    """One chat; every index has another length."""
    answer = f"{'ab' * (1 + index % 5)}{index}"
    return {"messages": [{"role": "user", "content": f"say {index}"}, {"role": "assistant", "content": answer}]}


def write_jsonl(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Screen(io.StringIO):
    """What a run prints; sends this process a signal when the text says so."""

    def __init__(self, *, after: str | None = None, number: signal.Signals = signal.SIGINT) -> None:
        super().__init__()
        self._after, self._number = after, number

    def write(self, text: str) -> int:
        count = super().write(text)
        if self._after is not None and self._after in self.getvalue():
            self._after = None
            signal.raise_signal(self._number)
        return count


def train(screen: Screen | None = None, *, dry_run: bool = False, terminal: bool = False, **tree: object) -> RunResult:
    """Run ``octavo sft`` on a configuration given as a mapping."""
    console = Console(file=screen or Screen(), width=200, force_terminal=terminal)
    return sft(parse_config(tree), console, dry_run=dry_run)


def tree(checkpoint: Path, data: Path, out: Path, **train_section: object) -> dict[str, Any]:
    """A short float32 run on the CPU, as a mapping that tests change."""
    return {
        "model": {"path": str(checkpoint), "dtype": "float32"},
        "lora": {"r": 4},
        "data": {"train": str(data), "max_length": 64},
        "train": {"steps": 3, "batch_size": 4, "lr": 1e-2, "warmup": 0, "precision": "float32", **train_section},
        "out": str(out),
    }
