"""From checkpoints to what the kernels read: one byte tensor of weights, and the plan of what lies where.

Matrices are read, converted and packed in pieces, so that loading needs little more memory than the result.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from recycle_ext import _C
from recycle_ext.arguments import one_of, shown
from recycle_ext.checkpoint.base_model import Checkpoint
from recycle_ext.checkpoint.config import DTYPES, MODULE_DTYPES, ModelConfig, ModuleConfig
from recycle_ext.checkpoint.module import ModuleCheckpoint
from recycle_ext.checkpoint.tensor_source import TensorSource, ggml_type_name
from recycle_ext.errors import RecycleError, RecycleWarning
from recycle_ext.weights.layout import PANEL_ROWS
from recycle_ext.weights.load import Loader
from recycle_ext.weights.plan import PlanWriter

_FOUR_BITS = ("q4_0", "q4_1", "iq4_nl", "q4_k", "iq4_xs")


@dataclass(frozen=True)
class PackedModel:
    """A base model, and a module if there is one, as the ops take them.

    weights: uint8 [bytes]; plan: int64 [entries], on the CPU. layer_bytes, head_bytes and module_bytes are what one
    pass reads of the base's layers, of the output head, and of the module with its head.
    """

    weights: Tensor
    plan: Tensor
    config: ModelConfig
    module_config: ModuleConfig | None
    layer_bytes: int
    head_bytes: int
    module_bytes: int
    formats: str  # the formats of the matrices, the most bytes first: "q4_1, q8_0"
    threads: int | None = None  # of the decoders of this model; None: the process's number (_C.n_threads())
    # What decoders of this model share, by name; decoding/decoder.py keeps its measured step costs here.
    shared: dict = field(default_factory=dict, compare=False, repr=False)

    @property
    def draft_vocab_size(self) -> int:
        """Tokens the module's head can name; 0 without a module."""
        if self.module_config is None:
            return 0
        return self.module_config.draft_vocab_size or self.config.vocab_size

    def to(self, device: torch.device) -> PackedModel:
        """The same model with its weights on ``device``; the plan stays on the CPU."""
        if self.weights.device == device:
            return self
        return dataclasses.replace(self, weights=self.weights.to(device), shared={})

    def step_bytes(self, num_draft_tokens: int) -> int:
        """Bytes of weights that one decode step reads: every matrix once, the module once a draft token."""
        return self.layer_bytes + self.head_bytes + num_draft_tokens * self.module_bytes


def pack_model(
    base: Checkpoint,
    module: ModuleCheckpoint | None = None,
    dtype: str | None = None,
    module_dtype: str | None = None,
    threads: int | None = None,
    progress: bool = False,
) -> PackedModel:
    """Reads a checkpoint, and a module's, into packed weights.

    dtype: "f32", "bf16", "q8" or "q4" (the layers in 4 bits, embedding and head in 8); None keeps the
    formats of a GGUF file (its other types become f16) and takes bf16 for a Hugging Face directory.
    module_dtype: the same for the module and its part of the head; None: f32 for a base in f32, else the dtype in
    the module's config, else q8. threads: that load; None: the process's number (_C.n_threads()). progress: whether a
    load of more than two seconds shows a bar on standard error, where that is a terminal.

    Raises RecycleError for an unknown dtype, for sizes that the kernels do not support, and where the packed weights
    are larger than the available memory.
    """
    if not isinstance(base, Checkpoint):
        raise RecycleError(f"base is {shown(base)}; pack_model needs what open_checkpoint returns")
    if not (module is None or isinstance(module, ModuleCheckpoint)):
        raise RecycleError(f"module is {shown(module)}; pack_model needs what open_module returns, or None")
    check_dtypes(dtype, module_dtype)
    check_sizes(base.config, base.path)
    size = _size_within_memory(base, module, dtype, module_dtype)
    if dtype is None:
        _warn_of_other_types(base)
    weights = torch.empty(size, dtype=torch.uint8, device="cpu")
    _C.use_huge_pages(weights.numpy())
    with _progress_bar(base.config.name, size, progress) as bar:
        loader = Loader(threads, bar.update)
        return describe(base, module, dtype, module_dtype, weights, loader).packed_model(weights)


def _size_within_memory(
    base: Checkpoint, module: ModuleCheckpoint | None, dtype: str | None, module_dtype: str | None
) -> int:
    """Bytes of the packed weights. Raises RecycleError where they are more than the available memory."""
    size = describe(base, module, dtype, module_dtype).weights_bytes
    available = _C.available_memory()
    if available is None or size <= available:
        return size
    smaller = {name: describe(base, module, name, module_dtype).weights_bytes for name in ("q8", "q4")}
    fitting = [f"{name} ({bytes / 1e9:.2f} GB)" for name, bytes in smaller.items() if bytes <= available]
    remedy = f"; dtype {' or '.join(fitting)} fits" if fitting else ""
    raise RecycleError(
        f"{base.path}: the weights take {size / 1e9:.2f} GB in memory, and {available / 1e9:.2f} GB are available{remedy}"
    )


def _warn_of_other_types(base: Checkpoint) -> None:
    """Warns of the types of a GGUF file that have no format here."""
    shapes: dict[str, list[tuple[int, ...]]] = {}
    for source in base.tensors.values():
        if source.ggml_type is not None:
            shapes.setdefault(ggml_type_name(source.ggml_type), []).append(source.shape)
    for name, of_type in shapes.items():
        size = sum(2 * math.prod(shape) for shape in of_type)
        message = f"{base.path}: {len(of_type)} tensors of type {name} become f16, {size / 1e9:.3g} GB"
        warnings.warn(message, RecycleWarning, stacklevel=3)


def _progress_bar(name: str, size: int, progress: bool) -> tqdm:
    """A bar of ``size`` bytes, which appears after two seconds."""
    # None: no bar where standard error is no terminal.
    return tqdm(
        total=size,
        desc=f"loading {name}",
        unit="B",
        unit_scale=True,
        delay=2,
        leave=False,
        disable=None if progress else True,
    )


def check_dtypes(dtype: str | None, module_dtype: str | None) -> None:
    """Raises RecycleError for a dtype that is not a name in ``DTYPES``; None is allowed."""
    for name, value in (("dtype", dtype), ("module_dtype", module_dtype)):
        if value is not None:
            one_of(name, value, DTYPES)


def check_sizes(config: ModelConfig, file: str) -> None:
    """Raises RecycleError for sizes that the kernels do not support."""
    for name in ("hidden_size", "intermediate_size", "head_dim"):
        if (value := getattr(config, name)) % PANEL_ROWS:
            raise RecycleError(f"{file}: {name} is {value}; the kernels need a multiple of 16")


@dataclass(frozen=True)
class Description:
    """A plan and what its weights add up to."""

    entries: list[int]
    weights_bytes: int
    config: ModelConfig
    module_config: ModuleConfig | None
    layer_bytes: int
    head_bytes: int
    module_bytes: int
    formats: str

    def packed_model(self, weights: Tensor) -> PackedModel:
        """The model whose weights, uint8 [weights_bytes], these are."""
        return PackedModel(
            weights=weights,
            plan=torch.tensor(self.entries, dtype=torch.int64, device="cpu"),
            config=self.config,
            module_config=self.module_config,
            layer_bytes=self.layer_bytes,
            head_bytes=self.head_bytes,
            module_bytes=self.module_bytes,
            formats=self.formats,
        )


def describe(
    base: Checkpoint,
    module: ModuleCheckpoint | None,
    dtype: str | None,
    module_dtype: str | None = None,
    weights: Tensor | None = None,
    loader: Loader | None = None,
) -> Description:
    """The plan of a model in these dtypes, in the order of csrc/include/recycle/model.h.

    weights: uint8 of ``weights_bytes``, to be filled; None: the tensors are not read. loader: how they are read.
    """
    writer = PlanWriter(weights, loader)
    config, tensors = base.config, base.tensors
    embedding = tensors["model.embed_tokens.weight"]
    head = tensors.get("lm_head.weight", embedding)
    head_format = _format(head, base, dtype, is_head=True)

    writer.header(module is not None)
    writer.stack(config)
    writer.numbers(config.vocab_size)
    embedding_entries = writer.matrix(embedding, _format(embedding, base, dtype, is_head=True))
    writer.source_vector(tensors, "model.norm.weight", config.hidden_size)
    if head is embedding:
        head_entries = embedding_entries
        writer.numbers(*head_entries)
    else:
        head_entries = writer.matrix(head, head_format)
    head_bytes = _C.matrix_bytes(*head_entries[1:])
    layers_start = writer.bytes
    writer.layers(tensors, "model.layers.", config, lambda source: _format(source, base, dtype))
    layer_bytes = writer.bytes - layers_start
    module_bytes = 0
    if module is not None:
        name = _module_dtype(base, module.config, dtype, module_dtype)
        module_bytes = _describe_module(writer, module, head, head_entries, head_bytes, name)
    writer.finish()
    by_bytes = sorted(writer.format_bytes, key=writer.format_bytes.__getitem__, reverse=True)
    return Description(
        entries=writer.entries,
        weights_bytes=writer.bytes,
        config=config,
        module_config=None if module is None else module.config,
        layer_bytes=layer_bytes,
        head_bytes=head_bytes,
        module_bytes=module_bytes,
        formats=", ".join(by_bytes),
    )


def _format(source: TensorSource, base: Checkpoint, dtype: str | None, is_head: bool = False) -> str:
    """The format that one of the base's matrices is packed in; ``is_head``: the output head or the embedding."""
    if dtype is not None and is_head:
        return DTYPES[dtype][1]
    if dtype is not None:
        # A 4-bit matrix is not quantized again to another 4-bit format.
        return source.format if dtype == "q4" and source.format in _FOUR_BITS else DTYPES[dtype][0]
    if not base.is_gguf:
        return "bf16"
    return "f16" if source.ggml_type is not None else source.format


def _module_dtype(base: Checkpoint, module: ModuleConfig, dtype: str | None, module_dtype: str | None) -> str:
    """The module's dtype where ``module_dtype`` may leave it open.

    8 bits draft as well as 16. Fewer cost acceptance, unless the module was trained for them.
    """
    if module_dtype is not None:
        return module_dtype
    sample = base.tensors["model.layers.0.mlp.down_proj.weight"]
    return "f32" if _format(sample, base, dtype) == "f32" else module.module_dtype or "q8"


def _describe_module(
    writer: PlanWriter,
    module: ModuleCheckpoint,
    head: TensorSource,
    head_entries: tuple[int, int, int, int],
    head_bytes: int,
    module_dtype: str,
) -> int:
    """Writes the module's part of the plan; returns the bytes that one pass of the module reads."""
    tensors, config = module.tensors, module.config
    format, head_format = MODULE_DTYPES[module_dtype]
    start = writer.bytes
    writer.stack(config)
    writer.matrix(tensors["input_proj.weight"], format)
    writer.module_vectors(tensors, config.hidden_size)
    if config.draft_vocab_size:
        ids = tensors["draft_vocab"].raw_rows(0, config.draft_vocab_size)
        writer.numbers(len(ids))
        writer.matrix(head, head_format, ids)
        writer.vector(ids)
        shared_head_bytes = 0
    else:
        writer.numbers(config.vocab_size)
        writer.numbers(*head_entries)
        writer.absent()
        shared_head_bytes = head_bytes
    writer.numbers(int(config.zero_first_embedding))
    writer.layers(tensors, "layers.", config, lambda source: format)
    return writer.bytes - start + shared_head_bytes
