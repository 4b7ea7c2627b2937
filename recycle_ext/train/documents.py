"""Text from files, as packed sequences of tokens."""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor
from tqdm import tqdm

from recycle_ext.errors import RecycleError
from recycle_ext.text.tokenizer import Tokenizer


def documents(files: Sequence[str], field: str) -> Iterator[str]:
    """The documents of files, by suffix, whatever its case.

    .jsonl and .ndjson have one in ``field`` of each line's object, .json in that of each object of its list, .parquet
    in that of each row; any other file is one document. A chat, a list of {"role", "content"} objects, becomes its
    contents, one a line; what has no text (tool calls, images) is left out. Raises RecycleError for a file that cannot
    be read, has no text, or is a table of another kind.
    """
    for name in files:
        file = Path(name)
        found = False
        for text in _READERS.get(file.suffix.lower(), _whole)(file, field):
            if text and not text.isspace():
                found = True
                yield text
        if not found:
            raise RecycleError(f"{file}: there is no text in it")


@contextmanager
def _read(file: Path) -> Iterator[TextIO]:
    """Opens a file as UTF-8 text, with or without a byte order mark; errors become RecycleErrors with the file's name."""
    try:
        with file.open(encoding="utf-8-sig") as stream:
            try:
                yield stream
            except UnicodeDecodeError as error:
                start = stream.buffer.tell() - len(error.object) + error.start
                raise RecycleError(f"{file}: not UTF-8 text ({error.reason} at byte {start})") from None
    except OSError as error:
        raise RecycleError(f"{file}: cannot be read: {error.strerror}") from None


def _whole(file: Path, field: str) -> Iterator[str]:
    with _read(file) as stream:
        yield stream.read()


def _lines(file: Path, field: str) -> Iterator[str]:
    with _read(file) as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            where = f"{file}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise RecycleError(f"{where}: not JSON: {error}") from None
            yield _field(row, where, field)


def _list(file: Path, field: str) -> Iterator[str]:
    """A .json file: a list of objects, one object, or an object a line."""
    with _read(file) as stream:
        try:
            rows = json.load(stream)
        except UnicodeDecodeError:
            raise
        except ValueError:
            rows = None
    if rows is None:
        yield from _lines(file, field)
        return
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
        yield _field(row, f"{file}, object {number}", field)


def _refused(file: Path, field: str) -> Iterator[str]:
    raise RecycleError(f"{file}: tables are read from .jsonl, .json and .parquet; write it as one of these")


def _field(row: Any, where: str, field: str) -> str:
    """The text of an object's field."""
    if not isinstance(row, dict) or field not in row:
        given = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise RecycleError(f'{where}: no "{field}" (there is: {given}); --text-field names it')
    return _text(row[field], where, field)


def _rows(file: Path, field: str) -> Iterator[str]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ModuleNotFoundError:
        raise RecycleError(f"{file}: parquet needs pyarrow: `pip install pyarrow`") from None
    try:
        opened = ParquetFile(file)
        if field not in opened.schema_arrow.names:
            there = ", ".join(opened.schema_arrow.names)
            raise RecycleError(f'{file}: no column "{field}" (there is: {there}); --text-field names it')
        number = 0
        for batch in opened.iter_batches(columns=[field]):
            for value in batch.column(0).to_pylist():
                number += 1
                yield _text(value, f"{file}, row {number}", field)
    except (OSError, ArrowException) as error:
        raise RecycleError(f"{file}: cannot be read as parquet: {error}") from None


def _text(value: Any, where: str, field: str) -> str:
    """The text of a field: a string, a chat, or null, which has none."""
    if value is None:
        return ""
    if isinstance(value, list) and all(isinstance(turn, dict) for turn in value):
        turns = (_content(turn, f"{where}, turn {number}") for number, turn in enumerate(value, 1))
        return "\n".join(text for text in turns if text)
    if not isinstance(value, str):
        raise RecycleError(f'{where}: "{field}" is {type(value).__name__}, not text')
    return value


def _content(turn: dict[str, Any], where: str) -> str:
    """The text of a chat's turn; its content may be in parts, of which those with "text" are text."""
    if "content" not in turn and "tool_calls" not in turn:
        raise RecycleError(f'{where}: no "content" (there is: {", ".join(turn)})')
    content = turn.get("content")
    texts = []
    for part in content if isinstance(content, list) else [content]:
        text = part.get("text") if isinstance(part, dict) and part is not content else part
        if text is not None and not isinstance(text, str):
            raise RecycleError(f'{where}: "content" is {type(text).__name__}, not text')
        texts.append(text or "")
    return "".join(texts)


_READERS = {".jsonl": _lines, ".ndjson": _lines, ".json": _list, ".parquet": _rows, ".csv": _refused, ".tsv": _refused}

# A place where nearly every tokenizer has a boundary: between a letter or digit and the space before the next word, or
# after a line's end. The tokens on both sides are then those of the whole text.
_BOUNDARY = re.compile(r"(?<=\w)(?= \w)|(?<=\S\n)(?=\S)")
_PIECE = 1 << 16  # characters; a tokenizer takes some hundred bytes for each


def pieces(text: str) -> Iterator[str]:
    """A text in parts of some 65,536 characters, cut at boundaries of words; a text without boundaries is one part."""
    start = 0
    while len(text) - start > _PIECE and (cut := _BOUNDARY.search(text, start + _PIECE)):
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def token_ids(tokenizer: Tokenizer, text: str) -> Iterator[list[int]]:
    """The token ids of a document in parts, so that a long one does not fill the memory."""
    before = ""
    for piece in pieces(text):
        # A tokenizer may change the start of a text, so that a later piece has the character before it for a start.
        known = len(tokenizer.encode(before, add_bos=False)) if before else 0
        yield tokenizer.encode(before + piece, add_bos=False if before else None)[known:]
        before = piece[-1]


def packed(tokenizer: Tokenizer, texts: Iterator[str], length: int) -> Tensor:
    """The documents as sequences of ``length`` tokens, [n, length] int32.

    An end token follows each document. Documents are cut where a sequence is full, and the last, incomplete sequence is
    dropped. Raises RecycleError for fewer than two sequences.
    """
    end = tokenizer.eos_token_ids[:1]
    ids = array("i")
    for text in tqdm(texts, desc="tokenizing", unit=" documents", leave=False):
        for part in token_ids(tokenizer, text):
            ids.extend(part)
        ids.extend(end)
    count = len(ids) // length
    if count < 2:
        raise RecycleError(f"--text has {len(ids)} tokens; at least two sequences of --length {length} are needed")
    return torch.frombuffer(ids, dtype=torch.int32, count=count * length).view(count, length)
