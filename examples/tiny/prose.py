"""Turns WordNet's records into English text, in several formulations so that a fact is not one fixed string."""

import random
from collections.abc import Iterator

from wordnet import Sense, Synset, WordNet, hyponyms

SHORT_FORMS = {"noun": "n.", "verb": "v.", "adjective": "adj.", "adverb": "adv."}
EXAMPLES_PER_DOCUMENT = 10
MAX_LISTED = 8
PARAGRAPHS_PER_SYNSET = 2


def documents(wordnet: WordNet, *, held_out: bool, seed: int) -> Iterator[str]:
    """Yields documents made only from the synsets that are held out, or only from those that are not.

    A sentence that relates two synsets is left out unless both are on the wanted side.
    """
    visible = {key: synset for key, synset in wordnet.synsets.items() if synset.held_out == held_out}
    below = hyponyms(wordnet)
    for sense in wordnet.senses:
        if entry := _dictionary_entry(sense, visible):
            yield entry
    for synset in visible.values():
        rng = random.Random(f"{seed} {synset.key}")
        for _ in range(PARAGRAPHS_PER_SYNSET):
            yield _paragraph(synset, visible, below.get(synset.key, []), rng)
        if synset.part_of_speech == "noun" and rng.random() < 0.3:
            yield _chain(synset, visible, rng)
    yield from _example_sentences(visible, random.Random(seed))


def _dictionary_entry(sense: Sense, visible: dict[str, Synset]) -> str:
    """`chair, n. 1. A seat for one person. 2. The position of professor.`, or nothing if no meaning is visible."""
    meanings = [visible[key] for key in sense.synsets if key in visible]
    # A word that shares its single meaning with others gets no entry of its own: the paragraph tells it already.
    if not meanings or (len(meanings) == 1 and sense.word != meanings[0].words[0].lower()):
        return ""
    head = f"{sense.word}, {SHORT_FORMS[sense.part_of_speech]}"
    if len(meanings) == 1:
        return f"{head} {_sentence(meanings[0].definition)}{_quoted(meanings[0])}"
    numbered = (f"{i}. {_sentence(synset.definition)}{_quoted(synset)}" for i, synset in enumerate(meanings, start=1))
    return f"{head} " + " ".join(numbered)


def _quoted(synset: Synset) -> str:
    return f' "{synset.examples[0]}"' if synset.examples else ""


def _paragraph(synset: Synset, visible: dict[str, Synset], below: list[str], rng: random.Random) -> str:
    """Sentences about one meaning, in random order after the first, which says what it means."""
    word = rng.choice(synset.words)
    sentences = [_meaning(synset, word, rng)]
    others = [other for other in synset.words if other != word]
    more = [
        _synonyms(word, others, rng),
        _kind_of(word, [visible[key] for key in synset.related("@") if key in visible], rng, synset.part_of_speech),
        _instance_of(word, [visible[key] for key in synset.related("@i") if key in visible]),
        _kinds(word, [visible[key] for key in below if key in visible], rng, synset.part_of_speech),
        _parts(word, [visible[key] for key in synset.related("%p") if key in visible], rng),
        _opposite(synset, visible),
        _usage(synset, rng),
    ]
    more = [sentence for sentence in more if sentence]
    rng.shuffle(more)
    return " ".join(sentences + more)


def _meaning(synset: Synset, word: str, rng: random.Random) -> str:
    text = synset.definition
    match synset.part_of_speech:
        case "noun":
            forms = [f'"{word}" means {text}.', f"{_upper(_article(word))} is {text}.", f"{_upper(word)}: {text}."]
        case "verb":
            forms = [f"To {word} is to {text}.", f'The verb "{word}" means to {text}.', f"When you {word}, you {text}."]
        case "adjective":
            forms = [f'"{word}" describes something {text}.', f"If something is {word}, it is {text}."]
        case _:
            forms = [f'"{word}" means {text}.', f"To do something {word} is to do it {text}."]
    return rng.choice(forms)


def _synonyms(word: str, others: list[str], rng: random.Random) -> str:
    if not others:
        return ""
    names = _join(others[:MAX_LISTED])
    return rng.choice(
        [
            f"Another word for {word} is {_join(others[:1])}.",
            f'"{word}" can also be called {names}.',
            f"Synonyms: {names}.",
        ]
    )


def _kind_of(word: str, parents: list[Synset], rng: random.Random, part_of_speech: str) -> str:
    if not parents:
        return ""
    parent = parents[0].words[0]
    if part_of_speech == "verb":
        return rng.choice([f"To {word} is one way to {parent}.", f"It is a way to {parent}."])
    return rng.choice([f"{_upper(_article(word))} is a kind of {parent}.", f"It is a kind of {parent}."])


def _instance_of(word: str, parents: list[Synset]) -> str:
    return f"{_upper(word)} is an example of {_article(parents[0].words[0])}." if parents else ""


def _kinds(word: str, children: list[Synset], rng: random.Random, part_of_speech: str) -> str:
    if not children:
        return ""
    chosen = rng.sample(children, min(len(children), rng.randint(1, MAX_LISTED)))
    names = _join([child.words[0] for child in chosen])
    if part_of_speech == "verb":
        return f"Ways to {word} are to {names}." if len(chosen) > 1 else f"One way to {word} is to {names}."
    return f"Kinds of {word} are {names}." if len(chosen) > 1 else f"One kind of {word} is {names}."


def _parts(word: str, parts: list[Synset], rng: random.Random) -> str:
    if not parts:
        return ""
    chosen = rng.sample(parts, min(len(parts), 4))
    return f"{_upper(_article(word))} has {_join([_article(part.words[0]) for part in chosen])}."


def _opposite(synset: Synset, visible: dict[str, Synset]) -> str:
    for symbol, key, source, target in synset.relations:
        if symbol == "!" and key in visible:
            return f"The opposite of {synset.words[source]} is {visible[key].words[target]}."
    return ""


def _usage(synset: Synset, rng: random.Random) -> str:
    if not synset.examples:
        return ""
    return rng.choice(["", "For example: ", "It is used like this: "]) + _sentence(rng.choice(synset.examples))


def _chain(synset: Synset, visible: dict[str, Synset], rng: random.Random) -> str:
    """`A spaniel is a kind of dog. A dog is a kind of canine.` up to six steps."""
    lines = []
    for _ in range(6):
        parents = [key for key in synset.related("@", "@i") if key in visible]
        if not parents:
            break
        parent = visible[rng.choice(parents)]
        link = "is a kind of" if synset.related("@") else "is an example of"
        lines.append(f"{_upper(_article(synset.words[0]))} {link} {parent.words[0]}.")
        synset = parent
    return " ".join(lines) or _sentence(synset.definition)


def _example_sentences(visible: dict[str, Synset], rng: random.Random) -> Iterator[str]:
    """Groups of unrelated example sentences."""
    sentences = [_sentence(example) for synset in visible.values() for example in synset.examples]
    rng.shuffle(sentences)
    for start in range(0, len(sentences), EXAMPLES_PER_DOCUMENT):
        yield "\n".join(sentences[start : start + EXAMPLES_PER_DOCUMENT])


def _article(word: str) -> str:
    """`a dog`, `an apple`; names stay bare. By the first letter, so `a hour` happens."""
    if word[0].isupper() or word[0].isdigit():
        return word
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def _sentence(text: str) -> str:
    return _upper(text) + ("" if text[-1:] in ".!?" else ".")


def _join(words: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
