"""Writes the pretraining text: WordNet as prose and the sections of Python's documentation, shuffled, one per line.

python corpus.py --wordnet /usr/share/wordnet --python-docs /usr/share/doc/python3.11/html --out build/corpus.jsonl
"""

import argparse
import json
import random
from collections import Counter
from pathlib import Path

import prose
import webpages
import wordnet

# Every n-th page of the documentation is kept for evaluation.
PAGE_STRIDE = 40


def build(wordnet_folder: Path, docs_folder: Path, seed: int) -> list[dict[str, str]]:
    """All documents with their source and split, in a random but repeatable order."""
    database = wordnet.load(wordnet_folder)
    documents = []
    for held_out, split in ((False, "train"), (True, "valid")):
        for text in prose.documents(database, held_out=held_out, seed=seed):
            documents.append({"source": "wordnet", "split": split, "text": text})
    for i, (_, texts) in enumerate(webpages.pages(docs_folder)):
        split = "valid" if i % PAGE_STRIDE == PAGE_STRIDE - 1 else "train"
        documents += [{"source": "python-docs", "split": split, "text": text} for text in texts]
    random.Random(seed).shuffle(documents)
    return documents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"))
    parser.add_argument("--python-docs", type=Path, default=Path("/usr/share/doc/python3.11/html"))
    parser.add_argument("--out", type=Path, default=Path("build/corpus.jsonl"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    documents = build(args.wordnet, args.python_docs, args.seed)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", encoding="utf-8") as file:
        for document in documents:
            file.write(json.dumps(document, ensure_ascii=False) + "\n")
    characters: Counter[tuple[str, str]] = Counter()
    for document in documents:
        characters[document["source"], document["split"]] += len(document["text"])
    for (source, split), count in sorted(characters.items()):
        print(f"{source:12} {split:6} {count / 1e6:7.2f} M characters")


if __name__ == "__main__":
    main()
