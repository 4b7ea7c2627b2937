"""The next words of held-out text: how often a mode writes what the author wrote.

cloze.jsonl is made from Herman Melville's Moby-Dick (1851, in the public domain), by `--make-cloze`. A base may have
read the book when it was trained itself; no module of ours was trained on it. Both modes know the same base, so their
difference is what the drafts cost either way. A file of your own text is made by the same option.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from recycle_ext.decoding.decoder import Decoder
from recycle_ext.errors import RecycleError
from recycle_ext.eval.decoding import decode
from recycle_ext.eval.jsonl import read_objects, read_text
from recycle_ext.text.tokenizer import Tokenizer

SHIPPED = Path(__file__).parent / "cloze.jsonl"
CONTEXT_WORDS = 40
NEXT_WORDS = 2
MOST_ITEMS = (
    640  # of a file that is made: what reads in a minute or two with a small model on two cores
)
_SENTENCE_END = re.compile(r"[.?!]\W*$")


@dataclass(frozen=True)
class Cloze:
    """A set of items. source: where the text is from, in words."""

    source: str
    items: list[tuple[str, str]]  # context, continuation


def read_cloze(file: Path) -> Cloze:
    """A .jsonl file of {"context": text, "continuation": text}, and of {"source": text} at its beginning if you like.

    Raises RecycleError for a file that is not so.
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
    """Items from prose with empty lines between paragraphs; none overlap, and they are spread evenly over the text.

    An item starts with a sentence. After CONTEXT_WORDS words come the first NEXT_WORDS that are all of letters
    (the last may have punctuation after it, which is cut off); a paragraph that has none soon is left out.
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
    count = min(MOST_ITEMS, len(found))
    return [found[index * len(found) // count] for index in range(count)]


def _cut(words: Sequence[str], start: int) -> int | None:
    """Where the context of an item that starts at ``start`` may end."""
    first = start + CONTEXT_WORDS
    for cut in range(first, min(first + 8, len(words) - NEXT_WORDS + 1)):
        *all_but_last, last = words[cut : cut + NEXT_WORDS]
        if all(word.isalpha() for word in (*all_but_last, last.rstrip(".,;:!?"))):
            return cut
    return None


def write_cloze(text_file: Path, file: Path) -> int:
    """Makes a cloze file of a text file; returns the number of items. Raises RecycleError."""
    items = make_cloze(read_text(text_file))
    if not items:
        raise RecycleError(
            f"{text_file}: gives no items; it needs paragraphs of more than {CONTEXT_WORDS} words"
        )
    lines = [{"source": text_file.name}]
    lines += [{"context": context, "continuation": following} for context, following in items]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    try:
        file.write_text(text, "utf-8")
    except OSError as error:
        raise RecycleError(f"{file}: cannot be written: {error.strerror}") from None
    return len(items)


def encode(cloze: Cloze, tokenizer: Tokenizer) -> list[tuple[list[int], list[int]]]:
    """Token ids of contexts and continuations, of the items that can be asked of this tokenizer: those where the
    continuation starts a token and has two or more. Alternate mode's first token is the base's; the second is a draft.
    """
    found = []
    for context, continuation in cloze.items:
        before, whole = tokenizer.encode(context), tokenizer.encode(context + continuation)
        if whole[: len(before)] == before and len(whole) >= len(before) + 2:
            found.append((before, whole[len(before) :]))
    return found


def right_tokens(
    decoder: Decoder, items: Sequence[tuple[list[int], list[int]]]
) -> Iterator[list[bool]]:
    """For each item, which of the continuation's tokens greedy decoding writes in their places."""
    for context, continuation in items:
        written = decode(decoder, context, len(continuation), ()).token_ids
        yield [a == b for a, b in zip(written, continuation, strict=True)]
