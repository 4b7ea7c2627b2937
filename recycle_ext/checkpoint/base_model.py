"""A base model on disk: sizes, tensors, tokenizer, whichever kind of file it comes from."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from recycle_ext.checkpoint import gguf as gguf_file
from recycle_ext.checkpoint import hub
from recycle_ext.checkpoint import huggingface as hf_directory
from recycle_ext.checkpoint.config import ModelConfig
from recycle_ext.checkpoint.default_model import default_model_path
from recycle_ext.checkpoint.shapes import base_shapes, check_layers, check_tensors
from recycle_ext.checkpoint.tensor_source import TensorSource
from recycle_ext.errors import RecycleError

if TYPE_CHECKING:
    from recycle_ext.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Checkpoint:
    """A base model. Its weights stay on disk until they are asked for, tensor by tensor."""

    config: ModelConfig
    path: str
    tensors: dict[str, TensorSource]

    @functools.cached_property
    def fingerprint(self) -> str:
        """Tells models apart, whatever format and precision their matrices have: sha256 (hex) over
        the sizes and over the float32 bytes of every RMSNorm weight, which quantising leaves alone.
        """
        config = self.config
        # What a GGUF file cannot tell (Mistral from Llama) or what does not change the model (how
        # far it may be run) is left out; GGUF keeps eps and theta as float32.
        sizes = {
            "architecture": "llama" if config.architecture == "mistral" else config.architecture,
            "rms_norm_eps": float(np.float32(config.rms_norm_eps)),
            "rope_theta": float(np.float32(config.rope_theta)),
        }
        for name in [
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "n_layers",
            "n_heads",
            "n_kv_heads",
            "head_dim",
        ]:
            sizes[name] = getattr(config, name)
        digest = hashlib.sha256(json.dumps(sizes, sort_keys=True).encode())
        for name in base_shapes(config):
            if name.endswith("norm.weight"):
                digest.update(self.tensors[name].to(torch.float32).numpy().tobytes())
        return digest.hexdigest()

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, built when first asked for."""
        from recycle_ext.text import tokenizer

        path = Path(self.path)
        if path.is_dir():
            return tokenizer.from_directory(path, self.config)
        # Read again, so that the vocabulary takes memory only where it is needed.
        return tokenizer.from_gguf(gguf_file.GgufHeader(path), self.config)

    def state_dict(self, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        """Every tensor in memory, for ``reference.BaseModel.load_state_dict``."""
        return {name: source.to(dtype) for name, source in self.tensors.items()}


def open_checkpoint(model: str | Path | None = None) -> Checkpoint:
    """Opens a base model and checks the names and shapes of its tensors; no weight is read yet.

    model: a .gguf file, a Hugging Face directory, a hub id ("org/name"), or None for the default
    model, which is fetched once. Raises RecycleError for whatever cannot be opened or is not
    supported.
    """
    if model is None:
        path, name = default_model_path(), None
    else:
        path, name = local_path(str(model))
    if path.is_dir():
        config = hf_directory.read_config(path / "config.json", name or path.resolve().name)
        tensors = hf_directory.read_tensors(path, config)
    else:
        header = gguf_file.GgufHeader(path)
        config = gguf_file.read_config(header)
        tensors = gguf_file.read_tensors(header, config)
    _check_sizes(config, path)
    check_layers(config.n_layers, tensors, str(path))
    check_tensors(tensors, base_shapes(config), str(path))
    for name, source in tensors.items():
        if source.format == "i64":
            raise RecycleError(
                f"{source.file}: tensor {name} is stored as I64; F32, F16 and BF16 are supported"
            )
    return Checkpoint(config=config, path=str(path), tensors=tensors)


def local_path(model: str) -> tuple[Path, str | None]:
    """Where the model is on this machine, and its name if that says more than the path."""
    path = Path(model)
    if path.exists():
        return path, None
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", model) and path.suffix not in (".gguf", ".safetensors"):
        return hub.download(model), model
    raise RecycleError(
        f"{model}: no such file or directory; a model is a .gguf file, a Hugging Face directory or "
        'a hub id such as "HuggingFaceTB/SmolLM2-360M"'
    )


def _check_sizes(config: ModelConfig, path: Path) -> None:
    """Sizes that no checkpoint has and that nothing further on is made for."""
    for name, value in dataclasses.asdict(config).items():
        if isinstance(value, int) and not isinstance(value, bool) and "token_id" not in name:
            if value < 1:
                raise RecycleError(f"{path}: {name} is {value}; it must be at least 1")
    if config.n_heads % config.n_kv_heads:
        raise RecycleError(
            f"{path}: {config.n_heads} heads cannot share {config.n_kv_heads} key and value heads"
        )
    if config.head_dim % 2:
        raise RecycleError(f"{path}: head_dim is {config.head_dim}; RoPE needs it to be even")
    if not 0 < config.rope_theta < math.inf:
        raise RecycleError(f"{path}: rope_theta is {config.rope_theta}; it must be positive")
