"""From checkpoints to what the kernels read: one byte tensor of weights, one int64 plan.

The order of the plan is described in csrc/include/recycle/model.h, the layout of a matrix in
csrc/include/recycle/format.h. Matrices are read, converted and packed a thousand rows at a
time, so that loading needs little more memory than the result.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from recycle_ext import _C
from recycle_ext.config import DTYPES, MODULE_DTYPES, ModelConfig, ModuleConfig
from recycle_ext.errors import RecycleError
from recycle_ext.tensor_source import BLOCKS, FLOAT_DTYPES, TensorSource

if TYPE_CHECKING:
    from recycle_ext.checkpoint import Checkpoint
    from recycle_ext.draft_policy import Experience
    from recycle_ext.module_checkpoint import ModuleCheckpoint

# Weight formats by their number in csrc/include/recycle/format.h.
FORMATS = {"f32": 0, "f16": 1, "bf16": 2, "q8_0": 3, "q4_0": 4, "q4_1": 5}

_ALIGN = 64
_ROWS_AT_ONCE = 1024  # a multiple of 16


@dataclass(frozen=True)
class PackedModel:
    """A base model, and a module if there is one, as the ops take them.

    weights: uint8 [bytes]; plan: int64 [entries]. layer_bytes, head_bytes and module_bytes are what one
    pass reads of the base's layers, of the output head, and of the module with its head.
    """

    weights: Tensor
    plan: Tensor
    config: ModelConfig
    module_config: ModuleConfig | None
    layer_bytes: int
    head_bytes: int
    module_bytes: int
    formats: str  # for humans: "q4_1, q8_0"
    # What the decoders of this model have learnt for drafts="auto", by what their steps have in common.
    experience: dict[tuple, Experience] = field(default_factory=dict, compare=False, repr=False)

    @property
    def draft_vocab_size(self) -> int:
        """Tokens the module's head can name; 0 without a module."""
        if self.module_config is None:
            return 0
        return self.module_config.draft_vocab_size or self.config.vocab_size

    def to(self, device: torch.device) -> PackedModel:
        """The same with its weights on a device; the plan, which calls read, stays with the CPU."""
        if self.weights.device == device:
            return self
        return dataclasses.replace(self, weights=self.weights.to(device), experience={})

    def step_bytes(self, drafts: int) -> int:
        """Bytes of weights that one decode step reads: every matrix once, the module once a draft."""
        return self.layer_bytes + self.head_bytes + drafts * self.module_bytes


def convert_rows(rows: Tensor, format: str) -> Tensor:
    """float32 [n, k] -> the rows of a format: a float tensor [n, k], or GGUF blocks, uint8."""
    if format in FLOAT_DTYPES:
        return rows.to(FLOAT_DTYPES[format])
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    kind = GGMLQuantizationType[format.upper()]
    return torch.from_numpy(np.ascontiguousarray(quantize(rows.numpy(), kind)))


def pack_matrix(matrix: Tensor, format: str) -> Tensor:
    """Packs one float matrix [n, k] in a format of FORMATS; uint8 [bytes], for ``recycle_head``."""
    if format not in FORMATS:
        raise RecycleError(f"format is {format!r}; it must be one of {', '.join(FORMATS)}")
    n, k = matrix.shape
    packed = torch.empty(_C.matrix_bytes(FORMATS[format], n, k), dtype=torch.uint8)
    rows = convert_rows(matrix.float(), format)
    _C.pack_rows(FORMATS[format], n, k, 0, _bytes_of(rows), packed.numpy())
    return packed


def _bytes_of(rows: Tensor) -> np.ndarray:
    return rows.contiguous().view(torch.uint8).numpy()


class _Plan:
    """Two passes over the same description: the first adds up the bytes, the second fills them."""

    def __init__(self, weights: Tensor | None) -> None:
        self.weights = weights
        self.entries: list[int] = []
        self.bytes = 0
        self.formats: dict[str, int] = {}

    def room(self, size: int) -> int:
        offset = self.bytes
        self.bytes += -(-size // _ALIGN) * _ALIGN
        return offset

    def add(self, *numbers: int) -> None:
        self.entries.extend(numbers)

    def vector(self, values: Tensor | Callable[[], Tensor] | None, size: int = 0) -> None:
        """A float32 (or int64) vector, or "absent"."""
        if values is None:
            return self.add(-1)
        if callable(values):
            if self.weights is None:
                return self.add(self.room(size * 4))
            values = values()
        size = values.numel() * values.element_size()
        offset = self.room(size)
        self.add(offset)
        if self.weights is not None:
            self.weights[offset : offset + size] = torch.from_numpy(_bytes_of(values))

    def source_vector(self, sources: dict[str, TensorSource], name: str, size: int) -> None:
        """The vector of that name, "absent" where the checkpoint has none."""
        source = sources.get(name)
        self.vector(None if source is None else source.to, size)

    def matrix(
        self, source: TensorSource, format: str, ids: Tensor | None = None
    ) -> tuple[int, int, int, int]:
        """A matrix, or those of its rows that ``ids`` names; returns its entries (offset, format, n, k)."""
        n, k = source.shape if ids is None else (len(ids), source.shape[1])
        if format in BLOCKS and k % 32:
            format = "bf16"
        if k % 16:
            raise RecycleError(
                f"{source.file}: tensor {source.name} has rows of {k}; "
                "the kernels need a multiple of 16"
            )
        code = FORMATS[format]
        size = _C.matrix_bytes(code, n, k)
        entries = (self.room(size), code, n, k)
        self.add(*entries)
        self.formats[format] = self.formats.get(format, 0) + size
        if self.weights is None:
            return entries
        packed = self.weights[entries[0] : entries[0] + size].numpy()
        for start in range(0, n, _ROWS_AT_ONCE):
            stop = min(n, start + _ROWS_AT_ONCE)
            if ids is None:
                rows = _rows(source, format, start, stop)
            else:
                first, last = int(ids[start]), int(ids[stop - 1]) + 1
                rows = _rows(source, format, first, last)[ids[start:stop] - first]
            _C.pack_rows(code, n, k, start, _bytes_of(rows), packed)
        return entries

    def stack(self, config: ModelConfig | ModuleConfig) -> None:
        """Sizes of a pile of layers."""
        self.add(config.hidden_size, config.intermediate_size, config.n_layers)
        self.add(config.n_heads, config.n_kv_heads, config.head_dim)
        self.add(struct.unpack("<i", struct.pack("<f", config.rms_norm_eps))[0])
        self.vector(config.inv_freq())

    def layer(
        self,
        sources: dict[str, TensorSource],
        prefix: str,
        config: ModelConfig | ModuleConfig,
        format_of: Callable[[TensorSource], str],
    ) -> None:
        """One transformer layer."""
        d, size = config.hidden_size, config.head_dim

        def vector(name: str, length: int) -> None:
            self.source_vector(sources, prefix + name, length)

        def matrix(name: str) -> None:
            source = sources[prefix + name]
            self.matrix(source, format_of(source))

        vector("input_layernorm.weight", d)
        for part in "qkv":
            matrix(f"self_attn.{part}_proj.weight")
        for part, heads in (
            ("q", config.n_heads),
            ("k", config.n_kv_heads),
            ("v", config.n_kv_heads),
        ):
            vector(f"self_attn.{part}_proj.bias", heads * size)
        vector("self_attn.q_norm.weight", size)
        vector("self_attn.k_norm.weight", size)
        matrix("self_attn.o_proj.weight")
        vector("post_attention_layernorm.weight", d)
        for part in ("gate", "up", "down"):
            matrix(f"mlp.{part}_proj.weight")


def _rows(source: TensorSource, format: str, start: int, stop: int) -> Tensor:
    """Rows of a source in a format; untouched where it is the one they are stored in."""
    if source.format == format:
        return source.raw_rows(start, stop)
    return convert_rows(source.float_rows(start, stop), format)


def check_sizes(config: ModelConfig, file: str) -> None:
    """Refuses sizes that the kernels are not made for."""
    for what in ("hidden_size", "intermediate_size", "head_dim"):
        if getattr(config, what) % 16:
            raise RecycleError(
                f"{file}: {what} is {getattr(config, what)}; the kernels need a multiple of 16"
            )


def pack_model(
    base: Checkpoint,
    module: ModuleCheckpoint | None = None,
    dtype: str | None = None,
    module_dtype: str | None = None,
) -> PackedModel:
    """Reads a checkpoint, and a module's, into packed weights.

    dtype: "f32", "bf16", "q8" or "q4" (the layers in 4 bits, embedding and head in 8); None keeps the
    formats of a GGUF file (its other types become f16) and takes bf16 for a Hugging Face directory.
    module_dtype: the same for the module and its part of the head; None: f32 for a base in f32, else what it
    was trained for, or q8.
    """
    for name, value in (("dtype", dtype), ("module_dtype", module_dtype)):
        if value is not None and value not in DTYPES:
            raise RecycleError(f"{name} is {value!r}; it must be one of {', '.join(DTYPES)}")
    check_sizes(base.config, base.path)
    _, size, _, _ = describe_plan(base, module, dtype, module_dtype)
    weights = torch.empty(size, dtype=torch.uint8)
    _C.use_huge_pages(weights.numpy())
    entries, _, parts, formats = describe_plan(base, module, dtype, module_dtype, weights)
    return PackedModel(
        weights,
        torch.tensor(entries, dtype=torch.int64),
        base.config,
        module.config if module is not None else None,
        *parts,
        formats,
    )


def describe_plan(
    base: Checkpoint,
    module: ModuleCheckpoint | None,
    dtype: str | None,
    module_dtype: str | None = None,
    weights: Tensor | None = None,
) -> tuple[list[int], int, tuple[int, int, int], str]:
    """The plan's entries, the bytes of the weights, those of layers, head and module, and the formats.

    weights: uint8 of that size, to be filled; None: the tensors aren't read.
    """
    plan = _Plan(weights)
    parts = _describe(plan, base, module, dtype, module_dtype)
    plan.entries[2] = len(plan.entries)
    formats = ", ".join(sorted(plan.formats, key=plan.formats.get, reverse=True))
    return plan.entries, plan.bytes, parts, formats


def _describe(
    plan: _Plan,
    base: Checkpoint,
    module: ModuleCheckpoint | None,
    dtype: str | None,
    module_dtype: str | None,
) -> tuple[int, int, int]:
    """Writes the plan in the order of model.h; returns the bytes of layers, head and module."""
    config, tensors = base.config, base.tensors
    is_gguf = base.path.endswith(".gguf")

    def layer_format(source: TensorSource) -> str:
        if dtype is not None:
            wanted = DTYPES[dtype][0]
            # 4 bits are 4 bits: what a file has in the other 4-bit format isn't quantised again.
            return source.format if dtype == "q4" and source.format in ("q4_0", "q4_1") else wanted
        if not is_gguf:
            return "bf16"
        return "f16" if source.ggml_type is not None else source.format

    def head_format(source: TensorSource) -> str:
        return DTYPES[dtype][1] if dtype is not None else layer_format(source)

    plan.add(_C.PLAN_MAGIC, _C.PLAN_VERSION, 0, int(module is not None))
    plan.stack(config)
    plan.add(config.vocab_size)
    embedding = tensors["model.embed_tokens.weight"]
    head = tensors.get("lm_head.weight", embedding)
    embedding_entries = plan.matrix(embedding, head_format(embedding))
    plan.source_vector(tensors, "model.norm.weight", config.hidden_size)
    if head is embedding:
        head_entries = embedding_entries
        plan.add(*head_entries)
    else:
        head_entries = plan.matrix(head, head_format(head))
    head_bytes = _C.matrix_bytes(*head_entries[1:])
    before = plan.bytes
    for index in range(config.n_layers):
        plan.layer(tensors, f"model.layers.{index}.", config, layer_format)
    layer_bytes = plan.bytes - before
    if module is None:
        return layer_bytes, head_bytes, 0

    before = plan.bytes
    tensors, config = module.tensors, module.config
    if module_dtype is None:
        # 8 bits guess as well as 16 do; fewer take from its guesses, where it wasn't trained for them.
        is_float32 = layer_format(base.tensors["model.layers.0.mlp.down_proj.weight"]) == "f32"
        module_dtype = "f32" if is_float32 else config.runs_in or "q8"
    module_format, own_head_format = MODULE_DTYPES[module_dtype]
    d = config.hidden_size
    plan.stack(config)
    plan.matrix(tensors["input_proj.weight"], module_format)
    plan.source_vector(tensors, "input_proj.bias", d)
    for part in ("embed", "hidden", "output"):
        plan.source_vector(tensors, f"{part}_norm.weight", d)
    ids = None
    own_head_bytes = head_bytes
    if config.draft_vocab_size:
        ids = tensors["draft_vocab"].raw_rows(0, config.draft_vocab_size)
        plan.add(len(ids))
        plan.matrix(head, own_head_format, ids)
        own_head_bytes = 0  # counted with the module's matrices
        plan.vector(ids)
    else:
        plan.add(base.config.vocab_size)
        plan.add(*head_entries)
        plan.vector(None)
    plan.add(int(config.zero_first_embedding))
    for index in range(config.n_layers):
        plan.layer(tensors, f"layers.{index}.", config, lambda source: module_format)
    return layer_bytes, head_bytes, plan.bytes - before + own_head_bytes
