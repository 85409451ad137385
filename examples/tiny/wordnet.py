"""Reads the WordNet 3.0 database files (`data.*`, `index.*`, `cntlist.rev`) into plain records.

The file formats are described in the manual pages wndb(5WN) and cntlist(5WN) that come with the database.
"""

import hashlib
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

PARTS_OF_SPEECH = {"n": "noun", "v": "verb", "a": "adjective", "s": "adjective", "r": "adverb"}
FILES = {"n": "noun", "v": "verb", "a": "adj", "r": "adv"}
HELD_OUT_PERCENT = 4


@dataclass(frozen=True)
class Synset:
    """One meaning: the words that share it, what it means, how it is used, what it is related to."""

    key: str
    part_of_speech: str
    words: tuple[str, ...]
    definition: str
    examples: tuple[str, ...]
    # pointer symbol of wninput(5WN), key of the other synset, index of the source word or -1, of the target word or -1
    relations: tuple[tuple[str, str, int, int], ...]

    @property
    def held_out(self) -> bool:
        """Whether no text made from this meaning may be used for pretraining.

        Hashing the definition, not the key, keeps the few meanings with equal definitions on the same side.
        """
        return int.from_bytes(hashlib.sha256(self.definition.encode()).digest()[:4]) % 100 < HELD_OUT_PERCENT

    def related(self, *symbols: str) -> list[str]:
        """Keys of the synsets related to the whole of this one by one of `symbols`."""
        return [key for symbol, key, source, _ in self.relations if symbol in symbols and source < 0]


@dataclass(frozen=True)
class Sense:
    """A word with one part of speech, and its meanings, the most frequent first."""

    word: str
    part_of_speech: str
    synsets: tuple[str, ...]
    count: int


@dataclass(frozen=True)
class WordNet:
    """The whole database."""

    synsets: dict[str, Synset]
    senses: tuple[Sense, ...]


def load(folder: Path) -> WordNet:
    """Reads the database in `folder` (Debian's `wordnet-base` installs it in /usr/share/wordnet)."""
    synsets = {synset.key: synset for letter in FILES for synset in _read_data(folder, letter)}
    counts = _read_counts(folder / "cntlist.rev")
    senses = tuple(sense for letter in FILES for sense in _read_index(folder, letter, counts))
    return WordNet(synsets, senses)


def _lines(path: Path) -> list[str]:
    # The licence at the head of each file is indented by two spaces.
    return [line for line in path.read_text(encoding="latin-1").splitlines() if not line.startswith("  ")]


def _read_data(folder: Path, letter: str) -> list[Synset]:
    return [_parse_synset(letter, line) for line in _lines(folder / f"data.{FILES[letter]}")]


def _parse_synset(letter: str, line: str) -> Synset:
    fields, gloss = line.split(" | ", 1)
    offset, _, kind, num_words, *rest = fields.split()
    end = 2 * int(num_words, 16)
    # Adjectives carry a syntactic marker: `galore(ip)`.
    words = tuple(word.split("(")[0].replace("_", " ") for word in rest[:end:2])
    pointers = rest[end + 1 : end + 1 + 4 * int(rest[end])]
    relations = tuple(
        (symbol, other_letter + other, int(ends[:2], 16) - 1, int(ends[2:], 16) - 1)
        for symbol, other, other_letter, ends in zip(*(pointers[i::4] for i in range(4)), strict=True)
    )
    definition, *examples = [part.strip(" ;") for part in gloss.strip().split('"')]
    return Synset(
        key=letter + offset,
        part_of_speech=PARTS_OF_SPEECH[kind],
        words=words,
        definition=definition,
        examples=tuple(example for example in examples[::2] if " " in example),
        relations=relations,
    )


def _read_counts(path: Path) -> Counter[tuple[str, str]]:
    """How often each (word, part of speech) was tagged in WordNet's semantic concordance."""
    counts: Counter[tuple[str, str]] = Counter()
    kinds = dict(enumerate("nvars", start=1))
    for line in _lines(path):
        key, _, count = line.split()
        word, rest = key.split("%")
        counts[word.replace("_", " "), PARTS_OF_SPEECH[kinds[int(rest[0])]]] += int(count)
    return counts


def _read_index(folder: Path, letter: str, counts: Counter[tuple[str, str]]) -> list[Sense]:
    senses = []
    for line in _lines(folder / f"index.{FILES[letter]}"):
        fields = line.split()
        word, num_synsets = fields[0].replace("_", " "), int(fields[2])
        keys = tuple(letter + offset for offset in fields[-num_synsets:])
        kind = PARTS_OF_SPEECH[letter]
        senses.append(Sense(word, kind, keys, counts[word, kind]))
    return senses


def hyponyms(wordnet: WordNet) -> dict[str, list[str]]:
    """Maps each synset to the synsets that are kinds (or instances) of it."""
    below: defaultdict[str, list[str]] = defaultdict(list)
    for synset in wordnet.synsets.values():
        for key in synset.related("@", "@i"):
            below[key].append(synset.key)
    return dict(below)
