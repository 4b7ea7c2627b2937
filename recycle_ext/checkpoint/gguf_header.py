"""The header of a GGUF file: metadata, and where each tensor is.

gguf.GGUFReader is not used: it makes several objects of every entry of the vocabulary, 2.3 s for SmolLM2's where this
reader takes 0.05 s.
"""

from __future__ import annotations

import mmap
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recycle_ext.checkpoint.not_a_model import kind_of_file
from recycle_ext.errors import RecycleError, RecycleWarning

# Value types of the header as struct and numpy spell them.
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9
# SentencePiece's own ids, which llama.cpp assumes where a file does not name the tokens.
_SENTENCEPIECE_IDS = {"unknown": 0, "bos": 1, "eos": 2}
_NO_TOKEN = (-1, 2**32 - 1)  # written where a model has no such token


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's entry in the header."""

    shape: tuple[int, ...]  # slowest dimension first, as in Hugging Face files
    ggml_type: int
    offset: int  # in bytes from the start of the file


class GgufHeader:
    """Metadata and tensor entries of a GGUF file. The file is closed again when the header is read.

    Raises RecycleError for a damaged header and for another kind of file.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, StoredTensor] = {}
        try:
            with open(file, "rb") as stream:
                if not (start := stream.read(64)).startswith(b"GGUF"):
                    raise RecycleError(f"{file}: not a GGUF file; {kind_of_file(file, start)}")
                with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    self._data, self._position = data, 4
                    self._read()
        except OSError as error:
            raise RecycleError(f"{file}: cannot be read: {error.strerror}") from None
        except struct.error:
            raise RecycleError(f"{file}: the file ends in the middle of its header") from None
        except UnicodeDecodeError as error:
            raise RecycleError(f"{file}: the header is damaged: {error}") from None
        finally:
            self._data = None

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """Value of a key. kind: int, float, str or bool. Raises RecycleError for another type."""
        value = self.metadata.get(key, default)
        if value is None:
            raise RecycleError(f"{self.file}: metadata {key} is missing")
        if isinstance(value, int) and not isinstance(value, bool) and kind is float:
            return float(value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            given = f"an array of {len(value)}" if isinstance(value, (list, np.ndarray)) else value
            raise RecycleError(f"{self.file}: metadata {key} is {given!r}, not {kind.__name__}")
        return value

    def strings(self, key: str) -> list[str]:
        """An array of strings; bytes that are not UTF-8 are lone surrogates, as surrogateescape makes them."""
        value = self.metadata.get(key)
        if not isinstance(value, list):
            raise RecycleError(f"{self.file}: metadata {key} is missing or no array of strings")
        return value

    def numbers(self, key: str, count: int, default: float) -> list[Any]:
        """The first ``count`` numbers of an array; all are ``default`` where the file has no such array."""
        value = self.metadata.get(key)
        if value is None:
            return [default] * count
        if not isinstance(value, np.ndarray) or len(value) < count:
            given = f"has {len(value)} values" if isinstance(value, (np.ndarray, list)) else f"is {value!r}"
            raise RecycleError(f"{self.file}: metadata {key} {given}; {count} numbers are needed")
        return value[:count].tolist()

    def token_id(self, name: str) -> int | None:
        """Id of a special token ("bos", "eos", ...), or None.

        A file that names no token, or one outside the vocabulary, which is warned of, has the token that llama.cpp
        assumes: SentencePiece's, if its tokenizer is "llama", else none.
        """
        key, tokens = f"tokenizer.ggml.{name}_token_id", "tokenizer.ggml.tokens"
        given = self.get(key, int) if key in self.metadata else None
        count = 0 if given is None and tokens not in self.metadata else len(self.strings(tokens))
        if given is not None and 0 <= given < count:
            return given
        is_sentencepiece = self.get("tokenizer.ggml.model", str, "") == "llama"
        assumed = _SENTENCEPIECE_IDS.get(name) if is_sentencepiece else None
        if assumed is not None and assumed >= count:
            assumed = None
        if given is not None and given not in _NO_TOKEN:
            instead = "no token" if assumed is None else assumed
            message = f"{self.file}: metadata {key} is {given}, of {count} tokens; {instead} is assumed"
            # From here, so that the same message comes once, whoever asks.
            warnings.warn(message, RecycleWarning, stacklevel=1)
        return assumed

    def _read(self) -> None:
        version = self._scalar("I")
        if version and not version & 0xFFFF:
            raise RecycleError(
                f"{self.file}: a big-endian GGUF file; make it little-endian first "
                "(gguf-convert-endian FILE little, which the package gguf brings, works in place)"
            )
        if version not in (2, 3):
            raise RecycleError(
                f"{self.file}: GGUF version {version}; versions 2 and 3 are read, which llama.cpp's converters write"
            )
        n_tensors, n_values = self._scalar("Q"), self._scalar("Q")
        for _ in range(n_values):
            key = self._string("strict")
            self.metadata[key] = self._value(self._scalar("I"))
        entries = [self._tensor() for _ in range(n_tensors)]
        alignment = self.get("general.alignment", int, 32)
        if alignment <= 0:
            raise RecycleError(f"{self.file}: general.alignment is {alignment}")
        start = -(-self._position // alignment) * alignment
        for name, shape, ggml_type, offset in entries:
            if name in self.tensors:
                raise RecycleError(f"{self.file}: tensor {name} is there twice")
            self.tensors[name] = StoredTensor(shape, ggml_type, start + offset)

    def _scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self._data, self._position)
        self._position += struct.calcsize("<" + code)
        return value

    def _bytes(self, size: int) -> bytes:
        data = self._data[self._position : self._position + size]
        if len(data) < size:
            raise struct.error
        self._position += size
        return data

    def _string(self, errors: str) -> str:
        return self._bytes(self._scalar("Q")).decode("utf-8", errors)

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string("replace")
        if kind == _ARRAY:
            item_kind, count = self._scalar("I"), self._scalar("Q")
            if item_kind == _STRING:
                # Tokens need not be UTF-8; two that are not stay two.
                return [self._string("surrogateescape") for _ in range(count)]
            dtype = np.dtype("<" + self._code(item_kind))
            return np.frombuffer(self._bytes(count * dtype.itemsize), dtype)
        return self._scalar(self._code(kind))

    def _code(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise RecycleError(f"{self.file}: the header is damaged: value type {kind}")
        return _SCALARS[kind]

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, n_dims = self._string("strict"), self._scalar("I")
        if not 1 <= n_dims <= 4:
            raise RecycleError(f"{self.file}: tensor {name} has {n_dims} dimensions, not 1 to 4")
        shape = tuple(self._scalar("Q") for _ in range(n_dims))[::-1]
        return name, shape, self._scalar("I"), self._scalar("Q")
