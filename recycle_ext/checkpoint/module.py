"""A recyclable module on disk: a directory with config.json and module.safetensors (docs/formats.md)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from recycle_ext import arguments
from recycle_ext.checkpoint import safetensors as safetensors_file
from recycle_ext.checkpoint.base_model import Checkpoint
from recycle_ext.checkpoint.config import ModuleConfig, check_numbers
from recycle_ext.checkpoint.json_file import read_json
from recycle_ext.checkpoint.shapes import check_layers, check_tensors, module_shapes
from recycle_ext.checkpoint.tensor_source import TensorSource
from recycle_ext.errors import RecycleError
from recycle_ext.files import make_directory, whole_file, write_whole

_WEIGHTS = "module.safetensors"
_SHIPPED = Path(__file__).parent.parent / "modules"


@dataclass(frozen=True)
class ModuleCheckpoint:
    """A module. Its weights stay on disk until a tensor is read."""

    config: ModuleConfig
    path: str
    tensors: dict[str, TensorSource]

    def state_dict(self, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        """The weights in memory, for ``reference.RecyclableModule.load_state_dict``."""
        return {name: source.to(dtype) for name, source in self.tensors.items() if name != "draft_vocab"}

    def draft_vocab(self) -> torch.Tensor | None:
        """Token ids that the module can draft, ascending, int64 [draft_vocab_size]; None: all."""
        source = self.tensors.get("draft_vocab")
        return None if source is None else source.to(torch.int64)


def open_module(path: str | Path, base: Checkpoint) -> ModuleCheckpoint:
    """Opens the module in directory ``path`` and checks the names and shapes of its tensors, and its draft vocabulary.

    Raises RecycleError for a module that cannot be opened or was trained for another base.
    """
    if not isinstance(base, Checkpoint):
        raise RecycleError(f"base is {arguments.shown(base)}; open_module needs what open_checkpoint returns")
    path = Path(arguments.path("module", path))
    try:
        found = path.is_dir()
    except OSError as error:
        raise RecycleError(f"module {arguments.shown(str(path))}: cannot be read: {error.strerror}") from None
    if not found:
        raise RecycleError(f"{path}: no such directory; a module has config.json and {_WEIGHTS}")
    config_file = path / "config.json"
    config = ModuleConfig.from_json(read_json(config_file), str(config_file))
    check_numbers(config, str(config_file))
    if config.base_fingerprint != base.fingerprint:
        raise RecycleError(
            f"{path}: this module was trained for {config.base_name} "
            f"(fingerprint {config.base_fingerprint[:12]}); "
            f"it cannot draft for {base.config.name} (fingerprint {base.fingerprint[:12]})"
        )
    for name in ("hidden_size", "vocab_size"):
        if (given := getattr(config, name)) != (needed := getattr(base.config, name)):
            raise RecycleError(f"{config_file}: {name} is {given}; the base model's is {needed}")
    tensors = safetensors_file.read_tensors(path / _WEIGHTS)
    check_layers(config.n_layers, tensors, str(config_file))
    check_tensors(tensors, module_shapes(config), str(path / _WEIGHTS))
    for name, source in tensors.items():
        if (source.format == "i64") != (name == "draft_vocab"):
            needed = "i64" if name == "draft_vocab" else "f32, f16 or bf16"
            raise RecycleError(f"{source.file}: tensor {name} is {source.format}; it must be {needed}")
    module = ModuleCheckpoint(config=config, path=str(path), tensors=tensors)
    if (ids := module.draft_vocab()) is not None:
        if ids[0] < 0 or ids[-1] >= config.vocab_size or not bool((ids.diff() > 0).all()):
            raise RecycleError(
                f"{path / _WEIGHTS}: draft_vocab must hold ascending token ids below {config.vocab_size}"
            )
    return module


def save_module(path: str | Path, config: ModuleConfig, state_dict: dict[str, torch.Tensor]) -> None:
    """Writes a module; its weights are rounded to bf16.

    state_dict: names and shapes of ``module_shapes(config)``; ``draft_vocab`` stays int64. Raises RecycleError for
    other names or shapes, and where the files cannot be written.
    """
    shapes = module_shapes(config)
    given = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    if wrong := sorted(set(given.items()) ^ set(shapes.items())):
        name = wrong[0][0]
        raise RecycleError(
            f"tensor {name} is {given.get(name, 'missing')}; "
            f"the module's config asks for {shapes.get(name, 'no such tensor')}"
        )
    tensors = {
        name: tensor.to(torch.int64 if name == "draft_vocab" else torch.bfloat16).contiguous()
        for name, tensor in state_dict.items()
    }
    write_directory(path, config.to_json(), _WEIGHTS, tensors)


def write_directory(
    path: str | Path, config: dict[str, Any], weights_name: str, tensors: dict[str, torch.Tensor]
) -> None:
    """Writes one safetensors file, then config.json; a reader sees each file whole, or not at all.

    Raises WriteError where the files cannot be written, and RecycleError where ``path`` has the config.json of a model
    of another type.
    """
    path = Path(path)
    kind = config.get("model_type")
    if (path / "config.json").exists() and (found := read_json(path / "config.json").get("model_type")) != kind:
        raise RecycleError(f"{path}: has the config.json of another model ({found}, not {kind}); give a new directory")
    make_directory(path)
    with whole_file(path / weights_name) as part:
        # transformers refuses files without this metadata.
        save_file(tensors, part, {"format": "pt"})
    write_whole(path / "config.json", json.dumps(config, indent=2) + "\n")


def default_module(base: Checkpoint) -> Path | None:
    """Directory of the shipped module that was trained for ``base``; None: there is none."""
    for config_file in sorted(_SHIPPED.glob("*/config.json")):
        if read_json(config_file).get("base_fingerprint") == base.fingerprint:
            return config_file.parent
    return None
