"""Options of the command lines that load a model."""

from __future__ import annotations

import argparse

from recycle_ext.checkpoint.config import DTYPES
from recycle_ext.decoding.decoder import AUTO
from recycle_ext.decoding.kv_cache import CACHE_DTYPES
from recycle_ext.generate.model import Model, load


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that ``load`` takes, and --cache-dtype."""
    add = parser.add_argument
    add("--model", help=".gguf file, Hugging Face directory or hub id (default: SmolLM2-135M-Instruct)")
    add("--module", help="directory of a module, or none (default: the one shipped for the model)")
    add("--dtype", choices=DTYPES, help="weights in memory (default: a GGUF's own, else bf16)")
    add(
        "--module-dtype",
        choices=DTYPES,
        help="the module's weights (default: f32 for a float32 model, else as it was trained, else q8)",
    )
    add("--cache-dtype", choices=CACHE_DTYPES, help="keys and values (default: f32 for a float32 model, else bf16)")
    add(
        "--threads", type=int, help="at most the CPUs of this process (default: its physical cores, within a CPU quota)"
    )
    add("--device", default="cpu", help="cpu (default), or an NVIDIA GPU: cuda, cuda:1, ...")


def model_of(options: argparse.Namespace) -> Model:
    """The model that the options of ``add_model_options`` name."""
    given = (options.model, options.module, options.dtype, options.threads, options.device, options.module_dtype)
    return load(*given, progress=True)


def number_of_drafts(text: str) -> int | str:
    """The value of --drafts, for argparse: a number or "auto"; Decoder checks the range."""
    try:
        return AUTO if text == AUTO else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor {AUTO}") from None
