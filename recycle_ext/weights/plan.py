"""The plan: an int64 table that says where each weight lies in the byte tensor of all weights.

The plan is a layout table, not an execution plan. csrc/include/recycle/model.h describes its order, csrc/common/plan.cpp
reads it in C++. Here are its one writer and its one reader in Python, which share the lists of fields below.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from recycle_ext import _C
from recycle_ext.checkpoint.config import ModelConfig, ModuleConfig
from recycle_ext.checkpoint.tensor_source import BLOCKS, TensorSource
from recycle_ext.errors import RecycleError
from recycle_ext.weights.layout import FORMATS, PANEL_ROWS, Matrix, bytes_of, matrix_bytes
from recycle_ext.weights.load import Loader

_ALIGNMENT = 64  # bytes
_ABSENT = -1
_FORMAT_NAMES = {code: name for name, code in FORMATS.items()}

# The fields of a layer in the order of the table, and the checkpoint's names for them.
_LAYER = {
    "input_norm": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "o": "self_attn.o_proj.weight",
    "post_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}
_MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
_SIZES = ("hidden_size", "intermediate_size", "n_layers", "n_heads", "n_kv_heads", "head_dim")
_MODULE_VECTORS = {
    "input_bias": "input_proj.bias",
    "embed_norm": "embed_norm.weight",
    "hidden_norm": "hidden_norm.weight",
    "output_norm": "output_norm.weight",
}


def _vector_size(stack: ModelConfig | ModuleConfig | Stack, field: str) -> int:
    """Elements of one of a layer's vectors."""
    if field.endswith("_bias"):
        return (stack.n_heads if field == "q_bias" else stack.n_kv_heads) * stack.head_dim
    return stack.head_dim if field in ("q_norm", "k_norm") else stack.hidden_size


class PlanWriter:
    """Writes the table, and the weights that it describes.

    weights: uint8 [bytes] to fill; None: only the table and ``bytes``, the size of the weights, are made. loader: how
    matrices are loaded into the weights.
    """

    def __init__(self, weights: Tensor | None, loader: Loader | None = None) -> None:
        self.entries: list[int] = []
        self.bytes = 0
        self.format_bytes: dict[str, int] = {}  # bytes of matrices by format
        self._weights = weights
        self._loader = loader or Loader()

    def header(self, has_module: bool) -> None:
        """Magic, version, length and whether there is a module."""
        self.numbers(_C.PLAN_MAGIC, _C.PLAN_VERSION, 0, int(has_module))

    def finish(self) -> None:
        """Fills in the length of the table."""
        self.entries[2] = len(self.entries)

    def numbers(self, *numbers: int) -> None:
        """Plain entries."""
        self.entries.extend(numbers)

    def vector(self, values: Tensor) -> None:
        """A float32 or int64 vector."""
        size = values.numel() * values.element_size()
        offset = self._reserve(size)
        self.numbers(offset)
        if self._weights is not None:
            self._weights[offset : offset + size] = torch.from_numpy(bytes_of(values))

    def source_vector(self, sources: Mapping[str, TensorSource], name: str, size: int) -> None:
        """The float32 vector of that name, or "absent" where the checkpoint has none."""
        source = sources.get(name)
        if source is None:
            self.absent()
        elif self._weights is None:
            self.numbers(self._reserve(size * 4))
        else:
            self.vector(source.to())

    def absent(self) -> None:
        """The entry of a vector that is not there."""
        self.numbers(_ABSENT)

    def matrix(self, source: TensorSource, format: str, ids: Tensor | None = None) -> tuple[int, int, int, int]:
        """A matrix, or its rows ``ids`` (ascending); returns its entries (offset, format, n, k).

        A quantized format becomes bf16 where the rows are no multiple of its block. Raises RecycleError where they
        are no multiple of 16.
        """
        n, k = source.shape if ids is None else (len(ids), source.shape[1])
        if format in BLOCKS and k % BLOCKS[format][1]:
            format = "bf16"
        if k % PANEL_ROWS:
            raise RecycleError(
                f"{source.file}: tensor {source.name} has rows of {k}; the kernels need a multiple of 16"
            )
        size = matrix_bytes(format, n, k)
        entries = (self._reserve(size), FORMATS[format], n, k)
        self.numbers(*entries)
        self.format_bytes[format] = self.format_bytes.get(format, 0) + size
        if self._weights is None:
            return entries
        self._loader.load(source, format, self._weights[entries[0] : entries[0] + size], ids)
        return entries

    def stack(self, config: ModelConfig | ModuleConfig) -> None:
        """The sizes of a stack of layers."""
        self.numbers(*(getattr(config, name) for name in _SIZES))
        self.numbers(struct.unpack("<i", struct.pack("<f", config.rms_norm_eps))[0])
        self.vector(config.inv_freq())

    def layers(
        self,
        sources: Mapping[str, TensorSource],
        prefix: str,
        config: ModelConfig | ModuleConfig,
        format_of: Callable[[TensorSource], str],
    ) -> None:
        """All layers of a stack; ``prefix`` is "model.layers." or "layers."."""
        for index in range(config.n_layers):
            for field, suffix in _LAYER.items():
                name = f"{prefix}{index}.{suffix}"
                if field in _MATRICES:
                    self.matrix(sources[name], format_of(sources[name]))
                else:
                    self.source_vector(sources, name, _vector_size(config, field))

    def module_vectors(self, sources: Mapping[str, TensorSource], hidden_size: int) -> None:
        """The module's bias and norms outside its layers."""
        for name in _MODULE_VECTORS.values():
            self.source_vector(sources, name, hidden_size)

    def _reserve(self, size: int) -> int:
        offset = self.bytes
        self.bytes += -(-size // _ALIGNMENT) * _ALIGNMENT
        return offset


# One transformer layer: each field of _LAYER is a Matrix, a float32 Tensor, or None where the vector is absent.
Layer = dataclasses.make_dataclass("Layer", _LAYER, frozen=True)


@dataclass
class Stack:
    """A stack of layers: the base model's, or the module's."""

    hidden_size: int
    intermediate_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    eps: float
    inv_freq: Tensor  # float32 [head_dim / 2]
    layers: list  # of Layer


@dataclass(frozen=True)
class ModuleView:
    """The module's part of a plan."""

    stack: Stack
    input_proj: Matrix
    input_bias: Tensor | None
    embed_norm: Tensor | None
    hidden_norm: Tensor | None
    output_norm: Tensor | None
    head: Matrix
    draft_vocab: Tensor | None  # int64 [draft vocabulary]; None: the row is the token id
    zero_first_embedding: bool


@dataclass(frozen=True)
class ModelView:
    """A packed model as views into its byte tensor."""

    stack: Stack
    embedding: Matrix
    final_norm: Tensor
    head: Matrix
    module: ModuleView | None


def read_plan(weights: Tensor, plan: Tensor) -> ModelView:
    """Reads a table: weights uint8 [bytes], plan int64 [entries] -> views into ``weights``."""
    return _PlanReader(weights, plan).model()


class _PlanReader:
    def __init__(self, weights: Tensor, plan: Tensor) -> None:
        self._weights = weights
        self._numbers: Iterator[int] = iter(plan.tolist())

    def model(self) -> ModelView:
        _, _, _, has_module = self._take(4)  # magic, version, length
        stack = self._stack()
        self._take(1)  # vocabulary
        embedding = self._matrix()
        final_norm = self._vector(stack.hidden_size)
        head = self._matrix()
        self._layers(stack)
        return ModelView(stack, embedding, final_norm, head, self._module() if has_module else None)

    def _module(self) -> ModuleView:
        stack = self._stack()
        input_proj = self._matrix()
        vectors = {field: self._vector(stack.hidden_size) for field in _MODULE_VECTORS}
        (draft_vocab_size,) = self._take(1)
        head = self._matrix()
        draft_vocab = self._vector(draft_vocab_size, torch.int64)
        (zero_first_embedding,) = self._take(1)
        self._layers(stack)
        return ModuleView(
            stack=stack,
            input_proj=input_proj,
            **vectors,
            head=head,
            draft_vocab=draft_vocab,
            zero_first_embedding=bool(zero_first_embedding),
        )

    def _take(self, count: int) -> list[int]:
        return [next(self._numbers) for _ in range(count)]

    def _vector(self, size: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
        (offset,) = self._take(1)
        if offset == _ABSENT:
            return None
        return self._weights[offset : offset + size * dtype.itemsize].view(dtype)

    def _matrix(self) -> Matrix:
        offset, format, n, k = self._take(4)
        return Matrix(self._weights, offset, _FORMAT_NAMES[format], n, k)

    def _stack(self) -> Stack:
        *sizes, eps_bits = self._take(len(_SIZES) + 1)
        (eps,) = struct.unpack("<f", struct.pack("<i", eps_bits))
        head_dim = sizes[_SIZES.index("head_dim")]
        return Stack(*sizes, eps, self._vector(head_dim // 2), layers=[])

    def _layers(self, stack: Stack) -> None:
        for _ in range(stack.n_layers):
            fields = {
                field: self._matrix() if field in _MATRICES else self._vector(_vector_size(stack, field))
                for field in _LAYER
            }
            stack.layers.append(Layer(**fields))
