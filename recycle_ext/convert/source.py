"""A head of another project on disk: config.json and safetensors files, of which only the head's tensors are read."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from recycle_ext.checkpoint import safetensors as safetensors_file
from recycle_ext.checkpoint.base_model import Checkpoint
from recycle_ext.checkpoint.huggingface import check_activation, read_rope, weight_files
from recycle_ext.checkpoint.json_file import Fields
from recycle_ext.checkpoint.tensor_source import BLOCKS, TensorSource
from recycle_ext.errors import RecycleError

# A head's copy of the base's embedding may have been rounded to float16 and bfloat16, which have these spacings.
_RELATIVE, _ABSOLUTE = 2.0**-8, 2.0**-23
_ROWS = 4096  # of a vocabulary, compared at once


class Source:
    """A directory with a head, alone or beside its base model. Raises RecycleError where it has no config.json."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir():
            raise RecycleError(f"{path}: no such directory; a head has config.json and model.safetensors")
        self.fields = Fields(path / "config.json")

    @functools.cached_property
    def _files(self) -> dict[str, Path]:
        """File of each tensor."""
        names = ("model.safetensors", "model.safetensors.index.json")
        if not any((self.path / name).is_file() for name in names):
            raise RecycleError(
                f"{self.path}: there is no model.safetensors. EAGLE's own heads are pytorch_model.bin, "
                "which can run code when it is opened and is not read; convert it: import torch, "
                "safetensors.torch as st; st.save_file(torch.load('pytorch_model.bin', "
                "weights_only=True), 'model.safetensors')"
            )
        files = weight_files(self.path)
        return {name: file for file in files for name in safetensors_file.read_names(file)}

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return sorted(self._files)

    def open(self, names: list[str]) -> dict[str, TensorSource]:
        """The named tensors that exist. Raises RecycleError for a tensor of a dtype that is not supported."""
        wanted = {name: self._files[name] for name in names if name in self._files}
        tensors = {}
        for file in set(wanted.values()):
            tensors |= safetensors_file.read_tensors(file, wanted.keys())
        return tensors

    def read(self, names: dict[str, str], shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
        """The module's tensors as float32.

        names: name in this directory by the module's name. shapes: the module's, by its names. Raises RecycleError for
        a missing tensor, a tensor without a place in the module and a wrong shape.
        """
        tensors = self.open(list(names.values()))
        for name, shape in shapes.items():
            if name not in names or names[name] not in tensors:
                theirs = names.get(name, "")
                raise RecycleError(f"{self.path}: tensor {theirs or name} is missing; its shape would be {list(shape)}")
            source = tensors[names[name]]
            if source.shape != shape:
                raise RecycleError(
                    f"{source.file}: tensor {source.name} has shape {list(source.shape)}; "
                    f"the sizes in config.json ask for {list(shape)}"
                )
        if unknown := sorted(names.keys() - shapes.keys()):
            raise RecycleError(f"{self.path}: tensor {names[unknown[0]]} has no place in a module")
        return {ours: tensors[theirs].to() for ours, theirs in names.items()}

    def sizes(self, base: Checkpoint) -> dict[str, Any]:
        """The fields of ModuleConfig that config.json and ``base`` determine.

        Raises RecycleError for a head of another base's sizes, and for what a module cannot compute.
        """
        get = self.fields.get
        check_activation(self.fields)
        for key in ("hidden_size", "vocab_size"):
            if (given := get(key, int)) != (needed := getattr(base.config, key)):
                raise RecycleError(f"{self.fields.file}: {key} is {given}; {base.config.name} has {needed}")
        d, n_heads = base.config.hidden_size, get("num_attention_heads", int)
        n_kv_heads = get("num_key_value_heads", int, n_heads)
        if min(n_heads, n_kv_heads) < 1 or n_heads % n_kv_heads:
            raise RecycleError(f"{self.fields.file}: {n_heads} heads cannot share {n_kv_heads} key and value heads")
        theta, scaling = read_rope(self.fields)
        return {
            "vocab_size": base.config.vocab_size,
            "hidden_size": d,
            "intermediate_size": get("intermediate_size", int),
            "n_heads": n_heads,
            "n_kv_heads": n_kv_heads,
            "head_dim": get("head_dim", int, d // n_heads),
            "rms_norm_eps": get("rms_norm_eps", float),
            "rope_theta": theta,
            "rope_scaling": scaling,
            "draft_vocab_size": 0,
            "base_name": base.config.name,
            "base_fingerprint": base.fingerprint,
        }

    def require_same(self, name: str, base: Checkpoint, base_name: str) -> None:
        """Raises RecycleError for a tensor ``name`` that exists and is not a (rounded) copy of the base's ``base_name``.

        A module has no embedding and no output matrix: it uses the base's.
        """
        if name not in self._files:
            return
        if base_name == "lm_head.weight" and base.config.tie_word_embeddings:
            base_name = "model.embed_tokens.weight"
        copy, original = self.open([name])[name], base.tensors[base_name]
        if copy.shape != original.shape:
            raise RecycleError(
                f"{copy.file}: tensor {name} has shape {list(copy.shape)}; a module uses the base's "
                f"{base_name}, {list(original.shape)}"
            )
        if original.format in BLOCKS:
            raise RecycleError(
                f"{copy.file}: tensor {name} cannot be compared with {base_name} of {base.path}, which "
                "is quantized; give --base in 16 bits, and use the module with either"
            )
        max_difference, differs = 0.0, False
        for start in range(0, copy.shape[0], _ROWS):
            stop = min(start + _ROWS, copy.shape[0])
            a, b = copy.float_rows(start, stop), original.float_rows(start, stop)
            difference = (a - b).abs()
            max_difference = max(max_difference, difference.max().item())
            differs |= bool((difference > _ABSOLUTE + _RELATIVE * b.abs()).any())
        if differs:
            raise RecycleError(
                f"{copy.file}: tensor {name} is the head's own: it differs from the base's {base_name} by "
                f"up to {max_difference:.3g}, and a module uses the base's"
            )
