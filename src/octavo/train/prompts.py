"""Prompts for ``octavo grpo``, every one of them checked; what is wrong is named by file and line."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import pyarrow
from transformers import PreTrainedTokenizerBase

from octavo.errors import ConfigError
from octavo.train.data import named, read_rows, turns_problem
from octavo.train.grpo_config import PromptsSection

Prompt = str | list[dict[str, Any]]

# Arguments that trl gives to every reward function itself, and a column that it keeps from them.
_TAKEN = frozenset(
    {"completion", "completions", "completion_ids", "prompts", "trainer_state", "log_extra", "log_metric"}
)
# Columns that would have to reach the model, and do not.
_UNREAD = ("image", "images", "tools")
_SHOWN_PROBLEMS = 5


@dataclass(frozen=True, slots=True)
class Prompts:
    """``dataset``: ``prompt`` (text, or a list of turns) and the columns that reward functions may use."""

    dataset: datasets.Dataset
    source: str
    unit: str
    numbers: tuple[int, ...]
    # The longest prompt in tokens, and the highest id among all tokens.
    longest: int
    highest: int

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def columns(self) -> tuple[str, ...]:
        """What a reward function gets beside prompts and completions."""
        return tuple(name for name in self.dataset.column_names if name != "prompt")


def load_prompts(section: PromptsSection, tokenizer: PreTrainedTokenizerBase) -> Prompts:
    """Read ``data.train``: rows with ``prompt`` as text or turns, or ``messages`` ending in the assistant's answer.

    The last answer of ``messages`` becomes the column ``answer``; every other column is kept for reward functions.

    Raises:
        ConfigError: the source is missing or unreadable, or rows in it are no prompts or too long.
    """
    unit, numbers, rows = read_rows(section.train, split=section.train_split, subset=section.subset)
    problems = [
        f"{unit} {number}: {problem}" for number, row in zip(numbers, rows, strict=True) if (problem := _problem(row))
    ]
    if problems:
        raise ConfigError(_listed(f"of {len(rows)} rows in {section.train} are no prompts", problems))
    prepared = [_split(row) for row in rows]
    conversational = isinstance(prepared[0]["prompt"], list)
    if conversational and tokenizer.chat_template is None:
        raise ConfigError(
            f"{section.train} holds conversations, and the tokenizer has no chat template. Write prompts as text."
        )
    mixed = [
        number
        for number, row in zip(numbers, prepared, strict=True)
        if isinstance(row["prompt"], list) != conversational
    ]
    if mixed:
        kinds = ("a conversation", "text") if conversational else ("text", "a conversation")
        raise ConfigError(
            f"{section.train}, {unit} {mixed[0]} holds {kinds[1]} and {unit} {numbers[0]} {kinds[0]}. "
            "Keep prompts of one kind in one source."
        )
    tokens = [prompt_ids(tokenizer, row["prompt"]) for row in prepared]
    lengths = [len(ids) for ids in tokens]
    long = [
        f"{unit} {number}: {length} tokens"
        for number, length in zip(numbers, lengths, strict=True)
        if length > section.max_prompt_tokens
    ]
    if long:
        raise ConfigError(
            _listed(
                f"prompts in {section.train} are longer than `data.max_prompt_tokens: {section.max_prompt_tokens}`",
                long,
            )
        )
    if empty := [number for number, length in zip(numbers, lengths, strict=True) if length == 0]:
        raise ConfigError(f"{section.train}, {unit} {empty[0]}: the prompt has no token.")
    highest = max(map(max, tokens))
    return Prompts(_table(prepared, section.train), section.train, unit, tuple(numbers), max(lengths), highest)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """The tokens that the sampler continues: the text, or the turns in the chat template, opened for an answer."""
    if isinstance(prompt, str):
        ids: list[int] = tokenizer(prompt)["input_ids"]
        return ids
    encoded = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)
    turns: list[int] = encoded["input_ids"]
    return turns


def _problem(row: object) -> str | None:
    """What keeps ``row`` from being a prompt, or None."""
    if not isinstance(row, dict):
        return f"expected an object with `prompt` or `messages`, found {type(row).__name__}"
    if taken := _TAKEN & row.keys():
        return f"the column {named(taken)} has a name that trl takes for itself; rename it"
    if unread := [name for name in _UNREAD if row.get(name)]:
        return f"`{unread[0]}` would not reach the model; remove it, or rename it if it is for reward functions alone"
    if row.get("prompt") is not None:
        prompt = row["prompt"]
        if isinstance(prompt, str):
            return None if prompt else "`prompt` is empty"
        return turns_problem("prompt", prompt)
    if row.get("messages") is None:
        return f"neither `prompt` nor `messages`, found {named(row) or 'an empty object'}"
    if problem := turns_problem("messages", row["messages"]):
        return problem
    last = row["messages"][-1]
    if last["role"] != "assistant" or len(row["messages"]) == 1:
        return "`messages` must be a question and the assistant's answer, which becomes the column `answer`"
    return "`answer` is there beside `messages`, whose last turn becomes it" if "answer" in row else None


def _split(row: Mapping[str, Any]) -> dict[str, Any]:
    if row.get("prompt") is not None:
        return {"prompt": row["prompt"]} | {name: value for name, value in row.items() if name != "prompt"}
    *turns, last = row["messages"]
    rest = {name: value for name, value in row.items() if name not in ("messages", "prompt")}
    return {"prompt": turns, "answer": last.get("content")} | rest


def _listed(what: str, problems: Sequence[str]) -> str:
    shown = "\n  ".join(problems[:_SHOWN_PROBLEMS])
    more = f"\n  and {len(problems) - _SHOWN_PROBLEMS} more" if len(problems) > _SHOWN_PROBLEMS else ""
    return f"{len(problems)} {what}:\n  {shown}{more}"


def _table(rows: Sequence[Mapping[str, Any]], source: str) -> datasets.Dataset:
    # `datasets` would take the columns of the first row alone.
    columns = dict.fromkeys(name for row in rows for name in row)
    for name in columns:
        if {int, float} <= {type(row.get(name)) for row in rows}:
            raise ConfigError(
                f"The column `{name}` of {source} holds whole numbers and others, and 1 would become 1.0 beside 2.5. "
                "Write them as text."
            )
    try:
        return datasets.Dataset.from_list([{name: row.get(name) for name in columns} for row in rows])
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
        raise ConfigError(f"The rows of {source} do not share one shape: {error}.") from error
