"""Files and directories that are taken for a model: each named for what it is, with the remedy."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

from recycle_ext.errors import RecycleError

ADAPTER = (
    "an adapter (LoRA or the like), not a model; merge it into {base} (peft: merge_and_unload, then save_pretrained) "
    "and give the merged model"
)
_OLD_GGML = "a model of llama.cpp's format before GGUF; convert the original model again with a newer llama.cpp"
_PYTORCH = (
    "weights of PyTorch, which can run code when they are opened and are not read; convert them to model.safetensors"
)
_ARCHIVE = "an archive; unpack it first"
# What a file is by its first bytes. llama.cpp's old formats spell their names backwards.
_STARTS = (
    (b"lmgg", _OLD_GGML),
    (b"fmgg", _OLD_GGML),
    (b"tjgg", _OLD_GGML),
    (b"algg", "a LoRA adapter of llama.cpp's format before GGUF; a model is needed"),
    (b"FUGG", "a GGUF file with its bytes swapped; convert the model again"),
    (b"version https://git-lfs", 'a pointer in place of the file, which "git lfs pull" fetches'),
    (b"PK\x03\x04", f"a zip archive, as {_PYTORCH}"),
    (b"\x80\x02", f"a pickle, as {_PYTORCH}"),
    (b"\x1f\x8b", _ARCHIVE),
    (b"7z\xbc\xaf", _ARCHIVE),
    (b"(\xb5/\xfd", _ARCHIVE),
    (b"<", "a page of HTML or XML; the download has failed"),
    (b"{", "a JSON file; give the directory of a Hugging Face model, not one of its files"),
)
_PART = re.compile(r"part[-_]?\d+|split[-_]?[a-z]+$|\.\d{3}$", re.IGNORECASE)


def kind_of_file(file: Path, start: bytes) -> str:
    """What a file that is no GGUF file is, and what to do. start: at least the first 16 bytes, or the whole file."""
    for magic, kind in _STARTS:
        if start.startswith(magic):
            return f"it is {kind}"
    if not start:
        return "it is empty; the download has failed"
    # safetensors: the length of a JSON object, 8 bytes little-endian, and the object.
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 2**32:
        return "it is a safetensors file; give the directory of a Hugging Face model, not one of its files"
    if _PART.search(file.name):
        return "it seems to be one part of a file that was cut; join the parts (cat PART1 PART2 ... > FILE)"
    return "it does not start with GGUF"


def check_directory(path: Path) -> None:
    """Raises RecycleError, which says what is there instead, for a directory that is no Hugging Face model."""
    if (adapter := path / "adapter_config.json").is_file() and not any(path.glob("model*.safetensors")):
        raise RecycleError(f"{path}: {ADAPTER.format(base=_base_of(adapter))}")
    if not (path / "config.json").is_file() or not any([*path.glob("*.safetensors"), *path.glob("*.bin")]):
        if files := gguf_files(file.name for file in path.iterdir()):
            raise RecycleError(f"{path}: a directory of GGUF files; give the one to run, such as {path / files[0]}")
    if not (path / "config.json").is_file() and (path / "params.json").is_file():
        raise RecycleError(
            f"{path}: a model in its maker's own format (params.json); give its Hugging Face version or a GGUF file"
        )


def gguf_files(names: Iterable[str]) -> list[str]:
    """Those of the names that are GGUF files of language models, in alphabetical order."""
    found = sorted(name for name in names if name.lower().endswith(".gguf"))
    return [name for name in found if not re.search("mmproj|imatrix", name, re.IGNORECASE)] or found


def _base_of(adapter: Path) -> str:
    try:
        return json.loads(adapter.read_text("utf-8"))["base_model_name_or_path"] or "its base"
    except (OSError, ValueError, KeyError, TypeError):
        return "its base"
