"""python -m recycle_ext.convert: converts a head of another project to a module, and a module to an EAGLE-1 head."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from recycle_ext.checkpoint.base_model import Checkpoint, local_path, open_checkpoint
from recycle_ext.checkpoint.module import open_module, save_module, write_directory
from recycle_ext.command_line import exit_status
from recycle_ext.convert import eagle, to_module
from recycle_ext.convert.source import Source
from recycle_ext.errors import RecycleError

_DESCRIPTION = """\
Converts a head that drafts for a Llama-family base, where the mathematics is the same.

from SOURCE to a module:
  EAGLE-1     heads for Llama, Vicuna and Qwen2 (their pytorch_model.bin made safetensors first)
  MiMo        the prediction layer of MiMo-7B; SOURCE and BASE may be the one directory
  DeepSeek    the layout model.layers.N.eh_proj around a dense layer with grouped-query attention
  Qwen        the layout mtp.fc around a Qwen2 or Qwen3 layer
from a module to an EAGLE-1 head that vLLM and SGLang read: --to eagle

Refused, with the reason: EAGLE-3, DeepSeek-V3 and R1 (latent attention, experts), GLM-4.5 (experts),
Qwen3-Next and Qwen3.5 (gated attention), MiMo-V2, heads with an embedding or output matrix of their own.
"""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, described by --help."""
    parser = argparse.ArgumentParser(
        prog="python -m recycle_ext.convert",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", help="directory or hub id with the head; for --to eagle a module")
    add("--base", required=True, help=".gguf file, Hugging Face directory or hub id of its base")
    add("--output", required=True, metavar="DIR", help="a new directory, or an empty one")
    add("--to", choices=["module", "eagle"], default="module", help="what to write (default: module)")
    add(
        "--hidden-state",
        choices=["after-norm", "before-norm"],
        default="after-norm",
        help="whether the head was trained on the base's last state after its final norm, as all of these "
        "are run by vLLM and SGLang (default), or before it",
    )
    return parser.parse_args(arguments)


def convert(options: argparse.Namespace) -> list[str]:
    """Writes the module or the EAGLE-1 head; returns the lines to print. Raises RecycleError."""
    output = Path(options.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RecycleError(f"--output {output} exists and is not empty: give a new directory")
    path = local_path(options.source)[0]
    source = Source(path)
    is_module = source.fields.values.get("model_type") == "recycle_module"
    if is_module != (options.to == "eagle"):
        raise RecycleError(
            f"{path}: is a module already; --to eagle converts it to an EAGLE-1 head"
            if is_module
            else f"{path}: --to eagle starts from a module, and this is not one"
        )
    base = open_checkpoint(options.base)
    if is_module:
        return _write_eagle(path, base, output)
    head = to_module(source, base, options.hidden_state == "before-norm")
    notes = list(head.notes)
    if any(not torch.equal(t, t.to(torch.bfloat16).to(t.dtype)) for t in head.tensors.values()):
        notes.append("the weights are rounded to bfloat16, as modules are kept")
    save_module(output, head.config, head.tensors)
    first = f"{output}: a module of {head.config.n_layers} layer(s) for {base.config.name}, of {head.format}"
    return [first, *(f"note: {note}" for note in notes)]


def _write_eagle(path: Path, base: Checkpoint, output: Path) -> list[str]:
    config, tensors, notes = eagle.from_module(open_module(path, base), base)
    write_directory(output, config, "model.safetensors", tensors)
    first = f"{output}: an EAGLE-1 head for {base.config.name}"
    return [first, *(f"note: {note}" for note in notes)]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""

    def run() -> int:
        print("\n".join(convert(parse_arguments(arguments))))
        return 0

    return exit_status(run)


if __name__ == "__main__":
    sys.exit(main())
