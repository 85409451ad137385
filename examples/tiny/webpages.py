"""Turns Sphinx HTML pages into clean text, one document per section."""

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

# Tables of contents, indexes, a log of bug numbers and other licences: not prose about Python.
SKIPPED_PAGES = re.compile(r"genindex|py-modindex|search|contents|download|changelog|license|copyright|^index|/index")
HEADINGS = frozenset({"h1", "h2", "h3", "h4"})
LISTS = frozenset({"ul", "ol", "li", "dl", "dt", "dd"})
BLOCKS = HEADINGS | LISTS | {"h5", "h6", "p", "pre", "div", "section", "blockquote", "table", "tr"}
SILENT = frozenset({"script", "style"})
# Typographic characters to plain ones: quotation marks, dashes, ellipsis, hard space, arrow.
PLAIN = str.maketrans(
    {
        "\u201c": '"',
        "\u201d": '"',
        "\u2018": "'",
        "\u2019": "'",
        "\u2013": "-",
        "\u2014": "-",
        "\u2026": "...",
        "\u00a0": " ",
        "\u2192": "->",
    }
)
MIN_CHARACTERS = 80
MAX_CHARACTERS = 1200


class _Page(HTMLParser):
    """Collects the blocks of text inside `<div role="main">`; a heading opens a new section."""

    def __init__(self) -> None:
        super().__init__()
        self.sections: list[list[str]] = [[]]
        self._block = ""
        self._depth = 0
        self._in_pre = False
        self._silent = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._depth and tag == "div":
            self._depth += 1
        elif ("role", "main") in attrs:
            self._depth = 1
        # The pilcrow after a heading, which links to it.
        self._silent = tag in SILENT or (tag == "a" and ("class", "headerlink") in attrs)
        if tag in BLOCKS:
            self._close_block()
        if tag in HEADINGS:
            self.sections.append([])
        self._in_pre = tag == "pre" or (self._in_pre and tag not in BLOCKS)

    def handle_endtag(self, tag: str) -> None:
        self._silent = False
        if tag in BLOCKS:
            self._close_block()
            self._in_pre = False
        if self._depth and tag == "div":
            self._depth -= 1

    def handle_data(self, data: str) -> None:
        if self._depth and not self._silent:
            self._block += data if self._in_pre else re.sub(r"\s+", " ", data)

    def _close_block(self) -> None:
        text = self._block.strip("\n") if self._in_pre else self._block.strip()
        if text.strip():
            self.sections[-1].append(text.translate(PLAIN))
        self._block = ""


def pages(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Yields (page name, documents) for each page under `folder`, in the order of the names."""
    for path in sorted(folder.rglob("*.html")):
        name = path.relative_to(folder).as_posix()
        if not SKIPPED_PAGES.search(name):
            yield name, _documents(path.read_text(encoding="utf-8"))


def _documents(html: str) -> list[str]:
    page = _Page()
    page.feed(html)
    return [text for section in page.sections for text in _split(section) if len(text) >= MIN_CHARACTERS]


def _split(blocks: list[str]) -> Iterator[str]:
    """Joins blocks into texts of at most `MAX_CHARACTERS`, unless a single block is longer."""
    text = ""
    for block in blocks:
        if text and len(text) + len(block) > MAX_CHARACTERS:
            yield text
            text = ""
        text += f"\n{block}" if text else block
    if text:
        yield text
