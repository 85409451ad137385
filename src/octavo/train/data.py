"""Examples read from jsonl, parquet or the hub, every one of them checked; what is wrong is named by file and line."""

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import pyarrow
import pyarrow.parquet
from datasets.exceptions import DatasetsError

from octavo.errors import ConfigError
from octavo.train.config import DataSection

Format = Literal["messages", "prompt-completion", "text"]
Loss = Literal["assistant", "completion", "all"]

# The columns that hold an example; `tools` goes to the chat template. Anything else is left out, and said so.
COLUMNS: Mapping[Format, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt-completion": ("prompt", "completion"),
    "text": ("text",),
}
_OPTIONAL_COLUMNS = ("tools",)
_DEFAULT_LOSS: Mapping[Format, Loss] = {"messages": "assistant", "prompt-completion": "completion", "text": "all"}
_SHOWN_PROBLEMS = 5


@dataclass(frozen=True, slots=True)
class Examples:
    """A data set that passed the checks, and where each example stood in its source."""

    dataset: datasets.Dataset
    format: Format
    source: str
    # "line" of a jsonl file, "row" of anything else; numbers start at 1.
    unit: Literal["line", "row"]
    numbers: tuple[int, ...]
    left_out: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.numbers)

    def where(self, index: int) -> str:
        """The place of example ``index`` as a person would look it up."""
        return f"{self.source}, {self.unit} {self.numbers[index]}"

    def select(self, indices: Sequence[int]) -> "Examples":
        """The examples at ``indices``, in that order, with their places."""
        numbers = tuple(self.numbers[index] for index in indices)
        return Examples(self.dataset.select(indices), self.format, self.source, self.unit, numbers, self.left_out)


def load_data(section: DataSection, *, seed: int) -> tuple[Examples, Examples | None]:
    """The training examples and, where the configuration asks for them, the evaluation examples.

    Raises:
        ConfigError: a source is missing or unreadable, or examples in it are incomplete.
    """
    train = load_examples(section.train, kind=section.format, split=section.train_split, subset=section.subset)
    if section.eval is not None:
        split, subset = section.eval_split, section.subset
        return train, load_examples(section.eval, kind=train.format, split=split, subset=subset)
    if section.eval_fraction is not None:
        return hold_out(train, section.eval_fraction, seed=seed)
    return train, None


def load_examples(
    source: str, *, kind: Format | Literal["auto"] = "auto", split: str = "train", subset: str | None = None
) -> Examples:
    """Read one source: a ``.jsonl`` or ``.parquet`` file, a folder that ``datasets`` understands, or a hub id.

    Raises:
        ConfigError: it is missing or unreadable, holds no example, or examples in it are incomplete.
    """
    unit, numbers, rows = read_rows(source, split=split, subset=subset)
    found = _detect(rows[0], source, f"{unit} {numbers[0]}") if kind == "auto" else kind
    _check(rows, numbers, found, source, unit)
    columns = COLUMNS[found] + tuple(name for name in _OPTIONAL_COLUMNS if any(row.get(name) for row in rows))
    left_out = tuple(sorted({name for row in rows for name in row} - set(columns)))
    return Examples(_table(rows, columns, source), found, source, unit, tuple(numbers), left_out)


def read_rows(source: str, *, split: str, subset: str | None) -> tuple[Literal["line", "row"], list[int], list[Any]]:
    """The rows of a source as they are, with their numbers, and what those count: lines of a file, or rows.

    Raises:
        ConfigError: it is missing or unreadable, or holds no example.
    """
    path = Path(source).expanduser()
    unit: Literal["line", "row"] = "row"
    if path.suffix in (".jsonl", ".ndjson"):
        unit = "line"
        numbers, rows = _read_jsonl(path)
    elif path.suffix == ".parquet":
        numbers, rows = _numbered(_read_parquet(path))
    elif path.is_file() or path.suffix in (".json", ".csv", ".txt"):
        raise ConfigError(
            f"{source} is neither .jsonl nor .parquet; write one JSON object per line into a .jsonl file."
        )
    else:
        numbers, rows = _numbered(_read_hub(source, split, subset))
    if not rows:
        raise ConfigError(f"{source} holds no example.")
    return unit, numbers, rows


def hold_out(examples: Examples, fraction: float, *, seed: int) -> tuple[Examples, Examples]:
    """Split off ``fraction`` of the examples, at least one, drawn with ``seed``; both parts keep the source's order."""
    count = max(1, round(len(examples) * fraction))
    if count >= len(examples):
        raise ConfigError(
            f"`data.eval_fraction` {fraction} of {len(examples)} examples in {examples.source} leaves none to train on."
        )
    held = set(random.Random(seed).sample(range(len(examples)), count))
    kept = [index for index in range(len(examples)) if index not in held]
    return examples.select(kept), examples.select(sorted(held))


def counted_loss(examples: Examples, asked: Loss | Literal["auto"]) -> Loss:
    """Which tokens of these examples count in the loss.

    Raises:
        ConfigError: the examples have no such part, or an example has no assistant turn to learn from.
    """
    loss = _DEFAULT_LOSS[examples.format] if asked == "auto" else asked
    conversational = examples.format != "text" and not isinstance(
        examples.dataset[0][COLUMNS[examples.format][-1]], str
    )
    if (loss == "assistant" and not conversational) or (
        loss == "completion" and examples.format != "prompt-completion"
    ):
        raise ConfigError(
            f"`data.loss: {loss}` needs {'messages' if loss == 'assistant' else 'a prompt and a completion'}; "
            f"{examples.source} holds {examples.format} examples, where `{_DEFAULT_LOSS[examples.format]}` is usual."
        )
    if loss == "assistant":
        column = COLUMNS[examples.format][-1]
        silent = [index for index, turns in enumerate(examples.dataset[column]) if not any(map(_is_answer, turns))]
        if silent:
            raise ConfigError(
                f"{len(silent)} of {len(examples)} examples have no assistant turn with content, so no token of them "
                f"counts; the first is {examples.where(silent[0])}. Remove them, or set `data.loss: all`."
            )
    return loss


def require_embedded(rows: int, highest: int, source: str) -> None:
    """Ask that a model with ``rows`` embeddings has one for every token of the data; ``highest``: the largest id there.

    Raises:
        ConfigError: it has not; a GPU would say so by an assertion somewhere else.
    """
    if highest >= rows:
        raise ConfigError(
            f"{source} has a token of id {highest}, and the model has {rows} embeddings: its tokenizer has tokens that "
            "the checkpoint was not made for. Use the checkpoint's own tokenizer, or resize its embeddings."
        )


def _is_answer(turn: Mapping[str, Any]) -> bool:
    return turn["role"] == "assistant" and bool(turn.get("content") or turn.get("tool_calls"))


def _read_jsonl(path: Path) -> tuple[list[int], list[Any]]:
    numbers: list[int] = []
    rows: list[Any] = []
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    row = json.loads(line)
                    if "\\u" in line:
                        _require_characters(row, path, number)
                    rows.append(row)
                    numbers.append(number)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}, line {number} is not JSON: {error.msg} at column {error.colno}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 after line {len(rows)}: {error.reason}.") from error
    except OSError as error:
        raise ConfigError(f"The data file {path.absolute()} cannot be read: {error.strerror}.") from error
    return numbers, rows


def _require_characters(row: object, path: Path, number: int) -> None:
    """Halves of a character, as ``"\\ud83d"`` alone, are legal JSON and no text."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{path}, line {number} holds half a character, {error.object[error.start]!r}, as cut text does. Remove it."
        ) from error


def _read_parquet(path: Path) -> list[Any]:
    try:
        rows: list[Any] = pyarrow.parquet.read_table(path).to_pylist()
    except OSError as error:
        raise ConfigError(f"The data file {path.absolute()} cannot be read: {error}.") from error
    except pyarrow.ArrowInvalid as error:
        raise ConfigError(f"{path} is not a parquet file: {error}.") from error
    return rows


def _read_hub(source: str, split: str, subset: str | None) -> list[Any]:
    try:
        rows: list[Any] = datasets.load_dataset(source, subset, split=split).to_list()
    except (DatasetsError, OSError, ValueError) as error:
        raise ConfigError(
            f"The data set {source!r} (split {split!r}) is no file here and cannot be loaded from the hub: {error}"
        ) from error
    return rows


def _numbered(rows: list[Any]) -> tuple[list[int], list[Any]]:
    return list(range(1, len(rows) + 1)), rows


def _detect(row: object, source: str, place: str) -> Format:
    keys = set(row) if isinstance(row, dict) else set()
    for kind, columns in COLUMNS.items():
        if keys.issuperset(columns):
            return kind
    hint = (
        " Rename `conversations`, `from` and `value` to `messages`, `role` and `content`."
        if "conversations" in keys
        else ""
    )
    raise ConfigError(
        f"{source}, {place} is none of the known formats: expected `messages`, `prompt` with `completion`, or `text`, "
        f"found {named(keys) or type(row).__name__}.{hint}"
    )


def _check(rows: Sequence[Any], numbers: Sequence[int], kind: Format, source: str, unit: str) -> None:
    problems = [
        f"{unit} {number}: {problem}"
        for number, row in zip(numbers, rows, strict=True)
        if (problem := _problem(row, kind))
    ]
    if not problems:
        return
    shown = "\n  ".join(problems[:_SHOWN_PROBLEMS])
    more = f"\n  and {len(problems) - _SHOWN_PROBLEMS} more" if len(problems) > _SHOWN_PROBLEMS else ""
    raise ConfigError(
        f"{len(problems)} of {len(rows)} examples in {source} are not complete {kind} examples:\n  {shown}{more}"
    )


def _problem(row: object, kind: Format) -> str | None:
    """What keeps ``row`` from being an example of that kind, or None."""
    if not isinstance(row, dict):
        return f"expected an object with {named(COLUMNS[kind])}, found {type(row).__name__}"
    missing = [name for name in COLUMNS[kind] if row.get(name) is None]
    if missing:
        return f"{named(missing)} missing, found {named(row) or 'an empty object'}"
    if kind == "messages":
        return turns_problem("messages", row["messages"])
    if kind == "prompt-completion" and isinstance(row["prompt"], list) and isinstance(row["completion"], list):
        return turns_problem("prompt", row["prompt"]) or turns_problem("completion", row["completion"])
    for name in COLUMNS[kind]:
        if not isinstance(row[name], str):
            return f"`{name}` is {type(row[name]).__name__}, expected text"
    return None if row[COLUMNS[kind][-1]] else f"`{COLUMNS[kind][-1]}` is empty"


def turns_problem(name: str, turns: object) -> str | None:
    """What keeps ``turns`` from being a conversation, or None."""
    if not isinstance(turns, list) or not turns:
        return f"`{name}` is {'empty' if turns == [] else type(turns).__name__}, expected a list of turns"
    for index, turn in enumerate(turns):
        if not isinstance(turn, dict):
            return f"`{name}[{index}]` is {type(turn).__name__}, expected an object with `role` and `content`"
        if not isinstance(turn.get("role"), str):
            return f"`{name}[{index}]` has no `role`, found {named(turn) or 'an empty object'}"
        if not isinstance(turn.get("content"), str) and not turn.get("tool_calls"):
            found = (
                "no `content`" if turn.get("content") is None else f"`content` of type {type(turn['content']).__name__}"
            )
            return f"`{name}[{index}]` has {found}, expected text"
    return None


def _table(rows: Iterable[Mapping[str, Any]], columns: Sequence[str], source: str) -> datasets.Dataset:
    try:
        return datasets.Dataset.from_list(list(_records(rows, columns)))
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
        raise ConfigError(f"The examples in {source} do not share one shape: {error}.") from error


def _records(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    for row in rows:
        record = {name: row.get(name) for name in columns}
        if "tools" in record and not isinstance(record["tools"], str):
            # Schemas of different tools share no Arrow type; trl parses the text back.
            record["tools"] = json.dumps(record["tools"]) if record["tools"] else None
        yield record


def named(keys: Iterable[str]) -> str:
    """Keys as an error message lists them."""
    return ", ".join(f"`{key}`" for key in sorted(keys))
