"""Loading a model: base, module and tokenizer, ready to generate."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from recycle_ext import _C, arguments
from recycle_ext.checkpoint.base_model import Checkpoint, open_checkpoint
from recycle_ext.checkpoint.module import default_module, open_module
from recycle_ext.errors import RecycleError, first_line, is_out_of_memory
from recycle_ext.ops.registration import check_device
from recycle_ext.text.tokenizer import Tokenizer
from recycle_ext.weights.pack import PackedModel, pack_model


@dataclass(frozen=True)
class Model:
    """A base model in memory, with its module if it has one."""

    packed: PackedModel
    tokenizer: Tokenizer
    cache_dtype: torch.dtype  # of keys and values: float32 for a float32 model, else bfloat16

    @property
    def default_mode(self) -> str:
        """verify where there is a module, else standard."""
        return "standard" if self.packed.module_config is None else "verify"


def load(
    model: str | Path | None = None,
    module: str | Path | None = None,
    dtype: str | None = None,
    threads: int | None = None,
    device: str | torch.device = "cpu",
    module_dtype: str | None = None,
    progress: bool = False,
) -> Model:
    """Loads a model into memory.

    model: a .gguf file, a Hugging Face directory or a hub id; None: SmolLM2-135M-Instruct, which is fetched
    (93 MB) the first time. module: the directory of a recyclable module; None: the one shipped for this
    model, if there is one; "none": no module. dtype: "f32", "bf16", "q8" or "q4"; None: a GGUF file's own
    formats, bf16 for a Hugging Face directory. threads: of this model's steps on the CPU, at most the CPUs of this
    process; None: one for each physical core, within a container's CPU quota and torch's number of threads. device: "cpu", or an NVIDIA GPU ("cuda" or "cuda:1"), to which the packed weights
    are copied. module_dtype: of the module's weights; None: f32 for a float32 model, else the dtype in the module's
    config, else q8. progress: whether a load of more than two seconds shows a bar on standard error, where that is a
    terminal.

    Raises RecycleError for files that are missing, damaged, foreign or do not fit together, and where memory is short.
    """
    if threads is not None:
        threads = min(arguments.integer("threads", threads, 1, 256), _C.available_cores())
    device = check_device(device)
    try:
        base = open_checkpoint(model)
        module = default_module(base) if module is None else arguments.path("module", module)
        opened = None if module is None or module == "none" else open_module(module, base)
        # Before the weights: building the tokenizer takes memory for a moment.
        tokenizer = base.tokenizer
        packed = pack_model(base, opened, dtype, module_dtype, threads, progress).to(device)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise RecycleError(f"no memory to load {model or 'the default model'}: {first_line(error)}") from None
    return Model(
        packed=dataclasses.replace(packed, threads=threads),
        tokenizer=tokenizer,
        cache_dtype=torch.float32 if _is_float32(base, dtype) else torch.bfloat16,
    )


def _is_float32(base: Checkpoint, dtype: str | None) -> bool:
    if dtype is not None:
        return dtype == "f32"
    source = base.tensors["model.layers.0.mlp.down_proj.weight"]
    return base.is_gguf and source.format == "f32" and source.ggml_type is None
