"""GGUF files that hold a vocabulary and no model, and llama.cpp's reading of them."""

from __future__ import annotations

import ctypes
from pathlib import Path

import gguf
from tokenizers import pre_tokenizers

from recycle_ext.checkpoint.gguf_header import GgufHeader
from recycle_ext.text.gguf_vocabulary import from_gguf
from recycle_ext.text.tokenizer import Tokenizer

KEY = "tokenizer.ggml."
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
BYTE_LEVEL = sorted(pre_tokenizers.ByteLevel.alphabet())


def sentencepiece(*pieces: str, **changes) -> dict:
    """Metadata of a SentencePiece vocabulary: <unk>, <s>, </s>, the bytes, the pieces; the first piece is best."""
    tokens = ["<unk>", "<s>", "</s>", *BYTE_TOKENS, *pieces]
    return {
        "model": "llama",
        "tokens": tokens,
        "token_type": [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(pieces),
        "scores": [-float(i) for i in range(len(tokens))],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    } | changes


def byte_level(*merges: str, specials: tuple[str, ...] = ("<|bos|>", "<|im_end|>"), **changes) -> dict:
    """Metadata of a byte-level vocabulary: the special tokens, the bytes, what the merges give."""
    merges = merges or ("a b",)  # a file must have some
    tokens = list(dict.fromkeys([*specials, *BYTE_LEVEL, *(merge.replace(" ", "") for merge in merges)]))
    return {
        "model": "gpt2",
        "pre": "llama-bpe",
        "tokens": tokens,
        "merges": list(merges),
        "token_type": [CONTROL] * len(specials) + [NORMAL] * (len(tokens) - len(specials)),
        "bos_token_id": 0,
        "eos_token_id": 1,
    } | changes


def write_vocabulary(file: Path, metadata: dict, name: str = "test") -> Path:
    """A GGUF file of a model ``name`` with these keys of the tokenizer; None leaves a key out. A token may be bytes."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name(name)
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, bool: writer.add_bool}
    for key, value in metadata.items():
        if value is not None:
            add.get(type(value), writer.add_array)(KEY + key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def read_vocabulary(file: Path) -> Tokenizer:
    """Our tokenizer of a file of ``write_vocabulary``."""
    header = GgufHeader(file)
    return from_gguf(header, len(header.strings(KEY + "tokens")), ())


class LlamaCpp:
    """llama.cpp's tokenizer of a GGUF file."""

    def __init__(self, file: Path) -> None:
        import llama_cpp

        self._library = llama_cpp
        parameters = llama_cpp.llama_model_default_params()
        parameters.vocab_only = True
        self._model = llama_cpp.llama_model_load_from_file(str(file).encode(), parameters)
        assert self._model, f"llama.cpp cannot read {file}"
        self._vocabulary = llama_cpp.llama_model_get_vocab(self._model)

    def encode(self, text: str) -> list[int]:
        data = text.encode()
        ids = (ctypes.c_int32 * (3 * len(data) + 8))()  # a space may take three byte tokens
        count = self._library.llama_tokenize(self._vocabulary, data, len(data), ids, len(ids), True, True)
        assert count >= 0
        return ids[:count]

    def close(self) -> None:
        self._library.llama_model_free(self._model)
