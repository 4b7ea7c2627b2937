"""Models from the Hugging Face hub, through huggingface_hub."""

from __future__ import annotations

from pathlib import Path

from recycle_ext.checkpoint.not_a_model import ADAPTER, gguf_files
from recycle_ext.errors import RecycleError, first_line

# The files that open_checkpoint reads; a repository may hold much more.
_FILES = [
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
]


def download(model_id: str, into: Path | None = None) -> Path:
    """Downloads the model ``model_id`` ("org/name") and returns its directory.

    Files in the cache are not downloaded again; without a network, a model in the cache still opens. into: a
    directory in place of the hub's cache. Raises RecycleError for an unknown, gated or unreachable model, and for a
    repository that has no Hugging Face model.
    """
    # Imported here: the import is slow, and only hub ids need it.
    from huggingface_hub import constants, errors, snapshot_download

    try:
        path = Path(snapshot_download(model_id, allow_patterns=_FILES, local_dir=into))
    except errors.GatedRepoError:
        reason = "its owner asks for an account; accept the terms on its page, then `hf auth login`"
    except errors.RepositoryNotFoundError:
        reason = "there is no such file or directory here and no such public model on the hub"
    except errors.LocalEntryNotFoundError as error:
        reason = f"it is not in the hub's cache and the hub cannot be reached ({first_line(error)})"
    except Exception as error:  # of a proxy or an answer that is not the hub's, the libraries raise dozens of types
        reason = f"it cannot be fetched from {constants.ENDPOINT}: {type(error).__name__}: {first_line(error)}"
    else:
        if not (path / "config.json").is_file() or not any(path.glob("*.safetensors")):
            _check_repository(model_id)
        return path
    raise RecycleError(f"model {model_id}: {reason}")


def _check_repository(model_id: str) -> None:
    """Raises RecycleError for a repository of GGUF files or with an adapter: the files of neither are fetched."""
    from huggingface_hub import list_repo_files

    try:
        names = list_repo_files(model_id)
    except Exception:  # without a network, what is missing in the cache is named later
        return
    if "adapter_config.json" in names and "config.json" not in names:
        raise RecycleError(f"model {model_id}: {ADAPTER.format(base='its base')}")
    if files := gguf_files(names):
        raise RecycleError(
            f"model {model_id}: a repository of GGUF files; fetch the one to run and give its path "
            f"(hf download {model_id} {files[0]} --local-dir .)"
        )
