"""Answers from a model with its trained adapter, as they are generated."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TextStreamer

import octavo
from octavo.errors import ConfigError
from octavo.integrations.generation import Graphs
from octavo.integrations.quantizer import Residence
from octavo.train.folder import is_adapter


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. ``temperature`` 0 takes the likeliest."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0

    def arguments(self) -> dict[str, Any]:
        """In the words of ``generate``."""
        if self.temperature == 0:
            # None, or the checkpoint's own defaults for sampling would be warned about.
            return {
                "max_new_tokens": self.max_new_tokens,
                "do_sample": False,
                "temperature": None,
                "top_p": None,
                "top_k": None,
            }
        sampled = {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return {"max_new_tokens": self.max_new_tokens, "do_sample": True, **sampled}


@dataclass(frozen=True, slots=True)
class Answer:
    """A generated text and what it took."""

    text: str
    tokens: int
    seconds: float


class Chat:
    """A model with its adapter and tokenizer, ready to answer."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, *, graphs: Graphs = "auto") -> None:
        """``graphs``: see `octavo.generate`."""
        self.model = model.eval()
        self.tokenizer = tokenizer
        self._graphs: Graphs = graphs

    def answer(
        self, turns: Sequence[dict[str, str]], sampling: Sampling, show: Callable[[str], None] | None = None
    ) -> Answer:
        """Continue the conversation ``turns``; ``show`` gets the text in pieces, as it is generated.

        A tokenizer without a chat template gets the contents of the turns as one text to continue.
        """
        ids_1T = self._encode(turns).to(self.model.device)
        streamer = None if show is None else _Streamer(self.tokenizer, show)
        began = time.perf_counter()
        with torch.inference_mode():
            out_1T = octavo.generate(
                self.model,
                graphs=self._graphs,
                input_ids=ids_1T,
                attention_mask=torch.ones_like(ids_1T),
                streamer=streamer,
                pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
                eos_token_id=self._ends(),
                **sampling.arguments(),
            )
        new_T = out_1T[0, ids_1T.shape[1] :]
        text = self.tokenizer.decode(new_T, skip_special_tokens=True)
        return Answer(text, len(new_T), time.perf_counter() - began)

    def _encode(self, turns: Sequence[dict[str, str]]) -> torch.Tensor:
        if self.tokenizer.chat_template is None:
            text = "\n".join(turn["content"] for turn in turns)
            return torch.tensor([self.tokenizer(text)["input_ids"]])
        encoded = self.tokenizer.apply_chat_template(
            list(turns), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids: torch.Tensor = encoded["input_ids"]
        return ids

    def _ends(self) -> list[int]:
        """Every token that ends a turn: the model's own, and the tokenizer's that it was trained with."""
        own = self.model.generation_config.eos_token_id
        ends = own if isinstance(own, list) else [own]
        return sorted({end for end in (*ends, self.tokenizer.eos_token_id) if end is not None})


class _Streamer(TextStreamer):  # type: ignore[misc]  # transformers is untyped
    """Hands finished pieces of text on, without the prompt and special tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._show = show

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._show(text)


def load_chat(
    adapter: str,
    *,
    base: str | None = None,
    numerics: str = "exact",
    engine: str = "auto",
    experts: Residence = "resident",
    dtype: str = "bfloat16",
    graphs: Graphs = "auto",
) -> Chat:
    """Load an adapter (its folder, the folder of a run, or a hub id) onto the model it was trained on, or ``base``.

    Raises:
        OctavoError: there is no adapter, or its model cannot be loaded.
    """
    where = find_adapter(adapter)
    try:
        config = PeftConfig.from_pretrained(where)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{adapter} is neither an adapter's folder nor the id of one on the hub: {error}") from error
    origin = base or config.base_model_name_or_path
    if origin is None:
        raise ConfigError(f"The adapter {where} does not say which model it belongs to. Name it with --base.")
    if Path(origin).is_absolute() and not Path(origin).exists():
        raise ConfigError(
            f"The adapter {where} was trained on {origin}, which is not there. Name its place with --base."
        )
    revision = None if base else config.revision
    model = octavo.load_model(
        origin, numerics=numerics, engine=engine, experts=experts, dtype=getattr(torch, dtype), revision=revision
    )
    # Runs of `sft` save the tokenizer they trained with beside the adapter.
    tokenizer_at = where if (Path(where) / "tokenizer_config.json").is_file() else origin
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_at)
    return Chat(PeftModel.from_pretrained(model, where), tokenizer, graphs=graphs)


def find_adapter(adapter: str) -> str:
    """The folder of the adapter in ``adapter`` or in the run that ``adapter`` is; a hub id as it is.

    Raises:
        ConfigError: the folder holds neither.
    """
    path = Path(adapter).expanduser()
    for folder in (path, path / "adapter"):
        if is_adapter(folder):
            return str(folder.absolute())
    if path.is_dir():
        checkpoints = sorted(path.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
        hint = f" The run was not finished; its last checkpoint is {checkpoints[-1]}." if checkpoints else ""
        raise ConfigError(f"{path} holds no adapter: no adapter_config.json with adapter_model.safetensors.{hint}")
    if path.is_absolute() or adapter.startswith(".") or adapter.count("/") > 1:
        raise ConfigError(f"There is no adapter at {path.absolute()}.")
    return adapter
