"""Somebody's head on disk: config.json and safetensors, of which only the head's tensors are read."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from recycle_ext.checkpoint import safetensors as safetensors_file
from recycle_ext.checkpoint.base_model import Checkpoint
from recycle_ext.checkpoint.huggingface import Fields, read_rope, weight_files
from recycle_ext.checkpoint.tensor_source import BLOCKS, TensorSource
from recycle_ext.errors import RecycleError

# A head's copy of the base's embedding may have been through float16 and bfloat16, whose spacings these are.
_RELATIVE, _ABSOLUTE = 2.0**-8, 2.0**-23
_ROWS = 4096  # of a vocabulary compared at a time


class Source:
    """A directory with a head, alone or beside the model it came with."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir():
            raise RecycleError(
                f"{path}: no such directory; a head has config.json and model.safetensors"
            )
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
        """Those of the named tensors that are there; of a kind that cannot be read, a RecycleError."""
        wanted = {name: self._files[name] for name in names if name in self._files}
        tensors = {}
        for file in set(wanted.values()):
            tensors |= safetensors_file.read_tensors(file, wanted.keys())
        return tensors

    def read(
        self, names: dict[str, str], shapes: dict[str, tuple[int, ...]]
    ) -> dict[str, torch.Tensor]:
        """The module's tensors as float32, from the tensors here.

        names: name here of each of the module's; shapes: what they must be, by the module's name.
        """
        tensors = self.open(list(names.values()))
        for name, shape in shapes.items():
            if name not in names or names[name] not in tensors:
                theirs = names.get(name, "")
                raise RecycleError(
                    f"{self.path}: tensor {theirs or name} is missing; "
                    f"its shape would be {list(shape)}"
                )
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
        """What config.json says of a module's layers, and what ties the module to ``base``."""
        get = self.fields.get
        if (activation := get("hidden_act", str, "silu")) != "silu":
            self.fields.refuse("hidden_act", activation, '"silu"')
        for key in ("hidden_size", "vocab_size"):
            if (given := get(key, int)) != (needed := getattr(base.config, key)):
                raise RecycleError(
                    f"{self.fields.file}: {key} is {given}; {base.config.name} has {needed}"
                )
        d, n_heads = base.config.hidden_size, get("num_attention_heads", int)
        n_kv_heads = get("num_key_value_heads", int, n_heads)
        if min(n_heads, n_kv_heads) < 1 or n_heads % n_kv_heads:
            raise RecycleError(
                f"{self.fields.file}: {n_heads} heads cannot share {n_kv_heads} key and value heads"
            )
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
        """Refuses a head with its own embedding or output matrix, where a module uses the base's.

        A copy of the base's, rounded or not, is fine, and so is none.
        """
        if name not in self._files:
            return
        if base_name == "lm_head.weight" and base.config.tie_word_embeddings:
            base_name = "model.embed_tokens.weight"
        own, shared = self.open([name])[name], base.tensors[base_name]
        if own.shape != shared.shape:
            raise RecycleError(
                f"{own.file}: tensor {name} has shape {list(own.shape)}; a module uses the base's "
                f"{base_name}, {list(shared.shape)}"
            )
        if shared.format in BLOCKS:
            raise RecycleError(
                f"{own.file}: tensor {name} cannot be compared with {base_name} of {base.path}, which "
                "is quantised; give --base in 16 bits, and use the module with either"
            )
        largest, differs = 0.0, False
        for start in range(0, own.shape[0], _ROWS):
            stop = min(start + _ROWS, own.shape[0])
            a, b = own.float_rows(start, stop), shared.float_rows(start, stop)
            difference = (a - b).abs()
            largest = max(largest, difference.max().item())
            differs |= bool((difference > _ABSOLUTE + _RELATIVE * b.abs()).any())
        if differs:
            raise RecycleError(
                f"{own.file}: tensor {name} is the head's own: it differs from the base's {base_name} by "
                f"up to {largest:.3g}, and a module uses the base's"
            )
