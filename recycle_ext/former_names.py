"""Import paths of earlier versions: importing one warns, and gives the contents of the new modules."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_NOW = {
    "bandwidth": "measuring.bandwidth",
    "config": "checkpoint.config",
    "decoder": "decoding.decoder",
    "draft_policy": "decoding.draft_policy",
    "fetch": "checkpoint.default_model",
    "generation": "generate.generation generate.model generate",
    "gguf_file": "checkpoint.gguf",
    "gpu_prefill": "ops.cuda_prefill weights.plan weights.layout",
    "graphed_step": "decoding.cuda_graph",
    "hf_directory": "checkpoint.huggingface",
    "hub": "checkpoint.hub",
    "json_file": "checkpoint.json_file",
    "kv_cache": "decoding.kv_cache reference.ops",
    "module_checkpoint": "checkpoint.module",
    "packing": "weights.pack weights.layout",
    "reference_ops": "reference.ops ops.functional",
    "safetensors_file": "checkpoint.safetensors",
    "shapes": "checkpoint.shapes",
    "tensor_source": "checkpoint.tensor_source",
    "tokenizer": "text.tokenizer",
}


class _FormerNames(MetaPathFinder, Loader):
    """Comes last on ``sys.meta_path``: asked only for modules that are nowhere else."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        if package != __package__ or name not in _NOW:
            return None
        return ModuleSpec(fullname, self)

    def exec_module(self, module: ModuleType) -> None:
        names = [f"{__package__}.{name}" for name in _NOW[module.__name__.partition(".")[2]].split()]
        message = f"{module.__name__} is now {' and '.join(names)}; the old name will go (CHANGELOG.md)"
        warnings.warn(message, DeprecationWarning, stacklevel=2)

        def find(attribute: str) -> Any:
            for name in names:
                if hasattr(found := importlib.import_module(name), attribute):
                    return getattr(found, attribute)
            raise AttributeError(f"module {module.__name__!r} has no attribute {attribute!r}")

        module.__getattr__ = find


def install() -> None:
    """Makes the former names importable."""
    sys.meta_path.append(_FormerNames())
