"""Reward functions by import path, and the two that come with octavo.

A reward function has trl's form: ``f(prompts, completions, completion_ids, **columns) -> list[float | None]``, one
reward for each completion, ``None`` where it does not apply. ``columns`` are the other columns of the data, one value
for each completion, and the ``arguments`` of the configuration. A function without ``**columns`` gets those it names.
"""

import importlib
import importlib.util
import inspect
import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from numbers import Real
from pathlib import Path
from typing import Any

from octavo.errors import ConfigError, OctavoError
from octavo.train.grpo_config import RewardSection
from octavo.train.metrics import TAKEN_NAMES

# What trl gives to every reward function, by name.
_GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")

_ARTICLES = frozenset({"a", "an", "the"})
_MINUS = frozenset("-\N{MINUS SIGN}")

Completion = str | list[dict[str, Any]]
Function = Callable[..., Sequence[float | None]]


class RewardError(OctavoError):
    """A reward function that gave something other than one number for each completion."""


def text_of(completion: Completion) -> str:
    """The text of a completion: itself, or the content of its last turn."""
    return completion if isinstance(completion, str) else str(completion[-1].get("content") or "")


def normalized(text: str) -> str:
    """Lower case, Unicode compatibility form, without punctuation at the ends of words, articles and extra spaces.

    A number keeps its minus and its leading point; an article that no word follows is an answer of its own, as the
    choice A; and a text of punctuation alone stays as it is.
    """
    written = unicodedata.normalize("NFKC", text).casefold().split()
    words = [bare for word in written if (bare := _bare(word))]
    kept = [word for word, after in pairwise([*words, ""]) if not after or word not in _ARTICLES]
    return " ".join(kept or written)


def _bare(word: str) -> str:
    rest = re.sub(r"^\W+", "", word)
    before, bare = word.removesuffix(rest), re.sub(r"\W+$", "", rest)
    if not bare[:1].isdigit():
        return bare
    minus = "-" if set(before) & _MINUS else ""
    return f"{minus}{'.' if before.endswith('.') else ''}{bare}"


def exact_match(
    completions: Sequence[Completion], *, column: str = "answer", normalize: bool = True, **columns: Any
) -> list[float | None]:
    """1 where the completion is the text in ``column``, else 0; None where the row has no such text.

    ``normalize``: compare them as `normalized`; else only without spaces at the ends.
    """
    if column not in columns:
        raise RewardError(
            f"exact_match compares with the column `{column}`, which the data does not have; name another by "
            "`arguments: {column: NAME}`."
        )
    form = normalized if normalize else str.strip
    return [
        None if answer is None else float(form(text_of(completion)) == form(str(answer)))
        for completion, answer in zip(completions, columns[column], strict=True)
    ]


def format(completions: Sequence[Completion], *, pattern: str, **_: Any) -> list[float]:  # noqa: A001 the field's word
    """1 where all of the completion, without spaces at its ends, matches the regular expression, else 0.

    In ``pattern``, ``.`` matches line breaks too.
    """
    compiled = re.compile(pattern, re.DOTALL)
    return [float(compiled.fullmatch(text_of(completion).strip()) is not None) for completion in completions]


READY: Mapping[str, Function] = {"exact_match": exact_match, "format": format}


class Reward:
    """A reward function with its arguments, whose results are checked. Its name appears in the metrics."""

    def __init__(self, section: RewardSection, columns: Sequence[str]) -> None:
        """Find the function; ``columns`` are those of the data.

        Raises:
            ConfigError: it is not there, or cannot be called like this.
        """
        self._function = _find(section.function)
        self._arguments = dict(section.arguments)
        self._where = section.function
        # trl names a metric after it.
        self.__name__ = section.name or section.function.rpartition(":")[2]
        self._parameters = inspect.signature(self._function).parameters
        clash = sorted(self._arguments.keys() & {*columns, "prompts", "completions", "completion_ids"})
        if clash:
            raise ConfigError(
                f"`rewards`: the argument `{clash[0]}` of {section.function} is also what it gets from the data. "
                "Rename one of them."
            )
        if self.__name__ in TAKEN_NAMES:
            raise ConfigError(
                f"`rewards`: {section.function} is called {self.__name__!r}, and `reward_{self.__name__}` is another "
                "metric. Give it a `name`."
            )
        if section.function == "format":
            _require_pattern(self._arguments)
        if section.function == "exact_match":
            _require_column(self._arguments.get("column", "answer"), columns)
        given = self._accepted({name: [] for name in (*_GIVEN, *columns)} | self._arguments)
        try:
            inspect.signature(self._function).bind(**given)
        except TypeError as error:
            raise ConfigError(
                f"`rewards`: {section.function} cannot be called: {error}. It gets {', '.join(_GIVEN[:3])}, the "
                f"columns of the data ({', '.join(columns) or 'none'}) and its `arguments`, by name."
            ) from error

    def _accepted(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """What the function can take: everything if it has ``**columns``, else what it names."""
        if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in self._parameters.values()):
            return dict(given)
        # Arguments of the configuration are passed in any case, so that a misspelt one is an error.
        return {name: value for name, value in given.items() if name in self._parameters or name in self._arguments}

    def __call__(self, prompts: list[Any], completions: list[Any], **given: Any) -> list[float | None]:
        """One reward for each completion.

        Raises:
            RewardError: the function's answer is not that.
        """
        everything = {"prompts": prompts, "completions": completions} | given | self._arguments
        rewards = self._function(**self._accepted(everything))
        if not isinstance(rewards, Sequence) or len(rewards) != len(completions):
            found = f"{len(rewards)} values" if isinstance(rewards, Sequence) else type(rewards).__name__
            raise RewardError(
                f"The reward function {self._where} gave {found} for {len(completions)} completions; expected a list "
                "of one number each."
            )
        for index, reward in enumerate(rewards):
            if reward is not None and (not isinstance(reward, Real) or not math.isfinite(reward)):
                raise RewardError(
                    f"The reward function {self._where} gave {reward!r} for completion {index} "
                    f"({text_of(completions[index])[:80]!r}); expected a finite number, or None where none applies."
                )
        return [None if reward is None else float(reward) for reward in rewards]


def load_rewards(sections: Sequence[RewardSection], columns: Sequence[str]) -> list[Reward]:
    """The reward functions of a configuration.

    Raises:
        ConfigError: one is not there, cannot be called with these columns, or two have one name.
    """
    rewards = [Reward(section, columns) for section in sections]
    names = [reward.__name__ for reward in rewards]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"`rewards`: {twice[0]} is there twice, and metrics are named after it. Give each a `name`.")
    return rewards


def _find(function: str) -> Function:
    if function in READY:
        return READY[function]
    home, colon, name = function.rpartition(":")
    if not colon:
        raise ConfigError(
            f"`rewards`: {function!r} is neither {' nor '.join(READY)}; write a function of yours as "
            "`package.module:name` or `file.py:name`."
        )
    module = _from_file(Path(home).expanduser()) if home.endswith(".py") else _from_package(home)
    found = getattr(module, name, None)
    if not callable(found):
        public = [known for known, value in vars(module).items() if inspect.isfunction(value) and known[0] != "_"]
        raise ConfigError(
            f"`rewards`: {home} has no function {name!r}" + (f"; it has {', '.join(public)}." if public else ".")
        )
    if inspect.iscoroutinefunction(found):
        raise ConfigError(f"`rewards`: {function} is asynchronous; write it as a plain function.")
    return found  # type: ignore[no-any-return]


def _from_file(path: Path) -> Any:
    if not path.is_file():
        raise ConfigError(f"`rewards`: there is no file {path.absolute()}.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise ConfigError(f"`rewards`: {error.filename}, line {error.lineno} is no Python: {error.msg}.") from error
    return module


def _from_package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise ConfigError(
            f"`rewards`: there is no module {name!r} on the path. Install it, or name its file as `file.py:name`."
        ) from error


def _require_column(column: object, columns: Sequence[str]) -> None:
    if column not in columns:
        raise ConfigError(
            f"`rewards`: exact_match compares with the column {column!r}, and the data has "
            f"{', '.join(columns) or 'none beside the prompt'}. Name another by `arguments: {{column: NAME}}`."
        )


def _require_pattern(arguments: Mapping[str, Any]) -> None:
    pattern = arguments.get("pattern")
    if not isinstance(pattern, str):
        raise ConfigError("`rewards`: format needs `arguments: {pattern: REGULAR_EXPRESSION}`.")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"`rewards`: the pattern {pattern!r} of format is no regular expression: {error}.") from error
