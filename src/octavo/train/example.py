"""One training example as the model sees it, with the tokens that count in the loss marked."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.text import Text
from transformers import PreTrainedTokenizerBase

IGNORED = -100
_SHOWN_CHARACTERS = 1200


@dataclass(frozen=True, slots=True)
class Span:
    """A run of tokens that count, or that do not."""

    text: str
    tokens: int
    counts: bool


@dataclass(frozen=True, slots=True)
class RenderedExample:
    """The spans of one row of tokens, in order."""

    spans: tuple[Span, ...]

    @property
    def tokens(self) -> int:
        """Tokens of the row."""
        return sum(span.tokens for span in self.spans)

    @property
    def counted(self) -> int:
        """Tokens that count in the loss."""
        return sum(span.tokens for span in self.spans if span.counts)

    def __str__(self) -> str:
        return "".join(f"⟦{_short(span.text)}⟧" if span.counts else _short(span.text) for span in self.spans)

    def rich(self) -> Text:
        """The same in colour: what counts is bold and green, the rest is dim."""
        text = Text()
        for span in self.spans:
            text.append(_short(span.text), "bold green" if span.counts else "dim")
        return text


def render_example(
    input_ids: Sequence[int], labels: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> RenderedExample:
    """Decode ``input_ids`` [T] in spans by whether ``labels`` [T] count. The first never does: nothing predicts it."""
    counts = [index > 0 and label != IGNORED for index, label in enumerate(labels)]
    return RenderedExample(tuple(_spans(list(input_ids), counts, tokenizer)))


def _spans(ids: list[int], counts: list[bool], tokenizer: PreTrainedTokenizerBase) -> Iterator[Span]:
    start, before = 0, ""
    for end in range(1, len(ids) + 1):
        if end == len(ids) or counts[end] != counts[start]:
            # Decoding what came before as well keeps the spaces that a span alone would lose at its edge.
            whole = tokenizer.decode(ids[:end], skip_special_tokens=False)
            text = whole[len(before) :] if whole.startswith(before) else tokenizer.decode(ids[start:end])
            yield Span(text, end - start, counts[start])
            start, before = end, whole


def _short(text: str) -> str:
    if len(text) <= _SHOWN_CHARACTERS:
        return text
    half = _SHOWN_CHARACTERS // 2
    return f"{text[:half]} [… {len(text) - 2 * half} characters …] {text[-half:]}"
