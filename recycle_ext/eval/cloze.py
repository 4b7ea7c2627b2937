"""The cloze set: how often a mode writes the next words of a held-out text.

`--make-cloze` made cloze.jsonl of Herman Melville's Moby-Dick (1851, in the public domain), and makes a file of any other
text. A base model may have been trained on the book; no shipped module was. Both modes use the same base model, so the
difference of their accuracies is the cost of unverified draft tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from recycle_ext.checkpoint.json_file import read_text
from recycle_ext.decoding.decoder import Decoder
from recycle_ext.errors import RecycleError
from recycle_ext.eval.decoding import decode
from recycle_ext.eval.jsonl import read_objects
from recycle_ext.files import check_output, has_keys, write_whole
from recycle_ext.text.tokenizer import Tokenizer

SHIPPED = Path(__file__).parent / "cloze.jsonl"
CONTEXT_WORDS = 40
NEXT_WORDS = 2
MAX_ITEMS = 640  # of a file that --make-cloze writes: a minute or two for a small model on two cores
_SENTENCE_END = re.compile(r"[.?!]\W*$")


@dataclass(frozen=True)
class Cloze:
    """A set of items. source: the title of the text. items: (context, continuation)."""

    source: str
    items: list[tuple[str, str]]


def read_cloze(file: Path) -> Cloze:
    """Reads a .jsonl file of {"context": text, "continuation": text}, optionally with a first line {"source": text}.

    Raises RecycleError for another content.
    """
    source, items = file.name, []
    kinds = {"context": str, "continuation": str, "source": str}
    for where, values in read_objects(file, kinds):
        if set(values) == {"source"}:
            source = values["source"]
            continue
        for name in ("context", "continuation"):
            if not values.get(name, "").strip():
                raise RecycleError(f"{where}: there is no {name}")
        items.append((values["context"], values["continuation"]))
    if not items:
        raise RecycleError(f"{file}: holds no items")
    return Cloze(source, items)


def make_cloze(text: str) -> list[tuple[str, str]]:
    """At most MAX_ITEMS items from prose with empty lines between paragraphs, without overlap, evenly spread over the text.

    An item starts with a sentence and has at least CONTEXT_WORDS words of context. The continuation is the first
    NEXT_WORDS words after that which consist of letters alone, apart from punctuation after the last one, which is cut off.
    A paragraph without such words within eight words gives no item.
    """
    found = []
    for paragraph in re.split(r"\n\s*\n", text):
        words = paragraph.split()
        start = 0
        while (cut := _cut(words, start)) is not None:
            end = cut + NEXT_WORDS
            following = " ".join(words[cut:end]).rstrip(".,;:!?")
            found.append((" ".join(words[start:cut]), " " + following))
            start = end
            while start < len(words) and not _SENTENCE_END.search(words[start - 1]):
                start += 1
    count = min(MAX_ITEMS, len(found))
    return [found[index * len(found) // count] for index in range(count)]


def _cut(words: Sequence[str], start: int) -> int | None:
    """The end of the context of an item that starts at word ``start``; None if there is no item."""
    first = start + CONTEXT_WORDS
    for cut in range(first, min(first + 8, len(words) - NEXT_WORDS + 1)):
        *all_but_last, last = words[cut : cut + NEXT_WORDS]
        if all(word.isalpha() for word in (*all_but_last, last.rstrip(".,;:!?"))):
            return cut
    return None


def write_cloze(text_file: Path, file: Path) -> int:
    """Writes a cloze file made of a text file; returns the number of items.

    Raises RecycleError if the text gives no items, a file cannot be read or written, or ``file`` is there and is no
    such file.
    """
    check_output("--make-cloze", file, lambda content: has_keys(content.splitlines()[0], {"source"}))
    items = make_cloze(read_text(text_file))
    if not items:
        raise RecycleError(f"{text_file}: gives no items; it needs paragraphs of more than {CONTEXT_WORDS} words")
    lines = [{"source": text_file.name}]
    lines += [{"context": context, "continuation": following} for context, following in items]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_whole(file, text)
    return len(items)


def encode(cloze: Cloze, tokenizer: Tokenizer) -> list[tuple[list[int], list[int]]]:
    """Token ids of (context, continuation), for the items whose continuation starts a token and has at least two.

    Two, because alternate mode's first token is the base model's and the second is a draft token.
    """
    found = []
    for context, continuation in cloze.items:
        before, whole = tokenizer.encode(context), tokenizer.encode(context + continuation)
        if whole[: len(before)] == before and len(whole) >= len(before) + 2:
            found.append((before, whole[len(before) :]))
    return found


def right_tokens(decoder: Decoder, items: Sequence[tuple[list[int], list[int]]]) -> Iterator[list[bool]]:
    """For each item, which tokens of the continuation equal the greedily decoded ones at the same positions."""
    for context, continuation in items:
        written = decode(decoder, context, len(continuation), ()).token_ids
        yield [a == b for a, b in zip(written, continuation, strict=True)]
