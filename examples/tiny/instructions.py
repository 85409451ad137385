"""Writes the chat examples that `octavo demo` fine-tunes on: common words and their first meaning in WordNet.

python instructions.py --wordnet /usr/share/wordnet --out ../../src/octavo/demo/data

The evaluation examples are about meanings that the models never saw. Neither the questions nor the form of the answers
occur in the pretraining text, so there is something to learn.
"""

import argparse
import json
import random
import re
from pathlib import Path

from wordnet import Sense, Synset, WordNet, load

QUESTIONS = (
    "Define the {kind} '{word}'.",
    "What does the {kind} '{word}' mean?",
    "Give me a definition of '{word}' ({kind}).",
    "How would you explain the {kind} '{word}'?",
    "'{word}' as {article} {kind}: what is it?",
)
# The most common words of this many have their first meaning explained in few words.
NUM_WORDS = 5200
NUM_TRAIN = 2800
DEFINITION_CHARACTERS = range(12, 81)
# Parentheses, quotations, open ends, and what a demonstration need not bring up.
UNFIT = re.compile(r"[()`\"]|--|\betc\b|sex")

Example = dict[str, list[dict[str, str]]]


def usable(sense: Sense, synset: Synset) -> bool:
    """Whether it is one plain word with a short and plain definition."""
    plain = re.fullmatch(r"[a-z]{3,12}", sense.word) and sense.word in synset.words
    short = len(synset.definition) in DEFINITION_CHARACTERS and not UNFIT.search(synset.definition)
    return bool(plain and short and sense.count)


def example(sense: Sense, synset: Synset, rng: random.Random) -> Example:
    """`{"messages": [user, assistant]}`; the answer is `noun: a seat for one person.`"""
    kind = sense.part_of_speech
    article = "an" if kind.startswith("ad") else "a"
    question = rng.choice(QUESTIONS).format(kind=kind, word=sense.word, article=article)
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": f"{kind}: {synset.definition}."},
        ]
    }


def build(wordnet: WordNet, seed: int) -> tuple[list[Example], list[Example]]:
    """The training and the evaluation examples."""
    pairs = [(sense, wordnet.synsets[sense.synsets[0]]) for sense in wordnet.senses]
    pairs = [(sense, synset) for sense, synset in pairs if usable(sense, synset)]
    pairs.sort(key=lambda pair: (-pair[0].count, pair[0].word, pair[0].part_of_speech))
    rng = random.Random(seed)
    common = [(synset.held_out, example(sense, synset, rng)) for sense, synset in pairs[:NUM_WORDS]]
    rng.shuffle(common)
    train = [item for held_out, item in common if not held_out]
    return train[:NUM_TRAIN], [item for held_out, item in common if held_out]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"))
    parser.add_argument("--out", type=Path, default=Path("../../src/octavo/demo/data"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    for split, examples in zip(("train", "eval"), build(load(args.wordnet), args.seed), strict=True):
        path = args.out / f"definitions-{split}.jsonl"
        path.write_text("".join(json.dumps(item) + "\n" for item in examples), encoding="utf-8")
        print(f"{path}: {len(examples)} examples, {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
