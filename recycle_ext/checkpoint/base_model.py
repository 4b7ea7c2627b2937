"""A base model on disk: config, tensors and tokenizer, from a GGUF file or a Hugging Face directory."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from recycle_ext import arguments
from recycle_ext.arguments import shown
from recycle_ext.checkpoint import gguf, hub, huggingface
from recycle_ext.checkpoint.architectures import BY_NAME
from recycle_ext.checkpoint.config import ModelConfig, check_numbers
from recycle_ext.checkpoint.default_model import default_model_path
from recycle_ext.checkpoint.gguf_header import GgufHeader
from recycle_ext.checkpoint.not_a_model import check_directory
from recycle_ext.checkpoint.shapes import base_shapes, check_layers, check_tensors
from recycle_ext.checkpoint.tensor_source import TensorSource
from recycle_ext.errors import RecycleError
from recycle_ext.text.gguf_vocabulary import from_gguf
from recycle_ext.text.tokenizer import Tokenizer

_SIZES = ["vocab_size", "hidden_size", "intermediate_size", "n_layers", "n_heads", "n_kv_heads", "head_dim"]


@dataclass(frozen=True)
class Checkpoint:
    """A base model. Its weights stay on disk until a tensor is read."""

    config: ModelConfig
    path: str
    tensors: dict[str, TensorSource]

    @property
    def is_gguf(self) -> bool:
        """Whether this is a GGUF file, whatever its name; else it is a Hugging Face directory."""
        return not Path(self.path).is_dir()

    @functools.cached_property
    def fingerprint(self) -> str:
        """Tells models apart in any format and precision of their matrices: sha256 (hex) over the sizes and the
        float32 bytes of every RMSNorm weight, which quantization does not change.
        """
        config = self.config
        # A GGUF file does not tell Mistral from Llama, and keeps eps and theta as float32. The context length is
        # left out: models that differ in nothing else compute the same.
        sizes = {
            "architecture": BY_NAME[config.architecture].gguf_name,
            "rms_norm_eps": float(np.float32(config.rms_norm_eps)),
            "rope_theta": float(np.float32(config.rope_theta)),
        }
        sizes |= {name: getattr(config, name) for name in _SIZES}
        digest = hashlib.sha256(json.dumps(sizes, sort_keys=True).encode())
        for name in base_shapes(config):
            if name.endswith("norm.weight"):
                digest.update(self.tensors[name].to(torch.float32).numpy().tobytes())
        return digest.hexdigest()

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, built on first use. Raises RecycleError where it is missing or not supported."""
        path, config = Path(self.path), self.config
        if not self.is_gguf:
            return huggingface.read_tokenizer(path, config)
        # The header is read again: keeping it would keep the vocabulary in memory for every checkpoint.
        return from_gguf(GgufHeader(path), config.vocab_size, config.eos_token_ids)

    def state_dict(self, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        """Every tensor in memory, for ``reference.BaseModel.load_state_dict``."""
        return {name: source.to(dtype) for name, source in self.tensors.items()}


def open_checkpoint(model: str | Path | None = None) -> Checkpoint:
    """Opens a base model and checks the names and shapes of its tensors; no weight is read yet.

    model: a GGUF file, a Hugging Face directory, a hub id ("org/name"), or None for the default model, which is
    fetched once. Raises RecycleError for a model that cannot be opened or is not supported.
    """
    if model is None:
        path, name = default_model_path(), None
    else:
        path, name = local_path(arguments.path("model", model))
    if path.is_dir():
        check_directory(path)
        config = huggingface.read_config(path / "config.json", name or path.resolve().name)
        config, tensors = huggingface.resolve_tied_head(config, huggingface.read_tensors(path, config))
    else:
        header = GgufHeader(path)
        config = gguf.read_config(header)
        tensors = gguf.read_tensors(header, config)
    _check_sizes(config, path)
    check_layers(config.n_layers, tensors, str(path))
    check_tensors(tensors, base_shapes(config), str(path))
    for name, source in tensors.items():
        if source.format == "i64":
            raise RecycleError(f"{source.file}: tensor {name} is stored as I64; F32, F16 and BF16 are supported")
    return Checkpoint(config=config, path=str(path), tensors=tensors)


def local_path(model: str) -> tuple[Path, str | None]:
    """The model's path on this machine, and its hub id if it came from the hub."""
    path = Path(model)
    try:
        if path.exists():
            return path, None
    except OSError as error:
        raise RecycleError(f"{shown(model)}: cannot be read: {error.strerror}") from None
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", model) and path.suffix.lower() not in (".gguf", ".safetensors"):
        return hub.download(model), model
    raise RecycleError(
        f"{model}: no such file or directory; a model is a .gguf file, a Hugging Face directory or "
        'a hub id such as "HuggingFaceTB/SmolLM2-360M"'
    )


def _check_sizes(config: ModelConfig, path: Path) -> None:
    """Raises RecycleError for sizes that the reference and the kernels cannot compute with."""
    for name, value in dataclasses.asdict(config).items():
        if isinstance(value, int) and not isinstance(value, bool) and "token_id" not in name:
            if value < 1:
                raise RecycleError(f"{path}: {name} is {value}; it must be at least 1")
    if config.n_heads % config.n_kv_heads:
        raise RecycleError(f"{path}: {config.n_heads} heads cannot share {config.n_kv_heads} key and value heads")
    if config.head_dim % 2:
        raise RecycleError(f"{path}: head_dim is {config.head_dim}; RoPE needs it to be even")
    check_numbers(config, str(path))
