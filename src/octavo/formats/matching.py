"""How each family of formats matches module names against the lists in its config.

A 30B checkpoint has 37 000 quantized modules and an ignore list may name each expert of a layer, so literal entries
are looked up and only real patterns are tried one by one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase

from octavo.errors import CheckpointError

_LITERAL = re.compile(r"[\w.\-/]+")


def compile_pattern(pattern: str, where: str) -> re.Pattern[str]:
    """``re.compile``, with the config's entry in the error. Raises: CheckpointError."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise CheckpointError(
            f"{where} has the pattern {pattern!r}, not a regular expression ({error}). Correct config.json."
        ) from error


def _ancestors(module: str) -> Iterator[str]:
    """``a.b.c`` -> ``a.b.c``, ``a.b.``, ``a.b``, ``a.``, ``a``: every prefix that ends at a module boundary."""
    yield module
    end = module.rfind(".")
    while end >= 0:
        yield module[: end + 1]
        yield module[:end]
        end = module.rfind(".", 0, end)


class SkipList:
    """``modules_to_not_convert`` as transformers reads it: an entry covers a module when it is

    a prefix of its name up to a module boundary (``model.layers.1`` covers ``model.layers.1.mlp``), or a regular
    expression that matches up to one, or any suffix of it (``fc1``). The dots of an entry without other special
    characters are dots; transformers takes them for any character, so that ``layers.1.`` also covers layer 10 there.
    """

    def __init__(self, entries: Iterable[str], where: str) -> None:
        self._literals: dict[str, None] = {}
        # A suffix with a dot has the module's own last component after its last dot: few lengths are left to try.
        self._suffix_lengths: dict[str, set[int]] = {}
        self._bare: list[str] = []
        self._patterns: list[tuple[str, re.Pattern[str]]] = []
        for entry in dict.fromkeys(entries):
            if not _LITERAL.fullmatch(entry):
                self._patterns.append((entry, compile_pattern(rf"(?:{entry})(?:(?<=\.)|(?=\.|$))", where)))
                self._bare.append(entry)
                continue
            self._literals[entry] = None
            _, dot, last = entry.rpartition(".")
            if dot:
                self._suffix_lengths.setdefault(last, set()).add(len(entry))
            else:
                self._bare.append(entry)

    def entry_for(self, module: str) -> str | None:
        """The entry that covers ``module``, or None."""
        for prefix in _ancestors(module):
            if prefix in self._literals:
                return prefix
        for length in self._suffix_lengths.get(module[module.rfind(".") + 1 :], ()):
            if module[-length:] in self._literals:
                return module[-length:]
        for entry in self._bare:
            if module.endswith(entry):
                return entry
        for entry, pattern in self._patterns:
            if pattern.match(module):
                return entry
        return None


class NameList:
    """Names as compressed-tensors matches them: the whole name, or ``re:`` and an expression for its beginning."""

    def __init__(self, entries: Iterable[str], where: str) -> None:
        entries = list(dict.fromkeys(entries))
        self._literals = frozenset(entry for entry in entries if not entry.startswith("re:"))
        self._patterns = [
            (entry, compile_pattern(entry.removeprefix("re:"), where)) for entry in entries if entry.startswith("re:")
        ]

    def entry_for(self, module: str) -> str | None:
        """The entry that covers ``module``, or None."""
        if module in self._literals:
            return module
        for entry, pattern in self._patterns:
            if pattern.match(module):
                return entry
        return None


class GlobList:
    """``exclude_modules`` of ModelOpt: a module, everything below it, the end of its name, or a shell pattern."""

    def __init__(self, entries: Iterable[str]) -> None:
        entries = list(dict.fromkeys(entries))
        self._literals = frozenset(entry for entry in entries if not any(c in entry for c in "*?["))
        self._globs = [entry for entry in entries if entry not in self._literals]

    def entry_for(self, module: str) -> str | None:
        """The entry that covers ``module``, or None."""
        for prefix in _ancestors(module):
            if prefix in self._literals:
                return prefix
        start = module.find(".")
        while start >= 0:
            if module[start + 1 :] in self._literals:
                return module[start + 1 :]
            start = module.find(".", start + 1)
        for glob in self._globs:
            if fnmatchcase(module, glob):
                return glob
        return None
