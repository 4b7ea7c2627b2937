"""A base model in a GGUF file: header, sizes, tensors.

The header is read here and not with gguf.GGUFReader, which makes several objects of every entry of the
vocabulary: 2.3 s for SmolLM2's, where this takes 0.05 s.
"""

from __future__ import annotations

import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recycle_ext.checkpoint.config import ModelConfig
from recycle_ext.checkpoint.tensor_source import BLOCKS, FLOAT_DTYPES, TensorSource
from recycle_ext.errors import RecycleError

# Value types of the header as struct and numpy spell them.
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9
# Tensor types that stay as they are.
_KEPT_TYPES = {0: "f32", 1: "f16", 2: "q4_0", 3: "q4_1", 8: "q8_0", 30: "bf16"}

_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ARCHITECTURES = ("llama", "qwen2", "qwen3")
# Tokens that end a turn of chat, for files that do not say which of theirs does.
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>")


@dataclass(frozen=True)
class StoredTensor:
    """An entry of the header."""

    shape: tuple[int, ...]  # slowest dimension first, as in Hugging Face files
    ggml_type: int
    offset: int  # in bytes from the start of the file


class GgufHeader:
    """Metadata and list of tensors of a GGUF file. Nothing of the file is kept open."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, StoredTensor] = {}
        try:
            with open(file, "rb") as stream:
                if stream.read(4) != b"GGUF":
                    raise RecycleError(f"{file}: not a GGUF file (it does not start with GGUF)")
                # Mapped only while the header is read.
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
        """Value of a key, which must be an int, float, str or bool as ``kind`` says."""
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
        """An array of strings."""
        value = self.metadata.get(key)
        if not isinstance(value, list):
            raise RecycleError(f"{self.file}: metadata {key} is missing or no array of strings")
        return value

    def numbers(self, key: str, count: int) -> list[Any]:
        """An array of ``count`` numbers."""
        value = self.metadata.get(key)
        if not isinstance(value, np.ndarray) or len(value) != count:
            given = f"has {len(value)}" if isinstance(value, (np.ndarray, list)) else "is missing"
            raise RecycleError(f"{self.file}: metadata {key} {given}; {count} numbers are needed")
        return value.tolist()

    def token_id(self, name: str) -> int | None:
        """Id of a special token ("bos", "eos", ...), None where the file names none."""
        key = f"tokenizer.ggml.{name}_token_id"
        if key not in self.metadata:
            return None
        token_id, count = self.get(key, int), len(self.strings("tokenizer.ggml.tokens"))
        if not 0 <= token_id < count:
            raise RecycleError(f"{self.file}: metadata {key} is {token_id}, of {count} tokens")
        return token_id

    def _read(self) -> None:
        version = self._scalar("I")
        if version not in (2, 3):
            raise RecycleError(f"{self.file}: GGUF version {version}; versions 2 and 3 are read")
        n_tensors, n_values = self._scalar("Q"), self._scalar("Q")
        for _ in range(n_values):
            key = self._string()
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

    def _string(self) -> str:
        size = self._scalar("Q")
        text = self._data[self._position : self._position + size]
        if len(text) < size:
            raise struct.error
        self._position += size
        return text.decode()

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            item_kind, count = self._scalar("I"), self._scalar("Q")
            if item_kind == _STRING:
                return [self._string() for _ in range(count)]
            dtype = np.dtype("<" + self._code(item_kind))
            size = count * dtype.itemsize
            if self._position + size > len(self._data):
                raise struct.error
            values = self._data[self._position : self._position + size]
            self._position += size
            return np.frombuffer(values, dtype)
        return self._scalar(self._code(kind))

    def _code(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise RecycleError(f"{self.file}: the header is damaged: value type {kind}")
        return _SCALARS[kind]

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, n_dims = self._string(), self._scalar("I")
        if not 1 <= n_dims <= 4:
            raise RecycleError(f"{self.file}: tensor {name} has {n_dims} dimensions, not 1 to 4")
        shape = tuple(self._scalar("Q") for _ in range(n_dims))[::-1]
        return name, shape, self._scalar("I"), self._scalar("Q")


def read_config(header: GgufHeader) -> ModelConfig:
    """Sizes of the model, or a RecycleError that names what is not supported."""
    file, get = header.file, header.get
    arch = get("general.architecture", str)
    if arch not in _ARCHITECTURES:
        raise RecycleError(
            f"{file}: architecture {arch!r} is not supported; "
            "llama (which Mistral files say too), qwen2 and qwen3 are"
        )
    if get("split.count", int, 1) > 1:
        raise RecycleError(f"{file}: one part of a split model; join the parts to one file first")
    if get(f"{arch}.expert_count", int, 0):
        raise RecycleError(f"{file}: mixture-of-experts models are not supported")
    scaling = get(f"{arch}.rope.scaling.type", str, "none")
    if scaling != "none":
        raise RecycleError(f"{file}: RoPE scaling {scaling!r} is not supported; Llama 3's is")
    hidden_size = get(f"{arch}.embedding_length", int)
    n_heads = get(f"{arch}.attention.head_count", int)
    if hidden_size < 1 or n_heads < 1:
        raise RecycleError(f"{file}: hidden size {hidden_size} with {n_heads} heads")
    head_dim = get(f"{arch}.attention.key_length", int, hidden_size // n_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (size := get(f"{arch}.{key}", int, head_dim)) != head_dim:
            raise RecycleError(
                f"{file}: {arch}.{key} is {size}; only {head_dim}, the head size, is"
            )
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise RecycleError(f"{file}: tensor token_embd.weight is missing")
    context = get(f"{arch}.context_length", int)
    return ModelConfig(
        architecture=arch,
        vocab_size=embedding.shape[0],
        hidden_size=hidden_size,
        intermediate_size=get(f"{arch}.feed_forward_length", int),
        n_layers=get(f"{arch}.block_count", int),
        n_heads=n_heads,
        n_kv_heads=get(f"{arch}.attention.head_count_kv", int, n_heads),
        head_dim=head_dim,
        rms_norm_eps=get(f"{arch}.attention.layer_norm_rms_epsilon", float),
        rope_theta=get(f"{arch}.rope.freq_base", float, 10000.0),
        rope_scaling=None,
        rope_freq_factors=_rope_freq_factors(header, head_dim),
        max_position_embeddings=min(
            context, get(f"{arch}.attention.sliding_window", int, 0) or context
        ),
        tie_word_embeddings="output.weight" not in header.tensors,
        qkv_bias=arch == "qwen2",
        qk_norm=arch == "qwen3",
        bos_token_id=header.token_id("bos"),
        eos_token_ids=_eos_token_ids(header),
        # Not general.name, which is often what the training run was called.
        name=file.stem,
    )


def read_tensors(header: GgufHeader, config: ModelConfig) -> dict[str, TensorSource]:
    """Every weight, under Hugging Face's name."""
    sources = {}
    for name, stored in header.tensors.items():
        if name == "rope_freqs.weight":
            continue
        new_name = _NAMES.get(name)
        if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
            layer, part, kind = match.groups()
            if part in _LAYER_NAMES:
                new_name = f"model.layers.{layer}.{_LAYER_NAMES[part]}.{kind}"
        if new_name is None:
            raise RecycleError(
                f"{header.file}: tensor {name} has no place in a {config.architecture} model"
            )
        interleaved = config.architecture == "llama" and re.search(r"attn_[qk]\.weight$", name)
        sources[new_name] = _source(
            header.file, name, new_name, stored, config.head_dim if interleaved else 0
        )
    return sources


def _source(
    file: Path, name: str, new_name: str, stored: StoredTensor, interleaved_head_dim: int
) -> TensorSource:
    format = _KEPT_TYPES.get(stored.ggml_type)
    if format in FLOAT_DTYPES:
        block, block_bytes = 1, 4 if format == "f32" else 2
    elif format in BLOCKS:
        block, block_bytes = BLOCKS[format]
    else:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import _type_traits

        known = {int(kind): GGML_QUANT_SIZES[kind] for kind in _type_traits}
        if stored.ggml_type not in known:
            types = {int(kind): kind.name for kind in GGMLQuantizationType}
            kind_name = types.get(stored.ggml_type, f"number {stored.ggml_type}")
            raise RecycleError(
                f"{file}: tensor {name} has type {kind_name}, which is not supported"
            )
        block, block_bytes = known[stored.ggml_type]
    is_matrix = len(stored.shape) == 2
    row = stored.shape[1] if is_matrix else 1
    if len(stored.shape) not in (1, 2) or row % block or 0 in stored.shape:
        raise RecycleError(f"{file}: tensor {name} has shape {list(stored.shape)}")
    row_bytes = row // block * block_bytes
    missing = stored.offset + stored.shape[0] * row_bytes - file.stat().st_size
    if missing > 0:
        raise RecycleError(
            f"{file}: the file is truncated: tensor {name} {list(stored.shape)} ends "
            f"{missing} bytes after the end of the file"
        )
    return TensorSource(
        name=new_name,
        shape=stored.shape,
        format=format or "f32",
        file=file,
        offset=stored.offset,
        row_bytes=row_bytes,
        ggml_type=None if format else stored.ggml_type,
        interleaved_head_dim=interleaved_head_dim,
    )


def _rope_freq_factors(header: GgufHeader, head_dim: int) -> tuple[float, ...] | None:
    name = "rope_freqs.weight"
    stored = header.tensors.get(name)
    if stored is None:
        return None
    source = _source(header.file, name, name, stored, 0)
    if source.shape != (head_dim // 2,) or source.format != "f32":
        raise RecycleError(
            f"{header.file}: tensor {name} is {source.format} {list(source.shape)}; "
            f"it must be f32 {[head_dim // 2]}"
        )
    return tuple(source.to().tolist())


def _eos_token_ids(header: GgufHeader) -> tuple[int, ...]:
    ids = [header.token_id("eos"), header.token_id("eot")]
    key = "tokenizer.ggml.tokens"
    tokens = header.strings(key) if key in header.metadata else []
    ids += [tokens.index(text) for text in _TURN_ENDS if text in tokens]
    return tuple(dict.fromkeys(i for i in ids if i is not None))
