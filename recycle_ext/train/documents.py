"""Text from files, as packed sequences of tokens."""

from __future__ import annotations

import json
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
    """The documents of files, by suffix.

    .jsonl has one in ``field`` of each line's object, .parquet one in ``field`` of each row; any other file is one
    document. A chat, a list of {"role", "content"} objects, becomes its contents, one a line. Raises RecycleError for a
    file that cannot be read or has no text.
    """
    for name in files:
        file = Path(name)
        found = False
        for text in _READERS.get(file.suffix, _whole)(file, field):
            if text.strip():
                found = True
                yield text
        if not found:
            raise RecycleError(f"{file}: there is no text in it")


@contextmanager
def _read(file: Path) -> Iterator[TextIO]:
    """Opens a file as UTF-8 text; errors become RecycleErrors with the file's name."""
    try:
        with file.open(encoding="utf-8") as stream:
            yield stream
    except OSError as error:
        raise RecycleError(f"{file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise RecycleError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def _whole(file: Path, field: str) -> Iterator[str]:
    with _read(file) as stream:
        yield stream.read()


def _lines(file: Path, field: str) -> Iterator[str]:
    with _read(file) as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise RecycleError(f"{file}, line {number}: not JSON: {error}") from None
            if not isinstance(row, dict) or field not in row:
                given = ", ".join(row) if isinstance(row, dict) else type(row).__name__
                raise RecycleError(f'{file}, line {number}: no "{field}" (there is: {given}); --text-field names it')
            yield _text(row[field], f"{file}, line {number}", field)


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
        for batch in opened.iter_batches(columns=[field]):
            for value in batch.column(0).to_pylist():
                yield _text(value, str(file), field)
    except (OSError, ArrowException) as error:
        raise RecycleError(f"{file}: cannot be read as parquet: {error}") from None


def _text(value: Any, where: str, field: str) -> str:
    if isinstance(value, list) and all(isinstance(turn, dict) for turn in value):
        value = "\n".join(str(turn.get("content", "")) for turn in value)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RecycleError(f'{where}: "{field}" is {type(value).__name__}, not text')
    return value


_READERS = {".jsonl": _lines, ".parquet": _rows}


def packed(tokenizer: Tokenizer, texts: Iterator[str], length: int) -> Tensor:
    """The documents as sequences of ``length`` tokens, [n, length] int64.

    An end token follows each document. Documents are cut where a sequence is full, and the last, incomplete sequence is
    dropped. Raises RecycleError for fewer than two sequences.
    """
    end = tokenizer.eos_token_ids[:1]
    ids: list[int] = []
    for text in tqdm(texts, desc="tokenizing", unit=" documents", leave=False):
        ids += tokenizer.encode(text)
        ids += end
    count = len(ids) // length
    if count < 2:
        raise RecycleError(f"--text has {len(ids)} tokens; at least two sequences of --length {length} are needed")
    return torch.tensor(ids[: count * length]).view(count, length)
